"""Distil a toy student: a teacher, its trajectories, then self-rollout distillation with a forward-KL term.

Three stages of the shipped recipes, cut down to minutes. The shipped weights know a black ground; these recipes are of
the world with coloured, textured grounds. You see losses fall; runs/distil/student/ then holds the loss plot, sheets of
samples and a model, and in student.mp4, a video by it, the ground is no longer black. Takes less than five minutes on
one CPU core (2 min 33 s of processor time, 2026-11-28, torch 2.13).
"""

import argparse
import sys

from hiar_model.cli import main as hiar

TEACHER, PAIRS, STUDENT = (f"runs/distil/{name}" for name in ("teacher", "pairs", "student"))


def main(
    teacher_updates: int = 100, trajectories: int = 32, student_updates: int = 16, batch: int = 8,
    sample_every: int = 8, num_frames: int = 48,
) -> int:  # fmt: skip
    stages = (
        ("toy/teacher", TEACHER, f"updates={teacher_updates}", f"batch_size={batch}", "sample_every=0"),
        (
            "toy/ode_pairs", PAIRS, f"teacher={TEACHER}/model/teacher.safetensors", f"count={trajectories}",
            f"shard_size={trajectories}", f"batch_size={batch}",
        ),
        (
            "toy/hiar", STUDENT, "init=toy", f"teacher={TEACHER}/model/teacher.safetensors",
            f"forward_kl.trajectories={PAIRS}", f"updates={student_updates}", f"batch_size={batch}",
            f"sample_every={sample_every}",
        ),
    )  # fmt: skip
    for recipe, folder, *settings in stages:
        print(f"hiar train {recipe} {' '.join(settings)} --out {folder}", flush=True)
        if status := hiar(["train", recipe, *settings, "--out", folder]):
            return status
    video = ["-o", "student.mp4", "--num-frames", str(num_frames), "--overwrite"]
    return hiar(["generate", "a red circle moving right", "--model", f"{STUDENT}/model", *video])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.exit(main())
