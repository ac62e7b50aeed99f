"""Live sessions that outlive the server: a record of each in the store's database, its states beside it.

Every block follows from the record: what the client asked for, and at which blocks. States only shorten the way to it.
So a record is written before the client is told of what it says, and a state when there is time.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import ExecutionConfig
from ..io.atomic import discard
from ..models.video_model import VideoModel
from ..version import NOISE
from . import protocol
from .dormant import Dormant, DormantSession
from .live import LiveVideo
from .metrics import Metrics
from .protocol import StartMessage
from .session import ViewerSession
from .spool import SUFFIX
from .states import SessionStates, StateDisk
from .store import FILE, Store

log = logging.getLogger("hiar.serve")

COLUMNS = ("id", "token_hash", "made_by", "start", "prompts", "jumps", "acked", "playing", "keep")
OURS = re.compile(rf"[0-9a-f]{{16}}({re.escape(SUFFIX)})?")
"""Names of what a session has on disk."""


class Keeper:
    """Sessions that end with the server: nothing of them is written. :class:`DiskKeeper` is the other kind.

    The scheduler's lock is held in :meth:`outlives`, :meth:`changed`, :meth:`progressed`, :meth:`ended` and
    :meth:`expire`.

    Args:
        store: in whose database an earlier server may have left sessions; they are dormant here. None: there is none.
        keep: seconds that a session without a viewer is kept.

    Raises:
        ValueError: one line: the records cannot be read.
    """

    def __init__(self, store: Store | None = None, keep: float = 0.0) -> None:
        self.keep, self.lock, self.closed, self.dormant = keep, threading.Lock(), False, Dormant(self._delete)
        self.database: sqlite3.Connection | None = None
        if store is None:
            return
        self.folder = store.folder / "sessions"
        try:
            self.database = sqlite3.connect(store.folder / FILE, check_same_thread=False, isolation_level=None)
            self.database.execute("PRAGMA synchronous=NORMAL")  # whole after kill -9; acks are too many for a sync each
            self.database.execute("PRAGMA secure_delete=ON")  # no prompt stays in a page that is free
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, token_hash TEXT NOT NULL, "
                "made_by TEXT NOT NULL, start TEXT NOT NULL, prompts TEXT NOT NULL, jumps TEXT NOT NULL, "
                "acked INTEGER NOT NULL, playing INTEGER NOT NULL, keep REAL)"
            )
            there = [row[1] for row in self.database.execute("PRAGMA table_info(sessions)")]
            if "keep" not in there:  # of a version before 2026-11-29
                self.database.execute("ALTER TABLE sessions ADD COLUMN keep REAL")
            self._records()  # refuses what cannot be read
        except sqlite3.Error as error:
            raise ValueError(f"--data {store.folder}: its live sessions cannot be read: {error}") from error

    def _records(self) -> list[dict[str, Any]]:
        if self.database is None:
            return []
        rows = self.database.execute(f"SELECT {', '.join(COLUMNS)} FROM sessions ORDER BY rowid").fetchall()
        return [dict(zip(COLUMNS, row, strict=True)) for row in rows]

    def restore(self, folder: Path) -> list[ViewerSession]:
        """The sessions of the server before this one that go on. Those that do not are dormant; of others, what lies in
        the folder of their spools is deleted.
        """
        sessions = []
        for values in self._records():
            keep = max(self.keep, values["keep"] if isinstance(values["keep"], float) else 0.0)
            try:
                sessions.append(self._session(values))
                sessions[-1].keep = keep
            except (ValueError, TypeError, KeyError, protocol.Refusal) as error:
                damaged = not isinstance(error, Unsuitable)
                reason = "its record is damaged" if damaged else str(error)
                log.error("session %s does not go on here, and is kept for %g s: %s", values["id"], keep, reason)
                self.dormant.add(DormantSession(values["id"], str(values["token_hash"]), reason, damaged, keep))
        clear(folder, [*self.dormant, *(session.id for session in sessions)])
        return sessions

    def _session(self, values: dict[str, Any]) -> ViewerSession:
        """A session without a client from its record; :class:`Unsuitable` if this server cannot go on with it,
        ValueError, TypeError or KeyError for a damaged one.
        """
        raise Unsuitable("this server keeps no live sessions: it has no --data, or --state-disk 0")

    def expire(self, now: float) -> None:
        """Delete dormant sessions whose time is over."""
        self.dormant.expire(now)

    def _delete(self, name: str) -> None:
        with suppress(sqlite3.Error), self.lock:  # the next start tries again
            if self.database is not None and not self.closed:
                self.database.execute("DELETE FROM sessions WHERE id = ?", (name,))
        shutil.rmtree(self.folder / name, ignore_errors=True)
        discard(self.folder / f"{name}{SUFFIX}")

    def states(self, session: ViewerSession) -> SessionStates | None:
        """Where a session keeps states on disk."""
        return None

    def outlives(self, session: ViewerSession) -> bool:
        """Whether a session goes on after the server was started again."""
        return False

    def changed(self, session: ViewerSession) -> None:
        """A session has begun, its prompts have changed, or it goes on elsewhere: the client is told after this."""

    def progressed(self, session: ViewerSession) -> None:
        """A session was acknowledged, paused or played."""

    def ended(self, session: ViewerSession) -> None:
        """Delete what there is of a session."""

    def close(self, sessions: Iterable[ViewerSession]) -> None:
        """Save sessions at the end of the server; in the generating thread."""
        with self.lock:
            self.closed = True
            if self.database is not None:
                self.database.close()


class DiskKeeper(Keeper):
    """Keeps sessions in the folder of a store.

    Args:
        limit: bytes of states on disk. keep: as of :class:`Keeper`; 0: no session outlives the server, and states only
            serve for the way back. states: options of :class:`.states.StateDisk`.
    """

    database: sqlite3.Connection

    def __init__(
        self,
        store: Store,
        model: VideoModel,
        execution: ExecutionConfig,
        metrics: Metrics,
        limit: int,
        keep: float = 60.0,
        **states: Any,
    ) -> None:
        super().__init__(store, keep)
        self.metrics, self.records = metrics, keep > 0
        self.model, self.execution, self.warned = model, execution, False
        self.unwritten: set[str] = set()  # ids whose record is older than what the client knows
        self.disk = StateDisk(self.folder, limit, metrics, **states)

    @property
    def made_by(self) -> str:
        """What must be the same for the same pixels, beside what was asked for."""
        model = self.model
        loras = [[lora.sha256, lora.scale] for lora in model.loras]
        numbers = [str(model.dtype), self.execution.dtypes, model.device.type, NOISE]
        numbers += [model.decoded_by["sha256"]] if model.decoded_by else []
        return json.dumps([model.weights_sha256, loras, *numbers])

    def restore(self, folder: Path) -> list[ViewerSession]:
        sessions = super().restore(folder)
        for name in [*self.dormant, *(session.id for session in sessions)]:  # all of them count for the limit
            self.disk.of(name)
        return sessions

    def _session(self, values: dict[str, Any]) -> ViewerSession:
        if not self.records:
            raise Unsuitable("this server keeps no live sessions: it has --keep 0")
        return stored_session(values, self.made_by)

    def _delete(self, name: str) -> None:
        super()._delete(name)
        self.disk.remove(name)

    def states(self, session: ViewerSession) -> SessionStates | None:
        return self.disk.of(session.id)

    def outlives(self, session: ViewerSession) -> bool:
        return self.records and (session.ready is not None or session.stored is not None)

    def changed(self, session: ViewerSession) -> None:
        if not self.records or session.gone:
            return
        video = session.video
        assert video is not None
        height, width = video.run.model.pixel_size  # which the next server may have other defaults for
        start = replace(session.start, order=video.run.config.order, height=height, width=width, resume=None,
                        after=None)  # fmt: skip
        prompts = [[block, prompt] for block, prompt, _ in video.prompts.changes]
        values = (session.id, session.token_hash, self.made_by, json.dumps(asdict(start)), json.dumps(prompts),
                  json.dumps(session.jumps), session.acked, session.playing, session.keep)  # fmt: skip
        marks = ", ".join("?" * len(COLUMNS))
        self._write(session, f"INSERT OR REPLACE INTO sessions ({', '.join(COLUMNS)}) VALUES ({marks})", values)

    def progressed(self, session: ViewerSession) -> None:
        if not self.records or session.ready is None:
            return
        if session.id in self.unwritten:
            return self.changed(session)
        values = (session.acked, session.playing, session.id)
        self._write(session, "UPDATE sessions SET acked = ?, playing = ? WHERE id = ?", values)

    def ended(self, session: ViewerSession) -> None:
        self.unwritten.discard(session.id)
        if self.records:
            self._write(session, "DELETE FROM sessions WHERE id = ?", (session.id,))
        self.disk.remove(session.id)
        if session.spool is None:
            discard(self.folder / f"{session.id}{SUFFIX}")

    def _write(self, session: ViewerSession, command: str, values: tuple[Any, ...]) -> None:
        try:
            with self.lock:
                if not self.closed:
                    self.database.execute(command, values)
            self.unwritten.discard(session.id)
        except sqlite3.Error as error:
            self.unwritten.add(session.id)
            self.metrics.state_errors.inc()
            if not self.warned:
                log.warning("session %s would not outlive the server now: its record: %s", session.id, error)
            self.warned = True

    def close(self, sessions: Iterable[ViewerSession]) -> None:
        for session in sessions:
            if session.video is not None and self.outlives(session):
                try:
                    session.video.save_state()
                except Exception:
                    log.exception("session %s goes on from an earlier state", session.id)
        self.disk.close()
        super().close(sessions)


def bring_back(session: ViewerSession, video: LiveVideo, after: int | None) -> None:
    """Let the video of a session go on behind the last chunk that the client has.

    Raises:
        Refusal: it cannot.
    """
    assert session.stored is not None
    try:
        video.restore(session.stored, session.next_block(after))
    except protocol.Refusal:
        raise
    except ValueError as error:
        log.error("session %s does not go on: this model does not know its prompts", session.id)
        raise protocol.Refusal("cannot_resume", f"the session cannot go on with this model: {error}") from error


class Unsuitable(ValueError):
    """This server cannot go on with a session; another one may."""


def clear(folder: Path, names: Iterable[str]) -> None:
    """Delete spools and states of all sessions but these; what no session has written stays."""
    stay = {path for name in names for path in (name, f"{name}{SUFFIX}")}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in stay and OURS.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def stored_session(values: dict[str, Any], made_by: str) -> ViewerSession:
    """A session without a client from its record; :class:`Unsuitable` for one of another model, ValueError, TypeError
    or KeyError for a damaged one.
    """
    if values["made_by"] != made_by:
        raise Unsuitable(_difference(values["made_by"], made_by))
    start = protocol.build(StartMessage, json.loads(values["start"]))
    prompts = [(int(block), str(prompt)) for block, prompt in json.loads(values["prompts"])]
    jumps = [(int(seq), int(block)) for seq, block in json.loads(values["jumps"])]
    if not prompts or not jumps or prompts[0][0] != 0:
        raise ValueError("its record is damaged")
    session = ViewerSession(start, None, "", id=str(values["id"]), token="")
    session.token_hash, session.stored, session.jumps = str(values["token_hash"]), prompts, jumps
    session.acked, session.playing = int(values["acked"]), bool(values["playing"])
    session.detached = time.monotonic()
    return session


def _difference(theirs: str, ours: str) -> str:
    """In what a session's ``made_by`` differs from this server's, for its viewer and the log."""
    try:
        before, now = (
            {
                "weights": weights,
                "LoRA files": loras,
                "decoder": more,
                "dtype": dtype,
                **dtypes,
                "device": device,
                "noise": noise,
            }
            for weights, loras, dtype, dtypes, device, noise, *more in map(json.loads, (theirs, ours))
        )
    except (ValueError, TypeError):
        return "it is of another version"
    hashed = ("weights", "LoRA files", "decoder")
    words = [
        f"other {name}" if name in hashed else f"{name} {before.get(name)}, here {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    return f"it was made with {'; '.join(words) or 'another version'}"
