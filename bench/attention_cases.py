"""Attention as the model calls it, by every implementation of the dispatcher and by libraries called directly."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hiar_kernels
from anchors import LIBRARIES, swapped
from hiar_kernels import BlockCausal, KVContext, attention_layout
from hiar_kernels.attention import gluon
from hiar_kernels.attention import table as dispatch
from hiar_kernels.attention.api import IMPLS
from hiar_kernels.attention.library import unavailable
from measure import Bench, line_of
from work import Op, Sizes, Work, ids, normal

BASELINE = "sdpa"
FLEX = {"flex": "TRITON", "flex-flash": "FLASH"}  # way -> its backend
SPLITS = 2  # rows of one launch that the keys are cut into, beside uncut ones


@functools.cache  # made once: some compile
def library(bench: Bench, name: str) -> Callable[..., Tensor]:
    return LIBRARIES[name][1](bench)[0]


def parsed(way: str) -> tuple[str, int]:
    """A way of the dispatcher as its ``impl`` and ``num_splits``."""
    impl, _, num_splits = way.partition(" with num_splits=")
    return impl, int(num_splits or 1)


def mask_mod(mask: BlockCausal, queries: Tensor, own: Tensor, context: Tensor | None) -> Callable[..., Tensor]:
    """The visibility rule of one batch row as FlexAttention takes it; keys of the context lie before one's own.

    Args:
        queries, own, context: frame ids, int32 [frames].
    """
    tokens, block, window = mask.frame_tokens, mask.frames_per_block, mask.windows(1)[0]
    start = mask.block_start(queries).to(torch.int32)
    keys, split = (own, 0) if context is None else (torch.cat([context, own]), len(context))
    back = 2**30 if window is None else window - mask.sink_frames
    sink_end = mask.first_frame + mask.sink_frames

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, slot = start[query // tokens], key // tokens
        frame, end = keys[slot], first + block
        visible = (frame >= 0) & (frame < end) & ((frame >= end - back) | (frame < sink_end))
        if context is None:
            return visible
        inside = (frame >= 0) & (frame >= first) & (frame < end)
        return torch.where(slot < split, visible & (frame < first), inside)

    return seen


def flex(
    bench: Bench,
    mask: BlockCausal,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: tuple[Tensor, Tensor],
    ctx: KVContext | None,
) -> Callable[[str], Tensor]:
    """FlexAttention by the name of a way. The block mask is made once; joining context and own keys is in its price."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rule = mask_mod(mask, frames[0][0], frames[1][0], None if ctx is None else ctx.frames[0])
    length = k.shape[1] + (0 if ctx is None else ctx.k.shape[1])
    blocks = bench.compiled(create_block_mask)(rule, None, None, q.shape[1], length, device=q.device)
    function = bench.compiled(flex_attention)

    def run(way: str) -> Tensor:
        keys, values = (k, v) if ctx is None else (torch.cat([ctx.k, k], 1), torch.cat([ctx.v, v], 1))
        options = {"BACKEND": FLEX[way]}
        return function(*swapped((q, keys, values)), block_mask=blocks, kernel_options=options).transpose(1, 2)

    return run


