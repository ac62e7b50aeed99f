"""Wan 2.1's VAE and the small one of taew2_1, random weights: decoding a block of 3 latent frames of 480x832 in the
middle of a video.

On a CPU the same code decodes a narrow VAE's small frames, as a rehearsal. Without diffusers only the small VAE is
measured, which the table says.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lib import report
from bench.lib.machine import CUDA
from bench.lib.measure import default_bench, percentiles

BENCH = default_bench()
BLOCK = 3  # latent frames
CASES: dict[str, dict[str, Any]] = {
    "diffusers' modules": {"fused": False},
    "fused": {},
    "fused, its own stream": {"own_stream": True},
    "fused, channels last": {"channels_last": True},
    "fused, 3 frames at once": {"frames_at_once": 3},
    "fused, channels last, 3 frames at once": {"channels_last": True, "frames_at_once": 3},
}
SMALL_CASES: dict[str, dict[str, Any]] = {
    "small, eager": {"cuda_graph": False},
    "small": {},
    "small, its own stream": {"own_stream": True},
    "small, channels last": {"channels_last": True},
    "small, 3 frames at once": {"frames_at_once": 3},
    "small, channels last, 3 frames at once": {"channels_last": True, "frames_at_once": 3},
}
GOAL_MS, SMALL_GOAL_MS = 150.0, 12.0  # a block of 480x832 on one H200
HEADINGS = ("VAE", "block ms p50 [p20, p80]", "frames per second of it alone", "peak GiB")
SIZES, LATENT, DTYPE = ({}, (60, 104), torch.bfloat16) if CUDA else ({"base_dim": 8}, (2, 4), torch.float32)
SMALL_DTYPE = torch.float16 if CUDA else torch.float32
TOLERANCE = 0.05 if CUDA else 1e-5  # mean |difference| of pixels in [-1, 1]; bfloat16 rounds all the way

Row = dict[str, Any]


def decoder(fused: bool = True, channels_last: bool = False, **options: Any) -> Any:
    """Of the same random weights every time."""
    from diffusers import AutoencoderKLWan

    from hiar_model.models.vae import StreamingDecoder
    from hiar_model.models.vae_fused import fuse, to_channels_last

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**SIZES).to(BENCH.device, DTYPE)
    vae = to_channels_last(vae) if channels_last else vae
    return StreamingDecoder(fuse(vae) if fused else vae, **options)


def small_decoder(dtype: torch.dtype = SMALL_DTYPE, channels_last: bool = False, **options: Any) -> Any:
    """Of the same random weights every time."""
    from hiar_model.models.small_stream import SmallDecoder
    from hiar_model.models.small_vae import SmallVAE

    torch.manual_seed(0)
    vae = SmallVAE().to(BENCH.device, dtype).eval().requires_grad_(False)
    return SmallDecoder(vae.to(memory_format=torch.channels_last) if channels_last else vae, **options)


def pixels_of(own: Any) -> Tensor:
    """Of the first two blocks."""
    return torch.cat([own.decode_float(block).cpu() for block in blocks()], 1)


@functools.cache
def baseline() -> Tensor:
    """Pixels by diffusers' own modules."""
    return pixels_of(decoder(fused=False))


@functools.cache
def small_baseline() -> Tensor:
    """Pixels by the small VAE in float32, not captured."""
    return pixels_of(small_decoder(torch.float32, cuda_graph=False))


def blocks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, BLOCK, 16, *LATENT, generator=generator).to(BENCH.device) for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_vae(benchmark: Any, record_property: Callable[[str, object], None], name: str) -> None:
    row: Row = {"vae": name, "rehearsal": not CUDA}
    if importlib.util.find_spec("diffusers") is None:
        benchmark.pedantic(lambda: None, rounds=1)
        record_property("row", {**row, "absent": "needs diffusers, which is not installed"})
        return
    measure(benchmark, record_property, row, lambda: decoder(**CASES[name]), baseline())


@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_vae(benchmark: Any, record_property: Callable[[str, object], None], name: str) -> None:
    row: Row = {"vae": name, "small": True, "rehearsal": not CUDA}
    measure(benchmark, record_property, row, lambda: small_decoder(**SMALL_CASES[name]), small_baseline())


def measure(
    benchmark: Any,
    record_property: Callable[[str, object], None],
    row: Row,
    make: Callable[[], Any],
    expected: Tensor,
) -> None:
    """Compare a decoder's pixels with the expected ones, time a block, and complete the row."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    own, (_, second), name = make(), blocks(), row["vae"]
    off = (pixels_of(own) - expected).abs().mean().item()
    assert off <= TOLERANCE, f"{name}: pixels are off by {off:.3g} on average, allowed {TOLERANCE}"
    times = benchmark.pedantic(lambda: BENCH.milliseconds(lambda: own.decode_float(second)), rounds=1)
    row |= {"block_ms": percentiles(times), "frames": 4 * BLOCK}
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
    benchmark.extra_info.update(row)
    record_property("row", row)


def measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "vae" in row and "block_ms" in row]


def fastest(rows: list[Row], small: bool = False) -> Row | None:
    """Of the full VAE, or of the small one."""
    of_kind = [row for row in measured(rows) if row.get("small", False) == small]
    return min(of_kind, key=lambda row: row["block_ms"][1], default=None)


def with_vae(rollouts: list[Row], rows: list[Row]) -> list[Row]:
    """Rows of rollouts with the frames per second that remain where the same GPU decodes each block afterwards, with
    the full VAE and with the small one.

    None where no such VAE was measured in the same run.
    """

    def fps(row: Row, best: Row | None) -> float | None:
        return None if best is None else row["fps"] * row["block_ms"] / (row["block_ms"] + best["block_ms"][1])

    full, small = fastest(rows), fastest(rows, small=True)
    return [{**row, "fps_vae": fps(row, full), "fps_small_vae": fps(row, small)} for row in rollouts]


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    cells = []
    for row in measured(rows):
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.3g}"
        alone = f"{1e3 * row['frames'] / row['block_ms'][1]:.3g}"
        cells.append([row["vae"], report.spread(row["block_ms"], ".2f"), alone, peak])
    lines = [*report.table(HEADINGS, cells), ""]
    for best, goal in ((fastest(rows), GOAL_MS), (fastest(rows, small=True), SMALL_GOAL_MS)):
        if best is not None and not best["rehearsal"]:
            lines.append(f"- goal: {best['vae']}: {best['block_ms'][1]:.1f} ms a block, at most {goal:g} ms")
    return lines + [f"- absent: {row['vae']}: {row['absent']}" for row in rows if "absent" in row]


def write(rows: list[Row], about: dict[str, str], folder: Path) -> Path:
    """vae.md and vae.json; the path of the first."""
    body = [
        "Wan 2.1's VAE with random weights in bfloat16, and the small one of taew2_1 in float16: a block of 3 latent",
        "frames, 12 pixel frames of 480x832, in the middle of a video, with what is kept of the frames before.",
        "",
        *table(rows),
    ]
    rehearsal = "on a CPU with a narrow VAE and small frames" if rows[0]["rehearsal"] else ""
    command = "pytest bench/vae --benchmark-only"
    return report.write("vae", folder, about, "The VAE", command, body, {"environment": about, "rows": rows}, rehearsal)
