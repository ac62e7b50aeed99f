"""Tiles of the pointwise kernels worth measuring, at Wan 1.3B's block.

    python -m bench.ops.sweep_pointwise            needs a CUDA device

Microseconds of one call in a captured graph; inputs, rings and outputs rotate, so that L2 does not flatter.
"""

from __future__ import annotations

import argparse
import itertools
from unittest.mock import patch

import torch

from bench.lib.measure import Bench
from bench.ops.op_cases import table
from bench.ops.work import Sizes, Work

SETS = 6  # of inputs
NORM_TILES = ((1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (4, 16), (8, 8), (8, 16))  # tokens, warps
ROPE_WARPS = (1, 2, 4, 8)


def microseconds(works: list[Work]) -> float:
    """Median of one call."""
    from triton.testing import do_bench_cudagraph

    works, outputs = itertools.cycle(works), []  # outputs are held, so that none is written over another
    return 1e3 * do_bench_cudagraph(lambda: outputs.append(next(works).run("triton")), rep=1, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"a sweep measures kernels on a CUDA device, torch {torch.__version__} finds none")
    from hiar_kernels.norm import triton_fwd as norm
    from hiar_kernels.qk_norm_rope import triton_fwd

    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    bench = Bench("cuda", (1, 1), 0.0)
    make = {op.label: op.make for op in table(bench, {})}
    norm_tiles = [{"BLOCK_T": tokens, "BLOCK_C": 2048, "num_warps": warps} for tokens, warps in NORM_TILES]
    rope_tiles = [{"BLOCK_H": 16, "BLOCK_D": 128, "num_warps": warps} for warps in ROPE_WARPS]
    for op, module, function, tiles in (  # the function holds the pinned tile
        ("gated_residual_ada_layer_norm", norm, "_tile", norm_tiles),
        ("gated_residual_layer_norm", norm, "_tile", norm_tiles),
        ("qk_norm_rope_append", triton_fwd, "tile", rope_tiles),
    ):
        works = [make[op](bench, Sizes()) for _ in range(SETS)]
        print(f"{op}, pinned: {microseconds(works):.2f} us", flush=True)
        for tile in tiles:
            with patch.object(module, function, lambda *_, tile=tile: tile):
                print(f"{op}, {tile}: {microseconds(works):.2f} us", flush=True)


if __name__ == "__main__":
    main()
