"""The barrier protocol of the Hopper attention kernels, simulated: three warp roles, each at its own pace.

The walks of producer and consumers are those of ``hiar_kernels/attention/gluon_fwd.py`` and of
``hiar_kernels/attention_fp8/gluon_fwd.py``, where a tile's scale is written and read with it; a tile may be read only
while it holds the block that is wanted, and nobody may wait for ever.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

pytestmark = pytest.mark.cpu

Segment = tuple[int, int, int]  # first block, last block + 1, masked blocks of the tile


class Barrier:
    """An mbarrier: completes a phase after ``count`` arrivals and all announced bytes."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self) -> None:
        assert self.pending > 0, "more arrivals than the barrier counts"
        self.pending -= 1
        self._turn()

    def expect(self) -> None:
        self.bytes += 1
        self.arrive()

    def complete(self) -> None:
        self.bytes -= 1
        self._turn()

    def _turn(self) -> None:
        if not self.pending and not self.bytes:
            self.phase ^= 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        return self.phase != parity


@dataclass
class CTA:
    """Barriers, and what each shared tile holds: a block's number, or None while a copy is under way."""

    stages: int = 2
    empty_count: int = 2
    q_full: list[Barrier] = field(default_factory=lambda: [Barrier(1) for _ in range(2)])
    q_empty: list[Barrier] = field(default_factory=lambda: [Barrier(1) for _ in range(2)])
    tiles: dict[tuple[str, int], object] = field(default_factory=dict)
    reading: dict[tuple[str, int], int] = field(default_factory=dict)
    copies: list[tuple[tuple[str, int], object, Barrier]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.k_full, self.v_full = ([Barrier(1) for _ in range(self.stages)] for _ in range(2))
        self.k_empty, self.v_empty = ([Barrier(self.empty_count) for _ in range(self.stages)] for _ in range(2))

    def copy(self, place: tuple[str, int], what: object, barrier: Barrier) -> None:
        barrier.expect()
        assert not self.reading.get(place), f"{place} is overwritten while it is read"
        self.tiles[place] = None
        self.copies.append((place, what, barrier))

    def land(self, i: int) -> None:
        place, what, barrier = self.copies.pop(i)
        self.tiles[place] = what
        barrier.complete()

    def read(self, place: tuple[str, int], what: object) -> None:
        assert self.tiles.get(place) == what, f"{place} holds {self.tiles.get(place)}, not {what}"
        self.reading[place] = self.reading.get(place, 0) + 1

    def done(self, place: tuple[str, int]) -> None:
        self.reading[place] -= 1


Wait = tuple[Barrier, int] | None  # None: a moment in which others may go ahead


def producer(cta: CTA, segments: list[Segment]) -> Iterator[Wait]:
    n = 0

    def fetch(kind: str, block: object, n: int) -> Iterator[Wait]:
        stage, phase = n % cta.stages, n // cta.stages & 1
        full, empty = (cta.k_full, cta.k_empty) if kind == "k" else (cta.v_full, cta.v_empty)
        yield empty[stage], phase ^ 1
        cta.copy((kind, stage), block, full[stage])

    for s, (lo, hi, _) in enumerate(segments):
        yield from fetch("k", (s, lo), n)
        for w in range(2):
            yield cta.q_empty[w], s & 1 ^ 1
            cta.copy(("q", w), s, cta.q_full[w])
        for j in range(lo + 1, hi):
            yield from fetch("k", (s, j), n + 1)
            yield from fetch("v", (s, j - 1), n)
            n += 1
        yield from fetch("v", (s, hi - 1), n)
        n += 1


class Consumer:
    """One of the two; ``walk`` is its kernel's."""

    def __init__(self, cta: CTA, w: int) -> None:
        self.cta, self.w = cta, w

    def start(self, kind: str, block: object, n: int) -> Iterator[Wait]:
        cta = self.cta
        yield (cta.k_full if kind == "k" else cta.v_full)[n % cta.stages], n // cta.stages & 1
        cta.read((kind, n % cta.stages), block)

    def release(self, kind: str, n: int) -> Iterator[Wait]:
        yield None
        cta = self.cta
        cta.done((kind, n % cta.stages))
        (cta.k_empty if kind == "k" else cta.v_empty)[n % cta.stages].arrive()

    def in_turn(self, s: int, j: int, n: int) -> Iterator[Wait]:
        """A block whose two products run one after the other."""
        for kind in "kv":
            yield from self.start(kind, (s, j), n)
            yield from self.release(kind, n)

    def beside(self, s: int, j: int, n: int) -> Iterator[Wait]:
        """Q K of block j, number n, beside P V of the one before."""
        yield from self.start("k", (s, j), n)
        yield from self.start("v", (s, j - 1), n - 1)
        yield from self.release("k", n)
        yield from self.release("v", n - 1)

    def walk(self, segments: list[Segment]) -> Iterator[Wait]:
        n = 0
        for s, (lo, hi, masked) in enumerate(segments):
            yield self.cta.q_full[self.w], s & 1
            self.cta.read(("q", self.w), s)
            first = max(min(masked, hi) - lo, 1)
            for j in range(lo, lo + first - 1):
                yield from self.in_turn(s, j, n)
                n += 1
            yield from self.start("k", (s, lo + first - 1), n)
            yield from self.release("k", n)
            for j in range(lo + first, hi):
                n += 1
                yield from self.beside(s, j, n)
            self.cta.done(("q", self.w))
            self.cta.q_empty[self.w].arrive()
            yield from self.start("v", (s, hi - 1), n)
            yield from self.release("v", n)
            n += 1


class Consumer8(Consumer):
    """Of attention_fp8: all masked blocks in turn, then the whole ones, if there are any."""

    def walk(self, segments: list[Segment]) -> Iterator[Wait]:
        n = 0
        for s, (lo, hi, masked) in enumerate(segments):
            yield self.cta.q_full[self.w], s & 1
            self.cta.read(("q", self.w), s)
            first = max(min(masked, hi) - lo, 0)
            for j in range(lo, lo + first):
                yield from self.in_turn(s, j, n)
                n += 1
            if lo + first < hi:
                yield from self.start("k", (s, lo + first), n)
                yield from self.release("k", n)
                for j in range(lo + first + 1, hi):
                    n += 1
                    yield from self.beside(s, j, n)
                yield from self.start("v", (s, hi - 1), n)
                yield from self.release("v", n)
                n += 1
            self.cta.done(("q", self.w))
            self.cta.q_empty[self.w].arrive()


def simulate(
    seed: int, segments: list[Segment], kind: type[Consumer] = Consumer, stages: int = 2, empty_count: int = 2
) -> None:
    rng, cta = random.Random(seed), CTA(stages, empty_count)
    roles = {0: producer(cta, segments), 1: kind(cta, 0).walk(segments), 2: kind(cta, 1).walk(segments)}
    waits: dict[int, Wait] = dict.fromkeys(roles)
    speed = [rng.choice((0.05, 0.5, 1.0)) for _ in range(4)]
    while roles:
        ready = [r for r in roles if waits[r] is None or waits[r][0].passed(waits[r][1])]  # type: ignore[index]
        choices = [(r, speed[r]) for r in ready] + [(3, speed[3])] * bool(cta.copies)
        assert choices, f"deadlock: {len(roles)} roles wait"
        one = rng.choices([c for c, _ in choices], [weight for _, weight in choices])[0]
        if one == 3:
            cta.land(rng.randrange(len(cta.copies)))
            continue
        try:
            waits[one] = next(roles[one])
        except StopIteration:
            del roles[one]
    assert not cta.copies
    assert not any(cta.reading.values())


def some_segments(rng: random.Random) -> list[Segment]:
    found = []
    for _ in range(rng.randint(1, 6)):
        lo = rng.randint(0, 4)
        hi = lo + rng.randint(1, 7)
        found.append((lo, hi, rng.randint(0, hi + 1)))
    return found


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize(("kind", "stages"), [(Consumer, 2), (Consumer8, 2), (Consumer8, 3)])
def test_no_deadlock_and_no_tile_overwritten(kind, stages, seed):
    rng = random.Random(seed)
    for i in range(40):
        simulate(1000 * seed + i, some_segments(rng), kind, stages)


@pytest.mark.parametrize("kind", [Consumer, Consumer8])
def test_the_simulation_notices_a_stage_freed_by_one_consumer_alone(kind):
    with pytest.raises(AssertionError, match=r"overwritten|holds|more arrivals"):
        for seed in range(50):
            simulate(seed, [(0, 9, 1)], kind, empty_count=1)
