"""Visible keys as ranges of slots, computed once on the host, for libraries that know no frame ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .mask import BlockCausal, visible_with_context

Run = tuple[int, int]
"""Neighbouring frame slots, or tokens, [start, stop)."""
Ids = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Group:
    """Neighbouring query frames ``queries`` that see the same keys: runs of slots of the context, then of their own."""

    queries: Run
    context: tuple[Run, ...]
    own: tuple[Run, ...]


@dataclass(frozen=True)
class AttentionLayout:
    """The visible keys of every query as ranges of slots; hashable: equal layouts run the same calls.

    Attributes:
        frame_tokens: tokens of a slot.
        rows: the groups of each batch row; one entry where all rows are alike.
    """

    frame_tokens: int
    rows: tuple[tuple[Group, ...], ...]

    def select(self, start: int, stop: int, first: int = 0) -> AttentionLayout:
        """The layout of batch items start..stop and of queries from slot ``first`` on."""
        rows = self.rows if len(self.rows) == 1 else self.rows[start:stop]
        if first:
            rows = tuple(
                tuple(
                    Group((max(0, g.queries[0] - first), g.queries[1] - first), g.context, g.own)
                    for g in row
                    if g.queries[1] > first
                )
                for row in rows
            )
        return AttentionLayout(self.frame_tokens, _alike(rows))


def attention_layout(
    mask: BlockCausal, q_frames: Ids, kv_frames: Ids, context_frames: Ids | None = None, *, rows: int | None = None
) -> AttentionLayout:
    """Compute what :func:`hiar_kernels.attention` with the same mask and ids sees; one layout serves all layers.

    Args:
        q_frames, kv_frames, context_frames: frame ids [B or 1, slots], -1 empty; lists, or tensors, which are read on
            the host: a device waits for that.
        rows: B; default: the most that the ids and the mask's windows have.
    """
    if not isinstance(mask, BlockCausal):
        raise ValueError(f"attention_layout: mask must be a BlockCausal, got {type(mask).__name__}")
    with _disable_current_modes():  # real values, even under FakeTensorMode or a counting mode
        q, kv = _tensor(q_frames), _tensor(kv_frames)
        context = None if context_frames is None else _tensor(context_frames)
        windows = len(mask.window_frames) if isinstance(mask.window_frames, tuple) else 1
        counts = [windows, *(x.shape[0] for x in (q, kv, context) if x is not None)]
        rows = max(counts) if rows is None else rows
        if any(n not in (1, rows) for n in counts):
            raise ValueError(f"attention_layout: windows and ids have {counts} rows; each must have 1 or {rows}")
        if context is None:
            visible, split = mask.visible(q, kv, rows), 0
        else:
            visible, split = visible_with_context(mask, q, kv, context, rows), context.shape[1]
        return AttentionLayout(mask.frame_tokens, _alike(tuple(_groups(row, split) for row in visible.tolist())))


def _tensor(ids: Ids) -> Tensor:
    try:
        return ids.cpu() if isinstance(ids, Tensor) else torch.tensor(ids, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"attention_layout: frame ids must be [[number, ...], ...], got {ids!r}") from error


def _alike(rows: tuple[tuple[Group, ...], ...]) -> tuple[tuple[Group, ...], ...]:
    return rows[:1] if len(set(rows)) == 1 else rows


def _groups(visible: list[list[bool]], split: int) -> tuple[Group, ...]:
    groups, start = [], 0
    for stop in range(1, len(visible) + 1):
        if stop < len(visible) and visible[stop] == visible[start]:
            continue
        groups.append(Group((start, stop), _runs(visible[start][:split]), _runs(visible[start][split:])))
        start = stop
    return tuple(groups)


def _runs(slots: list[bool]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for slot, visible in enumerate(slots):
        if visible and runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        elif visible:
            runs.append((slot, slot + 1))
    return tuple(runs)


def _share(tokens: int, rows: int) -> int:
    """The n-th part of the tokens, rounded down, so that no single one is left: cuDNN may refuse a call of one key."""
    share, left = divmod(tokens, rows)
    return share - 1 if left == 1 and share > 1 else share


class EvenCut(NamedTuple):
    """Rows of ``length`` tokens, one every ``step`` tokens from ``first`` on; ``rest``: the runs that no row covers."""

    first: int
    step: int
    length: int
    rest: tuple[Run, ...]


@functools.lru_cache(maxsize=1024)  # every layer asks for the same one
def even_cut(runs: tuple[Run, ...], rows: int) -> EvenCut | None:
    """The keys of a call as so many rows of one launch: as many of the tokens as equal rows at equal distances cover.

    Either the rows are equal shares of one run, or each begins a run: that is how rings lie whose window has moved on.

    Args:
        runs: of tokens, in order and apart.

    Returns:
        None where there are fewer tokens than rows.
    """
    shares = [(start, _share(stop - start, rows)) for start, stop in runs]
    cuts = [EvenCut(start, share, share, ()) for start, share in shares]
    for i, (first, _) in enumerate(runs):
        for last, _ in runs[i + 1 :]:
            step, uneven = divmod(last - first, rows - 1) if rows > 1 else (0, 1)
            starts = [first + row * step for row in range(rows)]
            room = [max((stop - s for start, stop in runs if start <= s < stop), default=0) for s in starts]
            cuts.append(EvenCut(first, step, 0 if uneven else min(step, *room), ()))
    best = max(cuts, key=lambda cut: cut.length, default=None)
    if best is None or not best.length:
        return None
    rest: list[Run] = []
    for start, stop in runs:
        for row in range(rows):
            begin, end = (best.first + row * best.step + n for n in (0, best.length))
            if start <= begin < stop:
                rest += [(start, begin)] if start < begin else []
                start = end
        rest += [(start, stop)] if start < stop else []
    return best._replace(rest=tuple(rest))
