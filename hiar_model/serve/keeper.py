"""Live sessions that outlive the server: a record of each in the store's database, its states beside it.

Every block follows from the record: what the client asked for, and at which blocks. States only shorten the way to it.
So a record is written before the client is told of what it says, and a state when there is time.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import ExecutionConfig
from ..io.atomic import discard
from ..models.video_model import VideoModel
from ..version import NOISE
from . import protocol
from .live import LiveVideo
from .metrics import Metrics
from .protocol import StartMessage
from .session import ViewerSession
from .spool import SUFFIX
from .states import SessionStates, StateDisk
from .store import FILE, Store

log = logging.getLogger("hiar.serve")

COLUMNS = ("id", "token_hash", "made_by", "start", "prompts", "jumps", "acked", "playing")


class Keeper:
    """Sessions that end with the server: nothing of them is written. :class:`DiskKeeper` is the other kind.

    The scheduler's lock is held in :meth:`outlives`, :meth:`changed`, :meth:`progressed` and :meth:`ended`.
    """

    def restore(self, folder: Path) -> list[ViewerSession]:
        """The sessions of the server before this one; what else lies in the folder of their spools is deleted."""
        clear(folder, ())
        return []

    def lost(self, token_hash: str) -> str | None:
        """Why the session of this token, which an earlier server had, does not go on here; None: there was none."""
        return None

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


class DiskKeeper(Keeper):
    """Keeps sessions in the folder of a store.

    Args:
        limit: bytes of states on disk. records: whether sessions outlive the server; if not, states only serve for the
            way back. states: options of :class:`.states.StateDisk`.
    """

    def __init__(
        self,
        store: Store,
        model: VideoModel,
        execution: ExecutionConfig,
        metrics: Metrics,
        limit: int,
        records: bool = True,
        **states: Any,
    ) -> None:
        self.metrics, self.records, self.lock = metrics, records, threading.Lock()
        self.model, self.execution, self.warned, self.closed = model, execution, False, False
        self.reasons: dict[str, str] = {}  # of what did not come back, by the hash of its token
        self.unwritten: set[str] = set()  # ids whose record is older than what the client knows
        self.folder = store.folder / "sessions"
        self.disk = StateDisk(self.folder, limit, metrics, **states)
        self.database = sqlite3.connect(store.folder / FILE, check_same_thread=False, isolation_level=None)
        self.database.execute("PRAGMA synchronous=NORMAL")  # whole after kill -9; acks are too many for a sync each
        self.database.execute("PRAGMA secure_delete=ON")  # no prompt stays in a page that is free
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, token_hash TEXT NOT NULL, "
            "made_by TEXT NOT NULL, start TEXT NOT NULL, prompts TEXT NOT NULL, jumps TEXT NOT NULL, "
            "acked INTEGER NOT NULL, playing INTEGER NOT NULL)"
        )

    @property
    def made_by(self) -> str:
        """What must be the same for the same pixels, beside what was asked for."""
        model = self.model
        loras = [[lora.sha256, lora.scale] for lora in model.loras]
        numbers = [str(model.dtype), self.execution.dtypes, model.device.type, NOISE]
        numbers += [model.decoded_by["sha256"]] if model.decoded_by else []
        return json.dumps([model.weights_sha256, loras, *numbers])

    def restore(self, folder: Path) -> list[ViewerSession]:
        rows = self.database.execute(f"SELECT {', '.join(COLUMNS)} FROM sessions ORDER BY rowid").fetchall()
        sessions = []
        for row in rows:
            values = dict(zip(COLUMNS, row, strict=True))
            try:
                if not self.records:
                    raise ValueError("sessions are not kept (--keep 0)")
                sessions.append(_session(values, self.made_by))
            except (ValueError, TypeError, KeyError, protocol.Refusal) as error:
                self.reasons[str(values["token_hash"])] = reason = " ".join(str(error).split())
                log.error("session %s does not go on: %s", values["id"], reason)
                self.database.execute("DELETE FROM sessions WHERE id = ?", (values["id"],))
        clear(folder, [session.id for session in sessions])
        for session in sessions:
            self.disk.of(session.id)
        return sessions

    def lost(self, token_hash: str) -> str | None:
        return self.reasons.get(token_hash)

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
                  json.dumps(session.jumps), session.acked, session.playing)  # fmt: skip
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
        with self.lock:
            self.closed = True
            self.database.close()


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
        log.error("session %s does not go on: %s", session.id, " ".join(str(error).split()))
        raise protocol.Refusal("failed", "the session cannot go on with this model", closes=True) from error


def forget(store: Store) -> None:
    """Delete all records."""
    with store.lock:
        store.database.execute("PRAGMA secure_delete=ON")
        store.database.execute("DROP TABLE IF EXISTS sessions")


def clear(folder: Path, names: Iterable[str]) -> None:
    """Delete spools and states of all sessions but these."""
    stay = {path for name in names for path in (name, f"{name}{SUFFIX}")}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in stay:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _session(values: dict[str, Any], made_by: str) -> ViewerSession:
    """A session without a client from its record; ValueError, TypeError or KeyError for a damaged one."""
    if values["made_by"] != made_by:
        raise ValueError(_difference(values["made_by"], made_by))
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
