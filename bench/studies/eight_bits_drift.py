"""Do 8 bits drift more? Trained toys at 8 and 32 times their training length, beside bfloat16 on the same noise.

    python -m bench.studies.eight_bits_drift     # makes the runs that are missing, then prints the table
    python -m bench.studies.eight_bits_table     # prints the table of those that are there

A run is one model, order, variant and seed: 16 held-out prompts, 384 frames (32 times the 12 of the training clips;
its first 96 frames are the video of 8 times). Its readings go to MODEL-ORDER-VARIANT-seedN.json in
bench/results/eight-bits as soon as it is done, and a run whose file is there is not made again: stop and start it as
you like.

The plan (`PLAN`) begins with what tells most: `scenes`, whose videos drift, in `stream`, which has the video of
step_first and wavefront, and in `block_first`; then shared keys, and the model `toy`. On one core of a Xeon a run takes
45 s of CPU time in bfloat16 and 65 to 110 s with 8 bits, whose arithmetic is emulated: all of it about an hour and a
quarter.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.lib.script import script
from bench.studies.eight_bits import E4M3, latents
from bench.studies.eight_bits_table import RESULTS, table
from hiar_model import ExecutionConfig, HiARTransformer
from hiar_model.io.atomic import atomic_write
from hiar_model.models.quantized_linear import quantized
from hiar_model.models.registry import VideoModel, load_video_model
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import ToyPrompt, split_prompts
from hiar_model.toy.reading import Reading
from hiar_model.version import NOISE, versions

PROMPTS, FRAMES, SEEDS = 16, 384, (0, 1, 2)
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "bfloat16": ("bfloat16", {}),
    "float32": ("float32", {}),
    "keys": ("bfloat16", {"kv_dtype": E4M3}),
    "linear": ("bfloat16", {"linear_dtype": E4M3}),
    "linear_inner": ("bfloat16", {}),
    "int8": ("bfloat16", {"linear_dtype": "int8"}),
    "all_int8": ("bfloat16", {"kv_dtype": E4M3, "attention_dtype": E4M3, "linear_dtype": "int8"}),
    "attention": ("bfloat16", {"kv_dtype": E4M3, "attention_dtype": E4M3}),
    "keys_linear": ("bfloat16", {"kv_dtype": E4M3, "linear_dtype": E4M3}),
    "all": ("bfloat16", {"kv_dtype": E4M3, "attention_dtype": E4M3, "linear_dtype": E4M3}),
}
"""Name -> (dtype of the work, what the ExecutionConfig says). linear_inner: the linear layers of all blocks but the
first and the last are in 8 bits (:func:`inner_in_8_bits`)."""
ORDERS: dict[str, dict[str, str]] = {
    "stream": {"order": "stream"},
    "step_first": {"order": "step_first"},
    "wavefront": {"order": "wavefront"},
    "shared_kv": {"order": "stream", "kv_source": "next_step"},
    "block_first": {"order": "block_first"},
}


@dataclass(frozen=True, order=True)
class DriftRun:
    """One rollout of all prompts."""

    model: str
    order: str
    variant: str
    seed: int

    def path(self, folder: Path) -> Path:
        """Of its readings."""
        return folder / f"{self.model}-{self.order}-{self.variant}-seed{self.seed}.json"


EVERY = ("bfloat16", "all", "attention", "linear", "int8")
PLAN = (
    ("scenes", "stream", EVERY),
    ("scenes", "block_first", EVERY),
    ("toy", "stream", EVERY),
    ("scenes", "shared_kv", EVERY),
    ("toy", "block_first", EVERY),
    ("toy", "shared_kv", EVERY),
    ("scenes", "stream", ("all_int8", "keys_linear", "keys")),
)
"""(model, order, variants), the most telling first."""


def plan() -> list[DriftRun]:
    """All runs, in the order in which they are made."""
    return [DriftRun(*one, v, seed) for *one, variants in PLAN for seed in SEEDS for v in variants]


def make(run: DriftRun, model: VideoModel, prompts: Sequence[ToyPrompt], frames: int) -> dict[str, Any]:
    """Roll out and read all prompts.

    Returns:
        What was run, and of each video its prompt, "valid" (frames of each stretch of a training length), "overlap" and
        "background_change" (means over the stretch), "speed" (measured over prompted, of the whole video).
    """
    assert model.world is not None
    started = time.process_time()
    dtype, options = VARIANTS[run.variant]
    rollout = replace(model.rollout, **ORDERS[run.order])
    transformer = model.transformer.to(getattr(torch, dtype))
    if run.variant == "linear_inner":
        transformer = inner_in_8_bits(transformer)
    model = replace(model, transformer=transformer, rollout=rollout)
    oracle, decoder = ToyOracle(model.world), model.decoder()
    videos = latents(model, prompts, frames, run.seed, ExecutionConfig(**options))
    clips = (torch.from_numpy(decoder.decode(video[None])) for video in videos)
    readings = [oracle.evaluate(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
    stretches = frames // model.train_frames
    return {
        **about(run, model, len(prompts), frames),
        "rollout": rollout.to_dict(),
        "noise": NOISE,
        "device": str(model.device),
        "versions": versions("torch"),
        "cpu_seconds": round(time.process_time() - started, 1),
        "videos": [_plain(reading, stretches) for reading in readings],
    }


def inner_in_8_bits(model: HiARTransformer) -> HiARTransformer:
    """The model with the linear layers of its inner blocks in 8 bits."""
    twin = quantized(model)
    twin.blocks[0], twin.blocks[-1] = model.blocks[0], model.blocks[-1]
    return twin


def about(run: DriftRun, model: VideoModel, prompts: int, frames: int) -> dict[str, Any]:
    """What must be the same where a run is not made again."""
    dtype, options = VARIANTS[run.variant]
    return {
        "model": run.model, "weights_sha256": model.weights_sha256, "order": run.order, "variant": run.variant,
        "dtype": dtype, "execution": options, "seed": run.seed, "prompts": prompts, "num_frames": frames,
        "stretch_frames": model.train_frames,
    }  # fmt: skip


def _plain(reading: Reading, stretches: int) -> dict[str, Any]:
    parts = reading.parts(stretches)
    return {
        "prompt": reading.prompt.text(),
        "valid": [int(part.valid.sum()) for part in parts],
        "overlap": [_short(float(part.overlap.mean())) for part in parts],
        "background_change": [_short(float(part.background_change.mean())) for part in parts],
        "speed": _short(reading.speed_ratio),
    }


def _short(value: float) -> float | None:
    """What could not be measured is None."""
    return None if math.isnan(value) else round(value, 3)


def missing(folder: Path) -> Iterator[DriftRun]:
    """Runs of the plan without a file."""
    return (run for run in plan() if not run.path(folder).exists())


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    folder = parser.parse_args().results
    prompts = split_prompts()[1][:PROMPTS]
    for run in missing(folder):
        result = make(run, load_video_model(run.model), prompts, FRAMES)  # loaded anew: its weights are cast
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(run.path(folder), json.dumps(result) + "\n")
        print(f"{run.path(folder)}: {result['cpu_seconds']} s", file=sys.stderr, flush=True)
    print(table(folder))


if __name__ == "__main__":
    script(main)
