"""The command `hiar evaluate`: how well a toy model's videos keep their prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ..common.checks import dtype_name
from ..io.atomic import atomic_write
from ..io.files import check_output, check_picture, require_apart
from .choices import overwrite_argument, refuse_existing, unused_now
from .machine import kv_argument, linear_argument, load_model, machine_arguments, progress_bar, window_argument


def evaluate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("what", choices=["toy"], help="toy: a model of the toy world, by the oracle of that world")
    parser.add_argument("--model", type=str, default="toy", help="name of a shipped model, or a folder")
    parser.add_argument("--prompts", type=int, help="how many of the held-out prompts; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of all noise; every prompt has noise of its own")
    parser.add_argument(
        "--num-frames", type=list[int] | int | None, help="one length or several; default: as trained, and 6 times that"
    )
    parser.add_argument(
        "--order",
        type=list[str] | str | None,
        help="one or several to compare; default: the model's own, for step_first block_first too",
    )
    parser.add_argument("--kv-source", type=str, help="own or next_step; default: the model's")
    window_argument(parser)
    kv_argument(parser)
    linear_argument(parser)
    parser.add_argument("--parts", type=int, default=6, help="stretches that a video is judged in")
    parser.add_argument("--seeds", type=int, default=0, help="first blocks of each prompt, to say how diverse they are")
    parser.add_argument("--batch", type=int, default=16, help="videos made at once; does not change the result")
    parser.add_argument("--json", type=str, help="write the figures there as well")
    parser.add_argument("--plot", type=str, help="draw valid frames and colour by stretches into this .png too")
    overwrite_argument(parser)
    machine_arguments(parser)


def evaluate(a: Namespace) -> None:
    target = None if a.json is None else check_output(a.json)  # before any work
    picture = check_picture(a.plot)
    require_apart({"--json": target, "--plot": picture}, {"--model": a.model})
    refuse_existing("--json", target, a.overwrite)
    refuse_existing("--plot", picture, a.overwrite)
    from ..config import ExecutionConfig
    from ..evaluation.evaluate import PARTS, default_rollouts, draw_rows, evaluate_toy
    from ..toy.prompt import split_prompts
    from ..version import NOISE, versions

    _, prompts = split_prompts()
    if a.prompts is not None and not 1 <= a.prompts <= len(prompts):
        raise ValueError(f"prompts must be in 1..{len(prompts)}, the number of held-out prompts, got {a.prompts}")
    prompts = prompts[: a.prompts]
    model = load_model(a)
    lengths = [a.num_frames] if isinstance(a.num_frames, int) else a.num_frames
    lengths = lengths or [model.train_frames, PARTS * model.train_frames]
    orders = [a.order] if isinstance(a.order, str) else a.order
    orders = orders or [rollout.order for rollout in default_rollouts(model.rollout)]
    options = {"window_frames": a.window_frames, "kv_source": a.kv_source}
    rollouts = [model.rollout.with_options(order=order, **options) for order in orders]
    execution = ExecutionConfig(kv_dtype=a.kv_dtype, attention_dtype=a.attention_dtype, linear_dtype=a.linear_dtype)
    with progress_bar("videos {task.completed}/{task.total}") as bar:
        task = bar.add_task("", total=None)
        rows = evaluate_toy(
            model, prompts, seed=a.seed, num_frames=lengths, rollouts=rollouts, parts=a.parts, seeds=a.seeds,
            batch=a.batch, execution=execution,
            on_videos=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    _print_rows(rows, f"{model.name} ({model.weights_sha256[:12]}), {len(prompts)} held-out prompts, seed {a.seed}, "
                      f"{len(model.rollout.steps)} steps")  # fmt: skip
    if target is not None:
        about = {
            "model": model.name,
            "weights_sha256": model.weights_sha256,
            "seed": a.seed,
            "noise": NOISE,
            "prompts": len(prompts),
            "seeds": a.seeds,
            "device": str(model.device),
            "dtype": dtype_name(model.dtype),
            "kv_dtype": a.kv_dtype,
            "attention_dtype": a.attention_dtype,
            "linear_dtype": a.linear_dtype,
            "versions": versions("torch"),
        }
        atomic_write(
            unused_now(target, a.overwrite),
            json.dumps({**about, "rows": [row.to_dict() for row in rows]}, indent=2) + "\n",
        )
    if picture is not None:
        picture = unused_now(picture, a.overwrite)
        draw_rows(rows, picture)
        print(f"plot: {picture}")


def _print_rows(rows: Sequence[Any], title: str) -> None:
    """A table with a line for each row: percentages, of the whole video and its stretches in order."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.quality import ordinal

    print(title)  # as the title of the table it would be wrapped
    by = f"by {ordinal(len(rows[0].parts))}"
    # what the prompt leaves open: in the last stretch, if the world varies it; and over seeds
    varied = any(row.whole.texture_kept == row.whole.texture_kept for row in rows)
    kinds = [vars(row.diversity) for row in rows if row.diversity is not None]
    diverse = [name for name in kinds[0] if any(of[name] == of[name] for of in kinds)] if kinds else []
    headings = ["order", "frames", "colour %", by, "valid %", by, "direction %", "speed/truth"]
    headings += ["background", "texture"] * varied + ["diversity"] * bool(kinds)
    table = Table(box=box.MARKDOWN)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "order" else "right", no_wrap=True)
    for row in rows:
        whole, last = row.whole, row.parts[-1]
        colours, valids = (
            " ".join(f"{100 * getattr(part, name):.0f}" for part in row.parts) for name in ("colour", "valid")
        )
        cells = [
            row.rollout.order, str(row.num_frames), f"{100 * whole.colour:.1f}", colours, f"{100 * whole.valid:.1f}",
            valids, f"{100 * whole.direction:.1f}", f"{whole.speed_ratio:.2f}",
        ]  # fmt: skip
        cells += [f"{last.background_change:.3f}", f"{last.texture_kept:.2f}"] * varied
        if kinds:
            cells.append(" ".join(f"{getattr(row.diversity, name):.2f}" for name in diverse))
        table.add_row(*cells)
    console = Console()
    Console(width=max(console.width, 200 if varied or kinds else 150)).print(table)
    if varied:
        print("last stretch: background, change of its colour since the first frames (root mean square, [0, 1] RGB); "
              "texture, share of that of the first frames")  # fmt: skip
    if kinds:
        print(f"diversity of first blocks over the world's: {', '.join(diverse)}")
