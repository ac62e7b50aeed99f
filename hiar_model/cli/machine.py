"""What commands that run a model share: where it runs, how it is loaded, how progress is shown."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from ..models.video_model import VideoModel


def machine_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", type=str, help="float32, bfloat16, float16 or float64")
    parser.add_argument(
        "--threads", type=int, help="CPU threads of torch; default: 1, or torch's own for a large model"
    )


def load_model(a: Namespace, **options: Any) -> VideoModel:
    """The model that a command names; ``options``: of :func:`hiar_model.load_video_model`."""
    import torch

    from ..models.registry import load_video_model
    from ..models.threads import is_small

    if a.threads is not None:
        if a.threads < 1:
            raise ValueError(f"threads must be at least 1, got {a.threads}")
        torch.set_num_threads(a.threads)
    model = load_video_model(a.model, a.device, a.dtype, **options)
    if a.threads is None and (model.device.type != "cpu" or is_small(model.transformer)):
        torch.set_num_threads(1)
    return model


@contextmanager
def imports() -> Iterator[None]:
    """Around the imports of a command. Modules stay: looking for garbage among torch's objects, while they come and at
    the end of the process, takes a quarter of its import.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Lines(nullcontext[Any]):
    """In place of a progress bar where there is no terminal: a line every half a minute; rich need not be imported."""

    EVERY = 30.0  # seconds, from the beginning

    def __init__(self, columns: Sequence[str]) -> None:
        super().__init__()
        self.columns, self.disable = columns, False
        self.total: float | None = None
        self.fields: dict[str, Any] = {}
        self.first: tuple[float, float] | None = None  # seconds, completed
        self.told = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def add_task(self, _: str, total: float | None = None, completed: float = 0, **fields: Any) -> int:
        """What the line is about."""
        self.total, self.fields = total, fields
        return 0

    def update(self, _: int, total: float | None = None, completed: float = 0, **fields: Any) -> None:
        """How far it is."""
        self.total, now = total or self.total, time.monotonic()
        self.fields.update(fields)
        self.first = self.first or (now, completed)
        if self.disable or now - self.told < self.EVERY:
            return
        self.told = now
        seen = SimpleNamespace(completed=completed, total=self.total, fields=self.fields)
        told = [column.format(task=seen) for column in self.columns]
        gone, done = now - self.first[0], completed - self.first[1]
        if self.total and done > 0:
            told.append(f"{spoken((self.total - completed) * gone / done)} left")
        print(", ".join(filter(None, told)), file=sys.stderr, flush=True)


def stage_lines(large: int = 10**9, every: float = 10.0) -> Callable[[str, int], None]:
    """What prints the stages of reading and encoding on stderr: those of weights that take a while, or on a terminal.
    "encoding: layer 3 of 24" is one stage, told at its beginning and then ``every`` so many seconds.
    """
    told, when = "", 0.0

    def show(text: str, nbytes: int) -> None:
        nonlocal told, when
        stage, now = text.partition(":")[0], time.monotonic()
        if (nbytes < large and not sys.stderr.isatty()) or (stage == told and now - when < every):
            return
        told, when = stage, now
        print(f"{text} ({nbytes / 1e9:.2f} GB)", file=sys.stderr, flush=True)

    return show


def spoken(seconds: float) -> str:
    """Seconds, minutes or hours, as one says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress_bar(*columns: Any) -> Any:
    """A progress bar on stderr; without a terminal, lines (:class:`Lines`)."""
    if not sys.stderr.isatty():
        return Lines(columns)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(*columns[:1], BarColumn(), *columns[1:], TimeRemainingColumn(), console=console,
                    disable=not console.is_terminal)  # fmt: skip
