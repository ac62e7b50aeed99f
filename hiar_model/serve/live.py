"""One live video: block by block, with prompts that change, and a way back to earlier blocks. Knows no network.

All methods are called from one thread, which is where torch works.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ExecutionConfig
from ..io.video import Frames
from ..models.video_model import VideoModel
from ..pipelines.decode import Decoding
from ..pipelines.prompt_schedule import LivePrompts
from ..pipelines.video_pipeline import VideoOptions, VideoRun
from ..rollout.session_io import load_session, session_tensors
from ..rollout.state_io import DamagedFile
from ..schedule.plan import Group
from .protocol import PromptList, Refusal, StartMessage, TaskList
from .states import SessionStates, StateFile, least_useful, prompts_key

log = logging.getLogger("hiar.serve")

CPU = torch.device("cpu")
REWIND_BYTES = 64 << 20
"""Bytes of the states that a video keeps for its way back; without one, it makes itself again from its start."""
MOST_CHANGES = 1000
"""Changes of the prompt in one video."""


def example(model: VideoModel) -> str:
    """A prompt that the model can show."""
    return "a cat walks over a wet street" if model.world is None else "a red circle moving right"


class Piece(NamedTuple):
    """A block: ``frames`` uint8 [f, H, W, 3], the first of which is ``first_frame`` of the video."""

    block: int
    first_frame: int
    frames: Frames
    prompt_index: int
    prompt: str


class Position(NamedTuple):
    """Where a prompt takes effect, or where the video goes on: a block, its first frame, and its prompt."""

    block: int
    frame: int
    prompt_index: int
    prompt: str


class RewindState(NamedTuple):
    """The state before ``block``. started: last block that has begun. frames: made before it."""

    block: int
    started: int
    frames: int
    rollout: dict[str, Any]
    decoder: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        groups = [self.rollout["cache"], self.rollout["latents"], self.rollout["history"], self.decoder or {}]
        return sum(x.nbytes for tensors in groups for x in tensors.values() if isinstance(x, Tensor))


class LiveVideo:
    """A video that goes on as long as :meth:`make` is called.

    Args:
        model, execution: as :class:`hiar_model.VideoPipeline` takes them.
        start: the client's request. on_group: called with each group of tasks that has run.
        rewind_bytes: for states of earlier blocks. disk: further ones; None: none.

    Attributes:
        block: the next one to come. num_blocks: of the whole video; None: endless.

    Raises:
        Refusal: a prompt or a video that the model cannot make.

    Example:
        >>> from hiar_model import ExecutionConfig, load_video_model
        >>> request = StartMessage(1, "a red circle moving right")
        >>> video = LiveVideo(load_video_model("toy", "cpu"), ExecutionConfig(), request)
        >>> [video.make().frames.shape for _ in range(2)]
        [(3, 32, 32, 3), (3, 32, 32, 3)]
        >>> video.fork(1, "a blue square moving up")
        Position(block=1, frame=3, prompt_index=1, prompt='a blue square moving up')
    """

    run: VideoRun

    def __init__(
        self,
        model: VideoModel,
        execution: ExecutionConfig,
        start: StartMessage,
        on_group: Callable[[Group], None] | None = None,
        rewind_bytes: int = REWIND_BYTES,
        disk: SessionStates | None = None,
    ) -> None:
        self.model, self.execution, self.on_group, self.rewind_bytes = model, execution, on_group, rewind_bytes
        self.disk = disk
        try:
            self.prompts = LivePrompts(start.prompt, model.encode_text)
        except ValueError as error:
            raise Refusal("bad_prompt", str(error)) from error
        self.states: list[RewindState] = []
        try:
            me = weakref.proxy(self)  # no reference cycle: a dropped video frees its caches at once
            self.options = VideoOptions(
                None, height=start.height, width=start.width, num_frames=start.num_frames, seed=start.seed,
                order=start.order, prompts=self.prompts, on_progress=lambda *_: me._ran(),
            )  # fmt: skip
            self._begin()
        except ValueError as error:
            raise Refusal("bad_video", str(error)) from error
        self.num_blocks = self.run.rollout.num_blocks

    def _begin(self) -> None:
        if "run" in vars(self):
            del self.run  # first: memory has no room for two rings
        self.run = VideoRun(self.model, self.execution, self.options, blockwise=True)
        self._sized, self._plan = self.run.model, self.run.rollout.plan  # the same whenever it begins anew
        self.block = self._target = 0
        self._open()

    def _open(self) -> None:
        self._blocks = iter(self.run)
        self._groups = self.run.rollout.plan.groups(self.run.rollout.num_blocks)
        for _ in range(self.run.rollout.groups_done):
            next(self._groups)
        self._counted = self.run.rollout.groups_done

    @property
    def complete(self) -> bool:
        """Whether all blocks are made."""
        return self.num_blocks is not None and self.block >= self.num_blocks

    @property
    def started(self) -> int:
        """The last block that has begun, -1 before the first."""
        return self.run.rollout.last_started_block

    def frame_of(self, block: int) -> int:
        """The first frame of a block."""
        return self._sized.pixel_frames(self._plan.block_frames(block)[0])

    def make(self) -> Piece | None:
        """The next block; None: it was one on the way to where :meth:`seek` went, or the video is complete.

        Raises:
            FloatingPointError: latents that are not finite, or black frames.
        """
        frames = next(self._blocks, None)
        if frames is None:
            return None
        block, self.block = self.block, self.block + 1
        piece = Piece(block, self.frame_of(block), frames, self.prompts.index(block), self.prompts.prompt(block))
        self._keep_state()
        return None if block < self._target else piece

    def _ran(self) -> None:
        """After a group of tasks (and after a block was decoded)."""
        done = self.run.rollout.groups_done
        while self._counted < done:
            self._counted += 1
            group = next(self._groups)
            if self.on_group is not None:
                self.on_group(group)

    def change_prompt(self, prompt: str) -> Position:
        """Another prompt from the first block on that has not begun; :class:`Refusal` if the model cannot show it, or
        all blocks have begun.
        """
        block = max(self.started + 1, self._target)
        if self.num_blocks is not None and block >= self.num_blocks:
            raise Refusal("no_such_block", f"all {self.num_blocks} blocks have begun with their prompts")
        return self._change(prompt, block)

    def _change(self, prompt: str, block: int) -> Position:
        if len(self.prompts.changes) >= MOST_CHANGES:
            raise Refusal("too_many", f"a video has at most {MOST_CHANGES} prompts")
        try:
            self.prompts.change(prompt, block)
        except ValueError as error:
            raise Refusal("bad_prompt", str(error)) from error
        if self.disk is not None:
            self.disk.drop_from(block)
        return self._position(block)

    def _position(self, block: int) -> Position:
        return Position(block, self.frame_of(block), self.prompts.index(block), self.prompts.prompt(block))

    def prompts_from(self, block: int) -> PromptList:
        """The prompt of a block, and those that begin later. Any thread may ask."""
        changes = self.prompts.changes
        shown: PromptList = [[first, self.frame_of(first), n, prompt] for n, (first, prompt, _) in enumerate(changes)]
        return shown[sum(first <= block for first, *_ in changes) - 1 :]

    def seek(self, block: int) -> Position:
        """Go on with an earlier block: the same prompts, the same frames; :class:`Refusal` for a later one."""
        self._require_made(block)
        self._go_back(block, below=block + 1)
        return self._position(block)

    def fork(self, block: int, prompt: str) -> Position:
        """Go on with an earlier block and another prompt, as if the prompt had changed there."""
        self._require_made(block)
        if self.num_blocks is not None and block >= self.num_blocks:
            raise Refusal("no_such_block", f"block must be below {self.num_blocks}, got {block}")
        position = self._change(prompt, block)
        self._go_back(block, below=block)
        return position

    def _require_made(self, block: int) -> None:
        if block > max(self.block, self._target):
            raise Refusal("no_such_block", f"block must be from 0 to {self.block}, the next to come, got {block}")

    def restore(self, changes: Iterable[tuple[int, str]], block: int) -> None:
        """Go on with a block of an earlier process, from its states on disk: its prompts were those of ``changes``, as
        (first block, prompt).

        Raises:
            Refusal: its states are damaged, or cannot be read here.
            ValueError: the model does not know the prompts.
        """
        for first, prompt in changes:
            self.prompts.change(prompt, first)
        lost = self._go_back(block)
        if lost is not None and not self.block:
            line = "the session cannot go on: its state on the disk"
            if isinstance(lost, DamagedFile):
                raise Refusal("failed", f"{line} is damaged", closes=True)
            raise Refusal("cannot_resume", f"{line} cannot be used by this server, whose log says why", closes=True)

    def _go_back(self, block: int, below: int | None = None) -> ValueError | None:
        """To the last state at or before ``block`` in which no block from ``below`` on has begun.

        Returns:
            Why one on the disk was of no use; :class:`DamagedFile` only if all of those were damaged.
        """
        self._blocks.close()  # type: ignore[attr-defined]
        self.states = [s for s in self.states if s.block <= block and (below is None or s.started < below)]
        lost: ValueError | None = None
        for file in self._on_disk(block, below):
            try:
                self._load(file)
                break
            except ValueError as error:
                log.error("a state is of no use: %s", " ".join(str(error).split()))
                if isinstance(error, DamagedFile):  # else a later start may be able to read it
                    self.disk.drop([file])  # type: ignore[union-attr]
                if lost is None or isinstance(lost, DamagedFile):
                    lost = error
        else:
            if not self.states:
                self._begin()
            else:
                state = self.states[-1]
                self.run.rollout.load_state_dict(state.rollout)
                if state.decoder is not None:
                    self.run.decoding.stateful.load_state_dict(state.decoder)  # type: ignore[union-attr]
                self.run.frames_done, self.block = state.frames, state.block
                self._open()
        self._target = block
        return lost

    def _key(self, started: int) -> str:
        return prompts_key(((first, prompt) for first, prompt, _ in self.prompts.changes), started)

    def _on_disk(self, block: int, below: int | None) -> Iterator[StateFile]:
        """States on disk that are nearer than those in memory, the nearest first."""
        nearest = self.states[-1].block if self.states else 0
        for file in () if self.disk is None else self.disk.before(block, below):
            if file.block > nearest and file.key == self._key(file.started):  # another: of a fork that was killed
                yield file

    def _load(self, file: StateFile) -> None:
        run = self.run
        run.decoding = run.decoding or Decoding(run.model.decoder())
        load_session(file.path, run.rollout, run.decoding.stateful, run.facts())
        self.block, run.frames_done = file.block, self.frame_of(file.block)
        self._open()

    def save_state(self) -> None:
        """Have the state before the next block on the disk."""
        if self.disk is not None and self.run.decoding is not None and not self.complete:
            tensors = session_tensors(self.run.rollout, self.run.decoding.stateful, self.run.facts(), CPU)
            self.disk.save(self.block, self.started, self._key(self.started), *tensors)

    def _keep_state(self) -> None:
        """Keep the state before the next block: of recent ones many, of old ones few."""
        run = self.run
        if self.complete:
            return
        size = run.rollout.cache.nbytes
        if self.disk is not None and self.disk.due(self.block, size):
            self.save_state()
        if size > self.rewind_bytes:  # before the copy, for which there may be no memory
            self.rewind_bytes, self.states = 0, []
        if not self.rewind_bytes:
            return
        decoder = getattr(run.decoding.stateful, "state_dict", lambda: None)()  # type: ignore[union-attr]
        state = RewindState(self.block, self.started, run.frames_done, run.rollout.state_dict(), decoder)
        if state.nbytes > self.rewind_bytes:
            self.rewind_bytes, self.states = 0, []
            return
        self.states.append(state)
        while sum(one.nbytes for one in self.states) > self.rewind_bytes:
            del self.states[least_useful([state.block for state in self.states])]

    def lines(self) -> list[list[Any]]:
        """The prompts as [seconds, prompt], as the record of a video has them."""
        last = max(self.block - 1, 0)
        return [[self.frame_of(b) / self.run.fps, prompt] for b, prompt, _ in self.prompts.changes if b <= last]

    def plan(self, blocks: int) -> list[TaskList]:
        """The groups of tasks of the first blocks, for a drawing."""
        few = blocks if self.num_blocks is None else min(blocks, self.num_blocks)
        return [task_list(group) for group in self._plan.groups(few)]


def task_list(group: Group) -> TaskList:
    """A group of tasks as a message has it."""
    return [[task.kind, task.step, task.block] for item in group for task in item]
