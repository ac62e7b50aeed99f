"""A process of a job that dies is named by the others in one line, with the way to go on, in place of a traceback."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from altered import altered
from jsonargparse import Namespace

from hiar_model.cli import parallel, train
from hiar_model.common import environment
from hiar_model.distributed import peers as peers_module
from hiar_model.distributed import watchdog
from hiar_model.distributed.peers import Peers, has_ended, link_error
from hiar_model.distributed.watchdog import Watchdog

pytestmark = pytest.mark.cpu

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:34732. GLHF!"


@pytest.fixture
def killed():
    """The number of a process that was killed, and has not been waited for."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    assert not has_ended(socket.gethostname(), process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()
    assert has_ended(socket.gethostname(), process.pid)


def test_a_process_that_was_killed_has_ended(killed):
    assert has_ended(socket.gethostname(), killed)
    assert not has_ended("elsewhere", killed) and not has_ended(socket.gethostname(), None)
    peers, left = Peers.__new__(Peers), []
    peers.rank, peers.store = 0, SimpleNamespace(check=lambda names: names[0] in left)
    peers.processes = {
        rank: {"host": socket.gethostname(), "pid": pid} for rank, pid in enumerate((killed, os.getpid()))
    }
    assert peers.dead() is None  # it is this process
    peers.rank = 1
    assert peers.dead() == 0
    left.append("left/0")  # it said that it ends by itself
    assert peers.dead() is None


def test_a_process_that_ends_a_moment_after_its_links_is_waited_for(monkeypatch):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(peers_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(peers_module, "has_ended", lambda host, pid: pid == 7 and now[0] > 1.0)
    peers = Peers.__new__(Peers)
    peers.rank, peers.store = 0, SimpleNamespace(check=lambda names: False)
    peers.processes = {rank: {"host": "here", "pid": 6 + rank} for rank in range(2)}
    assert peers.dead() is None and now[0] == 0
    assert peers.dead(patience=0.5) is None and now[0] == pytest.approx(0.5, abs=0.05)
    assert peers.dead(patience=peers_module.PATIENCE) == 1 and now[0] == pytest.approx(1.0, abs=0.05)


def test_errors_of_links():
    wrapped = ValueError("the state cannot be written")
    wrapped.__cause__ = RuntimeError(GLOO)
    assert link_error(RuntimeError(f"{GLOO}\nmore")) == link_error(wrapped) == GLOO
    assert link_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert link_error(ValueError(GLOO)) is None and link_error(None) is None


@pytest.mark.parametrize(
    ("dead", "state", "line"),
    [
        (1, None, "rank 1 died in update 7; the same command resumes from the start"),
        (1, "run/states/update_5", "rank 1 died in update 7; the same command resumes from run/states/update_5"),
        (None, "a", f"lost the others in update 7: {GLOO}; the same command resumes from a"),  # on another machine
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_training_names_who_died(monkeypatch, capsys, dead, state, line, debug):
    monkeypatch.setattr(environment, "world_size", lambda: 2)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(train, "os", altered(os, _exit=leave))
    with pytest.raises(SystemExit) as ended, train._among_others(debug) as others:
        others.peers = SimpleNamespace(dead=lambda patience=0.0: dead, leave=lambda: None)
        others.trainer = SimpleNamespace(update=6, state=state)
        raise ValueError("states cannot be written") from RuntimeError(GLOO)
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.startswith(f"hiar: {line}\n")
    assert ("Traceback" in printed) is debug


def test_a_state_is_not_promised_when_one_has_died(capsys):
    for dead, times in ((None, 1), (1, 0)):
        trainer = SimpleNamespace(first=True, stopping=False, stop=lambda: None)
        with train.ends_training(trainer, lambda dead=dead: dead):
            signal.raise_signal(signal.SIGTERM)
        assert capsys.readouterr().err.count("stopping after this update, with a saved state") == times


def test_the_watchdog_names_who_died(killed, capsys):
    """Ulysses waits in collectives, which know no ranks; an error of its own is reported as before."""

    def watching(pid):
        dog, store = Watchdog.__new__(Watchdog), {}
        dog.rank, dog.ranks, dog.name, dog.fault, dog.finished, dog.position = 0, 2, "rank 0", None, 0, "start"
        dog.advice = lambda finished: ""
        dog._read = lambda: None
        here = {"host": socket.gethostname(), "at": "start"}
        dog._statuses = [{**here, "pid": os.getpid()}, {**here, "pid": pid, "name": "rank 1"}]
        dog.store = SimpleNamespace(add=lambda *_: 1, set=store.__setitem__)
        return dog

    watching(killed).report_error(RuntimeError(GLOO))
    assert capsys.readouterr().err == "hiar: rank 1 died; run the command again\n"
    watching(killed).report_error(RuntimeError("shapes cannot be multiplied"))
    assert "rank 0 failed at start: RuntimeError: shapes" in capsys.readouterr().err


def test_the_watchdog_waits_no_longer_than_it_must(monkeypatch):
    """For a process that ends after its link: its patience, or until another process reports the fault."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds
        dog.fault = "reported" if now[0] > reported_at else None

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    dog = Watchdog.__new__(Watchdog)
    dog.rank, dog._statuses, dog._read = 0, [{}, {}], lambda: None
    for reported_at, waited in ((math.inf, watchdog.PATIENCE), (0.5, 0.5)):
        now[0], dog.fault = 0.0, None
        assert dog._dead() is None and now[0] == pytest.approx(waited, abs=0.05)


def test_the_launcher_names_the_signal():
    assert parallel._end(-9) == "was killed by SIGKILL" and parallel._end(3) == "ended with code 3 without a message"
    assert parallel._end(-99) == "ended with code -99 without a message"


def test_a_wrong_recipe_is_told_by_one_of_several_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "world_size", lambda: 2)
    monkeypatch.setattr(environment, "error_file", lambda: tmp_path / "reported")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(train, "os", altered(os, _exit=leave))
    words = Namespace(recipe="toy/teacher", overrides=["colour=3"], out=None, device="cpu", nproc=2)
    for times in (1, 0):
        with pytest.raises(SystemExit) as ended:
            train.train(words)
        assert ended.value.code == 2 and capsys.readouterr().err.count("hiar: recipe: unknown key colour") == times
