"""One viewer's session: what was sent and not acknowledged, when the viewer runs dry, and its figures.

The scheduler's lock guards all of it, except ``video``, which is of the generating thread alone.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av

from ..io.fragments import FragmentEncoder, pictures
from .live import LiveVideo, Piece
from .metrics import resident_bytes
from .protocol import VERSION, BlockMessage, Ended, ProtocolMessage, ReadyMessage, Refusal, StartMessage, Stats
from .spool import Spool

log = logging.getLogger("hiar.serve")

WINDOW = 4
"""Chunks that are made ahead of the viewer's last ack."""
MEASURED = 500
"""Intervals between chunks of which the percentiles are."""
RECENT = 16
"""Chunks over which the speed is measured."""
HAS_X264 = "libx264" in av.codecs_available
"""Whether FFmpeg can make an mp4."""


@dataclass
class Connection:
    """Where a session sends.

    deliver: called from any thread with texts and bytes, in order; those of one call stay together.
    close: with a code of RFC 6455 and a reason, after what was delivered.
    """

    deliver: Callable[..., None]
    close: Callable[[int, str], None]


@dataclass
class Clock:
    """When a viewer who plays at ``fps`` from the first chunk on runs dry.

    misses: chunks that came later than that, although they could have been made in time.
    """

    fps: float
    begun: float | None = None
    frames: int = 0
    misses: int = 0

    def due(self) -> float:
        """The time at which the viewer has played all that came; minus infinity before the first chunk."""
        return float("-inf") if self.begun is None else self.begun + self.frames / self.fps

    def arrived(self, frames: int, now: float, possible: float) -> bool:
        """A chunk came; ``possible``: since when there was room for it. Returns whether it was late."""
        late = self.begun is not None and now > max(self.due(), possible + frames / self.fps)
        self.misses += late
        if self.begun is None or now > self.due():
            self.begun, self.frames = now, 0
        self.frames += frames
        return late

    def restart(self) -> None:
        """The viewer has nothing to play any more, after a pause or a jump."""
        self.begun, self.frames = None, 0


@dataclass
class Chunk:
    """A chunk that the viewer has not acknowledged."""

    seq: int
    block: BlockMessage
    payload: bytes

    def send(self, connection: Connection) -> None:
        """The message, and the frames behind it."""
        connection.deliver(self.block.to_json(), self.seq.to_bytes(8, "big") + self.payload)


