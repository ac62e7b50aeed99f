"""The pointwise ops at the sizes they are used in, every way to run them, and the table of all ops."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import attention_cases
import hiar_kernels
from forward_cases import GOAL_MS, forward_pointwise, forward_pointwise_gelu
from hiar_kernels.common import cuda_loader
from hiar_kernels.common.triton_loader import interpreting
from measure import Bench
from work import Op, Sizes, Work, ids, normal

KERNELS = ("triton", "cuda")


def plain(bench: Bench, name: str, inputs: list[Tensor], forward: float, backward: float = 0.0, **options: Any) -> Work:
    """A pointwise op: eager, torch.compile of it, and our kernels."""
    function = getattr(hiar_kernels, name)
    eager = functools.partial(function, **options, impl="reference")
    ways = {"eager": eager, "compiled": bench.compiled(eager)}
    ways |= {impl: functools.partial(function, **options, impl=impl) for impl in KERNELS}
    return Work(inputs, lambda way: ways[way](*inputs), forward, backward)


def ada_layer_norm(bench: Bench, z: Sizes) -> Work:
    x = normal(bench, 1, z.block * z.frame_tokens, z.width)
    frames = [normal(bench, 1, z.block, z.width) for _ in range(2)]
    return plain(bench, "ada_layer_norm", [x, *frames], 2 * x.nbytes, 3 * x.nbytes)


def layer_norm(bench: Bench, z: Sizes) -> Work:
    x = normal(bench, 1, z.block * z.frame_tokens, z.width)
    affine = [normal(bench, z.width) for _ in range(2)]
    return plain(bench, "layer_norm", [x, *affine], 2 * x.nbytes, 3 * x.nbytes)


def gated_residual(bench: Bench, z: Sizes) -> Work:
    x, y = (normal(bench, 1, z.block * z.frame_tokens, z.width) for _ in range(2))
    return plain(bench, "gated_residual", [x, y, normal(bench, 1, z.block, z.width)], 3 * x.nbytes, 4 * x.nbytes)


def gated_residual_ada_layer_norm(bench: Bench, z: Sizes) -> Work:
    x, y = (normal(bench, 1, z.block * z.frame_tokens, z.width) for _ in range(2))
    frames = [normal(bench, 1, z.block, z.width) for _ in range(3)]
    return plain(bench, "gated_residual_ada_layer_norm", [x, y, *frames], 4 * x.nbytes, 6 * x.nbytes)


def gated_residual_layer_norm(bench: Bench, z: Sizes) -> Work:
    x, y = (normal(bench, 1, z.block * z.frame_tokens, z.width) for _ in range(2))
    inputs = [x, y, normal(bench, 1, z.block, z.width), *(normal(bench, z.width) for _ in range(2))]
    return plain(bench, "gated_residual_layer_norm", inputs, 4 * x.nbytes, 6 * x.nbytes)


def rms_norm(bench: Bench, z: Sizes) -> Work:
    x = normal(bench, 1, z.block * z.frame_tokens, z.width)
    return plain(bench, "rms_norm", [x, normal(bench, z.width)], 2 * x.nbytes, 3 * x.nbytes)


def flow_step(bench: Bench, z: Sizes) -> Work:
    x, v, noise = (normal(bench, 1, z.block, z.channels, 2 * z.grid[0], 2 * z.grid[1]) for _ in range(3))
    levels = [torch.tensor([[level]], device=bench.device) for level in (0.9375, 0.8333333)]
    return plain(bench, "flow_step", [x, v, *levels, noise], 5 * x.nbytes)


def rms_silu_pad(bench: Bench, z: Sizes) -> Work:
    """At the full size of the VAE's decoder: the four pixel frames of one latent frame, of 16 x 16 pixels a token."""
    size = [16 * n for n in z.grid]
    x, cache = (normal(bench, 1, z.vae_width, frames, *size) for frames in (4, 2))
    return plain(bench, "rms_silu_pad", [x, normal(bench, z.vae_width), cache], 2.5 * x.nbytes + 2 * cache.nbytes)


