"""Tiles of the pointwise kernels worth measuring, at Wan 1.3B's block: python bench/sweep_pointwise.py (a CUDA device).

Microseconds of one call in a captured graph; inputs and rings rotate, so that L2 does not flatter. The pinned tiles
stand in ``hiar_kernels/norm/triton_fwd.py`` and ``hiar_kernels/qk_norm_rope/triton_fwd.py``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import hiar_kernels as hk

TOKENS, WIDTH, HEADS, FRAMES, GRID, SETS = 4680, 1536, 12, 3, (30, 52), 6
NORM_TILES = ((1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (4, 16), (8, 8), (8, 16))  # tokens, warps
ROPE_WARPS = (1, 2, 4, 8)


def microseconds(call: Callable[[int], Any], calls: int = 30, rounds: int = 10) -> float:
    """Median of one call, by replays of a graph of so many."""
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for i in range(calls):
            kept.append(call(i))
    graph.replay()
    taken = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) / calls * 1e3)
    return statistics.median(taken)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(f"sweep_pointwise.py needs a CUDA device, torch {torch.__version__} finds none")
    from hiar_kernels.norm import triton_fwd as norm
    from hiar_kernels.qk_norm_rope import triton_fwd as rope

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    xs, ys = ([normal(1, TOKENS, WIDTH) for _ in range(SETS)] for _ in range(2))
    gate, shift, scale = normal(1, FRAMES, 6, WIDTH).unbind(2)[:3]
    weight = normal(WIDTH)
    norms = {
        "gated_residual_ada_layer_norm": lambda i: hk.gated_residual_ada_layer_norm(
            xs[i % SETS], ys[i % SETS], gate, shift, scale, impl="triton"
        ),
        "gated_residual_layer_norm": lambda i: hk.gated_residual_layer_norm(
            xs[i % SETS], ys[i % SETS], gate, weight, weight, impl="triton"
        ),
    }
    for name, call in norms.items():
        print(f"{name}, pinned: {microseconds(call):.2f} us")
        for tokens, warps in NORM_TILES:
            tile = {"BLOCK_T": tokens, "BLOCK_C": 2048, "num_warps": warps}
            with patch.object(norm, "_tile", lambda *_, tile=tile: tile):
                print(f"{name}, {tokens} tokens, {warps} warps: {microseconds(call):.2f} us", flush=True)

    qkv = [normal(1, TOKENS, 3 * WIDTH) for _ in range(SETS)]
    rings = [[normal(1, 21 * 1560, HEADS, 128) for _ in range(2)] for _ in range(SETS)]
    frames = torch.tensor([[30, 31, 32]], dtype=torch.int32, device="cuda")

    def append(i: int) -> torch.Tensor:
        return hk.qk_norm_rope_append(
            qkv[i % SETS], weight, weight, frames, frames % 21, *rings[i % SETS], num_heads=HEADS, grid=GRID,
            impl="triton",
        )  # fmt: skip

    print(f"qk_norm_rope_append, pinned: {microseconds(append):.2f} us")
    for warps in ROPE_WARPS:
        tile = {"BLOCK_H": 16, "BLOCK_D": 128, "num_warps": warps}
        with patch.object(rope, "tile", lambda *_, tile=tile: tile):
            print(f"qk_norm_rope_append, {warps} warps: {microseconds(append):.2f} us", flush=True)


if __name__ == "__main__":
    main()
