"""The pointwise ops at the sizes they are used in, every variant of them, and the table of all ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hiar_kernels
from bench.lib.measure import Bench
from bench.ops import attention_cases, attention_fp8_cases, linear_cases
from bench.ops.forward_cases import GOAL_MS, forward_pointwise
from bench.ops.work import Op, Sizes, Work, ids
from hiar_kernels.common import cuda_loader
from hiar_kernels.common.float8 import E4M3, padded
from hiar_kernels.common.triton_loader import interpreting

KERNELS = ("triton", "cuda")
# op -> its inputs (x: the tokens of a block, f: a row for each frame, c: one for all) and the passes over memory, each
# as large as x, of an ideal forward and backward
NORMS = {
    "ada_layer_norm": ("xff", 2, 3),
    "layer_norm": ("xcc", 2, 3),
    "rms_norm": ("xc", 2, 3),
    "gated_residual": ("xxf", 3, 4),
    "gated_residual_ada_layer_norm": ("xxfff", 4, 6),
    "gated_residual_layer_norm": ("xxfcc", 4, 6),
}


def pointwise(
    bench: Bench, name: str, inputs: list[Tensor], forward: float, backward: float = 0.0, **options: Any
) -> Work:
    """An op in eager PyTorch, torch.compile of it, and our kernels."""
    function = getattr(hiar_kernels, name)
    eager = functools.partial(function, **options, impl="reference")
    variants = {"eager": eager, "compiled": bench.compiled(eager)}
    variants |= {impl: functools.partial(function, **options, impl=impl) for impl in KERNELS}
    return Work(inputs, lambda variant: variants[variant](*inputs), forward, backward)


def norm(name: str, bench: Bench, z: Sizes) -> Work:
    letters, forward, backward = NORMS[name]
    shapes = {"x": (1, z.tokens, z.width), "f": (1, z.block, z.width), "c": (z.width,)}
    inputs = [bench.normal(*shapes[letter]) for letter in letters]
    return pointwise(bench, name, inputs, forward * inputs[0].nbytes, backward * inputs[0].nbytes)


def flow_step(bench: Bench, z: Sizes) -> Work:
    x, v, noise = (bench.normal(1, z.block, z.channels, 2 * z.grid[0], 2 * z.grid[1]) for _ in range(3))
    levels = [torch.tensor([[level]], device=bench.device) for level in (0.9375, 0.8333333)]
    return pointwise(bench, "flow_step", [x, v, *levels, noise], 5 * x.nbytes)


def rms_silu_pad(bench: Bench, z: Sizes) -> Work:
    """At the full size of the VAE's decoder: the four pixel frames of one latent frame, of 16 x 16 pixels a token."""
    size = [16 * n for n in z.grid]
    x, cache = (bench.normal(1, z.vae_width, frames, *size) for frames in (4, 2))
    return pointwise(bench, "rms_silu_pad", [x, bench.normal(z.vae_width), cache], 2.5 * x.nbytes + 2 * cache.nbytes)


def _rope(bench: Bench, z: Sizes) -> tuple[list[Tensor], dict[str, Any], float]:
    qkv = bench.normal(1, z.tokens, 3 * z.width)
    inputs = [qkv, bench.normal(z.width), bench.normal(z.width)]
    return inputs, {"num_heads": z.heads, "grid": z.grid}, qkv.nbytes / 3


def qk_norm_rope(bench: Bench, z: Sizes) -> Work:
    inputs, options, part = _rope(bench, z)
    return pointwise(bench, "qk_norm_rope", inputs, 4 * part, 8 * part, frames=ids(bench, [*range(z.block)]), **options)


def qk_norm_rope_append(bench: Bench, z: Sizes) -> Work:
    inputs, options, part = _rope(bench, z)
    rings = {name: bench.normal(1, z.window * z.frame_tokens, z.heads, z.head_dim) for name in ("k_cache", "v_cache")}
    frames = ids(bench, [z.window - 1 + i for i in range(z.block)])  # wraps
    return pointwise(
        bench, "qk_norm_rope_append", inputs, 6 * part, frames=frames, slots=frames % z.window, **rings, **options
    )


