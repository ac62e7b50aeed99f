"""The watchdog of a job: what it takes for a fault, by times of the test's own; no process is started."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from hiar_model.distributed import watchdog as module
from hiar_model.distributed.watchdog import Watchdog

pytestmark = pytest.mark.cpu

START = {"name": "rank 1, steps 2 to 3", "at": "step 2 of block 0", "state": "run", "beats": 3, "moves": 5}


@pytest.fixture
def watchdog():
    """Of rank 0 of two, with a limit of 10 s, of which 8 are for noticing; its reports are in ``reports``."""
    watchdog = object.__new__(Watchdog)
    watchdog.rank, watchdog.ranks, watchdog.timeout, watchdog.beat = 0, 2, 10.0, 0.5
    watchdog.fault, watchdog.stopped, watchdog.closed, watchdog.reports = None, False, False, []
    watchdog._statuses = [{**START, "state": "end"}, dict(START)]
    watchdog._seen = [(-1, -1, 0.0, 0.0)] * 2
    watchdog.report = lambda message, culprit=None: watchdog.reports.append((message, culprit))
    watchdog._judge(100.0)
    assert not watchdog.reports
    return watchdog


@pytest.mark.parametrize(
    ("changes", "seconds", "report"),
    [
        ({"beats": 4}, 9, None),  # the first block takes its time
        ({"beats": 4}, 81, "hangs for 81 s at step 2 of block 0"),
        ({"beats": 4, "warmed_up": True}, 7, None),
        ({"beats": 4, "warmed_up": True}, 9, "hangs for 9 s at step 2 of block 0"),
        ({"beats": 4, "warmed_up": True, "moves": 6}, 9, None),
        ({"beats": 4, "warmed_up": True, "state": "wait"}, 900, None),  # for another, which is the one that hangs
        ({}, 7, None),
        ({}, 9, "sent no heartbeat for 9 s at step 2 of block 0"),
        ({"state": "end"}, 900, None),
    ],
)
def test_a_fault_is_what_takes_longer_than_the_limit(watchdog, changes, seconds, report):
    watchdog._statuses[1] |= changes
    watchdog._judge(100.0 + seconds)
    assert watchdog.reports == ([] if report is None else [(f"rank 1, steps 2 to 3 {report}", 1)])


def test_a_process_that_has_not_begun_has_more_time(watchdog):
    watchdog._statuses[1] = {"name": "rank 1", "at": "start"}
    watchdog._seen[1] = (-1, -1, 0.0, 0.0)
    for now, reports in ((100.0, []), (109.0, []), (181.0, [("rank 1 sent no heartbeat for 81 s at start", 1)])):
        watchdog._judge(now)
        assert watchdog.reports == reports


def test_who_was_stopped_blames_nobody(watchdog, monkeypatch):
    """Ctrl-Z and fg: the others had no heartbeat for as long as this process itself did not look."""
    clock = iter([100.0, 100.5, 400.0, 400.5])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    judged, judge = [], watchdog._judge
    watchdog._write = watchdog._read = lambda: None
    watchdog._judge = lambda now: (judged.append(now), judge(now))

    def sleep():
        watchdog.closed = len(judged) == 3

    watchdog._sleep = sleep
    watchdog._run()
    assert judged == [100.5, 400.0, 400.5] and not watchdog.reports


class StoreOfJob:
    """Of a job, shared by its processes."""

    def __init__(self):
        self.counts, self.values = {}, {}

    def add(self, key, number):
        self.counts[key] = self.counts.get(key, 0) + number
        return self.counts[key]

    def set(self, key, value):
        self.values[key] = value


def test_a_fault_is_reported_by_the_first_who_sees_it(watchdog, capsys):
    store, watchdogs = StoreOfJob(), []
    for rank in range(3):
        one = object.__new__(Watchdog)
        one.__dict__ |= {**watchdog.__dict__, "rank": rank, "store": store, "finished": rank}
        one.advice = lambda finished: f";\n{finished} blocks are finished"
        one.__dict__.pop("report")
        watchdogs.append(one)
    watchdogs[1].report("rank 1\n hangs", 1)
    watchdogs[2].report("rank 1 died", 1)
    watchdogs[1].report("rank 1 died", 1)
    line = "rank 1 hangs; 1 blocks are finished"
    assert capsys.readouterr().err == f"hiar: {line}\n"
    assert watchdogs[1].fault == line and watchdogs[2].fault is None, "it reads it from the store"
    assert line in store.values["fault"]


@pytest.fixture
def store(tmp_path):
    """That of a job of one rank."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()


@pytest.mark.parametrize("silent", [0, 1])
def test_a_terminated_job_waits_only_for_ranks_that_do_not_answer(store, monkeypatch, capfd, silent):
    """It went on for four seconds whoever had answered: on every GPU, at each SIGTERM."""
    dog, waits, ended = Watchdog(dist.group.WORLD, timeout=60), [], []
    dog.ranks += silent
    dog._statuses += [{"name": "rank 1", "at": "step 1 of block 4", "state": "run"}] * silent
    monkeypatch.setattr(dog, "_end", ended.append)
    now = [0.0]

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    dog._roll_call()
    assert ended == [128 + signal.SIGTERM] and dog.terminated
    fault = "hiar: rank 1 died at step 1 of block 4; run the command again\n"
    if silent:
        assert sum(waits) >= 4 * dog.beat == 4 and capfd.readouterr().err == fault
    else:
        assert sum(waits) < dog.beat and dog.fault is None
