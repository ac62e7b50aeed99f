"""Attention as the model calls it, by every implementation of the dispatcher and by libraries called directly."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hiar_kernels
from bench.lib.measure import Bench
from bench.ops.libraries import LIBRARIES, available, library, swapped
from bench.ops.work import Op, Sizes, Work, ids
from hiar_kernels import BlockCausal, KVContext, attention_layout
from hiar_kernels.attention import gluon
from hiar_kernels.attention import selection as dispatch
from hiar_kernels.attention.api import IMPLS
from hiar_kernels.attention.library import unavailable

BASELINE = "sdpa"
FLEX = {"flex": "TRITON", "flex-flash": "FLASH"}  # variant -> its backend
SPLITS = 2  # parts that the keys are cut into, beside uncut ones


def parsed(variant: str) -> tuple[str, int]:
    """A variant of the dispatcher as its ``impl`` and ``num_splits``."""
    impl, _, num_splits = variant.partition(" with num_splits=")
    return impl, int(num_splits or 1)


def mask_mod(mask: BlockCausal, queries: Tensor, own: Tensor, context: Tensor | None) -> Callable[..., Tensor]:
    """The visibility rule of one batch item as FlexAttention takes it; keys of the context lie before one's own.

    Args:
        queries, own, context: frame ids, int32 [frames].
    """
    tokens, block, window = mask.frame_tokens, mask.frames_per_block, mask.windows(1)[0]
    start = mask.block_start(queries).to(torch.int32)
    keys, split = (own, 0) if context is None else (torch.cat([context, own]), len(context))
    back = 2**30 if window is None else window - mask.sink_frames
    sink_end = mask.first_frame + mask.sink_frames

    def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, slot = start[query // tokens], key // tokens
        frame, end = keys[slot], first + block
        visible = (frame >= 0) & (frame < end) & ((frame >= end - back) | (frame < sink_end))
        if context is None:
            return visible
        inside = (frame >= 0) & (frame >= first) & (frame < end)
        return torch.where(slot < split, visible & (frame < first), inside)

    return rule


def flex(
    bench: Bench, mask: BlockCausal, qkv: list[Tensor], frames: tuple[Tensor, Tensor], ctx: KVContext | None
) -> Callable[[str], Tensor]:
    """FlexAttention by backend. The block mask is made once; joining context and own keys is in its price."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = qkv
    rule = mask_mod(mask, frames[0][0], frames[1][0], None if ctx is None else ctx.frames[0])
    length = k.shape[1] + (0 if ctx is None else ctx.k.shape[1])
    blocks = bench.compiled(create_block_mask)(rule, None, None, q.shape[1], length, device=q.device)
    function = bench.compiled(flex_attention)

    def run(variant: str) -> Tensor:
        keys, values = (k, v) if ctx is None else (torch.cat([ctx.k, k], 1), torch.cat([ctx.v, v], 1))
        options = {"BACKEND": FLEX[variant]}
        return function(*swapped((q, keys, values)), block_mask=blocks, kernel_options=options).transpose(1, 2)

    return run


def attend(
    bench: Bench, z: Sizes, queries: list[int], keys: list[int], context: list[int], dense: bool = False
) -> Work:
    """Attention of blocks by frame ids: queries over a ring, or over their own keys and constant context.

    Args:
        dense: every query sees every key, so that a library may be called directly.
    """
    qkv = [bench.normal(1, len(f) * z.frame_tokens, z.heads, z.head_dim) for f in (queries, keys, keys)]
    mask = BlockCausal(z.frame_tokens, z.block, z.window)
    frames = ids(bench, queries), ids(bench, keys)
    options: dict[str, Any] = {"mask": mask, "q_frames": frames[0], "kv_frames": frames[1]}
    seen = float(mask.visible(*frames, 1).sum())
    outside, cached = 0.0, None
    if context:
        cached = KVContext(*(bench.normal(1, len(context) * z.frame_tokens, z.heads, z.head_dim) for _ in range(2)),
                           ids(bench, context))  # fmt: skip
        start = [f // z.block * z.block for f in queries]
        seen = float(sum(s <= f < s + z.block for s in start for f in keys))
        outside = float(sum(max(s + z.block - z.window, 0) <= f < s for s in start for f in context))
    options |= {"context": cached, "layout": attention_layout(mask, [queries], [keys], [context] if context else None)}
    unit = 4.0 * z.width * z.frame_tokens**2
    by_flex = functools.cache(lambda: flex(bench, mask, qkv, frames, cached))

    def run(variant: str) -> Tensor:
        if dense:
            return unmasked(bench, variant, *qkv, **options)
        return by_flex()(variant) if variant in FLEX else dispatched(variant, *qkv, **options)

    # A backward is five matmuls for a forward's two, three of them where the keys are constant.
    return Work(qkv, run, unit * (seen + outside), unit * (2.5 * seen + 1.5 * outside))


def unmasked(bench: Bench, variant: str, *qkv: Tensor, **options: Any) -> Tensor:
    """Where every query sees every key a library may be called directly."""
    if variant in LIBRARIES and variant not in IMPLS:
        return library(bench, variant)[0](*qkv)
    return dispatched(variant, *qkv, **options)


def dispatched(variant: str, *qkv: Tensor, **options: Any) -> Tensor:
    impl, num_splits = parsed(variant)
    out = hiar_kernels.attention(*qkv, **options, impl=impl, num_splits=num_splits)
    assert isinstance(out, Tensor)
    return out


def visit(bench: Bench, z: Sizes) -> Work:
    """A task; the dispatcher's table calls it so."""
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


def dense(bench: Bench, z: Sizes, queries: int, keys: int) -> Work:
    qkv = [bench.normal(1, n, z.heads, z.head_dim) for n in (queries, keys, keys)]
    flop = 4.0 * queries * keys * z.width
    return Work(qkv, lambda variant: unmasked(bench, variant, *qkv), flop, 2.5 * flop)


def cross(bench: Bench, z: Sizes) -> Work:
    """A block's queries over the text."""
    return dense(bench, z, z.tokens, z.text_tokens)


def bidirectional(bench: Bench, z: Sizes) -> Work:
    """A whole video over itself: teachers and critics."""
    return dense(bench, z, z.window * z.frame_tokens, z.window * z.frame_tokens)


def flex_variants(bench: Bench, absent: dict[str, str]) -> tuple[str, ...]:
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
        if reason := unavailable(impl, torch.device(bench.device)):
            absent[f"{impl} for attention"] = reason
        else:
            impls.append(impl)
    # on CUDA the one of torch's that sdpa takes for a logsumexp is "flash"
    hopper = ["gluon"] if own else []  # without gradient and context
    if own and (reason := gluon.unavailable(torch.device(bench.device))):
        hopper, absent["gluon for attention"] = [], reason
    cut = [dispatch.label(impl, SPLITS) for impl in impls if impl not in own and not (bench.cuda and impl == BASELINE)]
    direct = tuple(available(bench, absent, leave_out=(*IMPLS, *(() if bench.cuda else FLEX))))
    masked = flex_variants(bench, absent)

    ops = []
    for make, trained, peers, more in (
        (visit, False, direct, [*hopper, *cut]), (pair, False, masked, [*hopper, *cut]),
        (block_causal, True, masked, []), (constant_context, True, masked, []),
        (cross, True, direct, hopper), (bidirectional, True, direct, []),
    ):  # fmt: skip
        name, variants = make.__name__, (*impls, *more, *peers)
        ops.append(Op(f"attention: {name}", make, "flop", trained, variants, frozenset(peers), name))
    return ops
