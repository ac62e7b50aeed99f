"""Prompts over time: a script of lines "seconds prompt", and when a block shows which.

    # a circle that turns into a square
    0     a red circle moving right
    12.5  a blue square moving up

A prompt takes over at the first block that begins at its time or later: blocks are made whole, with one prompt each.
Times count from the start of the video; blank lines and those that begin with # are skipped. The prompt of the time
before the first line may be given apart.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..io.files import refuse_stand_in
from ..schedule.plan import Plan
from ..schedule.simulator import simulate


@dataclass(frozen=True)
class Line:
    """``prompt`` from ``seconds`` on; ``where`` it is written, for messages."""

    seconds: float
    prompt: str
    where: str


@dataclass(frozen=True)
class Script:
    """Prompts by rising time.

    Raises:
        ValueError: no line, a time that is no number, negative or not after the one before, no prompt; names the line.
    """

    lines: tuple[Line, ...]
    name: str = "script"
    file: str | None = None  # that it was read from

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError(f'{self.name} has no prompts: give lines "seconds prompt", the first at 0')
        before = -1.0
        for line in self.lines:
            if not math.isfinite(line.seconds) or line.seconds < 0:
                raise ValueError(f"{line.where}: a time is a number of seconds from 0 on, got {line.seconds:g}")
            if not line.prompt:
                raise ValueError(f'{line.where}: no prompt behind the time {line.seconds:g}: write "seconds prompt"')
            if line.seconds <= before:
                raise ValueError(f"{line.where}: times must rise, {line.seconds:g} comes behind {before:g}")
            before = line.seconds

    def from_start(self, prompt: str | None = None) -> Script:
        """The script from 0 s on, where ``prompt`` is that of the time before its first line.

        Raises:
            ValueError: there is no prompt at 0 s, or there are two.
        """
        first = self.lines[0]
        if first.seconds and not prompt:
            raise ValueError(f"{first.where}: the first prompt must be at 0 s, got {first.seconds:g}")
        if not first.seconds and prompt:
            raise ValueError(f"{first.where} is a prompt at 0 s: leave out the other one, {prompt!r}")
        return Script((Line(0.0, prompt, "the prompt"), *self.lines), self.name, self.file) if prompt else self

    @classmethod
    def parse(cls, text: str, name: str = "script") -> Script:
        """From lines "seconds prompt"; ``name`` is told in messages."""
        lines = []
        for number, raw in enumerate(text.splitlines(), 1):
            content = raw.strip()
            if not content or content.startswith("#"):
                continue
            time, prompt = [*content.split(maxsplit=1), ""][:2]
            where = f"{name} line {number}"
            try:
                seconds = float(time)
            except ValueError:
                raise ValueError(
                    f'{where}: begins with {time!r}, not with a time: write "seconds prompt", such as "12.5 {prompt}"'
                ) from None
            lines.append(Line(seconds, prompt.strip(), where))
        return cls(tuple(lines), name)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Script:
        """From a file in UTF-8."""
        refuse_stand_in(Path(path))
        try:
            script = cls.parse(Path(path).read_text(encoding="utf-8-sig"), Path(path).name)
            return replace(script, file=os.fspath(path))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from error

    @classmethod
    def of(cls, prompts: Iterable[tuple[float, str]], name: str = "prompts") -> Script:
        """From pairs (seconds, prompt)."""
        return cls(tuple(Line(float(t), p.strip(), f"{name} entry {i}") for i, (t, p) in enumerate(prompts, 1)), name)

    def at(self, seconds: float) -> int:
        """Which line's prompt is on at a time."""
        return bisect_right([line.seconds for line in self.lines], seconds) - 1


