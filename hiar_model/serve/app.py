"""The server: routes, and its life from the first request to SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket as sockets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ..config import WAN, ExecutionConfig
from ..io.video import record_path
from ..models.video_model import VideoModel
from ..pipelines.video_pipeline import VideoOptions, rollout_config
from ..toy.prompt import SLOTS
from . import protocol
from .connection import ClientLink, Realtime
from .encoding import Saving
from .guard import Guard, is_loopback
from .jobs import VIDEO, JobRequest, Jobs
from .keeper import DiskKeeper, Keeper
from .live import example
from .metrics import Metrics
from .protocol import Refusal
from .scheduler import Limits, Scheduler
from .schema import openapi, schema
from .session import ViewerSession
from .store import Store

log = logging.getLogger("hiar.serve")

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MOST_CONNECTIONS = 32
"""Open WebSockets of one client."""
STATUS = {
    "busy": 503, "shutting_down": 503, "too_many": 429, "too_large": 413, "bad_prompt": 422, "bad_video": 422,
    "disk_full": 507, "cannot_resume": 503,
}  # fmt: skip
"""Code of a refusal -> status of HTTP, where it is not 400."""
SHOWN = 100  # videos in a list
PROMPTS = 32
"""Prompts whose embeddings are kept: the next viewer who asks for one need not wait for the text encoder."""


@dataclass
class Settings:
    """How a server runs.

    host, port     where it listens; any host but this machine's own needs ``tokens``
    tokens         one of which a client must have
    hosts          names by which clients may call it, beside addresses and localhost
    proxies        addresses of proxies in front of it, whose X-Forwarded-For names the client
    limits         of sessions
    log_prompts    write prompts to the log
    state_bytes    on disk for the states of live sessions, which then outlive the server; None: nothing of them is
                   written but what they have shown

    Raises:
        ValueError: a host that others reach, without tokens; a proxy that is no address.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tokens: tuple[bytes, ...] = ()
    hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False
    state_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.tokens and not is_loopback(self.host):
            raise ValueError(f"--host {self.host} can be reached from other machines: give --token-file")
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                legal = "legal: addresses such as 127.0.0.1, networks such as 10.0.0.0/8"
                raise ValueError(f"--proxy {proxy} is no address, {legal}") from None


