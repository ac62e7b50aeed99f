"""Whole videos as jobs: made a block at a time when no viewer waits, and gone on with after a crash.

Each has a folder: its blocks as lossless fragments, every few blocks a session file, at the end its record and an mp4,
of the frames that `hiar generate` encodes, in the same way.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from ..config import ExecutionConfig
from ..io.atomic import discard
from ..io.files import SESSION
from ..io.fragments import FragmentEncoder
from ..io.video import Frames as FrameArray
from ..models.video_model import VideoModel
from ..pipelines.prompt_schedule import EncodedPromptSchedule, PromptSchedule
from ..pipelines.video_pipeline import VideoOptions, VideoRun, rollout_config
from ..rollout.state_io import DamagedFile
from ..schedule.plan import Plan
from .admission import Admission
from .protocol import LIVE_ORDERS, Frames, OneOf, Pixels, Prompt, Refusal, Seed, StartMessage
from .spool import ShortSpool, Spool, Transcoding, write_metadata
from .store import Store

log = logging.getLogger("hiar.serve")

MOST_WAITING = 100
"""Videos that wait or are being made."""
CHECKPOINT_EVERY = 10
"""Blocks between session files."""
RETRY_AFTER = 20.0
"""Seconds until a video that met a full disk, or too little memory, is tried again."""
LARGEST_SPOOL = 64 << 30
"""Bytes of the lossless fragments of one video."""
FRAMES_AT_ONCE = 24
"""Frames of a complete video that are encoded before a viewer has a turn again."""
VIDEO, SPOOL = "video.mp4", "blocks.spool"


@dataclass(frozen=True)
class JobRequest:
    """A whole video.

    prompt             what to show
    prompts            or several: lists of seconds and prompt, the first at 0
    num_frames         length in frames; null: the model's
    seed, order, height, width   as in a live video
    """

    prompt: Prompt | None = None
    prompts: list[list[float | str]] | None = None
    num_frames: Frames | None = None
    seed: Seed = 0
    order: Annotated[str, OneOf(LIVE_ORDERS)] | None = None
    height: Pixels | None = None
    width: Pixels | None = None

    def options(self, session: Path | None = None) -> VideoOptions:
        """Of :class:`.VideoRun`; ValueError of one line if they cannot be."""
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give prompt, or prompts: one of the two")
        prompts = None
        if self.prompts is not None:
            if not 1 <= len(self.prompts) <= 1000 or not all(_is_line(line) for line in self.prompts):
                raise ValueError('prompts must be 1 to 1000 lists of seconds and prompt, such as [[0, "a red circle"]]')
            prompts = PromptSchedule.of(self.prompts)  # type: ignore[arg-type]
        return VideoOptions(
            self.prompt, prompts=prompts, num_frames=self.num_frames, seed=self.seed, order=self.order,
            height=self.height, width=self.width, session=session,
        )  # fmt: skip


def _is_line(line: Any) -> bool:
    if not isinstance(line, list) or len(line) != 2:
        return False
    seconds, prompt = line
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return is_number and isinstance(prompt, str) and len(prompt) <= 2000


class Jobs:
    """The videos of a store that are to be made. The scheduler calls :meth:`work` while it is :meth:`waiting`, and
    :meth:`close` at its end.

    Args:
        changed: called when the list has changed.
    """

    def __init__(
        self,
        store: Store,
        model: VideoModel,
        execution: ExecutionConfig,
        admission: Admission,
        checkpoint_every: int = CHECKPOINT_EVERY,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.model, self.execution, self.admission = store, model, execution, admission
        self.checkpoint_every, self.changed = checkpoint_every, changed
        self.lock = threading.Lock()
        self.waiting_ids = [row["id"] for status in ("running", "queued") for row in store.having(10**6, status=status)]
        self.current: VideoJob | None = None
        self.retry_at = 0.0

    # From the network

    def check(self, request: JobRequest) -> int:
        """The frames of a video that can be made; in the generating thread.

        Raises:
            Refusal: it cannot.
        """
        try:
            options = request.options()
            model = self.model.sized(options.height, options.width)
            latent_frames = model.latent_frames(options.num_frames or model.num_frames)
            plan = Plan.of(rollout_config(model, options, blockwise=True))
            if isinstance(options.prompts, PromptSchedule):
                EncodedPromptSchedule.encoded(
                    options.prompts,
                    model.encode_text,
                    lambda block: model.pixel_frames(plan.block_frames(block)[0]) / model.fps,
                    plan.block_of(latent_frames - 1) + 1,
                )
        except ValueError as error:
            raise Refusal("bad_video", str(error)) from error
        if request.prompt is not None:
            try:
                model.encode_text(request.prompt)
            except ValueError as error:
                raise Refusal("bad_prompt", str(error)) from error
        frames = model.pixel_frames(latent_frames)
        self._admit(request, frames)
        return frames

    def _admit(self, request: JobRequest, frames: int | None) -> None:
        start = StartMessage(1, "", request.seed, request.order, frames, request.height, request.width)
        self.admission.admit(start, 0, 0)

    def add(self, request: JobRequest, frames: int) -> str:
        """Put a checked video behind the others; returns its id.

        Raises:
            Refusal: too many wait.
        """
        with self.lock:
            if len(self.waiting_ids) >= MOST_WAITING:
                raise Refusal("busy", f"{MOST_WAITING} videos are waiting", retry_after=60)
            height, width = self.model.sized(request.height, request.width).pixel_size
            explicit = replace(request, num_frames=frames, height=height, width=width)  # the defaults may change
            name = self.store.add("job", asdict(explicit), frames)
            self.waiting_ids.append(name)
        self.changed()
        return name

    def remove(self, name: str) -> None:
        """Delete a video, whatever its status."""
        with self.lock:
            if name in self.waiting_ids:
                self.waiting_ids.remove(name)
        self.store.remove(name)  # the job that makes it sees that at its next block
        self.changed()

    # In the generating thread

    def waiting(self) -> bool:
        """Whether there is anything to do now."""
        if self.current is not None and self.current.name not in self.waiting_ids:
            return True  # it was deleted: its rings are in memory still
        return bool(self.waiting_ids) and time.monotonic() >= self.retry_at

    def work(self) -> None:
        """Make a block of the oldest video."""
        with self.lock:
            name = next(iter(self.waiting_ids), None)
        if self.current is not None and self.current.name != name:
            self.current = None  # it was deleted
        if name is None:
            return
        try:
            if self.current is None:
                self._open(name)
            if self.current is not None and self.current.advance():
                self._done(name, status="finished", frames=self.current.frames, seconds=self.current.seconds)
        except Exception as error:
            try:
                self._failed(name, error)
            except sqlite3.Error as full:
                self._wait(name, full)

    def _open(self, name: str) -> None:
        row = self.store.get(name)
        if row is None:
            return
        try:
            request = JobRequest(**row["request"])
            self._admit(request, request.num_frames)
            self.store.update(name, status="running", error=None)
            self.current = VideoJob(name, self.store, self.model, self.execution, request, self.checkpoint_every)
        except Refusal as refusal:
            if refusal.code == "busy":
                raise
            self._put_off(name, refusal)
        except OSError as error:
            if _is_full(error):
                raise
            self._put_off(name, error)
        except (ValueError, TypeError) as error:
            self._put_off(name, error)

    def _put_off(self, name: str, error: Exception) -> None:
        """It could be made where it was asked for: this server has other weights, or is of another version. It waits
        for the next start.
        """
        log.error("video %s waits for the next start: this server cannot make it, its status says why", name)
        message = self._line(name, error)  # may name the prompt, which the log has not
        self.store.update(name, status="queued", error=f"this server cannot make it: {message}")
        self._leave(name)

    def _failed(self, name: str, error: Exception) -> None:
        job, self.current = self.current, None
        if self.store.get(name) is None:
            return  # it was deleted, and its folder with it
        message = self._line(name, error)
        if isinstance(error, Refusal) and error.code == "busy":  # viewers have the memory now
            self.retry_at = time.monotonic() + RETRY_AFTER
            self.store.update(name, status="queued", error=message)
            return
        if _is_full(error) or isinstance(error, sqlite3.Error):
            self._wait(name, error)
            self.store.update(name, error=message)
            return
        if not isinstance(error, ValueError | FloatingPointError | OSError):
            log.exception("video %s failed", name)
            message = "the video failed; the server's log says why"
        self._done(name, status="failed", error=message)
        if job is not None:
            job.clean()

    def _line(self, name: str, error: Exception) -> str:
        """An error in one line for clients, whom the server's folders do not concern."""
        return " ".join(str(error).replace(f"{self.store.path(name)}{os.sep}", "").split())

    def _wait(self, name: str, error: Exception) -> None:
        """Nothing can be written now; the last checkpoint stands."""
        log.error("video %s waits: %s", name, " ".join(str(error).split()))
        self.current, self.retry_at = None, time.monotonic() + RETRY_AFTER

    def _done(self, name: str, **values: Any) -> None:
        self.store.update(name, **values)
        if self.current is not None:
            self.current.clean()
        self.current = None
        self._leave(name)

    def _leave(self, name: str) -> None:
        with self.lock:
            if name in self.waiting_ids:
                self.waiting_ids.remove(name)
        self.changed()

    def close(self) -> None:
        """Put the video in hand away, to go on with at the next start."""
        if self.current is not None:
            try:
                if self.current.name in self.waiting_ids:  # else it was deleted
                    self.current.checkpoint()
            except (OSError, ValueError, sqlite3.Error) as error:
                log.error("video %s goes on from its last checkpoint: %s", self.current.name, error)
            self.current.give_up()
            self.current = None