@dataclass(frozen=True)
class Show:
    """A script on the blocks of one video; call it with a block number for the text, as :class:`Rollout` does.

    script: the prompts. texts: of each line, equal prompts share one tensor. start: seconds at which a block begins.
    """

    script: Script
    texts: tuple[Tensor, ...]
    start: Callable[[int], float]

    @classmethod
    def encoded(
        cls,
        script: Script,
        encode: Callable[[str], Tensor],
        start: Callable[[int], float],
        num_blocks: int | None = None,
    ) -> Show:
        """Encode every prompt ahead, so that a wrong one is told before work starts.

        Args:
            encode: prompt -> [B or 1, L, text_dim]; ValueError for one that cannot be shown.
            start: block -> seconds, rising. num_blocks: of the video; None: endless.

        Raises:
            ValueError: names the line: no prompt at 0 s, one that is refused, one whose time is behind the last block's
                start, or one that another takes over from within the same block.
        """
        script = script.from_start()
        texts: dict[str, Tensor] = {}
        for line in script.lines:
            try:
                texts[line.prompt] = texts[line.prompt] if line.prompt in texts else encode(line.prompt)
            except ValueError as error:
                raise ValueError(f"{line.where}: {error}") from error
        show = cls(script, tuple(texts[line.prompt] for line in script.lines), start)
        firsts = [show.first_block(i, num_blocks) for i in range(len(script.lines))]
        for line, first, following in zip(script.lines, firsts, [*firsts[1:], -1], strict=True):
            if first is None:
                assert num_blocks is not None
                last = f"the last block begins at {start(num_blocks - 1):g} s"
                raise ValueError(f"{line.where}: {line.seconds:g} s is too late to show, {last}")
            if first == following:
                raise ValueError(
                    f"{line.where}: never shows, the next prompt takes over at the same block ({first}, "
                    f"from {start(first):g} s): a block has one prompt"
                )
        return show

    def __call__(self, block: int) -> Tensor:
        return self.texts[self.script.at(self.start(block))]

    def first_block(self, line: int, num_blocks: int | None = None) -> int | None:
        """The block at which a line takes over; None if the video ends before it."""
        seconds, below, above = self.script.lines[line].seconds, -1, 1
        while self.start(above) < seconds:
            below, above = above, 2 * above
            if num_blocks is not None and below >= num_blocks:
                return None
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if self.start(middle) < seconds else (below, middle)
        return above if num_blocks is None or above < num_blocks else None

    def told(self) -> list[str]:
        """A line for each prompt: when it was asked for, and from when on it shows."""
        found = []
        for i, line in enumerate(self.script.lines):
            block = self.first_block(i)
            assert block is not None
            found.append(f"{line.seconds:g} s {line.prompt!r}: shows from {self.start(block):g} s (block {block})")
        return found


@dataclass(frozen=True)
class PromptDelay:
    """From a change of the prompt while a video is made to the end of the first block that shows it, at worst (just
    behind the start of a block, which keeps the prompt it began with), in the steady state.

    blocks    blocks that are finished in that time, the first to show the new prompt among them
    forwards  the time, in tasks of equal length
    recache   cache tasks that policy "recache" adds before it shows, at most; None: those of all earlier blocks
    """

    blocks: int
    forwards: float
    recache: int | None = 0

    def __str__(self) -> str:
        more = "those of all earlier blocks" if self.recache is None else str(self.recache)
        more = "" if self.recache == 0 else f" and {more} to cache its context again"
        return f"a new prompt shows at worst in block {self.blocks} from now, after {self.forwards:g} forwards{more}"


def prompt_delay(plan: Plan, ranks: int = 1, on_new_text: str = "keep") -> PromptDelay:
    """What an order, on so many ranks of a pipeline, makes a live change of the prompt wait.

    Raises:
        ValueError: the order begins every block before the first is finished.
    """
    if plan.order == "step_first":
        raise ValueError(
            "order step_first begins every block before one is finished: a prompt that changes on the way never shows; "
            "use stream, wavefront or block_first"
        )
    limit = ranks + 1 if ranks > 1 else None  # as a pipeline holds them
    timeline = simulate(plan, plan.prefix_blocks + 4 * plan.steps + 20, ranks, in_flight=limit)
    begun, finished = timeline.begun, timeline.finished
    block = timeline.num_blocks - 2 * plan.steps - 4  # away from both ends
    blocks = sum(begun[block] < end <= finished[block + 1] for end in finished.values())
    again: int | None = 0
    if on_new_text == "recache":
        again = None
        if None not in plan.window_frames:
            of_step = [len(plan.seen(s, 10**6)) for s in range(plan.steps)]  # windows are full there
            again = max(of_step) if plan.graph == "clean" else sum(of_step)
    return PromptDelay(blocks, timeline.prompt_delay or 0.0, again)
