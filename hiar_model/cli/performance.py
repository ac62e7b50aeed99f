"""Commands about speed: bench, warmup."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ..config import SHIPPED, WAN, ExecutionConfig, RolloutConfig, WanConfig
from ..io.atomic import atomic_write
from ..io.files import check_output, check_picture, require_apart
from .choices import option, overwrite_argument, refuse_existing, rollout_options, unused_now
from .machine import imports, kv_argument, linear_argument, progress_bar, size_arguments, window_argument


def setting_arguments(parser: ArgumentParser) -> None:
    """The rollout to measure; shared by the commands here."""
    parser.add_argument(
        "--model", type=str,
        help="a shipped model, a folder, such as of Wan, or wan2.1-t2v-1.3b or -14b with random weights; default: "
        "wan2.1-t2v-1.3b on CUDA, toy on a CPU",
    )  # fmt: skip
    size_arguments(parser)
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    parser.add_argument("--order", type=str, default="stream", help="stream, wavefront or block_first")
    parser.add_argument("--fuse-cache-denoise", type=bool, default=False, help="one forward for both kinds of tasks")
    parser.add_argument("--kv-source", type=str, default="own", help="of caches: own, or next_step (shared KV)")
    window_argument(parser)
    parser.add_argument("--sink-frames", type=int, help="first frames that always stay visible")
    kv_argument(parser)
    linear_argument(parser)
    parser.add_argument("--attention-impl", type=str, default="auto", help="of self-attention; auto: by measurements")
    parser.add_argument("--cuda-graph", type=bool | None, help="capture forwards as CUDA graphs; default: on CUDA")
    parser.add_argument("--layers", type=int, help="of the network, with random weights; default: all")
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is any), cpu, cuda, cuda:1")
    parser.add_argument("--dtype", type=str, help="default: bfloat16 on CUDA, float32 on a CPU")


def _checked(a: Namespace) -> None:
    """Refuse what can be refused without torch.

    Raises:
        ValueError: one line.
    """
    base = RolloutConfig(order="stream", window_frames=WAN.window_frames)
    config = base.with_options(**{"window_frames": "model", **rollout_options(a)})
    if config.order == "step_first":
        raise ValueError("order must have a steady state (stream, wavefront or block_first), got step_first")
    config.require_endless("a measurement with a full window")
    ExecutionConfig(
        kv_dtype=a.kv_dtype, attention_dtype=a.attention_dtype, linear_dtype=a.linear_dtype,
        attention_impl=a.attention_impl,
    )  # fmt: skip
    if a.layers is not None and a.model is not None and a.model not in WanConfig.names():
        names = ", ".join(WanConfig.names())
        raise ValueError(f"layers needs random weights, so one of the models {names}, got {a.model!r}")
    for name in ("height", "width"):
        if a.model in SHIPPED and a[name] is not None:
            raise ValueError(f"{name} must be left out: {a.model} makes frames of one size only, got {a[name]}")


def _setting(a: Namespace, **more: Any) -> Any:
    from ..benchmark.setting import Setting
    from ..models.video_model import pick_device

    model = a.model or ("toy" if pick_device(a.device).type == "cpu" else "wan2.1-t2v-1.3b")
    return Setting(
        model=model, height=a.height, width=a.width, rollout=rollout_options(a), cuda_graph=a.cuda_graph,
        kv_dtype=a.kv_dtype, attention_dtype=a.attention_dtype, linear_dtype=a.linear_dtype,
        attention_impl=a.attention_impl, device=a.device, dtype=a.dtype, layers=a.layers, **more,
    )  # fmt: skip


def _words(a: Namespace, *without: str) -> list[str]:
    """The options of a command as they are typed, but those ``without``."""
    words = []
    for name, value in vars(a).items():
        if name not in ("config", *without) and (value is not None or name == "window_frames"):
            words.append(f"{option(name)}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def warmup_arguments(parser: ArgumentParser) -> None:
    setting_arguments(parser)
    parser.add_argument("--again", type=bool, default=True, help="then measure a second process, with warm caches")


def warmup(a: Namespace) -> None:
    _checked(a)
    from ..benchmark.setting import warm_up

    start = warm_up(_setting(a))
    print(
        f"cold start of this process: weights {start.load:.1f} s, first run of {start.kinds} kinds of forwards "
        f"(compiling, loading, capturing) {start.warm_up:.1f} s",
        flush=True,
    )
    if a.again:
        print("a second process:", flush=True)
        command = [sys.executable, "-m", "hiar_model", "warmup", "--again=false"]
        if subprocess.run([*command, *_words(a, "again")]).returncode:
            raise ValueError("the second process failed, see its message above")


def bench_arguments(parser: ArgumentParser) -> None:
    setting_arguments(parser)
    parser.add_argument("--blocks", type=int, default=8, help="to measure of each rollout, once its window is full")
    parser.add_argument("--repeats", type=int, default=3, help="rollouts, each from its first block")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--decode", type=bool, default=True, help="with each decoder too: the small VAE, the full one")
    parser.add_argument("--plain", type=bool, default=True, help="plain PyTorch too, for the speedup over it")
    parser.add_argument("--parts", type=bool, default=False, help="where the time of a task goes, beside the limits")
    parser.add_argument("--json", type=str, help="write the result; schema: hiar_model/benchmark/schema.json")
    parser.add_argument("--plot", type=str, help="draw it into a .png")
    overwrite_argument(parser)
    parser.add_argument(
        "--compare", type=str, nargs=2, metavar=("A.json", "B.json"), help="instead: the ratios of two results"
    )


def bench(a: Namespace) -> None:
    if a.compare is not None:
        _compare(*a.compare)
        return
    _checked(a)
    target, picture = None if a.json is None else check_output(a.json), check_picture(a.plot)
    require_apart({"--json": target, "--plot": picture}, {})
    refuse_existing("--json", target, a.overwrite)
    refuse_existing("--plot", picture, a.overwrite)
    with imports():
        from ..benchmark.result import draw, notes, tables
        from ..benchmark.run import bench as measure
    with progress_bar("{task.fields[blocks]}", "{task.fields[what]}") as bar:
        task = bar.add_task("", total=None, blocks="loading", what="")

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, total=total, completed=done, blocks=f"blocks {done}/{total}", what=what)

        result = measure(
            _setting(a, blocks=a.blocks, repeats=a.repeats, seed=a.seed), decode=a.decode, plain=a.plain,
            parts=a.parts, on_progress=show,
            command=shlex.join(["hiar", "bench", *_words(a, "json", "plot", "overwrite")]),
        )  # fmt: skip
    if target is not None:
        target = unused_now(target, a.overwrite)
        atomic_write(target, json.dumps(result, indent=1) + "\n")
    if picture is not None:
        picture = unused_now(picture, a.overwrite)
        draw(result, picture)
    _print(*tables(result), *notes(result))
    for name, path in (("result", target), ("plot", picture)):
        if path is not None:
            print(f"{name}: {path}")


def _compare(first: str, second: str) -> None:
    from ..benchmark.result import compared, read

    table, lines = compared(read(first), read(second))
    _print(table, *lines)


def _print(*things: Any) -> None:
    """Tables and lines on standard output, as wide as the terminal; in a file 120 characters, without colours."""
    import io

    from rich.console import Console

    page = None if sys.stdout.isatty() else io.StringIO()
    console = Console(highlight=False, file=page, width=None if page is None else 120)
    for thing in things:
        console.print(thing, markup=False) if isinstance(thing, str) else console.print(thing, "")
    if page is not None:
        print("\n".join(line.rstrip() for line in page.getvalue().splitlines()))  # tables are padded
