"""TensorBoard's files of a run: scalars and sheets; a full disk."""

from __future__ import annotations

import errno
import re
import threading

import numpy as np
import pytest
from train_job import losses

from hiar_model.train.engine.metrics import MetricsLogger

pytestmark = pytest.mark.cpu


def test_tensorboard_has_scalars_and_sheets(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricsLogger(tmp_path, 0, {})
    logger.scalars(3, {"student_loss": 0.5, "student_dmd_normaliser": 2.0})
    logger.sheet(3, np.zeros((2, 3, 8, 8, 3), np.uint8))
    logger.close()
    MetricsLogger(tmp_path, 2, {}).close()  # a run that goes on behind update 2: what came later does not count
    logger = MetricsLogger(tmp_path, 2, {})
    logger.scalars(4, {"student_loss": 0.25})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"student/loss", "student/dmd_normaliser"} <= set(events.Tags()["scalars"]) and events.Tags()["images"]
    assert [(e.step, e.value) for e in events.Scalars("student/loss")] == [(4, 0.25)]


def test_a_full_disk_under_tensorboard_is_said_once_and_ends_no_run(tmp_path, monkeypatch):
    """In one line that names the file, in no thread of its own."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    lines = []

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = MetricsLogger(tmp_path, 0, {}, lines.append)
    assert not [thread for thread in threading.enumerate() if "tensorboard" in type(thread).__module__]
    logger.scalars(1, {"student_loss": 0.5})
    monkeypatch.setattr(RecordWriter, "write", full)
    for update in (2, 3):
        logger.scalars(update, {"student_loss": 0.25})
    logger.sheet(3, np.zeros((2, 3, 8, 8, 3), np.uint8))
    logger.close()
    (line,) = lines
    assert re.fullmatch(r"no more TensorBoard scalars: cannot write .*tfevents.*: No space left on device", line)
    assert len(losses(tmp_path)) == 3
    lines.clear()
    MetricsLogger(tmp_path, 3, {}, lines.append).close()  # full from its start
    assert len(lines) == 1 and "No space left" in lines[0]
