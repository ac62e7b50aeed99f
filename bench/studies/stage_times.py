"""Seconds of a denoise and of a cache task against the frames it sees, for the simulator (bench/studies/parallel.py).

python -m bench.studies.stage_times stage_times.json                             Wan 1.3B, 480x832
python -m bench.studies.stage_times stage_times.json --model toy --layers 2      a rehearsal on a CPU
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.lib.machine import CUDA, revision
from bench.lib.script import script
from hiar_model.benchmark.parts import now
from hiar_model.benchmark.setting import Setting, load
from hiar_model.io.atomic import atomic_write
from hiar_model.io.files import check_output
from hiar_model.rollout import Rollout


def stage_times(setting: Setting) -> dict[str, Any]:
    """JSON for :func:`hiar_model.schedule.costs.measured`; medians over the steps."""
    subject = load(setting)
    config = subject.rollout.with_options(order="step_first", fuse_cache_denoise=False, window_frames="model")
    frames = config.frames_per_block * (subject.blocks_before + 2)
    rollout = Rollout(
        subject.networks, subject.prompt_embeds, config, subject.execution, num_latent_frames=frames,
        latent_size=subject.latent_size,
    )  # fmt: skip
    rollout.warm_up()
    seconds: dict[str, dict[int, list[float]]] = {"denoise": {}, "cache": {}}
    for group in rollout.groups():
        task, start = group[0][0], now(subject.device)
        rollout.step()
        seen = rollout.plan.visible_frames(task.step, task.block)
        seconds[task.kind].setdefault(seen, []).append(now(subject.device) - start)
    medians = {kind: [[seen, median(times)] for seen, times in sorted(of.items())] for kind, of in seconds.items()}
    height, width = subject.latent_size
    return {
        "model": setting.model,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "revision": revision(),
        "height": height,
        "width": width,
        "frames_per_block": config.frames_per_block,
        "denoise_s": medians["denoise"],
        "cache_s": medians["cache"],
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="this JSON file")
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", help="a name of sizes; weights are random")
    parser.add_argument("--window-frames", type=int, default=21)
    parser.add_argument("--layers", type=int, help="default: all")
    a = parser.parse_args(words)
    check_output(a.out)
    device = torch.device("cuda" if CUDA else "cpu")
    setting = Setting(a.model, rollout={"window_frames": a.window_frames}, layers=a.layers, device=device)
    atomic_write(a.out, json.dumps(stage_times(setting), indent=1) + "\n")
    print(f"stage times: {a.out}")


if __name__ == "__main__":
    script(main)