def qk_norm_rope_append_fp8(bench: Bench, z: Sizes) -> Work:
    """With q in 8 bits too. Memory traffic of an ideal kernel: qkv read, 8 bits written."""
    inputs, options, part = _rope(bench, z)
    size = (
        (1, z.window * z.frame_tokens, z.heads, z.head_dim),
        (1, z.window, z.heads, z.head_dim, padded(z.frame_tokens)),
    )
    caches = [torch.zeros(shape, dtype=torch.uint8, device=bench.device).view(E4M3) for shape in size]
    scales = torch.ones(2, 1, z.window, z.heads, device=bench.device)
    rings = dict(zip(("k_cache", "v_cache", "k_scales", "v_scales"), (*caches, *scales), strict=True))
    frames = ids(bench, [z.window - 1 + i for i in range(z.block)])
    options |= {"frames": frames, "slots": frames % z.window, "quantize_q": True, **rings}
    written = 3 * part / inputs[0].element_size()
    return pointwise(bench, "qk_norm_rope_append_fp8", inputs, 3 * part + written, **options)


def ring_advance(bench: Bench, z: Sizes) -> Work:
    """Of a denoise task, which does not move on: every call writes the same. A launch, hardly any work."""

    def row(*numbers: int) -> Tensor:
        return ids(bench, list(numbers))[0]

    @functools.cache  # what one variant wrote must not pass for another's
    def own(variant: str) -> tuple[list[Tensor], Work]:
        written = [row(7), *ids(bench, [0] * 2 * z.block).view(2, 1, z.block).unbind(), ids(bench, [0] * z.window)]
        moved = 4.0 * (3 + 3 * z.block)
        return written, pointwise(bench, "ring_advance", written, moved, advance=row(0), capacities=row(z.window))

    def run(variant: str) -> list[Tensor]:
        written, work = own(variant)
        work.run(variant)
        return written

    return Work([], run, own("eager")[1].forward)


def merge_attention(bench: Bench, z: Sizes) -> Work:
    """Of two halves of the keys."""
    outs = [bench.normal(1, z.tokens, z.heads, z.head_dim) for _ in range(2)]
    lses = [bench.normal(1, z.heads, z.tokens).float() for _ in range(2)]
    return pointwise(bench, "merge_attention", [], 3 * outs[0].nbytes, outs=outs, lses=lses)


def table(bench: Bench, absent: dict[str, str]) -> list[Op]:
    """All ops, each with the variants that this machine has; why it lacks others goes into ``absent``."""
    runs = {"triton": bench.cuda or interpreting(), "cuda": bench.cuda and cuda_loader.missing() is None}
    for impl in KERNELS:
        if not runs[impl]:
            absent[impl] = str(cuda_loader.missing()) if bench.cuda else "needs a CUDA device"

    def own(name: str) -> tuple[str, ...]:
        implemented = hiar_kernels.backends().ops[name].implementations
        return tuple(impl for impl in KERNELS if impl in implemented and runs[impl])

    def op(name: str, make: Callable[[Bench, Sizes], Work], trained: bool = False) -> Op:
        return Op(name, make, "bytes", trained, ("eager", "compiled", *own(name)))

    ops = [op(name, functools.partial(norm, name), trained=True) for name in NORMS]
    ops.append(op("qk_norm_rope", qk_norm_rope, trained=True))
    for make in (qk_norm_rope_append, qk_norm_rope_append_fp8, flow_step, rms_silu_pad, ring_advance, merge_attention):
        ops.append(op(make.__name__, make))
    variants, name = ("eager", "compiled", *own("qk_norm_rope_append")), "all pointwise of a forward"
    ops.append(Op(name, forward_pointwise, "bytes", False, variants, goal_ms=GOAL_MS))
    ops.append(Op(f"{name}, GELU too", functools.partial(forward_pointwise, gelu=True), "bytes", False, variants))
    ops += linear_cases.table(bench, own("int8_linear"))
    ops += attention_fp8_cases.table(bench, absent, own("attention_fp8"))
    return ops + attention_cases.table(bench, absent, own("attention"))
