"""Metrics of a run: loss.csv and its plot, TensorBoard, sheets of samples, and W&B where its variable is set."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...common import environment
from ...io.atomic import atomic, atomic_write, sync
from ...io.video import Frames, contact_sheet, save_png
from .events import EventFile
from .loss_plot import PICTURE, draw_losses

LOSSES, SAMPLES, EVENTS, WANDB_ID = "loss.csv", "samples", "tensorboard", "wandb_id.txt"
UPDATE = "update"  # first column of the losses
SATURATED = 4  # of 255: how near to black or full a channel counts as saturated
PLOT_EVERY = 60.0  # seconds, at least, between two drawings of the losses; and once more at the end
SHEET_FRAMES, SHEET_SIDE = 24, 208  # of a video on a sheet, evenly spread; pixels of a frame's longer side, at most


def sample_scalars(frames: Frames) -> dict[str, float]:
    """Metrics that show a student collapse, of videos uint8 [N, F, H, W, 3].

    motion       mean absolute difference of successive frames, of 1: it falls where videos freeze
    saturation   share of channels at black or full: it rises where colours burn out
    """
    motion, saturated = [], []
    for video in frames:  # one by one: real ones are large
        steps = np.abs(np.diff(video.astype(np.int16), axis=0))
        motion.append(steps.mean() / 255 if len(steps) else 0.0)
        saturated.append(((video <= SATURATED) | (video >= 255 - SATURATED)).mean())
    return {"sample_motion": float(np.mean(motion)), "sample_saturation": float(np.mean(saturated))}


class MetricsLogger:
    """Writes the metrics of one run into its folder, on rank 0.

    loss.csv       one row for every logged update, one column for every metric
    loss.png       the losses in it, drawn while the run goes on
    tensorboard/   the same, and the sheets, where tensorboard is installed
    samples/       sheets as .png, one video a row
    wandb_id.txt   of the run at W&B, where its variable is set: a resumed run goes on in the same curves

    Args:
        update: number of finished updates; rows of later ones, from a killed run, are dropped.
        recipe: of the run, for W&B. say: called with one line where TensorBoard is missing, or its files, the plot or a
            sheet cannot be written: that ends no run; and where rows of the run are missing or are written again.
        logged: the last update that must have a row.

    Raises:
        ValueError: the variable of W&B is set, and wandb is not installed.
    """

    def __init__(
        self, folder: Path, update: int, recipe: Mapping[str, Any], say: Callable[[str], None] = print, logged: int = 0
    ) -> None:
        project = environment.wandb_project()
        if project and importlib.util.find_spec("wandb") is None:
            raise ValueError(f"WANDB_PROJECT is set to {project!r}, but wandb is not installed")
        self.folder = folder
        self._drawn, self._stale, self._say = time.monotonic(), False, say
        self.columns = self._drop_rows_after(update, logged)
        self.events: EventFile | None = None
        if importlib.util.find_spec("tensorboard") is not None:
            with self._without_events():
                self.events = EventFile(folder / EVENTS, update + 1)
        else:
            say("no TensorBoard scalars: tensorboard is not installed (pip install 'hiar-kernels[train]')")
        self.wandb: Any = None
        if project:
            import wandb

            self.wandb = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                config=dict(recipe),
                id=_wandb_id(folder / WANDB_ID, new=update == 0),
                resume="allow",
            )

    def scalars(self, update: int, numbers: Mapping[str, float]) -> None:
        """Write metrics by name, after so many updates."""
        self._write_row({UPDATE: str(update), **{name: f"{value:.9g}" for name, value in numbers.items()}})
        self._stale = True
        if time.monotonic() - self._drawn >= PLOT_EVERY:
            self._draw()
        with self._without_events() as events:
            if events is not None:
                for name, value in numbers.items():
                    events.scalar(name.replace("_", "/", 1), value, update)
        if self.wandb is not None:
            self.wandb.log(dict(numbers), step=update)

    def sheet(self, update: int, frames: Frames) -> Path | None:
        """Write videos uint8 [N, F, H, W, 3] as one .png, a video a row: at most 24 frames each, scaled down. Returns
        its path; None where it could not be written, which is said."""
        chosen = np.linspace(0, frames.shape[1] - 1, min(SHEET_FRAMES, frames.shape[1])).round().astype(int)
        few = _smaller(frames[:, chosen].reshape(-1, *frames.shape[2:]), SHEET_SIDE)
        image = contact_sheet(few, columns=len(chosen))
        path = self.folder / SAMPLES / f"update_{update:08d}.png"
        written = False
        try:
            path.parent.mkdir(exist_ok=True)
            save_png(image, path)
            written = True
        except OSError as error:  # a picture is no reason to lose the run
            self._say(f"no sheet of samples: {error}")
        with self._without_events() as events:
            if events is not None:
                events.image("samples", image, update)
        if self.wandb is not None:
            import wandb

            self.wandb.log({"samples": wandb.Image(image)}, step=update)
        return path if written else None

    def sync(self) -> None:
        """Put the rows on disk: a state behind them is there too after a power cut.

        Raises:
            OSError: they could not be written.
        """
        if (self.folder / LOSSES).exists():
            sync(self.folder / LOSSES)

    def close(self) -> None:
        """Flush and close."""
        self._draw()
        if self.events is not None:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()

    @contextmanager
    def _without_events(self) -> Iterator[EventFile | None]:
        """Where TensorBoard's files cannot be written, that is said once; the run goes on, with loss.csv."""
        try:
            yield self.events
        except OSError as error:
            self._say(f"no more TensorBoard scalars: {error}")
            self.events = None

    def _draw(self) -> None:
        if not self._stale or not any(name.endswith("_loss") for name in self.columns):
            return
        self._drawn, self._stale = time.monotonic(), False
        try:
            draw_losses(self.folder / LOSSES, self.folder / PICTURE)
        except OSError as error:  # a picture is no reason to lose the run
            self._say(f"no loss plot: {error}")
        except (ValueError, KeyError):
            self._say(f"no loss plot: {self.folder / LOSSES} is no table of losses any more")

    def _write_row(self, row: dict[str, str]) -> None:
        path = self.folder / LOSSES
        fresh = [name for name in row if name not in self.columns]
        if fresh:  # a metric that earlier rows lack: add a column
            self.columns = self.columns + fresh
            _rewrite(path, self.columns, _read(path)[1])
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:  # a full disk is noticed where the file is closed, and then has no name
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _drop_rows_after(self, update: int, logged: int) -> list[str]:
        """Drop the rows that a killed run logged after its last state, since they come again, those that were cut off
        or run into each other, and those of a second writer, where no lock kept one out; returns the columns.
        """
        path = self.folder / LOSSES
        columns, rows = _read(path)
        content = path.read_bytes() if rows else b""
        ended = rows if content.endswith(b"\n") else rows[:-1]
        complete = [row for row in ended if None not in row and None not in row.values()]
        once = {tuple(row.values()): row for row in complete}.values()
        valid = [row for row in once if _number(row) <= update]
        last = max((_number(row) for row in valid), default=0)
        if rows and not update:
            self._say(f"{path}: there is no state yet, so its {len(rows)} rows are dropped and come again")
        if last < logged:
            self._say(f"{path} lacks rows: it ends at update {last}, the state has seen rows up to update {logged}")
        if len(valid) < len(rows) or b"\0" in content:
            _rewrite(path, columns, valid)
        return columns if rows else []  # a header alone may be cut off: the first row writes it again


