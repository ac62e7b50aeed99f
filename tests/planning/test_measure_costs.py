"""Costs of tasks as they are measured, by a clock of the test's own: which tasks count, and what is the cost."""

from __future__ import annotations

import pytest
from tiny_model import MODEL, SIZE, TEXT

from hiar_model.config import RolloutConfig
from hiar_model.planning import measure_costs as module
from hiar_model.planning.measure_costs import measure_costs
from hiar_model.rollout import Rollout

pytestmark = pytest.mark.cpu

LATENT = tuple(SIZE.values())
COLD = 1000.0  # of each block until the window is full, and the one after it


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A denoise task takes its window and 1, a cache task half its window, a fused one 0.6 of the two."""
    seconds, step = [0.0], Rollout.step

    def timed_step(self):
        group, window = self._cursor.at(self.groups_done), self.plan.window_frames[0]
        task, block = group[0][-1], self.plan.frames_per_block
        cost = {"denoise": window + 1, "cache": window / 2}[task.kind]
        if len(group[0]) == 2:
            cost = 0.6 * (window + 1 + window / 2)
        seconds[0] += COLD if task.block <= -(-window // block) else cost
        return step(self)

    monkeypatch.setattr(Rollout, "step", timed_step)
    monkeypatch.setattr(module, "now", lambda device: seconds[0])


def test_costs_are_those_of_full_windows():
    config = RolloutConfig((1000, 500), order="stream", window_frames=(9, 15))
    costs = measure_costs(MODEL, TEXT, config, num_latent_frames=30, latent_size=LATENT)
    assert dict(costs.denoise.points) == {6: 7, 9: 10, 15: 16}
    assert dict(costs.cache.points) == {6: 3, 9: 4.5, 15: 7.5} and costs.fused == 1.0


def test_a_window_is_no_wider_than_the_video():
    """Its last block may be cut: it is made in full."""
    config = RolloutConfig((1000, 500), order="stream", window_frames=(None, 9))
    costs = measure_costs(MODEL, TEXT, config, num_latent_frames=11, latent_size=LATENT, repeats=1)
    assert [frames for frames, _ in costs.denoise.points] == [6, 9, 12]


def test_a_fused_task_is_compared_with_its_two():
    config = RolloutConfig((1000,), order="stream", window_frames=9)
    costs = measure_costs(MODEL, TEXT, config, num_latent_frames=None, latent_size=LATENT, repeats=1, fused=True)
    assert costs.fused == pytest.approx(0.6) and dict(costs.denoise.points) == {6: 7, 9: 10}
