"""TensorBoard's files of events, written by the thread that asks for it.

``SummaryWriter`` writes in a thread of its own, which prints a traceback when the disk is full; the error reaches the
trainer later, without the name of the file.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

from ...io.atomic import cannot_write
from ...io.video import Frames

_count = itertools.count()


class EventFile:
    """A new file in the folder; scalars and images of earlier files from ``purge_step`` on count no more.

    Raises:
        OSError: one line, here and in every method: the file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_count)}"
        self.path = folder / name  # as TensorBoard sorts them
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("wb", buffering=0)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.records = RecordWriter(self.file)
        version = "brain.Event:2"
        self._write(Event(file_version=version))
        self._write(Event(step=purge_step, file_version=version))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar

        self._write(Event(step=step, summary=scalar(name, value)))

    def image(self, name: str, image: Frames, step: int) -> None:
        """A picture uint8 [H, W, 3]."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard import summary

        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        try:
            self.records.write(event.SerializeToString())
        except OSError as error:
            self.close()  # what is behind half a record cannot be read
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self.file.close()
