"""Whether a client still answers: the server's side of a WebSocket, which notices a network that has gone.

A network that breaks sends no end of connection. So a client that says nothing is pinged, and any byte from it is an
answer; WebSocket libraries and browsers answer by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

NAME = "hiar.link"
"""Key of the :class:`ClientLink` in the extensions of an ASGI scope."""
TICK = 0.2  # seconds
PING_AFTER = 2
"""Ticks without a byte from the client after which it is pinged, and as often again."""
SILENT_AFTER = 7
"""Ticks after which it counts as silent."""


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
            extensions[NAME] = self

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
