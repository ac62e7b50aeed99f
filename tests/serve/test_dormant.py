"""Sessions that a server cannot go on with wait for one that can: a wrongly started server costs nobody a video."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from live_sessions import OFTEN, blocks, made, pictures, running, video
from serving import PROMPT, Viewer, serving, until
from websockets.exceptions import ConnectionClosed

from hiar_model import ExecutionConfig
from hiar_model.serve import dormant as dormant_module
from hiar_model.serve import live as live_module
from hiar_model.serve.app import Service, Settings
from hiar_model.serve.dormant import Dormant, DormantSession
from hiar_model.serve.metrics import Metrics
from hiar_model.serve.protocol import Refusal
from hiar_model.serve.scheduler import Limits
from hiar_model.serve.session import hash_token
from hiar_model.serve.states import StateDisk

pytestmark = pytest.mark.cpu


def test_another_dtype_is_named_to_the_viewer(model, tmp_path, caplog):
    """Not: no session has this token, it never had."""
    with running(model, tmp_path) as service:
        viewer = Viewer(service)
        ready = viewer.start()
        viewer.blocks(1)
    line = "it was made with kv_dtype None, here float8_e4m3fn"
    caplog.clear()
    with running(model, tmp_path, execution=ExecutionConfig(kv_dtype="float8_e4m3fn")) as service:
        (logged,) = [record.message for record in caplog.records]
        assert logged == f"session {ready['session']} does not go on here, and is kept for 60 s: {line}"
        with Viewer(service) as viewer:
            viewer.send("start", v=1, resume=ready["token"])
            refused = viewer.wait("refused")
    assert refused["code"] == "cannot_resume" and refused["message"].endswith(f"after the server's restart: {line}")


def files(data):
    """What lies in the folder of live sessions."""
    return {path: path.read_bytes() for path in (data / "sessions").rglob("*") if path.is_file()}


def test_a_wrongly_started_server_costs_nobody_a_video(model, tmp_path):
    """Other weights, no --data or --state-disk 0, --keep 0, lower limits: a session waits for the server that can go on
    with it. What is not of a session stays whatever happens.
    """
    with running(model, tmp_path) as service:
        viewer = Viewer(service)
        token = viewer.start()["token"]
        viewer.blocks(3)
    (tmp_path / "sessions" / "notes").mkdir()
    (tmp_path / "sessions" / "notes" / "mine.txt").write_text("a person's own")
    before = files(tmp_path)
    assert len(before) >= 3
    none = "this server keeps no live sessions: it has"
    for other, settings, line in (
        (replace(model, weights_sha256="0" * 64), Settings(state_bytes=10**8), "it was made with other weights"),
        (model, Settings(limits=Limits(8, 0.05)), f"{none} no --data, or --state-disk 0"),
        (model, Settings(limits=Limits(8, 0), state_bytes=10**8), f"{none} --keep 0"),
    ):
        with serving(other, tmp_path, settings) as service, Viewer(service) as early:
            early.send("start", v=1, resume=token)
            refused = early.wait("refused")
            assert (refused["code"], refused["retry_after"], refused["closes"]) == ("cannot_resume", 10, True)
            assert refused["message"] == f"the session does not go on after the server's restart: {line}"
            with pytest.raises(ConnectionClosed) as closed:
                early.receive()
            assert closed.value.rcvd.code == 1013
        assert files(tmp_path) == before
    lower = Settings(limits=Limits(1, 0.05), state_bytes=1000)  # what it was told holds: 60 s
    with serving(model, tmp_path, lower) as service:
        with service.scheduler.lock:
            service.scheduler._expire(time.monotonic() + 30)
            assert len(service.scheduler.sessions) == 1
        with Viewer(service) as back:
            back.start(resume=token, after=2)
            assert np.array_equal(pictures(back.blocks(2)), made(model, 5)[3:])
            back.send("stop")
            back.wait("ended")
        until(lambda: list(files(tmp_path)) == [tmp_path / "sessions" / "notes" / "mine.txt"])


def test_a_dormant_session_expires(monkeypatch):
    monkeypatch.setattr(dormant_module, "time", SimpleNamespace(monotonic=lambda: 110.0))
    deleted = []
    dormant = Dormant(deleted.append)
    for name in ("a", "b"):
        dormant.add(DormantSession(name, hash_token(name), "it was made with other weights", False, 60.0, seen=100.0))
    assert dormant.next_expiry(110.0) == 50.0
    with pytest.raises(Refusal, match="other weights"):  # its viewer is there: it waits as long again
        dormant.require_awake(hash_token("b"))
    dormant.require_awake(hash_token("c"))
    dormant.expire(160.0)
    assert deleted == ["a"] and list(dormant) == ["b"]
    dormant.expire(170.0)
    assert deleted == ["a", "b"] and dormant.next_expiry(0.0) == float("inf")


def test_dormant_sessions_are_deleted_when_their_time_is_over(model, tmp_path):
    with running(model, tmp_path, keep=0.2) as service:
        viewer = Viewer(service)
        viewer.start()
        viewer.blocks(3)
    other = replace(model, weights_sha256="0" * 64)
    with running(other, tmp_path, keep=0.2) as service:
        until(lambda: not service.scheduler.keeper.dormant and not list((tmp_path / "sessions").iterdir()))
    for path in tmp_path.rglob("*.sqlite*"):
        assert PROMPT.encode() not in path.read_bytes()


def test_records_of_an_older_version_are_read(model, tmp_path):
    """Without what the client was told of --keep."""
    with running(model, tmp_path) as service:
        viewer = Viewer(service)
        token = viewer.start()["token"]
        viewer.blocks(1)
    with closing(sqlite3.connect(tmp_path / "videos.sqlite")) as database:
        database.execute("ALTER TABLE sessions DROP COLUMN keep")
    with running(model, tmp_path) as service, Viewer(service) as back:
        assert back.start(resume=token, after=0)["block"] == 1
    with closing(sqlite3.connect(tmp_path / "videos.sqlite")) as database:
        database.execute("ALTER TABLE sessions DROP COLUMN jumps")
    with pytest.raises(ValueError, match="its live sessions cannot be read: no such column: jumps"):
        Service(model, ExecutionConfig(), tmp_path, Settings())


def test_a_state_that_cannot_be_read_now_is_not_deleted(model, disk, monkeypatch):
    """Of another version, or on a disk that has gone for a while: only damage is of no use to anybody."""
    live = video(model, disk)
    blocks(live, 4, disk)

    def unreadable(path, *_):
        raise ValueError(f"cannot read {path}: Input/output error")

    monkeypatch.setattr(live_module, "load_session", unreadable)
    again = StateDisk(disk.folder, 10**8, Metrics(), **OFTEN)
    with pytest.raises(Refusal, match="cannot be used by this server") as refused:
        video(model, again).restore([(0, PROMPT)], 4)
    assert refused.value.code == "cannot_resume" and len(list(disk.folder.rglob("*.safetensors"))) == 2
    (disk.folder / "a" / "something.else").touch()
    (disk.folder / "a" / ".1234.77.partial.safetensors").touch()
    monkeypatch.undo()
    fresh = video(model, StateDisk(disk.folder, 10**8, Metrics(), **OFTEN))
    fresh.restore([(0, PROMPT)], 4)
    assert fresh.block == 4 and (disk.folder / "a" / "something.else").exists()
    assert not list(disk.folder.rglob("*.partial*"))
