"""Whole rollouts of Wan 1.3B at 480x832, window 21, random weights: every executor and order in one table.

On a CPU the same code runs the toy's sizes, as a rehearsal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hiar_model.planning.profiling import Profile, Setting, profile
from op_results import CUDA

CAPTURED = "graph" if CUDA else "recorded"
CASES: dict[str, dict[str, Any]] = {
    "block-first, eager": {"order": "block_first", "executor": "eager"},
    "block-first, graph": {"order": "block_first", "executor": CAPTURED},
    "HiAR stream, eager": {"order": "stream", "executor": "eager"},
    "HiAR stream, graph": {"order": "stream", "executor": CAPTURED},
    "HiAR stream, pairs, graph": {"order": "stream", "pairs": True, "executor": CAPTURED},
    "HiAR wavefront, graph": {"order": "wavefront", "executor": CAPTURED},
    "HiAR wavefront, pairs, graph": {"order": "wavefront", "pairs": True, "executor": CAPTURED},
}
SMALL = {"model": "toy", "window_frames": 6, "layers": 2, "device": "cpu", "dtype": "float32", "blocks": 1}


def row_of(name: str, found: Profile) -> dict[str, Any]:
    """A rollout's row: what its table shows and, under "parts", where the time went."""
    roofline = sum(part.limit for part in found.parts)
    return {
        "rollout": name,
        "visit_ms": 1e3 * found.seconds,
        "block_ms": 1e3 * found.seconds * found.visits / found.setting.blocks,
        "fps": found.frames_per_second,
        "of_roofline": roofline / found.seconds,
        "launches": found.launches,
        "syncs": found.syncs,
        "peak_gib": None if found.peak_bytes is None else found.peak_bytes / 2**30,
        "cold_s": found.start.build + found.start.warm_up,
        "parts": [dataclasses.asdict(part) for part in found.parts],
        "rehearsal": not CUDA,
    }


@pytest.mark.parametrize("name", CASES)
def test_rollout(benchmark: Any, record_property: Any, name: str) -> None:
    setting = Setting(**{**({} if CUDA else SMALL), **CASES[name]})
    found: list[Profile] = []
    benchmark.pedantic(lambda: found.append(profile(setting)), rounds=1)
    row = row_of(name, found[0])
    benchmark.extra_info.update(row)
    record_property("row", row)
    if CUDA:
        torch.cuda.empty_cache()
