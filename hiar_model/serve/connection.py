"""One WebSocket of `/v1/realtime/video`: reads and checks messages, writes what the scheduler delivers, and notices a
network that has gone.

A network that breaks sends no end of connection. So a client that says nothing is pinged, and any byte from it is an
answer; WebSocket libraries and browsers answer by themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from . import protocol
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
"""Messages of one connection, a second and at once; the first ack of a chunk does not count."""
LATER = ("busy", "cannot_resume", "shutting_down")
"""Refusals after which a client may try again."""
MOST_REFUSED = 100
"""Messages of one connection that are refused before it is closed."""

LINK = "hiar.link"
"""Key of the :class:`ClientLink` in the extensions of an ASGI scope."""
TICK = 0.2  # seconds
PING_AFTER = 2
"""Ticks without a byte from the client after which it is pinged, and as often again."""
SILENT_AFTER = 7
"""Ticks after which it counts as silent."""

Item = str | bytes | tuple[int, str]


class Realtime:
    """A connection from its start to its end: await :meth:`run`."""

    def __init__(self, socket: WebSocket, scheduler: Scheduler, log_prompts: bool = False) -> None:
        self.socket, self.scheduler, self.log_prompts = socket, scheduler, log_prompts
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        self.connection = Connection(self._put, lambda code, reason: self._put((code, reason)))
        self.session: ViewerSession | None = None
        self.client = socket.client.host if socket.client else ""
        self.closing = False
        self.link: ClientLink | None = socket.scope.get("extensions", {}).get(LINK)

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
        others = [asyncio.create_task(watch(self.link, self._silent, lambda: self.closing))] if self.link else []
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
                message = protocol.parse(event.get("bytes") or b"" if text is None else text)
                acked = None if self.session is None else self.session.acked
                self._message(message)
                if isinstance(message, protocol.Ack) and self.session is not None and self.session.acked != acked:
                    bucket.left += 1  # no more of these than chunks were sent
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
            self._put((1013 if refusal.code in LATER else 1008, refusal.code))

    def _message(self, message: protocol.ProtocolMessage) -> None:
        try:
            self._handle(message)
        except Refusal as refusal:
            refusal.about = message.type
            raise

    def _handle(self, message: protocol.ProtocolMessage) -> None:
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


class ClientLink(WebSocketsSansIOProtocol):
    """uvicorn's protocol, which counts what comes from the client; :func:`watch` says whether it is silent."""

    received, silent = 0, False

    def data_received(self, data: bytes) -> None:
        self.received += 1
        super().data_received(data)

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):
            extensions: Any = self.scope["extensions"]
            extensions[LINK] = self

    async def send(self, message: Any) -> None:
        """A refusal is an answer too: without this, uvicorn logs each as an error of the application."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    def ping(self) -> None:
        """Ask the client for an answer."""
        if self.conn.state is State.OPEN and not self.transport.is_closing():
            self.conn.send_ping(b"")
            self.transport.write(b"".join(self.conn.data_to_send()))

    def abort(self) -> None:
        """End the connection without the client's part in it."""
        self.transport.abort()


async def watch(link: ClientLink, report: Callable[[bool], None], closing: Callable[[], bool]) -> None:
    """Report that the client is silent (True), or answers again (False). Once the connection is ``closing``, one with a
    silent client ends. Counts its own ticks: those of a server that was held up itself do not count.
    """
    received, ticks = link.received, 0
    while True:
        await asyncio.sleep(TICK)
        if link.received != received:
            if ticks >= SILENT_AFTER:
                link.silent = False
                report(False)
            received, ticks = link.received, 0
            continue
        ticks += 1
        if ticks == SILENT_AFTER:
            link.silent = True
            report(True)
        elif ticks > SILENT_AFTER and closing():
            link.abort()
            return
        if ticks % PING_AFTER == 0:
            link.ping()
