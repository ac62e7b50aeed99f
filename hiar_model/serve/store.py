"""The list of whole videos, in SQLite: what was asked for, how far it is, where its files are."""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from ..io.files import check_folder, lock
from .protocol import Refusal

FILE, LOCK = "videos.sqlite", "server.lock"
STATUSES = ("queued", "running", "finished", "failed")
COLUMNS = ("id", "kind", "status", "request", "created", "updated", "frames", "num_frames", "seconds", "error")


def check_data(folder: Path) -> None:
    """ValueError of one line if another server uses the folder, or nothing can be written there: what a :class:`Store`
    would say after the model was loaded.
    """
    file = folder / LOCK
    try:
        check_folder(folder)
        if file.exists():
            lock(file).close()
    except BlockingIOError:
        raise ValueError(f"--data {folder}: another server uses it") from None
    except ValueError as error:
        raise ValueError(f"--data: {error}") from error


class Store:
    """The videos of a folder; each has a folder of its own beneath, whose name is its id.

    May be used from any thread.

    Raises:
        ValueError: one line: the folder cannot be used, or another server does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        try:
            (folder / "videos").mkdir(parents=True, exist_ok=True)
            (folder / LOCK).touch()
            self._lock = lock(folder / LOCK)
            self.database = sqlite3.connect(folder / FILE, check_same_thread=False, isolation_level=None)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS videos (id TEXT PRIMARY KEY, kind TEXT NOT NULL, status TEXT NOT NULL, "
                "request TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, frames INTEGER NOT NULL, "
                "num_frames INTEGER, seconds REAL, error TEXT)"
            )
        except BlockingIOError:
            raise ValueError(f"--data {folder}: another server uses it") from None
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"--data {folder}: {getattr(error, 'strerror', None) or error}") from error
        for row in self.having(kind="saved", status="running"):  # whose session is gone
            self.remove(row["id"])

    def close(self) -> None:
        """Let another server use the folder."""
        with self.lock:
            self.database.close()
            self._lock.close()

    def add(self, kind: str, request: dict[str, Any], num_frames: int | None, status: str = "queued") -> str:
        """A new video; returns its id. :class:`.protocol.Refusal` if the disk takes no more."""
        name, now = secrets.token_hex(16), time.time()
        values = (name, kind, status, json.dumps(request), now, now, 0, num_frames, None, None)
        try:
            self.path(name).mkdir()
            with self.lock:
                self.database.execute(f"INSERT INTO videos VALUES ({', '.join('?' * len(values))})", values)
        except (OSError, sqlite3.Error) as error:
            shutil.rmtree(self.path(name), ignore_errors=True)
            reason = getattr(error, "strerror", None) or error  # without the server's folder
            raise Refusal("disk_full", f"the video cannot be written: {reason}") from error
        return name

    def update(self, name: str, **values: Any) -> None:
        """Change columns of a video."""
        values["updated"] = time.time()
        assert values.keys() <= set(COLUMNS)
        columns = ", ".join(f"{column} = ?" for column in values)
        with self.lock:
            self.database.execute(f"UPDATE videos SET {columns} WHERE id = ?", (*values.values(), name))

    def get(self, name: str) -> dict[str, Any] | None:
        """A video; None: there is none of this id."""
        rows = self._select("WHERE id = ?", (name,))
        return rows[0] if rows else None

    def having(self, limit: int = 100, **equal: Any) -> list[dict[str, Any]]:
        """Videos whose columns have these values, oldest first."""
        assert equal.keys() <= set(COLUMNS)
        where = f"WHERE {' AND '.join(f'{column} = ?' for column in equal)}" if equal else ""
        return self._select(f"{where} ORDER BY created, id LIMIT ?", (*equal.values(), limit))

    def newest(self, limit: int) -> list[dict[str, Any]]:
        """Videos, the newest first."""
        return self._select("ORDER BY created DESC, id LIMIT ?", (limit,))

    def counts(self) -> dict[str, int]:
        """How many videos have each status."""
        with self.lock:
            rows = dict(self.database.execute("SELECT status, COUNT(*) FROM videos GROUP BY status").fetchall())
        return {status: rows.get(status, 0) for status in STATUSES}

    def remove(self, name: str) -> None:
        """Forget a video and delete its files."""
        with self.lock:
            self.database.execute("DELETE FROM videos WHERE id = ?", (name,))
        shutil.rmtree(self.path(name), ignore_errors=True)

    def path(self, name: str) -> Path:
        """The folder of a video that is in the list."""
        return self.folder / "videos" / name

    def _select(self, rest: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
        with self.lock:
            rows = self.database.execute(f"SELECT {', '.join(COLUMNS)} FROM videos {rest}", values).fetchall()
        videos = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        return [{**video, "request": json.loads(video["request"])} for video in videos]
