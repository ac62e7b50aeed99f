"""States on disk by themselves: their order, and what happens while one is being written."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from serving import until

from hiar_model.rollout import state_io
from hiar_model.serve.metrics import Metrics
from hiar_model.serve.states import StateDisk, least_useful, prompts_key

pytestmark = pytest.mark.cpu

KEY = "0123456789abcdef"


@pytest.fixture
def disk(tmp_path):
    disk = StateDisk(tmp_path / "states", 10**6, Metrics(), every=2, rate=1e12)
    yield disk
    disk.close()


def save(states, block, wait=True):
    """A state before ``block``, when the block before it was the last that had begun."""
    states.save(block, block - 1, KEY, {"x": torch.full((4,), float(block))}, {})
    if wait:
        until(lambda: all(file.written for file in states.files))


@contextmanager
def being_written(monkeypatch):
    """States are written at the end of the block."""
    real, go = state_io.write, threading.Event()
    monkeypatch.setattr(state_io, "write", lambda *all_: (go.wait(10), real(*all_)))
    try:
        yield
    finally:
        go.set()


def numbers(files):
    return [file.block for file in files]


def test_they_are_in_the_order_of_their_blocks(disk):
    """Also where one is saved on the way from an earlier block."""
    states = disk.of("a")
    for block in (4, 8, 2):
        save(states, block)
    assert numbers(states.files) == [2, 4, 8] and numbers(states.before(8)) == [8, 4, 2]
    assert numbers(states.before(5)) == [4, 2]
    assert numbers(states.before(8, below=4)) == [4, 2] and numbers(states.before(8, below=3)) == [2]
    states.drop_from(3)  # the last block that has begun in the one before block 4
    assert numbers(states.files) == [2] and len(list(states.folder.iterdir())) == 1


def test_one_is_due_so_many_blocks_behind_the_one_before(disk):
    states = disk.of("a")
    save(states, 8)
    assert [block for block in range(1, 12) if states.due(block, 16)] == [2, 3, 4, 5, 6, 7, 10, 11]
    assert not states.due(2, 10**6 + 1)


def test_one_that_is_being_written_is_no_way_back(disk, monkeypatch):
    states = disk.of("a")
    save(states, 2)
    with being_written(monkeypatch):
        save(states, 4, wait=False)
        assert numbers(states.before(9)) == [2] and not states.due(9, 16)
    until(lambda: numbers(states.before(9)) == [4, 2])


def test_one_that_is_dropped_while_it_is_written_does_not_stay(disk, monkeypatch):
    states = disk.of("a")
    with being_written(monkeypatch):
        save(states, 4, wait=False)
        states.drop_from(0)
    disk.close()
    assert not states.files and not list(states.folder.iterdir())


def test_nothing_of_a_session_stays_that_goes_while_a_state_is_written(disk, monkeypatch):
    states = disk.of("a")
    with being_written(monkeypatch):
        save(states, 4, wait=False)
        disk.remove("a")
        save(states, 6, wait=False)
    disk.close()
    assert not states.folder.exists() and disk.total == 0


def test_the_next_server_has_whole_ones(disk):
    states = disk.of("a")
    for block in (12, 4):
        save(states, block)
    half = states.folder / ".000006_5_0123456789abcdef.safetensors.partial"
    half.touch()
    again = StateDisk(disk.folder, 10**6, Metrics()).of("a")
    assert not half.exists()
    assert [(f.path, f.block, f.started, f.key) for f in again.files] == [
        (f.path, f.block, f.started, f.key) for f in states.files
    ]
    assert again.nbytes == sum(path.stat().st_size for path in states.folder.iterdir())


def test_a_key_is_of_the_prompts_of_the_blocks_that_have_begun():
    changes = [(0, "red"), (3, "blue")]
    assert prompts_key(changes, 2) == prompts_key(changes[:1], 2) == prompts_key(changes[:1], 9)
    assert len({prompts_key(changes, 3), prompts_key(changes[:1], 3), prompts_key([(0, "red"), (3, "green")], 3)}) == 3


def test_of_old_ones_few_stay():
    assert least_useful([8, 16, 23, 30]) == 0, "although 23 leaves the smaller gap: it is young"
