"""The ops at the sizes they are used in: inputs, every way to run them, and the work that must be done."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hiar_kernels
from anchors import LIBRARIES
from hiar_kernels import BlockCausal, KVContext
from hiar_kernels._triton import interpreting
from measure import Bench, line_of


@dataclass(frozen=True)
class Sizes:
    """The one table of sizes. The defaults are Wan 1.3B at 480x832: blocks of 3 latent frames, a window of 21."""

    heads: int = 12
    head_dim: int = 128
    grid: tuple[int, int] = (30, 52)
    block: int = 3
    window: int = 21
    text_tokens: int = 512
    channels: int = 16

    width = property(lambda z: z.heads * z.head_dim)
    frame_tokens = property(lambda z: z.grid[0] * z.grid[1])


SMALL = Sizes(heads=2, head_dim=64, grid=(2, 3), window=6, text_tokens=8)


@dataclass
class Work:
    """One op on its inputs.

    Attributes:
        inputs: tensors that gradients are taken of, where they are.
        run: the op, given the name of a way; the first outputs are compared with those of the baseline.
        forward, backward: FLOP of attention, bytes of the others that an ideal kernel has to do or to move.
    """

    inputs: list[Tensor]
    run: Callable[[str], Any]
    forward: float
    backward: float = 0.0


@dataclass(frozen=True)
class Op:
    """``ways``: names to run it by, the baseline first. ``unit``: of the work, "flop" or "bytes"."""

    label: str
    function: str
    make: Callable[[Bench, Sizes], Work]
    unit: str
    trained: bool
    ways: tuple[str, ...]


def normal(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device).to(torch.bfloat16)


def ids(bench: Bench, frames: list[int]) -> Tensor:
    return torch.tensor([frames], dtype=torch.int32, device=bench.device)


def plain(bench: Bench, name: str, inputs: list[Tensor], forward: float, backward: float = 0.0, **options: Any) -> Work:
    """A pointwise op: eager, torch.compile of it, and our kernel."""
    function = getattr(hiar_kernels, name)
    eager = functools.partial(function, **options, impl="reference")
    ways = {
        "eager": eager,
        "compiled": bench.compiled(eager),
        "triton": functools.partial(function, **options, impl="triton"),
    }
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


def flow_step(bench: Bench, z: Sizes) -> Work:
    x, v, noise = (normal(bench, 1, z.block, z.channels, 2 * z.grid[0], 2 * z.grid[1]) for _ in range(3))
    levels = [torch.tensor([[level]], device=bench.device) for level in (0.9375, 0.8333333)]
    return plain(bench, "flow_step", [x, v, *levels, noise], 5 * x.nbytes)


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


def merge_attention(bench: Bench, z: Sizes) -> Work:
    """Of two halves of the keys."""
    shape = (1, z.block * z.frame_tokens, z.heads, z.head_dim)
    outs = [normal(bench, *shape) for _ in range(2)]
    lses = [normal(bench, 1, z.heads, shape[1]).float() for _ in range(2)]
    return plain(bench, "merge_attention", [], 3 * outs[0].nbytes, outs=outs, lses=lses)


@functools.cache  # made once: some compile
def library(bench: Bench, name: str) -> Callable[..., Tensor]:
    return LIBRARIES[name][1](bench)[0]


def attend(
    bench: Bench, z: Sizes, queries: list[int], keys: list[int], context: list[int], dense: bool = False
) -> Work:
    """Attention of blocks by frame ids: queries over a ring, or over their own keys and constant context."""
    q = normal(bench, 1, len(queries) * z.frame_tokens, z.heads, z.head_dim)
    k, v = (normal(bench, 1, len(keys) * z.frame_tokens, z.heads, z.head_dim) for _ in range(2))
    mask = BlockCausal(z.frame_tokens, z.block, z.window)
    options: dict[str, Any] = {"mask": mask, "q_frames": ids(bench, queries), "kv_frames": ids(bench, keys)}
    seen = float(mask.visible(options["q_frames"], options["kv_frames"], 1).sum())
    outside = 0.0
    if context:
        cached = [normal(bench, 1, len(context) * z.frame_tokens, z.heads, z.head_dim) for _ in range(2)]
        options["context"] = KVContext(*cached, ids(bench, context))
        start = [f // z.block * z.block for f in queries]
        seen = float(sum(s <= f < s + z.block for s in start for f in keys))
        outside = float(sum(max(s + z.block - z.window, 0) <= f < s for s in start for f in context))
    unit = 4.0 * z.width * z.frame_tokens**2

    def run(way: str) -> Tensor:
        if dense and way in LIBRARIES:
            return library(bench, way)(q, k, v)
        out = hiar_kernels.attention(q, k, v, **options, impl=way)
        assert isinstance(out, Tensor)
        return out

    # A backward is five matmuls for a forward's two, three of them where the keys are constant.
    return Work([q, k, v], run, unit * (seen + outside), unit * (2.5 * seen + 1.5 * outside))


def visit(bench: Bench, z: Sizes) -> Work:
    ring = [*range(2, z.window), 0, 1]  # wrapped
    return attend(bench, z, list(range(z.window - z.block, z.window)), ring, [], dense=True)


def pair(bench: Bench, z: Sizes) -> Work:
    """The cache group of one block and the denoise group of the next, each with its own window, in one launch."""
    last = z.window + z.block
    return attend(bench, z, list(range(last - 2 * z.block, last)), list(range(last)), [])


def block_causal(bench: Bench, z: Sizes) -> Work:
    video = list(range(z.window))
    return attend(bench, z, video, video, [])


def constant_context(bench: Bench, z: Sizes) -> Work:
    video = list(range(z.window))
    return attend(bench, z, video, video, video)


def cross(bench: Bench, z: Sizes) -> Work:
    q = normal(bench, 1, z.block * z.frame_tokens, z.heads, z.head_dim)
    k, v = (normal(bench, 1, z.text_tokens, z.heads, z.head_dim) for _ in range(2))
    flop = 4.0 * q.shape[1] * z.text_tokens * z.width

    def run(way: str) -> Tensor:
        if way in LIBRARIES:
            return library(bench, way)(q, k, v)
        out = hiar_kernels.attention(q, k, v, impl=way)
        assert isinstance(out, Tensor)
        return out

    return Work([q, k, v], run, flop, 2.5 * flop)


def libraries(bench: Bench, absent: dict[str, str]) -> tuple[str, ...]:
    """The attention libraries that can be had here; the others go into ``absent`` with the reason."""
    found = []
    for name, (devices, _) in LIBRARIES.items():
        if bench.device not in devices.split() or (name == "flex" and not bench.cuda):
            continue
        try:
            library(bench, name)
            found.append(name)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:  # told in the result
            absent[name] = line_of(error)
    return tuple(found)


def table(bench: Bench, absent: dict[str, str]) -> list[Op]:
    """All ops, each with the ways that this machine has."""
    found, ops = libraries(bench, absent), []
    kernels_run = bench.cuda or interpreting()

    def ways(name: str, *baseline: str) -> tuple[str, ...]:
        module = inspect.getmodule(getattr(hiar_kernels, name))
        assert module is not None
        if "triton" not in module.IMPLS:
            absent[f"triton for {name}"] = "no such implementation yet"
        elif not kernels_run:
            absent[f"triton for {name}"] = "needs a CUDA device"
        return (*baseline, *(["triton"] if kernels_run and "triton" in module.IMPLS else []))

    trains = (ada_layer_norm, layer_norm, gated_residual, gated_residual_ada_layer_norm, qk_norm_rope)
    for make in (*trains, qk_norm_rope_append, flow_step, merge_attention):
        name, trained = make.__name__, make in trains
        ops.append(Op(name, name, make, "bytes", trained, ways(name, "eager", "compiled")))
    own = ways("attention", "sdpa")
    for make, trained in ((visit, False), (pair, False), (block_causal, True), (constant_context, True), (cross, True)):
        peers = found if make in (visit, cross) else ()
        ops.append(Op(f"attention: {make.__name__}", "attention", make, "flop", trained, (*own, *peers)))
    return ops