def attend(
    bench: Bench, z: Sizes, queries: list[int], keys: list[int], context: list[int], dense: bool = False
) -> Work:
    """Attention of blocks by frame ids: queries over a ring, or over their own keys and constant context.

    Args:
        dense: every query sees every key, so that a library may be called directly.
    """
    q = normal(bench, 1, len(queries) * z.frame_tokens, z.heads, z.head_dim)
    k, v = (normal(bench, 1, len(keys) * z.frame_tokens, z.heads, z.head_dim) for _ in range(2))
    mask = BlockCausal(z.frame_tokens, z.block, z.window)
    frames = ids(bench, queries), ids(bench, keys)
    options: dict[str, Any] = {"mask": mask, "q_frames": frames[0], "kv_frames": frames[1]}
    seen = float(mask.visible(*frames, 1).sum())
    outside, cached = 0.0, None
    if context:
        cached = KVContext(*(normal(bench, 1, len(context) * z.frame_tokens, z.heads, z.head_dim) for _ in range(2)),
                           ids(bench, context))  # fmt: skip
        start = [f // z.block * z.block for f in queries]
        seen = float(sum(s <= f < s + z.block for s in start for f in keys))
        outside = float(sum(max(s + z.block - z.window, 0) <= f < s for s in start for f in context))
    options |= {"context": cached, "layout": attention_layout(mask, [queries], [keys], [context] if context else None)}
    unit = 4.0 * z.width * z.frame_tokens**2
    by_flex = functools.cache(lambda: flex(bench, mask, q, k, v, frames, cached))

    def run(way: str) -> Tensor:
        if dense and way in LIBRARIES and way not in IMPLS:
            return library(bench, way)(q, k, v)
        if way in FLEX:
            return by_flex()(way)
        return dispatched(way, q, k, v, **options)

    # A backward is five matmuls for a forward's two, three of them where the keys are constant.
    return Work([q, k, v], run, unit * (seen + outside), unit * (2.5 * seen + 1.5 * outside))


def dispatched(way: str, *qkv: Tensor, **options: Any) -> Tensor:
    impl, num_splits = parsed(way)
    out = hiar_kernels.attention(*qkv, **options, impl=impl, num_splits=num_splits)
    assert isinstance(out, Tensor)
    return out


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


def unmasked(bench: Bench, z: Sizes, queries: int, keys: int) -> Work:
    q = normal(bench, 1, queries, z.heads, z.head_dim)
    k, v = (normal(bench, 1, keys, z.heads, z.head_dim) for _ in range(2))
    flop = 4.0 * queries * keys * z.width

    def run(way: str) -> Tensor:
        direct = way in LIBRARIES and way not in IMPLS
        return library(bench, way)(q, k, v) if direct else dispatched(way, q, k, v)

    return Work([q, k, v], run, flop, 2.5 * flop)


def cross(bench: Bench, z: Sizes) -> Work:
    """A block's queries over the text."""
    return unmasked(bench, z, z.block * z.frame_tokens, z.text_tokens)


def bidirectional(bench: Bench, z: Sizes) -> Work:
    """A whole video over itself: teachers and critics."""
    return unmasked(bench, z, z.window * z.frame_tokens, z.window * z.frame_tokens)


def libraries(bench: Bench, absent: dict[str, str]) -> tuple[str, ...]:
    """What the dispatcher does not have, of the libraries that can be had here; the others go into ``absent``."""
    found = []
    for name, (devices, _) in LIBRARIES.items():
        if name in IMPLS or bench.device not in devices.split() or (name in FLEX and not bench.cuda):
            continue
        try:
            library(bench, name)
            found.append(name)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:  # told in the result
            absent[name] = line_of(error)
    return tuple(found)


def flex_ways(bench: Bench, absent: dict[str, str]) -> tuple[str, ...]:
    """FlexAttention with a block mask, by the backends that it has here."""
    if not bench.cuda:
        absent["flex with a block mask"] = "it compiles for about half a minute a case on a CPU: only on CUDA devices"
        return ()
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        absent["flex-flash"] = "its backend is FlashAttention-4 (flash_attn.cute), which is not installed"
        return ("flex",)
    return tuple(FLEX)


def table(bench: Bench, absent: dict[str, str], own: tuple[str, ...]) -> list[Op]:
    """Attention at every shape; ``own``: implementations of the dispatcher that are kernels of this package."""
    impls = [BASELINE, *own]
    for impl in IMPLS:
        if impl in ("reference", BASELINE, *dispatch.OWN):
            continue
        lacking = unavailable(impl, torch.device(bench.device))
        if lacking is None:
            impls.append(impl)
        else:
            absent[f"{impl} for attention"] = lacking
    # on CUDA the one of torch's that sdpa takes for a logsumexp is "flash"
    hopper = []
    if own:
        lacking = gluon.unavailable(torch.device(bench.device))
        if lacking is None:
            hopper = ["gluon"]  # without gradient and context
        else:
            absent["gluon for attention"] = lacking
    cut = [dispatch.label(impl, SPLITS) for impl in impls if impl not in own and not (bench.cuda and impl == BASELINE)]
    direct, masked = libraries(bench, absent), flex_ways(bench, absent)

    def op(make: Callable[[Bench, Sizes], Work], trained: bool, peers: tuple[str, ...], more: list[str]) -> Op:
        name = make.__name__
        ways = (*impls, *more, *peers)
        return Op(f"attention: {name}", make, "flop", trained, ways, frozenset(peers), name)

    return [
        op(visit, False, direct, [*hopper, *cut]),
        op(pair, False, masked, [*hopper, *cut]),
        op(block_causal, True, masked, []),
        op(constant_context, True, masked, []),
        op(cross, True, direct, hopper),
        op(bidirectional, True, direct, []),
    ]