@dataclass
class ViewerSession:
    """A session; ``start`` is the client's request.

    detached   since when no client answers; the connection may still be there
    jumps      (seq, block) of the first chunk, and of the first after each jump that the client may not know of
    stored     (block, prompt): the prompts of a session of the server before this one, until it goes on in this one
    keep       seconds that its client was told it is kept without a connection
    """

    start: StartMessage
    connection: Connection | None
    client: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    opened: float = field(default_factory=time.monotonic)
    token_hash: str = ""
    detached: float | None = None
    video: LiveVideo | None = None
    ready: ReadyMessage | None = None
    clock: Clock = field(default_factory=lambda: Clock(1.0))
    fragments: FragmentEncoder | None = None
    spool: Spool | None = None
    commands: deque[ProtocolMessage] = field(default_factory=deque)
    unacked: deque[Chunk] = field(default_factory=deque)
    recent: deque[Chunk] = field(default_factory=lambda: deque(maxlen=WINDOW))  # the last acked
    pending: list[Piece] = field(default_factory=list)  # blocks that are being encoded
    seq: int = -1  # of the last chunk
    acked: int = -1  # the last one that the client has acknowledged
    jumps: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    stored: list[tuple[int, str]] | None = None
    keep: float = 0.0
    after: int | None = None  # that of the client which asks for the stored session
    block: int = 0  # the next one that is sent
    playing: bool = True
    complete: bool = False
    gone: bool = False
    possible: float = field(default_factory=time.monotonic)  # since when the next block may be made
    first_chunk: float | None = None
    last_chunk: float | None = None
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED))
    speeds: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))  # (made at, frames)
    reserved: int = 0  # bytes that it may still take

    def __post_init__(self) -> None:
        self.token_hash = hash_token(self.token)

    @property
    def hungry(self) -> bool:
        """Whether its next block may be made now."""
        if self.video is None or self.gone or not self.playing or self.complete or self.detached is not None:
            return False
        return len(self.unacked) + len(self.pending) < WINDOW

    @property
    def frames(self) -> int:
        """Frames of the blocks that were sent."""
        return 0 if self.video is None else self.video.frame_of(self.block)

    @property
    def promised(self) -> int:
        """Bytes of what it reserved that it has not taken yet."""
        if self.video is None:
            return self.reserved
        return self.video.rewind_bytes - sum(state.nbytes for state in list(self.video.states))

    def awaits(self, piece: Piece) -> bool:
        """Whether a block is still to be sent."""
        return not self.gone and any(one is piece for one in self.pending)

    def post(self, message: ProtocolMessage) -> None:
        """Send a message, if there is a connection."""
        if self.connection is not None:
            self.connection.deliver(message.to_json())

    def hang_up(self, code: int, reason: str) -> None:
        """Close the connection, if there is one."""
        if self.connection is not None:
            self.connection.close(code, reason)

    def encode(self, piece: Piece) -> bytes:
        """The payload of a block. An mp4 of the video is kept in the spool; a full disk ends that, not the video."""
        fragment = None
        if self.spool is not None:
            try:
                fragment = self.spool.encode(piece.frames, piece.first_frame)
            except OSError as error:
                log.warning("session %s goes on, but can be saved no more: %s", self.id, error)
                self.spool.remove()
                self.spool = None
        if self.start.format != "mp4":
            return pictures(piece.frames, self.start.format)
        if fragment is None:
            assert self.fragments is not None
            fragment = self.fragments.fragment(piece.frames, piece.first_frame)
        return fragment

    def arrived(self, piece: Piece, payload: bytes, now: float, sessions: int) -> tuple[float | None, bool]:
        """A chunk is ready: number it, measure it, send it. Returns (seconds since the one before, whether late);
        None: the client had held it back.
        """
        self.pending = [one for one in self.pending if one is not piece]
        frames, interval = len(piece.frames), None
        late = self.clock.arrived(frames, now, self.possible)
        if self.first_chunk is None:
            self.first_chunk = now - self.opened
        elif self.last_chunk is not None and self.possible <= self.last_chunk:
            interval = now - self.last_chunk
            self.intervals.append(interval)
        self.last_chunk = now
        self.seq, self.block = self.seq + 1, piece.block + 1
        stats = self.stats(sessions, len(self.unacked) + 1)
        block = BlockMessage(self.seq, piece.block, piece.first_frame, frames, piece.prompt_index, piece.prompt, stats)
        chunk = Chunk(self.seq, block, payload)
        self.unacked.append(chunk)
        if self.connection is not None:
            chunk.send(self.connection)
        return interval, late

    def acknowledge(self, seq: int, now: float) -> None:
        """Forget chunks up to ``seq``."""
        was = self.hungry
        self.acked = max(self.acked, seq)
        while len(self.jumps) > 1 and self.jumps[1][0] <= self.acked:
            del self.jumps[0]
        while self.unacked and self.unacked[0].seq <= seq:
            self.recent.append(self.unacked.popleft())
        if self.hungry and not was:
            self.possible = now

    def jumped(self, block: int, now: float) -> None:
        """Forget the blocks from this one on; it comes next."""
        self.unacked, self.recent = (
            deque((chunk for chunk in chunks if chunk.block.block < block), chunks.maxlen)
            for chunks in (self.unacked, self.recent)
        )
        self.pending = [piece for piece in self.pending if piece.block < block]
        self.block = min(block, self.block)
        self.jumps = [jump for jump in self.jumps if jump[0] <= self.seq] + [(self.seq + 1, self.block)]
        self.complete, self.possible, self.last_chunk = False, now, None
        self.clock.restart()
        self.speeds.clear()

    def require_sent(self, name: str, seq: int) -> None:
        """Refusal unless there was a chunk of this ``seq``."""
        last = self.seq
        if self.stored is not None:  # no more than a window was sent since
            last = max(self.acked, self.jumps[-1][0] - 1) + WINDOW
        if seq > last:
            raise Refusal("bad_value", f"{name} must be at most {last}, the last chunk, got {seq}")

    def next_block(self, after: int | None) -> int:
        """The block that follows for a client whose last chunk is ``after`` (None: the last one acknowledged)."""
        last = max(self.acked, -1 if after is None else after)
        block = last + 1
        for seq, first in self.jumps:
            block = first + last + 1 - seq if seq <= last else min(block, first)
        return block

    def begun(self, video: LiveVideo, keep: float) -> ReadyMessage:
        """The video can be made now; a stored session goes on with the first chunk behind ``after``."""
        resumed = self.stored is not None
        if resumed:
            self.block = self.next_block(self.after)
            self.seq = self.acked = max(self.acked, -1 if self.after is None else self.after)
            self.jumps, self.stored = [(self.seq + 1, self.block)], None
            self.opened = self.possible = time.monotonic()
        self.clock, self.video, self.keep = Clock(video.run.fps), video, keep
        config, mime, init = video.run.config, None, None
        height, width = video.run.model.pixel_size
        if self.start.format == "mp4":
            assert self.fragments is not None
            mime, init = self.fragments.mime, base64.b64encode(self.fragments.init).decode()
            height, width = self.fragments.size
        self.ready = ReadyMessage(
            VERSION, self.id, self.token, Path(video.model.name).name, self.start.prompt, self.start.seed, config.order,
            len(config.steps), self.start.format, video.run.fps, video.run.num_frames, width, height,
            block_frames(video), mime, init, WINDOW, keep, resumed, self.playing, self.block,
            video.plan(2 * len(config.steps) + 4), video.prompts_from(self.block),
        )  # fmt: skip
        return self.ready

    def take_up(self, after: int | None, connection: Connection) -> None:
        """The client has come back, in a new connection."""
        self.possible = time.monotonic()
        if after is not None:
            self.acknowledge(after, time.monotonic())
        assert self.ready is not None and self.video is not None
        again = [] if after is None else [chunk for chunk in self.recent if chunk.seq > after]
        chunks = [*again, *self.unacked]
        prompts = self.video.prompts_from(chunks[0].block.block if chunks else self.block)
        self.ready = replace(self.ready, resumed=True, playing=self.playing, block=self.block, scheduled=prompts)
        self.post(self.ready)
        for chunk in chunks:
            chunk.send(connection)
        if self.complete and not self.pending:
            self.post(Ended("complete", self.frames))

    def open_spool(self, path: Path, block: int) -> None:
        """Where what is shown is kept on disk, up to this block; without it the video cannot be saved."""
        if self.fragments is None:
            return
        with suppress(OSError):
            self.spool = Spool(path, self.fragments)
            if self.spool.blocks >= block:
                return self.spool.truncate(block)
            self.spool.remove()
        self.spool = None

    def stats(self, sessions: int, queue: int) -> Stats:
        """The live figures."""
        recent = list(self.speeds)
        spent = sum(b[0] - a[0] for a, b in pairwise(recent))
        fps = sum(frames for _, frames in recent[1:]) / spent if spent > 0 else 0.0
        ordered = sorted(self.intervals)
        p50, p99 = (ordered[int(part * (len(ordered) - 1) + 0.5)] if ordered else None for part in (0.5, 0.99))
        return Stats(
            round(fps, 2), round(self.first_chunk or 0.0, 4), p50, p99, self.clock.misses, resident_bytes(), queue,
            sessions,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The record of the video so far."""
        assert self.video is not None
        lines = self.video.lines()
        about = {name: value for name, value in self.video.run.metadata.items() if name != "command"}
        return {**about, "prompt": lines[0][1], "prompts": lines if len(lines) > 1 else None}


def hash_token(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def block_frames(video: LiveVideo) -> int:
    """Frames of each block but the first."""
    return video.frame_of(2) - video.frame_of(1)


def new_fragments(video: LiveVideo) -> FragmentEncoder:
    """The mp4 encoder of a video's blocks."""
    return FragmentEncoder(video.run.fps, *video.run.model.pixel_size)
