"""Random visibility rules and rings, from any random.Random: seeded, or hypothesis's st.randoms(), which shrinks."""

from __future__ import annotations

from random import Random

from hiar_kernels import EMPTY, BlockCausal

TOKENS = 2  # of a frame


def any_rule(random: Random) -> tuple[BlockCausal, dict, tuple[int | None, ...], list[int]]:
    """(rule, the same as arguments of the oracle without the window, one window for each row, frames of a video)."""
    block = random.randint(1, 4)
    first_block = random.choice([None, random.randint(1, block)])
    sink = random.randint(0, 3)
    first = random.choice([0, 1, 5, 1_000_000])
    rows = random.randint(1, 3)
    windows = tuple(random.choice([None, random.randint(sink + block, sink + 3 * block + 2)]) for _ in range(rows))
    shared = random.choice([True, False])
    windows = windows[:1] * rows if shared else windows
    rule = BlockCausal(TOKENS, block, windows[0] if shared else windows, sink, first, first_block)
    arguments = {"block": block, "sink": sink, "first": first, "first_block": first_block}
    return rule, arguments, windows, list(range(first, first + random.randint(1, 14)))


def any_ring(random: Random, frames: list[int]) -> list[int]:
    """Some of the frames, each once, in any order of slots, with empty ones among them; at least one slot."""
    slots = random.sample(frames, random.randint(0, len(frames))) + [EMPTY] * random.randint(0, 3)
    random.shuffle(slots)
    return slots or [EMPTY]
