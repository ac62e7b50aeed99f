"""Oracles of the ops: definitions written down as plainly as possible, without a line of the packages under test. That
of the network and of the rollout is hiar_model.rollout.reference.

Everything computes in the dtype of its arguments: float64 gives the exact result, a narrow dtype what plain torch makes
of it (the yardstick of tests/helpers/budget.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Who sees whom


def block_of(frame: int, block: int, first: int = 0, first_block: int | None = None) -> tuple[int, int]:
    """(first frame, frame after the last) of the block that a frame lies in, by laying blocks end to end."""
    start, end = first, first + (block if first_block is None else first_block)
    while end <= frame:
        start, end = end, end + block
    return start, end


def sees(
    query: int, key: int, block: int, window: int | None = None, sink: int = 0, first: int = 0,
    first_block: int | None = None,
) -> bool:  # fmt: skip
    """Does a query in this frame see a key of that frame? -1: there is no key."""
    if key == -1:
        return False
    end = block_of(query, block, first, first_block)[1]
    if key >= end:
        return False
    return window is None or key >= end - (window - sink) or key - first < sink


def sees_beside_context(
    query: int, key: int, of_context: bool, block: int, window: int | None = None, sink: int = 0, first: int = 0,
    first_block: int | None = None,
) -> bool:  # fmt: skip
    """The rule where earlier blocks stand in a context of their own."""
    if key == -1:
        return False
    own = block_of(query, block, first, first_block)
    if of_context:
        return key < own[0] and sees(query, key, block, window, sink, first, first_block)
    return block_of(key, block, first, first_block) == own


def spread(frames: Sequence[Sequence[bool]], tokens: int) -> Tensor:
    """bool [Fq, Fk] as lists -> [Fq tokens, Fk tokens]."""
    return torch.tensor([[s for s in row for _ in range(tokens)] for row in frames for _ in range(tokens)])


# Arithmetic


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, counts: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention; q, k, v [B, T, H, D], seen bool [B, Tq, Tk], counts [B, Tk] -> out, logsumexp [B, H, Tq].

    A key that occurs n times is repeated n times; a query that sees nothing gives 0.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    outs, lses = [], []
    for b in range(q.shape[0]):
        keep = torch.arange(k.shape[1])
        if counts is not None:
            keep = keep.repeat_interleave(counts[b].long())
        row = torch.ones(q.shape[1], len(keep), dtype=torch.bool) if seen is None else seen[b][:, keep]
        some = row.any(0)
        keep, row = keep[some], row[:, some]  # a key that nobody sees may be anything
        scores = torch.einsum("qhd,khd->hqk", q[b], k[b, keep]) * scale
        scores = scores.masked_fill(~row, -math.inf)
        highest = scores.amax(-1, keepdim=True) if len(keep) else scores.new_full((*scores.shape[:2], 1), -math.inf)
        weights = torch.exp(scores - highest.masked_fill(highest == -math.inf, 0).detach())
        total = weights.sum(-1, keepdim=True)
        shares = weights / torch.where(total == 0, 1, total)
        outs.append(torch.einsum("hqk,khd->qhd", shares, v[b, keep]))
        lses.append((highest.masked_fill(highest == -math.inf, 0).detach() + total.log())[..., 0])
    return torch.stack(outs), torch.stack(lses)


def cancelling_terms(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, counts: Tensor | None, scale: float | None, dout: Tensor,
    dlse: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sizes of what the gradients of q and k of ``attend`` are differences of, [B, Tq, H, D] and [B, Tk, H, D].

    ds = p (dout . v - (dout . out - dlse)): with one key the two are equal, and only their rounding is left of them.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = attend(q, k, v, seen, counts, scale)
    used = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool) if seen is None else seen
    if counts is not None:
        used = used & (counts > 0)[:, None]
    k, v = (x.masked_fill(~used.any(1)[..., None, None], 0) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores if counts is None else scores + counts.clamp(min=1).log()[:, None, None]
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).masked_fill(~used[:, None], 0)
    dp = torch.einsum("bqhd,bkhd->bhqk", dout.abs(), v.abs())
    delta = (dout * out).abs().sum(-1).transpose(1, 2) + (torch.zeros_like(lse) + dlse).abs()
    ds = p * (dp + delta[..., None]) * abs(scale)
    return torch.einsum("bhqk,bkhd->bqhd", ds, k.abs()), torch.einsum("bhqk,bqhd->bkhd", ds, q.abs())


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def per_frame(x: Tensor, tokens: int) -> Tensor:
    """[B, F, C] -> [B, F tokens, C]: what belongs to a frame, told to each of its tokens."""
    return x.repeat_interleave(tokens, 1)


def rope_turns(
    frames: Sequence[int], rows: int, columns: int, head_dim: int, theta: float = 10000.0
) -> list[list[complex]]:
    """For each token the unit complex number of each pair of a head, in Python's float64."""
    pairs = head_dim // 2
    third = pairs // 3
    turns = []
    for frame in frames:
        for y in range(rows):
            for x in range(columns):
                token = []
                for position, n in ((frame, pairs - 2 * third), (y, third), (x, third)):
                    for i in range(n):
                        angle = position / theta ** (i / n)
                        token.append(complex(math.cos(angle), math.sin(angle)))
                turns.append(token)
    return turns


def rope(x: Tensor, frames: Sequence[int], rows: int, columns: int, theta: float = 10000.0) -> Tensor:
    """x [T, H, D]: adjacent numbers as one complex number, turned."""
    turns = rope_turns(frames, rows, columns, x.shape[-1], theta)
    real = torch.tensor([[t.real for t in token] for token in turns], dtype=torch.float64).to(x.dtype)[:, None]
    imag = torch.tensor([[t.imag for t in token] for token in turns], dtype=torch.float64).to(x.dtype)[:, None]
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * real - x[..., 1::2] * imag
    out[..., 1::2] = x[..., 0::2] * imag + x[..., 1::2] * real
    return out
