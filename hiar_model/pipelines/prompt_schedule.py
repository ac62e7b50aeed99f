"""Prompts that change over time: a file of lines "seconds prompt".

    # a circle that turns into a square
    0     a red circle moving right
    12.5  a blue square moving up

A block has one prompt, so a prompt takes effect at the first block that starts at its time or later. Times count from
the start of the video; blank lines and lines that start with # are ignored. If the first line is later than 0 s, the
prompt before it is passed separately.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..common.checks import number_at_least_0, path_like
from ..io.files import read_text
from ..schedule.plan import Plan
from ..schedule.simulator import simulate


@dataclass(frozen=True)
class Line:
    """``prompt`` takes effect at ``seconds``; ``where`` names the line in error messages."""

    seconds: float
    prompt: str
    where: str


@dataclass(frozen=True)
class PromptSchedule:
    """Prompts in ascending order of time.

    Raises:
        ValueError: no lines, an illegal time or an empty prompt; names the line.

    Example:
        >>> from hiar_model import PromptSchedule
        >>> schedule = PromptSchedule.of([(0, "a red circle moving right"), (12.5, "a blue square moving up")])
        >>> schedule.at(13)
        1
    """

    lines: tuple[Line, ...]
    name: str = "prompt schedule"
    file: str | None = None  # path that it was read from

    def __post_init__(self) -> None:
        if isinstance(self.lines, str) or not all(isinstance(line, Line) for line in self.lines or ()):
            raise ValueError("PromptSchedule takes lines: use .of([(0, 'a prompt'), ...]), or .read('script.txt')")
        if not self.lines:
            raise ValueError(f'{self.name} has no prompts, expected lines "seconds prompt", the first at 0')
        before = -1.0
        for line in self.lines:
            if not math.isfinite(line.seconds) or line.seconds < 0:
                raise ValueError(f"{line.where}: time must be a number of seconds, at least 0, got {line.seconds:g}")
            if not line.prompt:
                raise ValueError(f'{line.where}: no prompt after the time {line.seconds:g}, expected "seconds prompt"')
            if line.seconds <= before:
                raise ValueError(f"{line.where}: times must ascend, got {line.seconds:g} after {before:g}")
            before = line.seconds

    def from_start(self, prompt: str | None = None) -> PromptSchedule:
        """The schedule from 0 s on; ``prompt`` is the one before its first line.

        Raises:
            ValueError: there is no prompt at 0 s, or there are two.
        """
        first = self.lines[0]
        if first.seconds and not prompt:
            raise ValueError(f"{first.where}: the first prompt must be at 0 s, got {first.seconds:g}")
        if not first.seconds and prompt:
            raise ValueError(f"{first.where} is the prompt at 0 s: leave out the other one, {prompt!r}")
        return PromptSchedule((Line(0.0, prompt, "the prompt"), *self.lines), self.name, self.file) if prompt else self

    @classmethod
    def parse(cls, source: str, name: str = "prompt schedule") -> PromptSchedule:
        """Parse lines "seconds prompt"; ``name`` appears in error messages."""
        lines = []
        for number, raw in enumerate(source.splitlines(), 1):
            content = raw.strip()
            if not content or content.startswith("#"):
                continue
            time, prompt = [*content.split(maxsplit=1), ""][:2]
            where = f"{name} line {number}"
            try:
                seconds = float(time)
            except ValueError:
                raise ValueError(
                    f'{where}: starts with {time!r}, expected "seconds prompt", such as "12.5 {prompt}"'
                ) from None
            lines.append(Line(seconds, prompt.strip(), where))
        return cls(tuple(lines), name)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PromptSchedule:
        """Read a file in UTF-8, or in UTF-16 with a byte order mark."""
        path_like("path", path, "file")
        try:
            schedule = cls.parse(read_text(path), Path(path).name)
            return replace(schedule, file=os.fspath(path))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error

    @classmethod
    def of(cls, prompts: Iterable[tuple[float, str]], name: str = "prompts") -> PromptSchedule:
        """From tuples (seconds, prompt)."""
        return cls(tuple(_entry(f"{name} entry {i}", pair) for i, pair in enumerate(prompts, 1)), name)

    def at(self, seconds: float) -> int:
        """Index of the line whose prompt is in effect at a time."""
        return bisect_right(self._times, seconds) - 1

    @cached_property
    def _times(self) -> list[float]:
        return [line.seconds for line in self.lines]


def _entry(where: str, pair: object) -> Line:
    """A tuple (seconds, prompt) as a line."""
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[1], str):
        raise ValueError(f"{where} must be (seconds, prompt), got {pair!r}")
    return Line(number_at_least_0(f"{where}: time", pair[0]), pair[1].strip(), where)


@dataclass(frozen=True)
class EncodedPromptSchedule:
    """A schedule for the blocks of one video. Call it with a block number for the prompt embeddings, as
    :class:`hiar_model.Rollout` does.

    schedule       the prompts
    prompt_embeds  of each line [B or 1, L, text_dim]; equal prompts share one tensor
    start          block -> seconds at which it starts
    """

    schedule: PromptSchedule
    prompt_embeds: tuple[Tensor, ...]
    start: Callable[[int], float]

    @classmethod
    def encoded(
        cls,
        schedule: PromptSchedule,
        encode: Callable[[str], Tensor],
        start: Callable[[int], float],
        num_blocks: int | None = None,
    ) -> EncodedPromptSchedule:
        """Encode all prompts now, so that an illegal one is refused before work starts.

        Args:
            encode: prompt -> [B or 1, L, text_dim]; raises ValueError for an illegal prompt.
            start: block -> seconds, ascending. num_blocks: of the video; None: endless.

        Raises:
            ValueError: names the line: no prompt at 0 s, an illegal prompt, a time after the start of the last block,
                or a prompt that is replaced within the same block.
        """
        schedule = schedule.from_start()
        cls(schedule, (), start)._require_effects(num_blocks)  # before encoding, which may take a second each
        embeds: dict[str, Tensor] = {}
        for line in schedule.lines:
            try:
                embeds[line.prompt] = embeds[line.prompt] if line.prompt in embeds else encode(line.prompt)
            except ValueError as error:
                raise ValueError(f"{line.where}: {error}") from error
        return cls(schedule, tuple(embeds[line.prompt] for line in schedule.lines), start)

    def _require_effects(self, num_blocks: int | None) -> None:
        """ValueError for the first line whose prompt shows in no block."""
        lines = self.schedule.lines
        first = self.first_block(0, num_blocks)
        for i, line in enumerate(lines):
            following = self.first_block(i + 1, num_blocks) if i + 1 < len(lines) else -1
            if first is None:
                assert num_blocks is not None
                last = f"the last block starts at {self.start(num_blocks - 1):g} s"
                raise ValueError(f"{line.where}: {line.seconds:g} s is too late, {last}")
            if first == following:
                raise ValueError(
                    f"{line.where}: has no effect, the next prompt replaces it in the same block ({first}, "
                    f"from {self.start(first):g} s): a block has one prompt"
                )
            first = following

    def __call__(self, block: int) -> Tensor:
        return self.prompt_embeds[self.schedule.at(self.start(block))]

    def first_block(self, line: int, num_blocks: int | None = None) -> int | None:
        """The first block of a line's prompt; None if the video ends before it."""
        seconds, below, above = self.schedule.lines[line].seconds, -1, 1
        while self.start(above) < seconds:
            below, above = above, 2 * above
            if num_blocks is not None and below >= num_blocks:
                return None
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if self.start(middle) < seconds else (below, middle)
        return above if num_blocks is None or above < num_blocks else None

    def summary(self) -> list[str]:
        """A line of output for each prompt: its time, and the block where it takes effect."""
        lines = []
        for i, line in enumerate(self.schedule.lines):
            block = self.first_block(i)
            assert block is not None
            lines.append(f"{line.seconds:g} s {line.prompt!r}: shows from {self.start(block):g} s (block {block})")
        return lines