def _rope(bench: Bench, z: Sizes) -> tuple[list[Tensor], dict[str, Any], float]:
    qkv = normal(bench, 1, z.block * z.frame_tokens, 3 * z.width)
    weights = [normal(bench, z.width) for _ in range(2)]
    return [qkv, *weights], {"num_heads": z.heads, "grid": z.grid}, qkv.nbytes / 3


def qk_norm_rope(bench: Bench, z: Sizes) -> Work:
    inputs, options, part = _rope(bench, z)
    frames = ids(bench, list(range(z.block)))
    return plain(bench, "qk_norm_rope", inputs, 4 * part, 8 * part, frames=frames, **options)


def qk_norm_rope_append(bench: Bench, z: Sizes) -> Work:
    inputs, options, part = _rope(bench, z)
    rings = {name: normal(bench, 1, z.window * z.frame_tokens, z.heads, z.head_dim) for name in ("k_cache", "v_cache")}
    frames = ids(bench, [z.window - 1 + i for i in range(z.block)])  # wraps
    options |= {"frames": frames, "slots": frames % z.window, **rings}
    return plain(bench, "qk_norm_rope_append", inputs, 6 * part, **options)


def ring_advance(bench: Bench, z: Sizes) -> Work:
    """Of a denoise visit, which does not move on: every call writes the same. A launch, hardly any work."""

    def row(*numbers: int) -> Tensor:
        return ids(bench, list(numbers))[0]

    @functools.cache  # what one way wrote must not pass for another's
    def way(name: str) -> tuple[list[Tensor], Work]:
        written = [row(7), *ids(bench, [0] * 2 * z.block).view(2, 1, z.block).unbind(), ids(bench, [0] * z.window)]
        moved = 4.0 * (3 + 3 * z.block)
        return written, plain(bench, "ring_advance", written, moved, advance=row(0), capacities=row(z.window))

    def run(name: str) -> list[Tensor]:
        written, work = way(name)
        work.run(name)
        return written

    return Work([], run, way("eager")[1].forward)


def merge_attention(bench: Bench, z: Sizes) -> Work:
    """Of two halves of the keys."""
    shape = (1, z.block * z.frame_tokens, z.heads, z.head_dim)
    outs = [normal(bench, *shape) for _ in range(2)]
    lses = [normal(bench, 1, z.heads, shape[1]).float() for _ in range(2)]
    return plain(bench, "merge_attention", [], 3 * outs[0].nbytes, outs=outs, lses=lses)


def table(bench: Bench, absent: dict[str, str]) -> list[Op]:
    """All ops, each with the ways that this machine has."""
    kernels_run = {"triton": bench.cuda or interpreting(), "cuda": bench.cuda and cuda_loader.missing() is None}
    for impl in KERNELS:
        if not kernels_run[impl]:
            absent[impl] = str(cuda_loader.missing()) if bench.cuda else "needs a CUDA device"

    def own(name: str) -> tuple[str, ...]:
        there = hiar_kernels.backends().ops[name].implementations
        return tuple(impl for impl in KERNELS if impl in there and kernels_run[impl])

    fused = (gated_residual_ada_layer_norm, gated_residual_layer_norm)
    trains = (ada_layer_norm, layer_norm, rms_norm, gated_residual, *fused, qk_norm_rope)
    ops = []
    for make in (*trains, qk_norm_rope_append, flow_step, rms_silu_pad, ring_advance, merge_attention):
        name = make.__name__
        ops.append(Op(name, make, "bytes", make in trains, ("eager", "compiled", *own(name))))
    of_models = ("eager", "compiled", *own("qk_norm_rope_append"))
    name = "all pointwise of a forward"
    ops.append(Op(name, forward_pointwise, "bytes", False, of_models, goal_ms=GOAL_MS))
    ops.append(Op(f"{name}, GELU too", forward_pointwise_gelu, "bytes", False, of_models))
    return ops + attention_cases.table(bench, absent, own("attention"))