def last_logged(path: Path) -> int:
    """The update of the last row of a loss.csv; 0: there is none."""
    numbers = [_number(row) for row in _read(path)[1]]
    return int(max((number for number in numbers if math.isfinite(number)), default=0))


def _wandb_id(path: Path, *, new: bool) -> str:
    """The id of this run at W&B, from its file."""
    if new or not path.exists():
        atomic_write(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def _smaller(frames: Frames, side: int) -> Frames:
    """uint8 [F, H, W, 3], averaged over squares of pixels until no side is longer; incomplete squares are cropped."""
    factor = -(-max(frames.shape[1:3]) // side)
    if factor == 1:
        return frames
    height, width = (size // factor for size in frames.shape[1:3])
    cut = frames[:, : height * factor, : width * factor]
    squares = cut.reshape(-1, height, factor, width, factor, 3)
    return squares.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8)


def _number(row: Mapping[str, str]) -> float:
    """The update of a row; infinite where a row that was cut off has none."""
    return int(row[UPDATE]) if row[UPDATE].isdecimal() else math.inf


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; ValueError of one line for a file that is no table of a run."""
    if not path.exists():
        return [], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(line.replace("\0", "") for line in file)  # what a power cut may leave at its end
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}; move it away") from error
    if columns[:1] != [UPDATE] and (columns or rows):
        raise ValueError(
            f"{path} is no table of losses, whose first column is {UPDATE}; move it away, or choose another --out"
        )
    return columns, rows


def _rewrite(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
