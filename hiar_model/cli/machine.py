"""Shared by the commands that run a model: device options, loading, progress."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from .choices import rollout_options
from .config_file import Repeated, other_weights

if TYPE_CHECKING:
    from ..models.video_model import VideoModel


def machine_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", type=str, help="float32, bfloat16, float16 or float64")
    parser.add_argument(
        "--threads", type=int, help="CPU threads of torch; default: 1, or torch's own for a large model"
    )


def size_arguments(parser: ArgumentParser) -> None:
    for name, pixels in (("height", 480), ("width", 832)):
        parser.add_argument(f"--{name}", type=int, help=f"pixels; default: what the model says, {pixels} of Wan")


def window_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--window-frames",
        type=int | list[int | None] | None | Literal["model"],
        default="model",
        help="latent frames a block sees, its own among them: a number, one per step as [6,9,12,12], or null for all",
    )


def memory_arguments(parser: ArgumentParser) -> None:
    """Options of a video that decide its memory; those of a rollout by the names of its config."""
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    window_argument(parser)
    parser.add_argument("--sink-frames", type=int, help="first frames that always stay visible")
    kv_argument(parser)
    parser.add_argument("--offload", type=str, help="what leaves the GPU: text (once the prompt is read), vae, or both")


def kv_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--kv-dtype", type=str, help="of keys and values, such as float8_e4m3fn; default: dtype")
    parser.add_argument(
        "--attention-dtype",
        type=str,
        help="of self-attention's products: float8_e4m3fn, with such keys; default: dtype",
    )


def linear_argument(parser: ArgumentParser) -> None:
    text = "of the large linear layers: int8 or float8_e4m3fn; default: dtype"
    parser.add_argument("--linear-dtype", type=str, help=text)


def lora_argument(parser: ArgumentParser, more: str) -> None:
    """The option --lora."""
    parser.add_argument(
        "--lora", action=Repeated, metavar="FILE[:SCALE]",
        help=f"LoRA to merge into the transformer, such as style.safetensors:0.8; {more}",
    )  # fmt: skip


def load_model(a: Namespace, **options: Any) -> VideoModel:
    """The model that a command names; ``options``: of :func:`hiar_model.load_video_model`."""
    import torch

    from ..models.registry import load_video_model
    from ..models.threads import is_small

    if a.threads is not None:
        if a.threads < 1:
            raise ValueError(f"threads must be at least 1, got {a.threads}")
        torch.set_num_threads(a.threads)
    model = load_video_model(a.model, a.device, a.dtype, linear_dtype=a.get("linear_dtype"), **options)
    if a.threads is None and (model.device.type != "cpu" or is_small(model.transformer)):
        torch.set_num_threads(1)
    return model


def load_for_video(
    a: Namespace,
    *,
    order: str | None,
    beside: Sequence[str] = (),
    ranks: int = 1,
    own_steps: range | None = None,
    on_checkpoint: Callable[[str], None],
) -> VideoModel:
    """The model of the options of a video (:func:`.generate.video_arguments`), which tells what it reads.

    Args:
        order: of the video. beside: those of others that are made at the same time. ranks: processes that share it.
        own_steps, on_checkpoint: of :func:`hiar_model.load_video_model`.

    Raises:
        ValueError: one line: what cannot be loaded; one process has not the memory for it.
    """
    from ..models.video_model import pick_device, pick_dtype
    from ..planning.free_memory import require_memory

    offload = tuple(name.strip() for name in a.offload.split(",")) if a.offload else ()
    if ranks == 1:
        require_memory(
            a.model, pick_device(a.device), pick_dtype(a.dtype), checkpoint=a.checkpoint, vae=a.vae, offload=offload,
            height=a.height, width=a.width, num_frames=a.num_frames, kv_dtype=a.kv_dtype,
            attention_dtype=a.attention_dtype, linear_dtype=a.linear_dtype, lora=bool(a.lora), beside=beside,
            **{**rollout_options(a), "order": order},
        )  # fmt: skip
    model = load_model(
        a, checkpoint=a.checkpoint, steps=a.steps, own_steps=own_steps, prompt_cache=a.prompt_cache, vae=a.vae,
        offload=offload, lora=a.lora, on_checkpoint=on_checkpoint, on_stage=stage_lines(),
    )  # fmt: skip
    for line in other_weights(a, model):
        print(line, file=sys.stderr)
    return model


@contextmanager
def imports() -> Iterator[None]:
    """Disable garbage collection around imports: it takes a quarter of the time to import torch, and modules stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class ProgressLines(nullcontext[Any]):
    """Progress without a terminal: a line every 30 seconds, without importing rich."""

    EVERY = 30.0  # seconds

    def __init__(self, columns: Sequence[str]) -> None:
        super().__init__()
        self.columns, self.disable = columns, False
        self.total: float | None = None
        self.fields: dict[str, Any] = {}
        self.first: tuple[float, float] | None = None  # seconds, completed
        self.printed = time.monotonic()

    def __enter__(self) -> ProgressLines:
        return self

    def add_task(self, _: str, total: float | None = None, completed: float = 0, **fields: Any) -> int:
        """Start the task."""
        self.total, self.fields = total, fields
        return 0

    def update(self, _: int, total: float | None = None, completed: float = 0, **fields: Any) -> None:
        """Update its progress."""
        self.total, now = total or self.total, time.monotonic()
        self.fields.update(fields)
        self.first = self.first or (now, completed)
        if self.disable or now - self.printed < self.EVERY:
            return
        self.printed = now
        seen = SimpleNamespace(completed=completed, total=self.total, fields=self.fields)
        line = [column.format(task=seen) for column in self.columns]
        gone, done = now - self.first[0], completed - self.first[1]
        if self.total and done > 0:
            line.append(f"{duration((self.total - completed) * gone / done)} left")
        print(", ".join(filter(None, line)), file=sys.stderr, flush=True)


def stage_lines(large: int = 10**9, every: float = 10.0) -> Callable[[str, int], None]:
    """A callback that prints stages of loading and encoding on stderr, for weights of at least ``large`` bytes or on a
    terminal. "encoding: layer 3 of 24" is printed when the stage starts and then ``every`` so many seconds.
    """
    printed, when = "", 0.0

    def show(message: str, nbytes: int) -> None:
        nonlocal printed, when
        stage, now = message.partition(":")[0], time.monotonic()
        if (nbytes < large and not sys.stderr.isatty()) or (stage == printed and now - when < every):
            return
        printed, when = stage, now
        print(f"{message} ({nbytes / 1e9:.2f} GB)", file=sys.stderr, flush=True)

    return show


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, whichever suits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress_bar(*columns: Any) -> Any:
    """A progress bar on stderr; without a terminal, lines (:class:`ProgressLines`)."""
    if not sys.stderr.isatty():
        return ProgressLines(columns)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(*columns[:1], BarColumn(), *columns[1:], TimeRemainingColumn(), console=console,
                    disable=not console.is_terminal)  # fmt: skip