class LivePrompts:
    """Prompts that change while a video runs. Call it with a block number for the prompt embeddings, as
    :class:`hiar_model.Rollout` does; ``prompts=`` of :class:`.video_pipeline.VideoOptions` takes one.

    Args:
        prompt: of the first block. encode: prompt -> [B or 1, L, text_dim]; raises ValueError for an illegal prompt.

    Attributes:
        changes: (first block, prompt, embeddings) of each, ascending.

    Raises:
        ValueError: an illegal prompt.

    Example:
        >>> import torch
        >>> live = LivePrompts("a red circle", lambda prompt: torch.zeros(1, 2, 4))
        >>> live.change("a blue square", 7)
        1
        >>> [live.prompt(block) for block in (6, 7)]
        ['a red circle', 'a blue square']
    """

    def __init__(self, prompt: str, encode: Callable[[str], Tensor]) -> None:
        self.encode, self.changes = encode, [(0, prompt, encode(prompt))]

    def __call__(self, block: int) -> Tensor:
        return self.changes[self.index(block)][2]

    def index(self, block: int) -> int:
        """Which of the changes is in effect at a block."""
        return bisect_right([first for first, *_ in self.changes], block) - 1

    def prompt(self, block: int) -> str:
        """The prompt of a block."""
        return self.changes[self.index(block)][1]

    def change(self, prompt: str, block: int) -> int:
        """Another prompt from a block on, which must not have begun; changes at later blocks are forgotten.

        Returns:
            Its index.

        Raises:
            ValueError: an illegal prompt; nothing has changed.
        """
        known = next((embeds for _, same, embeds in self.changes if same == prompt), None)
        embeds = self.encode(prompt) if known is None else known
        self.changes = [*(one for one in self.changes if one[0] < block), (block, prompt, embeds)]
        return len(self.changes) - 1


