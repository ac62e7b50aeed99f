"""Who shares a turn, and that a shared turn gives each session the blocks that it would have had alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from serving import Viewer, serving
from small_toy import PROMPT

from hiar_model import ExecutionConfig
from hiar_model.serve import turns
from hiar_model.serve.app import Settings
from hiar_model.serve.live import LiveVideo
from hiar_model.serve.protocol import StartMessage
from hiar_model.serve.scheduler import Limits
from hiar_model.serve.session import Clock, ViewerSession
from hiar_model.serve.turns import Turns

pytestmark = pytest.mark.cpu

BLUE = "a blue square moving up"
NOW = 1000.0


@pytest.fixture
def opened(model):
    def opened(due=0.0, **start):
        """A session whose viewer runs dry in ``due`` seconds from NOW."""
        request = StartMessage(1, **{"prompt": PROMPT, "order": "stream", **start})
        session = ViewerSession(request, None, "")
        session.video = LiveVideo(model, ExecutionConfig(), request)
        session.clock = Clock(12.0, None if math.isinf(due) else NOW + due)
        session.possible = NOW
        return session

    return opened


def measured(most=None, **seconds):
    made = Turns(most)
    made.seconds = {int(name[1:]): value for name, value in seconds.items()}
    return made


def pictures(session, count):
    """Frames of the next blocks, made alone."""
    return [session.video.make().frames for _ in range(count)]


def close(a, b):
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.parametrize(
    ("dues", "together"),
    [
        ([5.0, 6.0, 7.0], 3),  # none is near to running dry
        ([1.5, 6.0, 7.0], 2),  # a turn of three, 1.8 s, would make the first late
        ([0.9, 6.0, 7.0], 1),  # a turn of two as well
        ([-3.0, -2.0, -1.0], 3),  # all are late
        ([-1.0, 1.9, 2.5], 2),  # the second would run dry behind the first: alone they take 2 s
        ([-math.inf, 4.0, 4.0], 1),  # a new viewer waits for nobody who can wait
        ([-math.inf, -math.inf, -1.0], 3),
    ],
)
def test_nobody_waits_who_cannot(opened, dues, together):
    sessions = [opened(due) for due in dues]
    chosen = measured(t1=1.0, t2=1.4, t3=1.8).choose(sessions[::-1], NOW)
    assert [s.clock.due() for s in chosen] == [s.clock.due() for s in sessions[:together]]
    assert chosen[0] is sessions[0] or math.isinf(dues[1])


def test_seconds_of_a_turn_are_expected(opened):
    made = measured()
    assert made.expected(3) == 0.0
    made.seconds = {1: 1.0, 4: 2.0}
    assert [made.expected(count) for count in (1, 2, 4, 6)] == [1.0, 2.0, 2.0, 3.0]
    made.seconds = {}
    list(made.make([opened(), opened(seed=1)]))
    assert list(made.seconds) == [2] and 0 < made.seconds[2] < 60


def test_at_most_so_many(opened):
    sessions = [opened(5.0, seed=seed) for seed in range(4)]
    for most, count in ((1, 1), (2, 2), (9, 4), (None, 4)):
        assert len(Turns(most).choose(sessions, NOW)) == count


def test_where_it_does_not_pay_each_has_its_turn(opened, monkeypatch):
    sessions = [opened(5.0, seed=seed) for seed in range(5)]
    tokens = turns.block_tokens(sessions[0].video.run.rollout)
    assert tokens == 48 and turns.block_tokens(opened(order="wavefront").video.run.rollout) == 2 * tokens
    for most, count in ((4 * tokens, 4), (5 * tokens, 5), (4 * tokens - 1, 1)):
        monkeypatch.setattr(turns, "MOST_TOKENS", most)
        assert len(Turns().choose(sessions, NOW)) == count
        assert len(Turns(3).choose(sessions, NOW)) == 3, "asked for"
    monkeypatch.setattr(turns, "MOST_TOKENS", 1000)
    monkeypatch.setattr(turns, "WIDEST", 31)
    assert len(Turns().choose(sessions, NOW)) == 1


def test_orders_join_if_their_forwards_match(opened):
    assert len(Turns().choose([opened(), opened(order="wavefront"), opened(order="block_first")], NOW)) == 3
    graph = opened()
    graph.video.run.rollout._executor.capture = object()
    assert len(Turns(8).choose([opened(), graph, opened()], NOW)) == 2


def test_each_gets_its_own_video(opened):
    starts = [{"seed": 1}, {"seed": 2, "prompt": BLUE}, {"seed": 3, "order": "wavefront"}, {"seed": 4, "num_frames": 9}]
    expected = [pictures(opened(**start), 3) for start in starts]
    sessions = [opened(**start) for start in starts]
    ahead = pictures(sessions[0], 1)
    made = {session.id: [] for session in sessions}
    for _ in range(3):
        for session, outcome in Turns().make(sessions):
            made[session.id].append(outcome)
    for session, frames in zip(sessions, expected, strict=True):
        frames = frames[1:] if session is sessions[0] else frames
        pieces = made[session.id][: len(frames)]
        assert [piece.frames.shape for piece in pieces] == [one.shape for one in frames]
        assert all(close(piece.frames, one) for piece, one in zip(pieces, frames, strict=True))
    assert close(ahead[0], expected[0][0]) and sessions[3].video.complete
    ((_, nothing),) = (pair for pair in Turns().make(sessions) if pair[0] is sessions[3])
    assert nothing is None


def test_changes_and_ways_back_beside_another(opened):
    def change(video):
        video.fork(1, BLUE)

    def back(video):
        video.seek(1)

    for act in (change, back):
        alone, joint, beside = opened(seed=1), opened(seed=1), opened(seed=2)
        expected = pictures(alone, 3)
        act(alone.video)
        expected += pictures(alone, 2)
        found = []
        for turn in range(5):
            if turn == 3:
                act(joint.video)
            found += [outcome.frames for session, outcome in Turns().make([joint, beside]) if session is joint]
        assert all(close(a, b) for a, b in zip(found, expected, strict=True))
        assert beside.video.block == 5


def test_one_that_fails_or_goes_takes_no_other_along(opened):
    good, bad, gone = (opened(seed=seed) for seed in range(3))
    expected = pictures(opened(seed=0), 2)
    renoise = bad.video.run.rollout._executor.renoise
    bad.video.run.rollout._executor.renoise = lambda step, block: renoise(step, block) * (math.nan if block else 1.0)
    first = {s.id: outcome for s, outcome in Turns().make([good, bad, gone])}
    assert len(first) == 3 and close(first[good.id].frames, expected[0])
    task = gone.video.run.rollout
    task.on_task = lambda *_: setattr(gone, "gone", True)
    second = {s.id: outcome for s, outcome in Turns().make([good, bad, gone])}
    assert set(second) == {good.id, bad.id} and close(second[good.id].frames, expected[1])
    assert isinstance(second[bad.id], FloatingPointError) and "block 1" in str(second[bad.id])


def test_viewers_of_a_server_share_turns(model, tmp_path, monkeypatch):
    shared, make = [], Turns.make
    monkeypatch.setattr(Turns, "make", lambda self, sessions: shared.append(len(sessions)) or make(self, sessions))
    with serving(model, tmp_path, Settings(limits=Limits(4, keep=0))) as service:
        with Viewer(service) as one, Viewer(service) as two:
            for seed, viewer in enumerate((one, two)):
                viewer.start(seed=seed)
            for _ in range(8):
                for viewer in (one, two):
                    viewer.blocks(1)
        assert max(shared) == 2
        text = service.scheduler.metrics.text().decode()
    assert f"hiar_turn_sessions_count {len(shared)}.0" in text
