"""The live figures of a session: what is late, how fast it is, and what a jump leaves of them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from hiar_model.serve.live import Piece
from hiar_model.serve.protocol import StartMessage
from hiar_model.serve.session import WINDOW, Clock, ViewerSession

pytestmark = pytest.mark.cpu

PROMPT = "a red circle moving right"


def session(fps=10.0):
    one = ViewerSession(StartMessage(1, PROMPT), None, "")
    one.video, one.clock = SimpleNamespace(frame_of=lambda block: 3 * block), Clock(fps)
    one.opened = one.possible = 100.0
    return one


def piece(block):
    return Piece(block, 3 * block, np.zeros((3, 2, 2, 3), np.uint8), 0, PROMPT)


def test_what_is_late():
    """A chunk that comes when the viewer has nothing to play, although it could have come before."""
    clock = Clock(10.0)
    assert clock.due() == -math.inf and not clock.arrived(3, 5.0, 0.0) and clock.due() == pytest.approx(5.3)
    assert not clock.arrived(3, 5.2, 0.0) and clock.due() == pytest.approx(5.6)
    assert not clock.arrived(3, 5.7, 5.5) and clock.due() == pytest.approx(6.0), "there was room for it since 5.5"
    assert clock.arrived(3, 6.1, 5.0) and clock.misses == 1 and clock.due() == pytest.approx(6.4)
    clock.restart()
    assert not clock.arrived(3, 9.0, 0.0) and clock.misses == 1 and clock.due() == pytest.approx(9.3)


def test_seconds_between_chunks():
    one = session()
    one.arrived(piece(0), b"", now := 101.5, 1)
    one.acknowledge(0, now)
    assert one.stats(1, 0).first_chunk_s == 1.5 and one.stats(1, 0).p50 is None
    for block in range(1, 101):  # after 0.01 to 1.00 seconds, in no order
        now += 0.01 * (1 + block * 37 % 100)
        interval, _ = one.arrived(piece(block), b"", now, 1)
        assert interval == pytest.approx(0.01 * (1 + block * 37 % 100))
        one.acknowledge(block, now)
    stats = one.stats(1, 0)
    assert (stats.p50, stats.p99) == pytest.approx((0.51, 0.99)) and stats.first_chunk_s == 1.5
    one.possible = now + 60.0  # when the viewer made room
    assert one.arrived(piece(101), b"", now + 60.1, 1)[0] is None and one.stats(1, 0).p99 == stats.p99


def test_frames_per_second_and_the_queue():
    one = session()
    one.speeds.extend([(0.0, 300), (1.0, 3), (3.0, 6)])  # the first began nobody knows when
    one.arrived(piece(0), b"", 101.0, 2)
    one.arrived(piece(1), b"", 101.1, 2)
    stats = one.unacked[-1].block.stats
    assert (stats.fps, stats.queue, stats.sessions) == (3.0, 2, 2)


def test_what_is_promised_is_what_is_not_taken_yet():
    one = session()
    one.video.rewind_bytes, one.video.states = 1000, [SimpleNamespace(nbytes=300), SimpleNamespace(nbytes=50)]
    assert one.promised == 650
    one.video, one.reserved = None, 1200
    assert one.promised == 1200


def test_blocks_are_made_a_window_ahead():
    one = session()
    one.pending.append(piece(WINDOW - 1))
    for block in range(WINDOW - 1):
        assert one.hungry
        one.arrived(piece(block), b"", 101.0, 1)
    assert not one.hungry and one.possible == 100.0
    one.acknowledge(0, 150.0)
    assert one.hungry and one.possible == 150.0
    one.acknowledge(1, 160.0)
    assert one.possible == 150.0, "there was room already"


def test_a_jump_forgets_what_follows():
    one = session()
    for block in range(3):
        one.arrived(piece(block), b"", 101.0 + block, 1)
    one.pending, one.complete = [piece(2), piece(3)], True
    one.speeds.append((1.0, 3))
    one.jumped(2, 200.0)
    assert [chunk.block.block for chunk in one.unacked] == [0, 1] and not one.pending
    assert not one.complete and one.hungry and one.possible == 200.0 and one.block == 2
    assert one.clock.due() == -math.inf and not one.speeds
    assert one.arrived(piece(2), b"", 300.0, 1) == (None, False), "the viewer had nothing to play since the jump"
