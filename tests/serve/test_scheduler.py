"""The scheduler without its threads: whose turn it is, who expires, what is admitted."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from hiar_model import ExecutionConfig
from hiar_model.serve import protocol, scheduler, turns
from hiar_model.serve.admission import Admission
from hiar_model.serve.live import LiveVideo
from hiar_model.serve.protocol import Refusal, StartMessage
from hiar_model.serve.scheduler import JOB_PATIENCE, Limits, Scheduler
from hiar_model.serve.session import Connection, ViewerSession
from hiar_model.serve.turns import SMOOTHING, Turns

pytestmark = pytest.mark.cpu

PROMPT = "a red circle moving right"
START = StartMessage(1, PROMPT, order="stream", format="webp")


@pytest.fixture(autouse=True)
def now(monkeypatch):
    """The time of the scheduler, which stands still: what a busy machine takes for a test makes no difference."""
    moment = time.monotonic()
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: moment))
    return moment


@pytest.fixture
def idle(model, tmp_path):
    """A scheduler that is not started: its work is done here."""
    return Scheduler(model, ExecutionConfig(), tmp_path, Limits(max_sessions=2, keep=60.0))


def joined(idle, detached=None, **values):
    """A session of it, whose messages and hang-ups are in ``sent``."""
    session = ViewerSession(START, None, "")
    session.sent = []
    session.connection = Connection(
        lambda *messages: session.sent.extend(messages), lambda *why: session.sent.append(why)
    )
    session.detached = None if detached is None else scheduler.time.monotonic() - detached
    for name, value in values.items():
        setattr(session, name, value)
    idle.sessions[session.id] = session
    return session


def test_who_is_away_too_long_expires_but_not_while_the_server_is_stopped(idle, now):
    """Its record would be deleted, and with it the way back after the restart."""
    away, back_soon = joined(idle, detached=61.0), joined(idle, detached=10.0)
    with idle.lock:
        idle.draining = True
        idle._expire(now)
        assert len(idle.sessions) == 2 and not away.gone
        idle.draining = False
        idle._expire(now)
    assert list(idle.sessions.values()) == [back_soon] and away.gone
    assert away.sent == [(1008, "no answer for too long")]


def test_when_to_try_again_is_when_the_first_place_is_free(idle):
    assert idle.full() is None
    joined(idle, detached=55.4), joined(idle, detached=20.0)
    assert idle.full() == 5
    idle.sessions.clear()
    joined(idle), joined(idle)
    assert idle.full() == 10, "nobody is away"


def test_a_whole_video_has_a_turn_although_viewers_wait(idle, model, now):
    idle.jobs = SimpleNamespace(waiting=lambda: True, work=lambda: None)
    session = joined(idle, video=LiveVideo(model, ExecutionConfig(), START))
    assert session.hungry
    idle.job_turn = now - JOB_PATIENCE - 1
    assert idle._next() is idle.jobs.work
    assert idle._next() is not idle.jobs.work, "it had one just now"
    session.playing = False
    assert idle._next() is idle.jobs.work, "nobody waits"


def test_after_a_pause_the_viewer_has_nothing_to_play(idle, now):
    session = joined(idle)
    session.clock.begun = 1.0
    for message, playing, begun in ((protocol.Play(), True, 1.0), (protocol.Pause(), False, 1.0),
                                    (protocol.Play(), True, None)):  # fmt: skip
        idle.handle(session, message)
        assert (session.playing, session.clock.begun) == (playing, begun)
        assert protocol.parse(session.sent[-1], protocol.FROM_SERVER) == protocol.StateMessage(playing)
    assert session.possible == now


def test_a_stored_session_goes_on_behind_the_last_chunk_that_is_named(idle, monkeypatch):
    """A client that comes back twice, with another chunk each time, while the first way is still gone."""
    session, chunks = joined(idle, stored=[(0, PROMPT)], after=2, acked=1), []

    def bring_back(session, video, after):
        chunks.append(after)
        session.after = 5
        video.block = session.next_block(after)

    monkeypatch.setattr(scheduler, "bring_back", bring_back)
    idle._begin(session)
    assert session.video is None and session.ready is None
    idle.tasks.pop()()
    assert chunks == [2, 5] and session.block == session.video.block == 6 and session.ready.block == 6


def test_a_jump_behind_the_last_block_is_no_end(idle):
    session = joined(idle, complete=True)
    idle.encoding.complete(session)
    idle.encoding.stop()
    assert [protocol.parse(message, protocol.FROM_SERVER) for message in session.sent] == [
        protocol.Ended("complete", 0)
    ]
    session.sent.clear()
    session.complete = False  # it jumped meanwhile
    idle.encoding._complete(session)
    assert not session.sent


def test_a_file_that_cannot_be_cut_is_saved_no_more(idle, caplog):
    """It would hold what the viewer has left behind."""

    def truncate(blocks):
        raise ValueError(f"a.spool holds 1 blocks, not {blocks}")

    session = joined(idle, spool=SimpleNamespace(truncate=truncate))
    idle.encoding.cut(session, 3)
    idle.encoding.stop()
    assert session.spool is None and "cannot be saved any more" in caplog.text


def test_memory_is_admitted_to_the_byte(model):
    free = [None]
    admission = Admission(model, ExecutionConfig(), lambda device: free[0])
    resident, working = admission.predicted(START)
    for rewind, need in ((0, resident), (1000, resident + 1000), (10**15, 17 * resident)):
        for promised in (0, 12345):
            free[0] = need + working + promised
            assert admission.admit(START, rewind, promised) == need
            free[0] -= 1
            with pytest.raises(Refusal, match="are free for it") as refused:
                admission.admit(START, rewind, promised)
            assert refused.value.code == "busy" and refused.value.retry_after
    free[0] = None
    assert admission.admit(START, 0, 10**15) == resident


def test_the_last_turn_weighs_less_than_those_before(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    session = ViewerSession(START, None, "")
    session.video, queue = SimpleNamespace(make=lambda: clock.append(clock.pop() + 10.0)), Turns()
    queue.seconds = {1: 20.0}
    list(queue.make([session]))
    assert queue.seconds[1] == pytest.approx(SMOOTHING * 10.0 + (1 - SMOOTHING) * 20.0) and SMOOTHING < 0.5