class Service:
    """A model, its sessions and its videos, as an ASGI application: ``app``.

    Args:
        data: folder for videos, and for what running sessions have shown.
        states: options of :class:`.states.StateDisk`, scheduler_options: of :class:`.scheduler.Scheduler`, for tests.
    """

    def __init__(
        self,
        model: VideoModel,
        execution: ExecutionConfig,
        data: Path,
        settings: Settings | None = None,
        checkpoint_every: int = 10,
        states: Mapping[str, Any] | None = None,
        **scheduler_options: Any,
    ) -> None:
        self.settings = settings or Settings()
        self.model = model = replace(model, text_encoder=lru_cache(PROMPTS)(model.text_encoder))
        self.store = Store(data)
        limits, metrics, state_bytes = self.settings.limits, Metrics(), self.settings.state_bytes
        if state_bytes is None:
            keeper = Keeper(self.store, limits.keep)
        else:
            keeper = DiskKeeper(self.store, model, execution, metrics, state_bytes, limits.keep, **(states or {}))
        self.scheduler = Scheduler(
            model, execution, data / "sessions", limits, metrics, keeper, new_saving=self._saving, **scheduler_options
        )
        self.jobs = self.scheduler.jobs = Jobs(
            self.store, model, execution, self.scheduler.admission, checkpoint_every, changed=self._wake
        )
        self.clients: Counter[str] = Counter()
        self.ready = False
        self.files = frozenset(file.name for file in PAGE.iterdir() if file.suffix in KINDS)
        routes = [
            Route("/", self._page),
            Route("/healthz", self._health),
            Route("/metrics", self._metrics),
            Route("/{name}", self._page, name="file"),
            Route("/v1/videos", self._new_video, methods=["POST"]),
            Route("/v1/videos", self._list),
            Route("/v1/videos/{id}", self._delete, methods=["DELETE"]),
            Route("/v1/videos/{id}", self._video),
            Route("/v1/videos/{id}/content", self._content),
            Route("/v1/videos/{id}/record", self._content),
            Route("/v1/info", self._info),
            Route("/v1/schema.json", self._schema),
            Route("/v1/openapi.json", self._openapi),
            Route("/v1/realtime/video", _no_socket),
            WebSocketRoute("/v1/realtime/video", self._realtime),
        ]
        inner = Starlette(routes=routes, exception_handlers=HANDLERS)
        self.app = Guard(inner, self.settings.tokens, self.settings.hosts, self.files)

    def start(self) -> None:
        """Start the threads."""
        self.scheduler.start()
        self.ready = True

    def stop(self, timeout: float = 30.0) -> None:
        """Finish the block that is being made, put videos away, tell viewers, end the threads."""
        self.ready = False
        self.scheduler.drain(timeout)
        self.store.close()

    def _wake(self) -> None:
        with self.scheduler.lock:
            self.scheduler.lock.notify_all()

    def _saving(self, session: ViewerSession) -> Saving:
        name = self.store.add("saved", {"session": session.id}, None, status="running")

        def finished(frames: int, seconds: float) -> None:
            self.store.update(name, status="finished", frames=frames, num_frames=frames, seconds=seconds)

        target = self.store.path(name) / VIDEO
        return Saving(target, f"/v1/videos/{name}/content", finished, lambda: self.store.remove(name))

    # Routes

    async def _page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self.files:
            return _error(404, "not_found", "no such page")
        kind = KINDS[Path(name).suffix]
        return FileResponse(PAGE / name, media_type=kind, headers={"cache-control": "no-cache"})

    async def _health(self, request: Request) -> Response:
        alive = self.ready and self.scheduler.thread.is_alive() and not self.scheduler.draining
        with self.scheduler.lock:
            sessions = len(self.scheduler.sessions)
        about = {"status": "ok" if alive else "stopping", "sessions": sessions, "model": Path(self.model.name).name}
        return JSONResponse(about, 200 if alive else 503)

    async def _metrics(self, request: Request) -> Response:
        for status, count in self.store.counts().items():
            self.scheduler.metrics.videos.labels(status).set(count)
        return Response(self.scheduler.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _info(self, request: Request) -> Response:
        model, config = self.model, rollout_config(self.model, VideoOptions(None), True)
        words = None if model.world is None else {slot: list(words) for slot, words in SLOTS.items()}
        height, width = model.pixel_size
        first, two = (model.pixel_frames(blocks * config.frames_per_block) for blocks in (1, 2))
        about = {
            "v": protocol.VERSION, "model": Path(model.name).name, "words": words,
            "example": example(model), "orders": protocol.LIVE_ORDERS, "order": config.order,
            "fps": model.fps, "height": height, "width": width, "num_frames": model.num_frames,
            "sizes": sizes(model), "size_step": model.size_step, "first_frames": first, "block_frames": two - first,
        }  # fmt: skip
        return JSONResponse(about)

    async def _schema(self, request: Request) -> Response:
        return JSONResponse(schema())

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi())

    async def _realtime(self, socket: WebSocket) -> None:
        client = socket.client.host if socket.client else ""
        wait = self.scheduler.full()
        awaited = len(self.scheduler.keeper.dormant) > 0
        awaited |= any(session.detached is not None for session in list(self.scheduler.sessions.values()))
        if self.clients[client] >= MOST_CONNECTIONS:
            refusal = Refusal("too_many", f"more than {MOST_CONNECTIONS} connections", retry_after=10)
        elif wait is not None and not awaited:  # a kept session may be resumed
            refusal = Refusal("busy", "all places are taken", retry_after=wait)
        else:
            self.clients[client] += 1
            try:
                await Realtime(socket, self.scheduler, self.settings.log_prompts).run()
            finally:
                self.clients[client] -= 1
                if not self.clients[client]:
                    del self.clients[client]
            return
        self.scheduler.metrics.refusals.labels(refusal.code).inc()
        await socket.send_denial_response(_answer(refusal))

    async def _new_video(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(415, "bad_message", "the body must be application/json")
        body = await request.body()
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal("bad_message", "the body must be a JSON object") from None
        if not isinstance(values, dict):
            raise Refusal("bad_message", "the body must be a JSON object")
        video = protocol.build(JobRequest, values)
        frames = await asyncio.wrap_future(self.scheduler.call(lambda: self.jobs.check(video)))
        name = self.jobs.add(video, frames)
        if self.settings.log_prompts:
            log.info("video %s: %r", name, video)
        return JSONResponse(self._described(name), 202, headers={"location": f"/v1/videos/{name}"})

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"videos": [_shown(row) for row in self.store.newest(SHOWN)]})

    async def _video(self, request: Request) -> Response:
        return JSONResponse(self._described(request.path_params["id"]))

    async def _delete(self, request: Request) -> Response:
        self._described(request.path_params["id"])
        self.jobs.remove(request.path_params["id"])
        return Response(status_code=204)

    async def _content(self, request: Request) -> Response:
        about = self._described(request.path_params["id"])
        path = self.store.path(about["id"]) / VIDEO
        if about["status"] != "finished":
            return _error(409, "not_finished", f"the video is {about['status']}")
        is_metadata = request.url.path.endswith("/record")
        path = record_path(path) if is_metadata else path
        if not path.is_file():
            return _error(410, "gone", "the file of the video is not there any more")
        if is_metadata:
            return FileResponse(path, media_type="application/json")
        return FileResponse(
            path, media_type="video/mp4", filename=f"{about['id']}.mp4", content_disposition_type="inline"
        )

    def _described(self, name: str) -> dict[str, Any]:
        row = self.store.get(name)
        if row is None:
            raise Refusal("unknown_session", "no video has this id")
        job = self.jobs.current
        if job is not None and job.name == name and row["status"] == "running":
            row["frames"] = job.frames
        return _shown(row)


