"""Attention through libraries that know no frame ids: one call for each group of queries that sees the same keys.

No mask is ever materialised. Attention does not care for the order of keys, so a full ring is one call over all of it;
keys in several places are copied together. With ``num_splits`` the keys are rows of one launch instead: views of the
ring, the queries repeated by a stride of 0, the results merged by their logsumexps (as Flash-Decoding does).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.torch_library import own_arithmetic, remembered
from ..merge_attention import merge_attention
from .inputs import AttentionInputs
from .layout import AttentionLayout, Group, Run, even_cut

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PACKAGES = {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}
LIBRARIES = ("sdpa", *BACKENDS, *PACKAGES)

Partial = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
"""q, k, v [B, T, H, D], scale -> out [B, T, H, D], logsumexp [B, H, T]; without gradient."""


@own_arithmetic
def attend(
    impl: str, call: AttentionInputs, layout: AttentionLayout | None, num_splits: int = 1, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, logsumexp if asked for) of :func:`hiar_kernels.attention`.

    Args:
        layout: None: every query sees every key.
        num_splits: n > 1: the keys as n rows of one launch, a second call where they leave a rest, merged; each video
            by itself. Not where a gradient is needed.
    """
    q, k, v, context, scale, trains = call.q, call.k, call.v, call.context, call.scale, call.needs_grad
    if trains and return_lse:
        raise ValueError(no_gradient_of_lse(impl))
    if call.kv_counts is not None:
        if impl != "sdpa" or return_lse:
            raise ValueError(f"attention: impl={impl!r} takes no kv_counts here; use 'triton' or 'reference'")
        return _counted(q, k, v, call.kv_counts, scale), None
    num_splits = 1 if trains or not q.shape[0] else num_splits
    merged = (num_splits > 1 or return_lse) and not trains
    if merged and q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention: impl={impl!r} gives a logsumexp of bfloat16 and float16 on CUDA, got {q.dtype}; "
            "use 'triton' or 'reference'"
        )
    if layout is None:
        whole = Group((0, q.shape[1]), (), ((0, k.shape[1]),) if k.shape[1] else ())
        layout = AttentionLayout(1, ((whole,),))
    rows, tokens = layout.rows, layout.frame_tokens
    if num_splits > 1:
        rows = rows * (q.shape[0] // len(rows))  # the splits of one video's keys are rows of a launch
    outs, lses = [], []
    for b, groups in enumerate(rows):
        row = None if len(rows) == 1 else b
        q_slots, sources = _Slots(q, row, tokens), [(_Slots(k, row, tokens), _Slots(v, row, tokens))]
        if context is not None:
            sources.insert(0, (_Slots(context.k, row, tokens), _Slots(context.v, row, tokens)))
        results = [_group(impl, group, q_slots, sources, scale, num_splits, merged) for group in groups]
        outs.append(_join([out for out, _ in results]))
        lses.append(_join([lse for _, lse in results if lse is not None], 2) if merged else None)
    out = torch.cat(outs) if len(outs) > 1 else outs[0].contiguous()
    if trains and not out.requires_grad:  # nothing is visible: 0, with gradient 0
        for x in (q, k, v, *(() if context is None else context.kv)):
            out = out + x[:, :0].sum()
    return out, torch.cat([x for x in lses if x is not None]) if return_lse else None


def no_gradient_of_lse(impl: str) -> str:
    """Error message for a logsumexp with gradient."""
    return f"attention: impl={impl!r} has no gradient with a logsumexp; use 'triton' or 'reference'"


def _counted(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float | None) -> Tensor:
    """sdpa with log(counts) as a bias. Hidden keys and values are zeroed because 0 * NaN is NaN."""
    bias, hidden = remembered(counts, (q.dtype,), lambda: _bias_of(counts, q.dtype))
    return _plain("sdpa", q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), scale, bias).contiguous()


