"""What a request must pass before anything else sees it: Host, Origin, token, size, rate; and the headers of answers.

Without a token the server listens to this machine alone. A web page elsewhere must not use it either: its Origin is
another, and a name that it points at this machine is no Host of ours.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..io.files import read_text
from .protocol import Refusal

LARGEST_BODY = 65536
"""Bytes of a request."""
OPEN_PATHS = ("/", "/healthz", "/v1/info", "/v1/schema.json", "/v1/openapi.json")
"""What needs no token beside the files of the page: it says nothing of anybody."""
RATE, BURST = 50.0, 200.0
"""Requests of one client, a second and at once."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def read_tokens(path: Path) -> tuple[bytes, ...]:
    """The tokens of a file, one a line; ValueError of one line if it holds none, or one that is easily guessed."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise ValueError(f"--token-file {path} holds no token: write one a line, of at least 16 characters")
    if short := [number for number, token in enumerate(tokens, 1) if len(token) < 16]:
        raise ValueError(f"--token-file {path}: token {short[0]} has fewer than 16 characters")
    return tuple(token.encode() for token in tokens)


def is_loopback(host: str) -> bool:
    """Whether an address that is listened to is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class Bucket:
    """So many events a second, ``burst`` at once."""

    rate: float
    burst: float
    left: float = 0.0
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = self.burst

    def take(self) -> bool:
        """Whether another one is allowed now."""
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.at) * self.rate)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Guard:
    """ASGI middleware around ``app``.

    Args:
        tokens: one of which a client must have; (): none is needed.
        hosts: names that the Host of a request may have, beside addresses in figures and localhost.
        files: of the page, which need no token.
    """

    def __init__(
        self, app: Any, tokens: Iterable[bytes] = (), hosts: Iterable[str] = (), files: Iterable[str] = ()
    ) -> None:
        self.app, self.tokens = app, tuple(tokens)
        self.open = frozenset([*OPEN_PATHS, *(f"/{name}" for name in files)])
        self.hosts = frozenset(host.lower() for host in hosts)
        self.buckets: dict[str, Bucket] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self._refused(scope, headers):
            await _refuse(scope, receive, send, *refused)
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in present]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        received = 0

        async def limited() -> Any:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > LARGEST_BODY:
                    raise Refusal("too_large", f"a request has at most {LARGEST_BODY} bytes")
            return message

        await self.app(scope, limited, answer)

    def _refused(self, scope: Any, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """(status, code, message), or None."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 403, "wrong_host", f"{host[:100]!r} is no name of this server: see --allow-host"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return (
                403,
                "wrong_origin",
                f"a page of {origin[:100]!r} may not use this server, which was called as {host[:100]!r}",
            )
        if not self._bucket(scope).take():
            return 429, "too_many", f"more than {RATE:g} requests a second"
        length = headers.get("content-length", "0")
        if scope["type"] == "http" and (not length.isdecimal() or int(length) > LARGEST_BODY):
            return 413, "too_large", f"a request has at most {LARGEST_BODY} bytes"
        if self.tokens and scope["path"] not in self.open and not self._knows(scope, headers):
            return 401, "unauthorised", "a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            urlsplit(f"//{host}").port  # noqa: B018  # ValueError
        except ValueError:
            return False
        if name == "localhost" or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _knows(self, scope: Any, headers: dict[str, str]) -> bool:
        """Whether the client has a token; takes as long whichever it is."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        same = [compare_digest(token.strip().encode(), one) for one in self.tokens]  # all of them: no early end
        return any(same)

    def _bucket(self, scope: Any) -> Bucket:
        client = (scope.get("client") or ("",))[0]
        if client not in self.buckets:
            if len(self.buckets) > 10000:  # those who came once
                self.buckets.clear()
            self.buckets[client] = Bucket(RATE, BURST)
        return self.buckets[client]


async def _refuse(scope: Any, receive: Any, send: Any, status: int, code: str, message: str) -> None:
    body = json.dumps({"code": code, "message": message}).encode()
    headers = {**HEADERS, "content-type": "application/json", "content-length": str(len(body))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 429:
        headers["retry-after"] = "1"
    pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    kind = "http.response"
    if scope["type"] == "websocket":
        kind = "websocket.http.response"
        await receive()  # websocket.connect
    await send({"type": f"{kind}.start", "status": status, "headers": pairs})
    await send({"type": f"{kind}.body", "body": body})
