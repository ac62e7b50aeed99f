"""The thread that encodes: blocks become chunks of a session, and what has been shown becomes a file."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .live import Piece
from .metrics import Metrics
from .protocol import Ended, Refusal, Saved
from .session import ViewerSession

log = logging.getLogger("hiar.serve")

Fail = Callable[[ViewerSession, Refusal, bool], None]


@dataclass
class Saving:
    """A video that is being saved: where its mp4 goes, where a client gets it, and whom to tell (frames, seconds)."""

    target: Path
    url: str
    finished: Callable[[int, float], None]
    failed: Callable[[], None]


class Encoding:
    """One thread, for all sessions; what is asked for is done in that order.

    Args:
        lock: of the sessions. sessions: how many there are. fail: tells a client of a refusal, and ends its session
            unless the last argument is false.
    """

    def __init__(self, lock: threading.Condition, metrics: Metrics, sessions: Callable[[], int], fail: Fail) -> None:
        self.lock, self.metrics, self.sessions, self.fail = lock, metrics, sessions, fail
        self.thread = ThreadPoolExecutor(1, "hiar-encode")

    def put(self, session: ViewerSession, piece: Piece) -> None:
        """Send a block. Call it with the lock held."""
        session.pending.append(piece)
        self.thread.submit(self._encode, session, piece)

    def complete(self, session: ViewerSession) -> None:
        """Tell the client that all blocks have been sent."""
        self.thread.submit(self._complete, session)

    def cut(self, session: ViewerSession, blocks: int) -> None:
        """Keep the first blocks of what was shown, after a jump."""
        self.thread.submit(self._cut, session, blocks)

    def save(self, session: ViewerSession, saving: Saving, about: dict[str, Any]) -> None:
        """Write the mp4 of what has been shown, and its record."""
        self.thread.submit(self._save, session, saving, about)

    def clear(self, session: ViewerSession) -> None:
        """Delete the file of a session that has gone."""
        if (spool := session.spool) is not None:
            self.thread.submit(spool.remove)

    def stop(self) -> None:
        """Do what was asked for, then end."""
        self.thread.shutdown(wait=True)

    def _encode(self, session: ViewerSession, piece: Piece) -> None:
        if not session.awaits(piece):
            return
        try:
            payload = session.encode(piece)
        except Exception:
            log.exception("session %s: cannot encode", session.id)
            self.fail(session, Refusal("failed", "the frames cannot be encoded", closes=True), True)
            return
        with self.lock:
            if not session.awaits(piece):
                return
            first = session.first_chunk is None
            interval, late = session.arrived(piece, payload, time.monotonic(), self.sessions())
            self.metrics.chunk(len(piece.frames), session.first_chunk if first else None, interval, late)
            self.lock.notify_all()

    def _complete(self, session: ViewerSession) -> None:
        with self.lock:
            if session.complete:
                session.post(Ended("complete", session.frames))

    def _cut(self, session: ViewerSession, blocks: int) -> None:
        try:
            if session.spool is not None:
                session.spool.truncate(blocks)
        except (OSError, ValueError):
            log.exception("session %s: what it has shown cannot be saved any more", session.id)
            session.spool = None

    def _save(self, session: ViewerSession, saving: Saving, about: dict[str, Any]) -> None:
        try:
            if session.spool is None:
                raise OSError("what was shown is not on the disk, which was full")
            count, fps = session.spool.write_mp4(saving.target, about), session.spool.fragments.fps
            saving.finished(count, count / fps)
        except (OSError, ValueError, sqlite3.Error) as error:
            log.error("session %s: cannot save: %s", session.id, error)
            with suppress(sqlite3.Error):  # the next start deletes what there is
                saving.failed()
            self.fail(session, Refusal("disk_full", "the video cannot be written", about="save"), False)
            return
        with self.lock:
            session.post(Saved(saving.url, count, count / fps))
