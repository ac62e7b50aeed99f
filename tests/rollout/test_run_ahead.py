"""On an accelerator the cache tasks of a finished block are queued before it is handed over: nobody can tell."""

from __future__ import annotations

import pytest
import torch
from made_runs import make_rollout
from tiny_model import MODEL, SIZE, TEXT

from hiar_model.config import FlowSchedule
from hiar_model.rollout import Rollout
from hiar_model.rollout.executor import Executor

pytestmark = pytest.mark.cpu

ORDERS = [{"order": "stream"}, {"order": "block_first"}, {"order": "stream", "cache_source": "next_step"}]
OPTIONS = {"num_frames": 12, "window_frames": 6, **SIZE}


def rollout(text=TEXT, **options) -> Rollout:
    return make_rollout(MODEL, text, FlowSchedule.uniform(4), **{**OPTIONS, **options})


@pytest.fixture
def accelerator(monkeypatch):
    """The executor decides as if its device queued work; what ran is noted."""
    ran, run, on_cpu = [], Executor.run, Executor.may_run_ahead

    def may_run_ahead(self, following):
        device, self.device = self.device, torch.device("cuda")
        try:
            return on_cpu(self, following)
        finally:
            self.device = device

    def noted(self, group):
        ran.append(group)
        return run(self, group)

    monkeypatch.setattr(Executor, "may_run_ahead", may_run_ahead)
    monkeypatch.setattr(Executor, "run", noted)
    return ran


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_blocks_and_states_are_the_same(options, accelerator, monkeypatch):
    blocks = iter(made := rollout(**options))
    first = next(blocks)
    assert {row[-1].kind for row in accelerator[-1]} == {"cache"}  # of the block in hand
    assert made.groups_done == len(accelerator)
    state = made.state_dict()
    rest = [first, *blocks]
    again = rollout(**options)
    again.load_state_dict(state)
    resumed = [first, *again]
    monkeypatch.setattr(Executor, "may_run_ahead", lambda self, following: False)
    plain = list(rollout(**options))
    for other in (rest, resumed):
        assert len(other) == len(plain)
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(other, plain, strict=True))


@pytest.mark.parametrize("order", ["wavefront", "stream"])
def test_a_prompt_given_between_blocks_is_not_missed(order, accelerator, monkeypatch):
    """Visits of blocks that have not begun wait for the caller."""

    def made(prompt_of: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        run = rollout(lambda block: prompt_of.get(block, TEXT), order=order)
        found = []
        for block in run:
            found.append(block.latents)
            prompt_of.setdefault(run.last_started_block + 1, TEXT * (2 + len(found)))
        return found

    ahead = made({})
    monkeypatch.setattr(Executor, "may_run_ahead", lambda self, following: False)
    assert all(torch.equal(a, b) for a, b in zip(ahead, made({}), strict=True))


def test_not_on_a_cpu_nor_where_every_visit_is_looked_at_nor_in_a_pipeline(accelerator):
    assert accelerator == []
    list(rollout(on_nan="retry", order="stream"))
    retried = [[row[-1].kind for row in group] for group in accelerator]
    made = rollout(order="stream", on_nan="retry")
    next(iter(made))
    assert made.groups_done == 4 and retried[4] == ["cache"] * 4
    made = rollout(order="stream", executor="pipeline")  # which tells the other ranks of every block
    next(iter(made))
    assert made.groups_done == 4
