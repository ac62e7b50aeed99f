"""A client whose network has gone without a word, and one that only stalled."""

from __future__ import annotations

import asyncio
import time

import pytest
from relay import Relay
from serving import Viewer, serving, until

from hiar_model.serve import connection
from hiar_model.serve.app import Settings
from hiar_model.serve.scheduler import Limits
from hiar_model.serve.session import WINDOW

pytestmark = pytest.mark.cpu


@pytest.fixture
def quick(monkeypatch):
    """A quarter of the real ticks: silence is noticed within half a second."""
    monkeypatch.setattr(connection, "TICK", connection.TICK / 4)


def test_silence_is_noticed_within_two_seconds():
    """Counted in the server's own time, which is what a test can promise on any machine."""
    assert connection.TICK * (connection.SILENT_AFTER + 1) < 2


class FakeLink:
    """A client that answers pings while ``answers``."""

    received, answers, pings, aborted = 0, True, 0, False

    def ping(self):
        self.pings += 1
        self.received += self.answers

    def abort(self):
        self.aborted = True


def test_silence_is_counted_in_ticks(monkeypatch):
    monkeypatch.setattr(connection, "TICK", 0.001)
    fake, said = FakeLink(), []

    async def scene():
        closing = False
        task = asyncio.create_task(connection.watch(fake, said.append, lambda: closing))

        async def reach(condition):
            while not condition():
                await asyncio.sleep(0.001)

        await reach(lambda: fake.pings >= 5)
        assert said == []
        time.sleep(0.1)  # the server itself is held up: no silence of the client
        await asyncio.sleep(0)
        await reach(lambda: fake.pings >= 6)
        assert said == []
        fake.answers = False
        await reach(lambda: said)
        fake.answers = True
        await reach(lambda: len(said) == 2)
        fake.answers = False
        await reach(lambda: len(said) == 3)
        assert not fake.aborted
        closing = True
        await task

    asyncio.run(scene())
    assert said == [True, False, True] and fake.aborted


def test_a_client_that_only_listens_is_there(quick, service, monkeypatch):
    """Its library answers for it."""
    pings, ping = [], connection.ClientLink.ping
    monkeypatch.setattr(connection.ClientLink, "ping", lambda self: (pings.append(self), ping(self)))
    with Viewer(service) as viewer:
        session = service.scheduler.sessions[viewer.start()["session"]]
        while len(viewer.chunks) < WINDOW:
            viewer.receive()
        first = len(pings)
        until(lambda: len(pings) > first + 4)
        assert session.detached is None


def test_a_network_that_breaks_leaves_nothing(quick, model, tmp_path, monkeypatch):
    """By its silence: TCP would tell after a quarter of an hour."""
    client = connection.ClientLink
    ended, lost, aborted, abort = [], client.connection_lost, [], client.abort
    monkeypatch.setattr(client, "abort", lambda self: (aborted.append(self), abort(self)))
    monkeypatch.setattr(client, "connection_lost", lambda self, why: (ended.append(self), lost(self, why)))
    with serving(model, tmp_path, Settings(limits=Limits(keep=0))) as service, Relay(service.url) as relay:
        viewer = Viewer(relay)
        viewer.start()
        viewer.blocks(1)
        (session,) = service.scheduler.sessions.values()
        relay.forwards.clear()
        until(lambda: not service.scheduler.sessions and not service.clients)
        until(lambda: session.video is None and not session.spool.path.exists() and ended)
        assert aborted == ended


def test_a_network_that_stalls_loses_nothing(quick, service):
    with Relay(service.url) as relay:
        viewer = Viewer(relay)
        session = service.scheduler.sessions[viewer.start()["session"]]
        viewer.blocks(2)
        relay.forwards.clear()
        until(lambda: session.detached is not None)
        with service.scheduler.lock:
            session.unacked.clear()  # that there is room is no reason to make more now
            assert not session.hungry and session.connection is not None
        relay.forwards.set()
        until(lambda: session.detached is None)
        viewer.blocks(6)
        assert [block["seq"] for block, _ in viewer.chunks] == list(range(8))
        viewer.send("stop")
        viewer.wait("ended")
