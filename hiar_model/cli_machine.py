"""What commands that run a model share: where it runs, how it is loaded, how progress is shown."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from .video_model import VideoModel


def machine_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", type=str, help="float32, bfloat16, float16 or float64")
    parser.add_argument(
        "--threads", type=int, help="CPU threads of torch; default: 1, or torch's own for a large model"
    )


def load_model(a: Namespace, **options: Any) -> VideoModel:
    """The model that a command names; ``options``: of :func:`hiar_model.load_video_model`."""
    import torch

    from .bundle import load_video_model
    from .threads import is_small

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


class _NoBar(nullcontext[Any]):
    """In place of a progress bar where nobody would see one; rich need not be imported."""

    disable = True

    def __enter__(self) -> _NoBar:
        return self

    def add_task(self, *_: Any, **__: Any) -> None:
        """Nothing to show."""

    update = add_task


def progress_bar(*columns: Any) -> Any:
    """A progress bar on stderr, shown on a terminal only."""
    if not sys.stderr.isatty():
        return _NoBar()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(*columns[:1], BarColumn(), *columns[1:], TimeRemainingColumn(), console=console,
                    disable=not console.is_terminal)  # fmt: skip