def _bias_of(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bias [B or 1, 1, 1, Tk], and which keys are hidden [B or 1, Tk, 1, 1].

    A hidden key has half the lowest number, not -inf, with which a row without any key is NaN in some libraries: beside
    another key it gives a probability of 0, among hidden ones alone a mean of zeros.
    """
    bias = (
        counts.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
    )  # round the logarithm, not the count: 509 is no bfloat16
    used = counts > 0
    bias = torch.where(used, bias, torch.finfo(dtype).min / 2)
    return bias[:, None, None, :], ~used[:, :, None, None]


class _Slots:
    """Tokens of frame slots of x [B, T, H, D], as views; of one batch row, or of all (None)."""

    def __init__(self, x: Tensor, row: int | None, tokens: int) -> None:
        self.x = x = x if row is None else x[row : row + 1]
        self.tokens = tokens
        # a slice's backward fills a whole zero tensor; the pieces of one split share a single concatenation
        self.pieces = x.split(tokens, 1) if x.requires_grad and torch.is_grad_enabled() and tokens > 1 else None

    def views(self, runs: tuple[Run, ...]) -> list[Tensor]:
        if self.pieces is not None:
            return [piece for start, stop in runs for piece in self.pieces[start:stop]]
        if len(runs) == 1 and (runs[0][1] - runs[0][0]) * self.tokens == self.x.shape[1]:
            return [self.x]
        return [self.x[:, start * self.tokens : stop * self.tokens] for start, stop in runs]


def _group(
    impl: str,
    group: Group,
    q: _Slots,
    sources: list[tuple[_Slots, _Slots]],
    scale: float | None,
    num_splits: int,
    merged: bool,
) -> tuple[Tensor, Tensor | None]:
    """``sources``: keys and values of the context, if any, then the own ones."""
    query, runs = _join(q.views((group.queries,))), (group.context, group.own)[-len(sources) :]
    if not any(runs):
        lse = query.new_full((query.shape[0], query.shape[2], query.shape[1]), float("-inf"), dtype=_wide(query))
        return torch.zeros_like(query), lse if merged else None
    if num_splits > 1:
        tokens = [tuple((start * q.tokens, stop * q.tokens) for start, stop in each) for each in runs]
        return _split(impl, query, [(k.x, v.x) for k, v in sources], tokens, scale, num_splits)
    keys, values = (
        _join([x for source, each in zip(sources, runs, strict=True) for x in source[i].views(each)]) for i in (0, 1)
    )
    return partial(impl, query, keys, values, scale) if merged else (_plain(impl, query, keys, values, scale), None)


def _split(
    impl: str,
    q: Tensor,
    sources: list[tuple[Tensor, Tensor]],
    runs: list[tuple[Run, ...]],
    scale: float | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Attend one video's queries [1, T, H, D] to runs of tokens: rows of one launch, and a second call for the rest."""
    cuts = [even_cut(each, num_splits) for each in runs]
    best = max(range(len(cuts)), key=lambda i: cut.length if (cut := cuts[i]) is not None else 0)
    cut, outs, lses = cuts[best], [], []
    if cut is not None:
        runs[best] = cut.rest

        def rows(x: Tensor) -> Tensor:
            token, *others = x.stride()[1:]
            shape = (num_splits, cut.length, *x.shape[2:])
            return x.as_strided(shape, (cut.step * token, token, *others), x.storage_offset() + cut.first * token)

        keys, values = map(rows, sources[best])
        out, lse = partial(impl, q.expand(num_splits, -1, -1, -1), keys, values, scale)
        outs, lses = list(out[:, None]), list(lse[:, None])
    if any(runs):
        keys, values = (
            _join([x[i][:, start:stop] for x, each in zip(sources, runs, strict=True) for start, stop in each])
            for i in (0, 1)
        )
        out, lse = partial(impl, q, keys, values, scale)
        outs, lses = [*outs, out], [*lses, lse]
    return (outs[0], lses[0]) if len(outs) == 1 else merge_attention(outs, lses)


def _join(parts: list[Tensor], dim: int = 1) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _plain(impl: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    """One differentiable library call; in float32 on a CPU, where bfloat16 is slower."""
    dtype, device = q.dtype, q.device.type
    if impl in PACKAGES:
        return _packaged(impl)(q, k, v, scale)[0]
    if device == "cpu" and dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, enabled=False):
            wide = None if bias is None else bias.float()
            return _plain(impl, q.float(), k.float(), v.float(), scale, wide).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if impl == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
    with sdpa_kernel(BACKENDS[impl]):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def partial(impl: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """One library call that also returns the logsumexp; no gradient."""
    if impl in PACKAGES:
        return _packaged(impl)(q, k, v, scale)
    dtype = q.dtype
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    aten = torch.ops.aten
    if not q.is_cuda:
        heads = [x.to(_wide(x)) for x in heads]
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale)
    elif impl == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(*heads, None, True, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(*heads, scale=scale)[:2]
    b, t, h, _ = q.shape
    return out.transpose(1, 2).to(dtype), lse.reshape(b, h, t)  # cuDNN's has a last dimension of 1


@functools.cache
def _packaged(impl: str) -> Partial:
    """flash_attn_func of a package; versions name the logsumexp option differently."""
    module = importlib.import_module(PACKAGES[impl])
    option = {"flash-attn-2": "return_attn_probs", "flash-attn-3": "return_attn_probs"}.get(impl, "return_lse")

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        result: Any = module.flash_attn_func(q, k, v, softmax_scale=scale, **{option: True})
        return result[0], result[1]

    return call


def unavailable(impl: str, device: torch.device) -> str | None:
    """Why a library cannot run on the device; None if it can."""
    if impl == "sdpa":
        return None
    if impl in PACKAGES:
        package = PACKAGES[impl]
        try:
            installed = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # the parent package is missing
            installed = False
        if not installed:
            return f"{package} is not installed"
    return None if device.type == "cuda" else f"it needs a CUDA device, got {device}"
