"""One model, several sessions: the thread that makes their blocks in turns, and the one that encodes them.

The session that runs dry first has its turn first, with others where that pays (:mod:`.turns`); the whole videos of
:mod:`.jobs` have the time that is left. Torch works in the generating thread alone. A session is admitted if its
predicted memory is free.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from pathlib import Path
from typing import Any

import torch

from ..common.settings import own_settings
from ..config import ExecutionConfig
from ..models.video_model import VideoModel
from ..planning.free_memory import free_bytes
from ..schedule.plan import Group
from . import protocol
from .admission import Admission
from .dormant import RETRY_AFTER
from .encoding import Encoding, Saving
from .jobs import Jobs
from .keeper import Keeper, bring_back
from .live import REWIND_BYTES, LiveVideo, Piece, example, task_list
from .metrics import Metrics
from .protocol import ProtocolMessage, Refusal, StartMessage
from .session import HAS_X264, Connection, ViewerSession, hash_token, new_fragments
from .spool import SUFFIX
from .turns import Turns

log = logging.getLogger("hiar.serve")

MOST_COMMANDS = 32
"""Messages of one session that wait for the generating thread."""
PROGRESS_EVERY = 0.1  # seconds
LOOK_AGAIN = 5.0  # seconds
JOB_PATIENCE = 5.0
"""Seconds after which a whole video has a turn even if viewers are waiting."""


@dataclass
class Limits:
    """max_sessions: at once, kept ones among them. keep: seconds that one is kept without a connection.
    batch_sessions: that share a turn; None: as many as pay.
    """

    max_sessions: int = 8
    keep: float = 60.0
    batch_sessions: int | None = None
    rewind_bytes: int = REWIND_BYTES


@dataclass
class Scheduler:
    """Start it with :meth:`start`, end it with :meth:`stop`; all other methods may be called from any thread.

    model, execution   as :class:`hiar_model.VideoPipeline` takes them
    folder             for the spools of sessions; those of no session are deleted at the start
    keeper             what of sessions lies on disk
    new_saving         what :class:`.protocol.Save` writes to
    jobs               whole videos, made in the time that sessions leave
    free               free bytes of the device, for tests
    """

    model: VideoModel
    execution: ExecutionConfig
    folder: Path
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    keeper: Keeper = field(default_factory=Keeper)
    new_saving: Callable[[ViewerSession], Saving] | None = None
    jobs: Jobs | None = None
    free: Callable[[Any], int | None] = free_bytes

    def __post_init__(self) -> None:
        self.lock = threading.Condition()
        self.sessions: dict[str, ViewerSession] = {}
        self.tasks: list[Callable[[], None]] = []  # for the generating thread, first of all
        self.stopping = self.draining = False
        self.job_turn = 0.0
        self.turns = Turns(self.limits.batch_sessions)
        self.admission = Admission(self.model, self.execution, self.free)
        self.encoding = Encoding(self.lock, self.metrics, lambda: len(self.sessions), self._fail)
        self.thread = threading.Thread(target=self._run, name="hiar-generate", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sessions = {session.id: session for session in self.keeper.restore(self.folder)}
        self.metrics.sessions.set(len(self.sessions))
        self.metrics.dormant.set_function(lambda: len(self.keeper.dormant))
        self.thread.start()
        self.call(self._prepare).result()

    def _prepare(self) -> None:
        """Do what is done once, so that the first viewer need not wait for it: predict, load the text encoder, and make
        a block, for which a GPU compiles kernels. With Wan on a CPU a block takes minutes, and nothing is compiled.
        """
        start = StartMessage(protocol.VERSION, example(self.model))
        try:
            for order in protocol.LIVE_ORDERS:  # predictions are kept; a new one takes a second
                self.admission.predicted(replace(start, order=order))
            self.model.encode_text(start.prompt)
            if self.model.world is None and self.model.device.type == "cpu":
                return
            self.admission.admit(start, 0, 0)
            video = LiveVideo(self.model, self.execution, start, rewind_bytes=0)
            piece = video.make()
            if piece is not None and HAS_X264:
                new_fragments(video).fragment(piece.frames, 0)
        except (ValueError, FloatingPointError) as error:
            log.warning("no block was made yet: %s", error)

    # From the network

    def full(self) -> int | None:
        """Seconds after which to try again, if there is no place for another session; None: there is one."""
        with self.lock:
            if self.draining:
                return 10
            return self._retry_after() if len(self.sessions) >= self.limits.max_sessions else None

    def _retry_after(self) -> int:
        now = time.monotonic()
        waits = [self._keep(s) - (now - s.detached) for s in self.sessions.values() if s.detached is not None]
        return max(1, round(min(waits, default=10.0)))

    def _require_running(self) -> None:
        if self.draining:
            raise Refusal("shutting_down", "the server is being stopped", closes=True, retry_after=10)

    def open(self, start: StartMessage, connection: Connection, client: str) -> ViewerSession:
        """A new session; :class:`.protocol.ReadyMessage` follows, or :class:`.protocol.Refused`.

        Raises:
            Refusal: all places are taken, or the server is being stopped.
        """
        if not start.prompt:
            raise Refusal("bad_prompt", "prompt is missing: say what to show")
        with self.lock:
            self._require_running()
            if len(self.sessions) >= self.limits.max_sessions:
                most = f"all {self.limits.max_sessions} places are taken"
                raise Refusal("busy", most, closes=True, retry_after=self._retry_after())
            session = ViewerSession(start, connection, client)
            self.sessions[session.id] = session
            self.tasks.append(lambda: self._begin(session))
            self.lock.notify_all()
        return session

    def resume(self, token: str, after: int | None, connection: Connection) -> ViewerSession:
        """The session of a token, with this connection in place of the one that it had; what was sent and not
        acknowledged is sent again.

        Raises:
            Refusal: there is none.
        """
        with self.lock:
            self._require_running()
            digest = hash_token(token)
            session = next((s for s in self.sessions.values() if compare_digest(s.token_hash, digest)), None)
            if session is None or (session.ready is None and session.stored is None):
                self.keeper.dormant.require_awake(digest)
                line = "no session has this token: it never had, or was not kept so long"
                raise Refusal("unknown_session", line, closes=True)
            if after is not None:
                session.require_sent("after", after)
            session.hang_up(1008, "the session goes on in another connection")
            session.connection, session.detached = connection, None
            if session.stored is not None:
                session.token, session.after = token, after
                self.tasks.append(lambda: self._begin(session))
            else:
                session.take_up(after, connection)
                self.keeper.progressed(session)
            self.lock.notify_all()
        return session

    def detach(self, session: ViewerSession, connection: Connection) -> None:
        """A connection is lost: its session is kept for a while, or ends."""
        with self.lock:
            if session.connection is not connection:
                return  # another has taken over
            session.connection, session.detached = None, session.detached or time.monotonic()
            if not self.limits.keep or (session.ready is None and session.stored is None):
                self._remove(session)
            self.lock.notify_all()

    def silent(self, session: ViewerSession, connection: Connection, silent: bool) -> None:
        """A client does not answer, or does again: meanwhile its session waits as one without a connection."""
        with self.lock:
            if session.connection is connection:
                now = time.monotonic()
                session.detached, session.possible = (now if silent else None), now
                self.lock.notify_all()

    def handle(self, session: ViewerSession, message: ProtocolMessage) -> None:
        """A message of the client; :class:`Refusal` if it cannot be."""
        now = time.monotonic()
        with self.lock:
            if session.gone:
                raise Refusal("not_started", "the session has ended", closes=True)
            if isinstance(message, protocol.Ack):
                session.require_sent("seq", message.seq)
                if session.stored is None:  # else ``after`` has said it
                    session.acknowledge(message.seq, now)
                    self.keeper.progressed(session)
            elif isinstance(message, protocol.Pause | protocol.Play):
                playing = isinstance(message, protocol.Play)
                if playing and not session.playing:
                    session.possible = now
                    session.clock.restart()
                session.playing = playing
                self.keeper.progressed(session)
                session.post(protocol.StateMessage(playing))
            elif isinstance(message, protocol.StopMessage):
                session.post(protocol.Ended("stopped", session.frames))
                session.hang_up(1000, "stopped")
                self._remove(session)
            elif isinstance(message, protocol.StartMessage):
                raise Refusal("already_started", "the session has started: stop it, or connect anew")
            elif len(session.commands) >= MOST_COMMANDS:
                raise Refusal("too_many", f"{MOST_COMMANDS} messages of this session are waiting")
            else:
                session.commands.append(message)
            self.lock.notify_all()

    def drain(self, timeout: float = 30.0) -> None:
        """Take no more; finish the block that is being made, put sessions and whole videos away, tell the viewers."""
        with self.lock:
            self.draining = True
            for session in list(self.sessions.values()):
                outlives = self.keeper.outlives(session)
                session.post(protocol.Ended("drained", session.frames, outlives))
                session.hang_up(1012, "the server is being stopped")
                session.connection = None
                if not outlives:
                    self._remove(session)
        self.stop(timeout)

    def stop(self, timeout: float = 30.0) -> None:
        """End both threads."""
        with self.lock:
            self.stopping = self.draining = True
            self.lock.notify_all()
        if self.thread.is_alive():
            self.thread.join(timeout)
            if self.thread.is_alive():
                log.warning("the block in hand is left unfinished: it takes more than %g s", timeout)
        self.encoding.stop()

    # The generating thread

    def _run(self) -> None:
        with own_settings():
            while (work := self._next()) is not None:
                work()
                del work  # it may hold a session that has gone
            self.keeper.close(list(self.sessions.values()))
            if self.jobs is not None:
                self.jobs.close()

    def _next(self) -> Callable[[], None] | None:
        """What to do next; waits for it. None: the end."""
        with self.lock:
            while True:
                now = time.monotonic()
                self._expire(now)
                if self.tasks:
                    return self.tasks.pop(0)
                if self.stopping:
                    return None
                for session in self.sessions.values():
                    if session.video is not None and session.commands:
                        message = session.commands.popleft()
                        return lambda: self._command(session, message)
                hungry = [session for session in self.sessions.values() if session.hungry]
                if self.jobs is not None and (not hungry or now - self.job_turn > JOB_PATIENCE) and self.jobs.waiting():
                    self.job_turn = now
                    return self.jobs.work
                if hungry:
                    sessions = self.turns.choose(hungry, now)
                    return lambda: self._turn(sessions)
                self.lock.wait(self._next_expiry(now))

    def _next_expiry(self, now: float) -> float:
        """Seconds after which to look again, for what no message tells."""
        left = [s.detached + self._keep(s) - now for s in self.sessions.values() if s.detached is not None]
        return max(0.01, min([*left, self.keeper.dormant.next_expiry(now), LOOK_AGAIN]))

    def _keep(self, session: ViewerSession) -> float:
        """Seconds that it waits for its viewer: what an earlier server said holds, if that was longer."""
        return max(self.limits.keep, session.keep)

    def _expire(self, now: float) -> None:
        for session in list(self.sessions.values()):
            if session.detached is not None and now - session.detached >= self._keep(session) and not self.draining:
                session.hang_up(1008, "no answer for too long")
                self._remove(session)
        if not self.draining:
            self.keeper.expire(now)

    def _remove(self, session: ViewerSession) -> None:
        """Forget a session; its rings go in the generating thread, its file in the encoding one."""
        if session.gone:
            return
        session.gone = True
        self.sessions.pop(session.id, None)
        session.unacked.clear()
        session.recent.clear()
        session.commands.clear()
        session.connection = None
        self.keeper.ended(session)
        self.metrics.sessions.set(len(self.sessions))

        def clear() -> None:
            session.video = None
            self.encoding.clear(session)

        self.tasks.append(clear)
        self.lock.notify_all()

    def _fail(self, session: ViewerSession, refusal: Refusal, close: bool = True) -> None:
        """Tell the client, and end the session."""
        self.metrics.refusals.labels(refusal.code).inc()
        with self.lock:
            session.post(refusal.message)
            if close:
                session.hang_up(1013 if refusal.code == "busy" else 1011, refusal.code)
                self._remove(session)

    def _begin(self, session: ViewerSession) -> None:
        """Make the rollout of a new session, or of a stored one that goes on."""
        if session.gone or session.video is not None or session.connection is None:
            return
        try:
            with self.lock:
                others = [s.promised for s in self.sessions.values() if s is not session]
                after = session.after
            session.reserved = self.admission.admit(session.start, self.limits.rewind_bytes, sum(others))
            video = LiveVideo(
                self.model, self.execution, session.start, self._reporter(session), self.limits.rewind_bytes,
                self.keeper.states(session),
            )  # fmt: skip
            if session.stored is not None:
                bring_back(session, video, after)
            if HAS_X264:
                session.fragments = new_fragments(video)
                session.open_spool(self.folder / f"{session.id}{SUFFIX}", session.next_block(after))
            elif session.start.format == "mp4":
                raise Refusal("bad_value", "format must be webp or jpeg: this server's FFmpeg has no x264")
        except Exception as error:
            if isinstance(error, Refusal):
                refusal = error
            else:
                log.exception("session %s: cannot start", session.id)
                refusal = Refusal("failed", "the video cannot be made")
                if session.stored is not None or isinstance(error, torch.OutOfMemoryError):
                    refusal = Refusal("busy", "the video cannot be made now", retry_after=10)
            if session.stored is not None and refusal.code not in ("busy", "failed"):  # what another server could do
                refusal = Refusal("cannot_resume", str(refusal), retry_after=RETRY_AFTER)
            refusal.closes = True
            put_back = session.stored is not None and refusal.code != "failed"
            return self._put_back(session, refusal) if put_back else self._fail(session, refusal)
        with self.lock:
            if session.gone:
                return self.keeper.ended(session)
            if after != session.after:  # the client came back again, with another chunk
                return self.tasks.append(lambda: self._begin(session))
            ready = session.begun(video, self.limits.keep)
            self.keeper.changed(session)
            session.post(ready)
            self.metrics.sessions.set(len(self.sessions))

    def _put_back(self, session: ViewerSession, refusal: Refusal) -> None:
        """A stored session cannot go on now."""
        with self.lock:
            session.post(refusal.message)
            session.hang_up(1013, refusal.code)
            session.connection, session.detached, session.reserved = None, time.monotonic(), 0

    def _reporter(self, session: ViewerSession) -> Callable[[Group], None]:
        last = 0.0

        def report(group: Group) -> None:
            nonlocal last
            now = time.monotonic()
            video = session.video
            if video is None or now - last < PROGRESS_EVERY:
                return
            last = now
            with self.lock:
                session.post(protocol.Progress(task_list(group), video.started, video.block))

        return report

    def _turn(self, sessions: Sequence[ViewerSession]) -> None:
        """One block of each of the sessions."""
        self.metrics.turns.observe(len(sessions))
        for session, outcome in self.turns.make(sessions):
            if isinstance(outcome, FloatingPointError):
                self._fail(session, Refusal("failed", str(outcome), closes=True))
            elif isinstance(outcome, Exception):
                log.error("session %s: failed", session.id, exc_info=outcome)
                self._fail(session, Refusal("failed", "the video failed; the server's log says why", closes=True))
            else:
                self._deliver(session, outcome)

    def _deliver(self, session: ViewerSession, piece: Piece | None) -> None:
        video = session.video
        assert video is not None
        with self.lock:
            if piece is not None and not session.gone:
                session.speeds.append((time.monotonic(), len(piece.frames)))
                self.encoding.put(session, piece)
            if video.complete and not session.complete:
                session.complete = True
                self.encoding.complete(session)

    def _command(self, session: ViewerSession, message: ProtocolMessage) -> None:
        """A message that touches the video."""
        video = session.video
        if video is None or session.gone:
            return
        try:
            if isinstance(message, protocol.ChangePrompt):
                at = video.change_prompt(message.text)
                with self.lock:
                    self.keeper.changed(session)
                    session.post(protocol.PromptScheduled(*at))
            elif isinstance(message, protocol.Seek | protocol.Fork):
                if isinstance(message, protocol.Fork):
                    at = video.fork(message.block, message.prompt)
                else:
                    at = video.seek(message.block)
                with self.lock:
                    session.jumped(at.block, time.monotonic())
                    self.keeper.changed(session)
                    self.encoding.cut(session, at.block)
                    session.post(protocol.Moved(at.block, at.frame, at.prompt_index, message.type, at.prompt))
            elif isinstance(message, protocol.Save):
                self._save(session)
        except Refusal as refusal:
            refusal.about = message.type
            self._fail(session, refusal, close=False)
        except Exception:
            log.exception("session %s: failed", session.id)
            self._fail(session, Refusal("failed", "the video failed; the server's log says why", closes=True))

    def _save(self, session: ViewerSession) -> None:
        assert session.video is not None
        if not session.video.block:
            raise Refusal("nothing_yet", "nothing to save: no block has been made")
        if self.new_saving is None:
            raise Refusal("disk_full", "this server saves nothing: it has no --data")
        about = session.describe()
        self.encoding.save(session, self.new_saving(session), about)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function in the generating thread; for what needs torch."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self.lock:
            self._require_running()
            self.tasks.append(run)
            self.lock.notify_all()
        return future
