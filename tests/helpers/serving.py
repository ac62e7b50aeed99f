"""A real server in this process, and a client of it."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import uvicorn.server as uvicorn_server
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from hiar_model.config import ExecutionConfig
from hiar_model.io.fragments import split_pictures
from hiar_model.models.video_model import VideoModel
from hiar_model.serve.app import Service, Settings, address, listen, server

PROMPT = "a red circle moving right"
PATIENCE = 60.0  # seconds, on a loaded machine


class _Hurried:
    """asyncio for an uvicorn that ends: ten times a second it looks whether its connections have gone."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


@contextmanager
def serving(
    model: VideoModel,
    data: Path,
    settings: Settings | None = None,
    port: int = 0,
    execution: ExecutionConfig | None = None,
    **options: Any,
) -> Iterator[Service]:
    """A server on a free port; ``service.url`` is its address. Ended as by SIGTERM."""
    service = Service(model, execution or ExecutionConfig(), data, settings, **options)
    listening = listen("127.0.0.1", port)
    uvicorn = server(service)
    thread = threading.Thread(target=lambda: uvicorn.run(sockets=[listening]), daemon=True)
    service.url = address(listening)  # type: ignore[attr-defined]
    service.start()
    thread.start()
    try:
        yield service
    finally:
        uvicorn.should_exit = True
        with mock.patch.object(uvicorn_server, "asyncio", _Hurried()):
            thread.join(PATIENCE)
        if still := [one for one in (thread, service.scheduler.thread) if one.is_alive()]:
            raise AssertionError(f"not ended after {PATIENCE:g} s:\n" + "\n".join(map(_where, still)))


def _where(thread: threading.Thread) -> str:
    """What a thread is doing."""
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread.name}:\n" + "".join(traceback.format_stack(frame) if frame else [])


def until(condition: Callable[[], Any], what: str = "it", every: float = 0.005) -> Any:
    """Wait for a condition, which is asked so often (a server counts what is too much)."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited for {what} in vain"
        time.sleep(every)
    return value


def ask(service: Any, path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    """(status, headers, body) of a request to a :class:`Service` of :func:`serving`, or whatever has a ``url``."""
    data = None if body is None else json.dumps(body).encode() if not isinstance(body, bytes) else body
    request = urllib.request.Request(service.url + path, data, {"content-type": "application/json"} | headers)
    request.method = method
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def pictures(chunks: Sequence[tuple[dict[str, Any], bytes]]) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] of chunks in WebP, which keeps small frames exactly."""
    files = [file for _, payload in chunks for file in split_pictures(payload)]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def frames_of(mp4: bytes) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] of a file."""
    with av.open(io.BytesIO(mp4)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


class Viewer:
    """A client. ``messages`` are all that came; chunks are (block message, payload)."""

    def __init__(self, service: Service, path: str = "", **options: Any) -> None:
        address = service.url.replace("http", "ws") + f"/v1/realtime/video{path}"  # type: ignore[attr-defined]
        self._open = connect(address, max_size=1 << 24, open_timeout=PATIENCE, compression=None, **options)
        self.socket = self._open.__enter__()
        self.messages: list[dict[str, Any]] = []
        self.chunks: list[tuple[dict[str, Any], bytes]] = []

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.__exit__(None, None, None)

    def vanish(self) -> None:
        """Be gone without a word, as behind a network that breaks. Unlike close(), this ends the client's threads."""
        with suppress(OSError):  # the server was quicker
            self.socket.socket.shutdown(socket.SHUT_RDWR)

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def start(self, **fields: Any) -> dict[str, Any]:
        """Start a video and wait for the answer."""
        given = {"v": 1, "format": "webp", **({} if "resume" in fields else {"prompt": PROMPT}), **fields}
        self.send("start", **given)
        return self.wait("ready")

    def receive(self) -> dict[str, Any]:
        """The next message; a block with its chunk."""
        text = self.socket.recv(PATIENCE)
        assert isinstance(text, str), text[:20]
        message = json.loads(text)
        self.messages.append(message)
        if message["type"] == "block":
            data = self.socket.recv(PATIENCE)
            assert isinstance(data, bytes) and int.from_bytes(data[:8], "big") == message["seq"]
            self.chunks.append((message, data[8:]))
        return message

    def wait(self, type: str) -> dict[str, Any]:
        """The next message of a type; chunks on the way are acknowledged, a refusal is an error."""
        end = time.monotonic() + PATIENCE
        while (message := self.receive())["type"] != type:
            assert message["type"] != "refused" or type == "refused", message
            assert time.monotonic() < end, f"waited for {type} in vain, and got {len(self.chunks)} chunks"
            if message["type"] == "block":
                with suppress(ConnectionClosed):  # what was sent before that can still be read
                    self.send("ack", seq=message["seq"])
        return message

    def blocks(self, count: int) -> list[tuple[dict[str, Any], bytes]]:
        """The next chunks, each acknowledged."""
        first = len(self.chunks)
        while len(self.chunks) < first + count:
            self.send("ack", seq=self.wait("block")["seq"])
        return self.chunks[first:]
