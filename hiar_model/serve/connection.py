"""One WebSocket of `/v1/realtime/video`: reads and checks messages, writes what the scheduler delivers."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from starlette.websockets import WebSocket, WebSocketDisconnect

from . import link, protocol
from .guard import Bucket
from .protocol import Refusal
from .session import Connection, ViewerSession

if TYPE_CHECKING:
    from .scheduler import Scheduler

log = logging.getLogger("hiar.serve")

START_WITHIN = 10.0
"""Seconds in which a client must send start."""
MOST_UNREAD = 1000
"""Messages that wait for a client that does not read."""
RATE, BURST = 50.0, 100.0
"""Messages of one connection, a second and at once."""
MOST_REFUSED = 100
"""Messages of one connection that are refused before it is closed."""

Item = str | bytes | tuple[int, str]


class Realtime:
    """A connection from its start to its end: await :meth:`run`."""

    def __init__(self, socket: WebSocket, scheduler: Scheduler, log_prompts: bool = False) -> None:
        self.socket, self.scheduler, self.log_prompts = socket, scheduler, log_prompts
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        self.connection = Connection(self._deliver, self._close)
        self.session: ViewerSession | None = None
        self.client = socket.client.host if socket.client else ""
        self.closing = False
        self.link: link.ClientLink | None = socket.scope.get("extensions", {}).get(link.NAME)

    def _deliver(self, *items: str | bytes) -> None:
        """From any thread."""
        self._put(*items)

    def _close(self, code: int, reason: str) -> None:
        self._put((code, reason))

    def _silent(self, silent: bool) -> None:
        if self.session is not None:
            self.scheduler.silent(self.session, self.connection, silent)

    def _put(self, *items: Item) -> None:
        """In order, whatever the thread, and nothing between them."""
        try:
            self.loop.call_soon_threadsafe(self._queue, *items)
        except RuntimeError:  # the server has ended
            return

    def _queue(self, *items: Item) -> None:
        for item in items:
            if self.closing:
                return
            if self.queue.qsize() >= MOST_UNREAD:
                item = (1008, "too_slow")
            self.closing = isinstance(item, tuple)
            self.queue.put_nowait(item)

    async def run(self) -> None:
        """Serve the client until it goes, or is sent away."""
        await self.socket.accept()
        self.scheduler.metrics.connections.inc()
        writer, reader = asyncio.create_task(self._write()), asyncio.create_task(self._read())
        others = [asyncio.create_task(link.watch(self.link, self._silent, lambda: self.closing))] if self.link else []
        try:
            await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.scheduler.metrics.connections.dec()
            if self.session is not None:
                self.scheduler.detach(self.session, self.connection)
            for task in (reader, writer, *others):
                task.cancel()
            if self.link and self.link.silent:
                self.link.abort()
            for ended in await asyncio.gather(reader, writer, *others, return_exceptions=True):
                if isinstance(ended, Exception):
                    log.error("a connection of %s failed", self.client, exc_info=ended)

    async def _write(self) -> None:
        while True:
            item = await self.queue.get()
            try:
                if isinstance(item, tuple):
                    await self.socket.close(*item)
                    return
                if isinstance(item, str):
                    await self.socket.send_text(item)
                else:
                    await self.socket.send_bytes(item)
            except (WebSocketDisconnect, RuntimeError, OSError):  # it has gone
                return

    async def _read(self) -> None:
        bucket, refused = Bucket(RATE, BURST), 0
        timeout: float | None = START_WITHIN
        while not self.closing:
            try:
                event = await asyncio.wait_for(self.socket.receive(), timeout)
            except asyncio.TimeoutError:
                self._refuse(Refusal("too_slow", f"start must come within {START_WITHIN:g} s", closes=True))
                break
            except RuntimeError:
                return
            if event["type"] == "websocket.disconnect":
                return
            try:
                if not bucket.take():
                    raise Refusal("too_many", f"more than {RATE:g} messages a second", closes=True)
                text = event.get("text")
                self._message(protocol.parse(event.get("bytes") or b"" if text is None else text))
            except Refusal as refusal:
                refused += 1
                refusal.closes = refusal.closes or refused >= MOST_REFUSED
                self._refuse(refusal)
            if self.session is not None:
                timeout = None
            await asyncio.sleep(0)  # what was said may have been the last
        await asyncio.sleep(START_WITHIN)  # until the writer has sent all

    def _refuse(self, refusal: Refusal) -> None:
        self.scheduler.metrics.refusals.labels(refusal.code).inc()
        self._put(refusal.message.to_json())
        if refusal.closes:
            self._put((1013 if refusal.code in ("busy", "shutting_down") else 1008, refusal.code))

    def _message(self, message: protocol.ProtocolMessage) -> None:
        if self.session is not None:
            if self.log_prompts and isinstance(message, protocol.ChangePrompt | protocol.Fork):
                log.info("session %s: %r", self.session.id, message)
            self.scheduler.handle(self.session, message)
        elif not isinstance(message, protocol.StartMessage):
            raise Refusal("not_started", f"the first message must be start, got {message.type}")
        elif message.resume is not None:
            self.session = self.scheduler.resume(message.resume, message.after, self.connection)
        else:
            self.session = self.scheduler.open(message, self.connection, self.client)
            shown = f" {message.prompt!r}" if self.log_prompts else ""
            log.info("session %s of %s%s", self.session.id, self.client, shown)