@dataclass(frozen=True)
class PromptDelay:
    """Worst-case time from a live prompt change to the end of the first block that shows it, in the steady state. The
    worst case is just after a block has started, as that block keeps its prompt.

    blocks    blocks finished in that time, including the first with the new prompt
    forwards  the time, in tasks of equal duration
    recache   cache tasks that "recache" adds before it, at most; None: those of all earlier blocks
    """

    blocks: int
    forwards: float
    recache: int | None = 0

    def __str__(self) -> str:
        more = "those of all earlier blocks" if self.recache is None else str(self.recache)
        more = "" if self.recache == 0 else f" and {more} to cache its context again"
        return f"a new prompt shows at worst in block {self.blocks} from now, after {self.forwards:g} forwards{more}"


def prompt_delay(plan: Plan, ranks: int = 1, on_prompt_change: str = "keep") -> PromptDelay:
    """The delay of a live prompt change for a task order on that many pipeline ranks.

    Raises:
        ValueError: the order is step_first, which starts every block before the first is finished.
    """
    if plan.order == "step_first":
        raise ValueError(
            "order must be stream, wavefront or block_first, got step_first, which starts every block before one is "
            "finished: a live prompt change would have no effect"
        )
    limit = ranks + 1 if ranks > 1 else None  # blocks in flight of a pipeline
    timeline = simulate(plan, plan.prefix_blocks + 4 * plan.steps + 20, ranks, in_flight=limit)
    started, finished = timeline.started, timeline.finished
    block = timeline.num_blocks - 2 * plan.steps - 4  # away from both ends
    blocks = sum(started[block] < end <= finished[block + 1] for end in finished.values())
    again: int | None = 0
    if on_prompt_change == "recache":
        again = None
        if None not in plan.window_frames:
            of_step = [len(plan.seen(s, 10**6)) for s in range(plan.steps)]  # with a full window
            again = max(of_step) if plan.graph == "clean" else sum(of_step)
    return PromptDelay(blocks, timeline.prompt_delay or 0.0, again)
