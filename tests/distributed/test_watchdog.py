"""The watchdog of a job in one process; test_pipeline.py has those of several."""

from __future__ import annotations

import signal

import pytest
import torch.distributed as dist

from hiar_model.distributed import watchdog as module
from hiar_model.distributed.watchdog import Watchdog

pytestmark = pytest.mark.cpu


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
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(module.time, "sleep", sleep)
    dog._roll_call()
    assert ended == [128 + signal.SIGTERM] and dog.terminated
    fault = "hiar: rank 1 died at step 1 of block 4\n"
    if silent:
        assert sum(waits) >= 4 * dog.beat == 4 and capfd.readouterr().err == fault
    else:
        assert sum(waits) < dog.beat and dog.fault is None
