"""What is written of a run's metrics, and what a resumed run keeps of it."""

from __future__ import annotations

import numpy as np
import pytest

from hiar_model.train.engine import loss_plot, metrics
from hiar_model.train.engine.metrics import MetricsLogger

pytestmark = pytest.mark.cpu


@pytest.fixture
def purged(monkeypatch):
    """The steps from which on TensorBoard's files hide what earlier ones hold."""
    steps = []

    class NoEvents:
        def __init__(self, folder, purge_step):
            steps.append(purge_step)

    monkeypatch.setattr(metrics, "EventFile", NoEvents)
    return steps


@pytest.mark.parametrize("cut", ["3,0.5,0", "2,0.5", "2", "x", "2,0.5,0.125", "2,0.5,0.13,0.5,0.25", "\0\0\0"])
def test_rows_of_finished_updates_stay(tmp_path, purged, cut):
    """Not those behind the state, nor one that was cut off, stands twice, or has run into the next; nor what a power
    cut leaves at the end.
    """
    table = tmp_path / "loss.csv"
    table.write_text(f"update,critic_loss,student_loss\n1,0.5,0.25\n2,0.5,0.125\n{cut}\n")
    MetricsLogger(tmp_path, 2, {})
    assert table.read_text().splitlines() == ["update,critic_loss,student_loss", "1,0.5,0.25", "2,0.5,0.125"]
    assert purged == [3], "update 2 stays there too"


def test_pictures_are_averaged_until_they_fit():
    frames = np.zeros((1, 300, 7, 3), np.uint8)
    assert metrics._smaller(frames, 300) is frames
    frames[:, ::2] = 7
    small = metrics._smaller(frames, 208)
    assert small.shape == (1, 150, 3, 3) and set(small.flat) == {4}, "3.5, rounded"


def test_losses_are_averaged_over_the_updates_before(tmp_path, monkeypatch):
    """Over a fortieth of the run."""
    panels = []
    monkeypatch.setattr(loss_plot, "save_plot", lambda drawn, picture: panels.extend(drawn))
    rows = "".join(f"{2 * n},{n},\n" for n in range(1, 81))
    (tmp_path / "loss.csv").write_text(f"update,student_loss,critic_loss\n{rows}162,81,5\n")
    loss_plot.draw_losses(tmp_path / "loss.csv", tmp_path / "loss.png")
    student, critic = panels
    logged, means = student.series
    assert list(logged.y) == list(range(1, 82)) and list(means.x) == list(range(2, 164, 2))
    assert (means.y[0], means.y[1], means.y[2], means.y[80]) == (1, 1.5, 2, 80) and means.label == "mean of the last 3"
    assert [list(one.x) for one in critic.series] == [[162], [162]], "a row without it is no point"
