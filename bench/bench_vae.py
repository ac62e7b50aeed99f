"""Wan 2.1's VAE, random weights: decoding a block of 3 latent frames of 480x832 in the middle of a video.

On a CPU the same code decodes a narrow VAE's small frames, as a rehearsal. Without diffusers nothing is measured, and
that is told.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from op_results import BENCH, CUDA

BLOCK = 3  # latent frames
CASES: dict[str, dict[str, Any]] = {
    "diffusers' modules": {"fused": False},
    "fused": {},
    "fused, its own stream": {"own_stream": True},
    "fused, channels last": {"channels_last": True},
    "fused, 3 frames at once": {"frames_at_once": 3},
    "fused, channels last, 3 frames at once": {"channels_last": True, "frames_at_once": 3},
}
SIZES, LATENT, DTYPE = ({}, (60, 104), torch.bfloat16) if CUDA else ({"base_dim": 8}, (2, 4), torch.float32)
TOLERANCE = 0.05 if CUDA else 1e-5  # mean |difference| of pixels in [-1, 1]; bfloat16 rounds all the way


@functools.lru_cache(maxsize=1)
def weights() -> dict[str, Tensor]:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(**SIZES).state_dict()


def decoder(fused: bool = True, channels_last: bool = False, **options: Any) -> Any:
    from diffusers import AutoencoderKLWan

    from hiar_model.models.vae import StreamingDecoder
    from hiar_model.models.vae_fused import fuse, to_channels_last

    with torch.device("meta"):
        vae = AutoencoderKLWan(**SIZES)
    vae.load_state_dict({k: v.to(BENCH.device, DTYPE) for k, v in weights().items()}, assign=True)
    vae = to_channels_last(vae) if channels_last else vae
    return StreamingDecoder(fuse(vae) if fused else vae, **options)


@functools.lru_cache(maxsize=1)
def baseline() -> Tensor:
    """Pixels of the first two blocks by diffusers' own modules."""
    own = decoder(fused=False)
    return torch.cat([own.decode_float(block).cpu() for block in blocks()], 1)


def blocks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, BLOCK, 16, *LATENT, generator=generator).to(BENCH.device) for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_vae(benchmark: Any, record_property: Callable[[str, object], None], name: str) -> None:
    row: dict[str, Any] = {"vae": name, "rehearsal": not CUDA}
    if importlib.util.find_spec("diffusers") is None:
        benchmark.pedantic(lambda: None, rounds=1)
        record_property("row", {**row, "absent": "needs diffusers, which is not installed"})
        return
    taken: list[list[float]] = []
    wanted = baseline()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    own, (first, second) = decoder(**CASES[name]), blocks()
    found = torch.cat([own.decode_float(block).cpu() for block in (first, second)], 1)
    off = (found - wanted).abs().mean().item()
    assert off <= TOLERANCE, f"{name}: pixels are off by {off:.3g} on average, allowed {TOLERANCE}"
    benchmark.pedantic(lambda: taken.append(BENCH.milliseconds(lambda: own.decode_float(second))), rounds=1)
    row["block_ms"] = [taken[0][round(p / 100 * (len(taken[0]) - 1))] for p in (20, 50, 80)]
    row["frames"] = 4 * BLOCK
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
    benchmark.extra_info.update(row)
    record_property("row", row)
