"""Commands about speed: warmup, profile, bench-report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ..io.atomic import atomic_write
from ..io.files import check_output, check_picture
from .choices import rollout_options


def setting_arguments(parser: ArgumentParser) -> None:
    """The rollout to measure; shared by the commands here."""
    parser.add_argument("--model", type=str, default="wan2.1-t2v-1.3b", help="a configuration; weights are random")
    parser.add_argument("--height", type=int, help="pixels; default: 480, or the one size that the model has")
    parser.add_argument("--width", type=int, help="pixels; default: 832, likewise")
    parser.add_argument("--order", type=str, default="stream", help="stream, wavefront or block_first")
    parser.add_argument("--fuse-cache-denoise", type=bool, default=False, help="one forward for both kinds of tasks")
    parser.add_argument("--window-frames", type=int, default=21, help="latent frames a block sees, its own among them")
    parser.add_argument("--sink-frames", type=int, default=0, help="first frames that always stay visible")
    parser.add_argument("--cuda-graph", type=bool | None, help="capture forwards as CUDA graphs; default: on CUDA")
    parser.add_argument("--layers", type=int, help="of the network; default: all")
    parser.add_argument("--device", type=str, help="default: cuda if there is any, else cpu")
    parser.add_argument("--dtype", type=str, help="default: bfloat16 on CUDA, float32 on a CPU")


def _setting(a: Namespace, **more: Any) -> Any:
    import torch

    from ..config import RolloutConfig
    from ..planning.profiling import Setting

    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.startswith("cuda")
    legal = ("bfloat16", "float16", "float32", "float64")
    dtype = a.dtype or ("bfloat16" if cuda else "float32")
    if dtype not in legal:
        raise ValueError(f"dtype must be one of {', '.join(legal)}, got {dtype!r}")
    return Setting(
        model=a.model, height=a.height, width=a.width,
        rollout=RolloutConfig(**rollout_options(a)),
        cuda_graph=cuda if a.cuda_graph is None else a.cuda_graph, dtype=dtype, device=device, layers=a.layers, **more,
    )  # fmt: skip


def warmup_arguments(parser: ArgumentParser) -> None:
    setting_arguments(parser)
    parser.add_argument("--again", type=bool, default=True, help="then measure a second process, with warm caches")


def warmup(a: Namespace) -> None:
    from ..planning.profiling import warm_up

    _, start = warm_up(_setting(a))
    print(
        f"cold start of this process: weights {start.build:.1f} s, first run of {start.kinds} kinds of forwards "
        f"(compiling, loading, capturing) {start.warm_up:.1f} s",
        flush=True,
    )
    if a.again:
        print("a second process:", flush=True)
        command = [sys.executable, "-m", "hiar_model", "warmup", "--again=false"]
        options = {k: v for k, v in vars(a).items() if k not in ("again", "config") and v is not None}
        for name, value in options.items():
            command.append(f"--{name.replace('_', '-')}={json.dumps(value) if isinstance(value, bool) else value}")
        if subprocess.run(command).returncode:
            raise ValueError("the second process failed, see its message above")


def profile_arguments(parser: ArgumentParser) -> None:
    setting_arguments(parser)
    parser.add_argument("--blocks", type=int, default=2, help="blocks to measure, once the window is full")
    parser.add_argument(
        "--stage-times", type=str, help="instead: tasks by the frames they see, into this JSON file for bench-report"
    )
    parser.add_argument("--plot", type=str, help="draw where a task's milliseconds go, beside the limit, into a .png")


def profile(a: Namespace) -> None:
    if a.blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {a.blocks}")
    picture = check_picture(a.plot)
    setting = _setting(a, blocks=a.blocks)
    from ..planning.profiling import draw_profile, stage_times
    from ..planning.profiling import profile as measure

    if a.stage_times is None:
        result = measure(setting)
        print("\n".join(result.lines()))
        if picture is not None:
            draw_profile(result, picture)
            print(f"plot: {picture}")
        return
    target = check_output(a.stage_times)
    atomic_write(target, json.dumps(stage_times(setting), indent=1) + "\n")
    print(f"stage times: {target}")


def report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--measured", type=str, help="JSON of bench/rollout/test_four_step_speedup.py: its table")
    parser.add_argument("--stage-times", type=str, help="JSON of hiar profile --stage-times; default: the roofline")
    parser.add_argument("--tflops", type=float, default=790.0, help="of the roofline")
    parser.add_argument("--vae-ms", type=float, default=145.5, help="decode of a block, where stage times do not say")
    parser.add_argument("--results", type=str, help="a folder like bench/results: only the rollouts measured in it")
    parser.add_argument("--plot", type=str, help="draw the gains into this .png too")


def bench_report(a: Namespace) -> None:
    from ..schedule.gpu_tables import breakdown_table, rollout_table
    from ..schedule.report import draw_gains, measured_table, report

    if a.measured is not None:
        try:
            lines = measured_table(json.loads(Path(a.measured).read_text(encoding="utf-8")))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            bench = "bench/rollout/test_four_step_speedup.py"
            raise ValueError(f"--measured must be a result of {bench}, got {a.measured}: {error!r}") from None
        print("\n".join(lines))
        return
    if a.results is not None:
        if not Path(a.results).is_dir():
            raise ValueError(f"--results must be a folder with <device>/<date>-<revision>/, got {a.results}")
        for table in (rollout_table, breakdown_table):
            print("\n".join([*table(Path(a.results)), ""]))
        return
    picture = check_picture(a.plot)
    print("Measured rollouts, then projections by the simulator: about half a minute.", file=sys.stderr, flush=True)
    for section in report(a.stage_times, a.tflops, a.vae_ms):
        print(section, flush=True)
    if picture is not None:
        draw_gains(picture)
        print(f"plot: {picture}")
