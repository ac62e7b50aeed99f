"""Recipes and files of the stages of distillation, for a network of one small layer: what their tests share."""

from __future__ import annotations

from pathlib import Path

import torch
import train_job  # noqa: F401 - makes the model "least" known
from safetensors.torch import save_file
from tiny_model import make_model

from hiar_model.config import WanConfig
from hiar_model.models.checkpoint import save_transformer
from hiar_model.train.config.reading import make_recipe
from hiar_model.train.stages.base import make_stage

SEED, FRAMES, LATENT = 5, 6, (2, 4, 4)
MASK = {"frames_per_block": 2, "window_frames": 4, "sink_frames": 1}
SCHEDULE = {"steps": [1000, 750, 250], "shift": 2.0}  # of the ODE below the states 0, 1, 3 and the last
ROLLOUT = {**MASK, **SCHEDULE, "order": "stream"}
STEPS = 3
ADAMW = {"kind": "adamw", "lr": 1e-3, "warmup": 0.0, "cooldown": 0.0}
SAMPLES = [0, 1, 2]
VARIANTS = {
    "matched": {},
    "clean": {"rollout": {"order": "block_first"}},
    "shared": {"rollout": {"kv_source": "next_step"}},
    "windows": {"rollout": {"window_frames": [3, 4, 6]}},
}


def write_files(folder: Path) -> Path:
    """Weights in which every number matters, encoded clips, and the teacher's trajectories."""
    for seed, name in enumerate(("teacher", "student", "critic")):
        save_transformer(make_model(seed, WanConfig.from_name("least")), folder / f"{name}.safetensors")
    (folder / "clips").mkdir()
    generator = torch.Generator().manual_seed(0)
    sizes = {"text": (5, 3, 32), "unconditional": (1, 3, 32), "latents": (5, FRAMES, *LATENT)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    save_file(tensors, folder / "clips" / "a.safetensors")
    ode = {"teacher": weights(folder, "teacher"), "teacher_model": "least", "steps": 4, "shift": SCHEDULE["shift"]}
    pairs = make(folder, "ode_pairs", **ode, count=4, shard_size=2, guidance=2.0, points=[0, 1, 3, -1])
    assert pairs.produce(folder / "pairs", 0, 1, lambda done, total: None) == f"trajectories: {folder / 'pairs'}"
    return folder


def weights(files: Path, name: str) -> str:
    return str(files / f"{name}.safetensors")


def values(files: Path, stage: str, **more) -> dict:
    """A recipe as a plain mapping; ``forward_kl`` and ``rollout`` are laid over defaults."""
    plain = {"stage": stage, "model": "least", "seed": SEED, "num_latent_frames": FRAMES, "precision": "float32"}
    plain["data"] = {"folder": str(files / "clips"), "latent_size": list(LATENT[1:])}
    if stage != "ode_pairs":
        plain |= {"updates": 4, "batch_size": len(SAMPLES), "log_every": 1, "optimizer": ADAMW}
        plain |= {"init": weights(files, "student"), "scale": {"threads": 1}}
    if stage == "ode_init":
        plain |= {"trajectories": str(files / "pairs")}
    if stage == "hiar":
        plain |= {"teacher": weights(files, "teacher"), "critic_init": weights(files, "critic")}
        plain |= {"teacher_model": "least", "critic_optimizer": ADAMW}
        more["forward_kl"] = {"trajectories": str(files / "pairs"), **more.get("forward_kl", {})}
    if stage in ("ode_init", "hiar"):
        more["rollout"] = {**ROLLOUT, **more.get("rollout", {})}
    return plain | more


def make(files: Path, stage: str, **more):
    """The stage of a recipe."""
    return make_stage(make_recipe(values(files, stage, **more)), torch.device("cpu"))