def _is_full(error: Exception) -> bool:
    """Whether it says that the disk is full."""
    numbers = {getattr(e, "errno", None) for e in (error, error.__cause__) if e is not None}
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT})


class VideoJob:
    """A video that is being made.

    frames, seconds: made so far.
    """

    def __init__(
        self, name: str, store: Store, model: VideoModel, execution: ExecutionConfig, request: JobRequest, every: int
    ) -> None:
        self.name, self.store, self.every = name, store, every
        self.folder = store.path(name)
        self.session = self.folder / SESSION
        self.options = model, execution, request
        self.transcoding: Transcoding | None = None
        for path in self.folder.glob(".*.partial*"):
            discard(path)  # of a process that was killed
        try:
            self._begin(self.session if self.session.exists() else None)
        except (DamagedFile, ShortSpool) as error:
            log.error("video %s is made from its start again: %s", name, " ".join(str(error).split()))
            self._begin(None)
        self.coming: Iterator[FrameArray] = iter(self.run)
        self.saved = self.blocks

    def _begin(self, session: Path | None) -> None:
        """Make the rollout, where the session is, and cut off what was made since."""
        model, execution, request = self.options
        self.run = VideoRun(model, execution, request.options(session), blockwise=True)
        fragments = FragmentEncoder(self.run.fps, *self.run.model.pixel_size, lossless=True)
        self.spool = Spool(self.folder / SPOOL, fragments, LARGEST_SPOOL)
        self.blocks, plan = 0, self.run.rollout.plan
        while self.run.model.pixel_frames(plan.block_frames(self.blocks)[0]) < self.run.frames_done:
            self.blocks += 1
        self.spool.truncate(self.blocks)

    @property
    def frames(self) -> int:
        return self.run.frames_done

    @property
    def seconds(self) -> float:
        return self.frames / self.run.fps

    def advance(self) -> bool:
        """Make a block, or encode a part of the complete video; returns whether it is written."""
        first = self.frames
        frames = None if self.transcoding is not None else next(self.coming, None)
        if frames is not None:
            self.spool.encode(frames, first)
            self.blocks += 1
            if self.blocks - self.saved >= self.every and self.blocks != self.run.rollout.num_blocks:
                self.checkpoint()
            return False
        if self.transcoding is None:
            self.transcoding = Transcoding(self.spool, self.folder / VIDEO)
        if not self.transcoding.advance(FRAMES_AT_ONCE):
            return False
        metadata = dict(self.run.metadata)
        if "command" in metadata:
            metadata["command"] = shlex.join([*_without_session(metadata["command"]), "--out", VIDEO, "--overwrite"])
        write_metadata(self.folder / VIDEO, self.transcoding.frames, self.run.fps, metadata)
        return True

    def checkpoint(self) -> None:
        """Everything that was made is on the disk: a process that starts anew goes on here."""
        if self.blocks == self.saved:
            return
        self.spool.sync()
        self.run.save_session(self.session)
        self.saved = self.blocks
        self.store.update(self.name, frames=self.frames)

    def give_up(self) -> None:
        """Delete the half of an mp4, if there is one."""
        if self.transcoding is not None:
            self.transcoding.discard()
            self.transcoding = None

    def clean(self) -> None:
        """Delete what only an unfinished video needs."""
        self.spool.remove()
        self.session.unlink(missing_ok=True)


def _without_session(command: list[str]) -> list[str]:
    """A command that makes the whole video, not what followed the last start of the server."""
    words = list(command)
    if "--from-session" in words:
        at = words.index("--from-session")
        del words[at : at + 2]
    return words