def sizes(model: VideoModel) -> list[tuple[int, int]]:
    """Frame sizes for a viewer to choose from, (height, width) in pixels: the model's own, and those Wan was trained
    for.
    """
    if model.size_step is None:
        return [model.pixel_size]
    rows, columns = model.size_step
    fitting = [(height, width) for height, width in WAN.sizes if height % rows == 0 == width % columns]
    return list(dict.fromkeys([model.pixel_size, *fitting]))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """What a client sees of a video."""
    url = f"/v1/videos/{row['id']}/content" if row["status"] == "finished" else None
    return {**{name: row[name] for name in row if name not in ("request", "updated")}, "url": url}


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"code": code, "message": message}, status, headers)


def _answer(refusal: Refusal) -> JSONResponse:
    status = 404 if refusal.code == "unknown_session" else STATUS.get(refusal.code, 400)
    headers = None if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    return _error(status, refusal.code, str(refusal), headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _answer(error)


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, "failed", "the server's log says why")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _error(405, "not_allowed", f"{request.method} is not for this path", dict(error.headers or {}))
    return _error(error.status_code, "not_found", "nothing is here")


async def _no_socket(request: Request) -> Response:
    line = "a WebSocket is here, and the request asks for none: a proxy must pass on Upgrade and Connection"
    return _error(426, "not_allowed", line, {"upgrade": "websocket"})


HANDLERS = {Refusal: _refused, HTTPException: _no_route, Exception: _failed}


class _Uvicorn(uvicorn.Server):
    """Puts videos away and tells viewers before connections are closed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[sockets.socket] | None = None) -> None:
        await asyncio.to_thread(self.service.stop)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> sockets.socket:
    """A socket that listens; ValueError of one line if it cannot be."""
    try:
        family, kind, _, _, address = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM)[0]
        listening = sockets.socket(family, kind)
        listening.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen at --host {host} --port {port}: {reason}") from error
    return listening


def address(listening: sockets.socket) -> str:
    """Its URL."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def server(service: Service) -> uvicorn.Server:
    """The server of a service; ``run(sockets=[listen(...)])`` returns when it is told to end."""
    # An answer to a ping waits behind the chunks that a slow network still carries; ClientLink notices one that broke.
    config = uvicorn.Config(
        service.app, log_config=None, access_log=False, lifespan="off", server_header=False, date_header=True,
        ws=ClientLink, ws_max_size=1 << 20, ws_ping_interval=5.0, ws_ping_timeout=60.0,
        ws_per_message_deflate=False, timeout_graceful_shutdown=5, timeout_keep_alive=15,
        proxy_headers=bool(service.settings.proxies), forwarded_allow_ips=list(service.settings.proxies),
    )  # fmt: skip
    return _Uvicorn(config, service)


def run(service: Service, listening: Iterable[sockets.socket]) -> None:
    """Serve a service that was started, until SIGTERM or Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):  # what uvicorn raises once it has ended
        server(service).run(sockets=list(listening))
