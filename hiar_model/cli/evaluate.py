"""`hiar evaluate`: measures toy models, and tabulates measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from ..io.atomic import atomic_write
from ..io.files import check_output
from .machine import load_model, machine_arguments, progress_bar

ORDINALS = {4: "quarter", 5: "fifth", 6: "sixth", 8: "eighth", 10: "tenth"}


def evaluate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["toy", "toy-table", "toy-pairs"],
        help="toy: measure a model; toy-table: a folder of --json files together; toy-pairs: a teacher's trajectories",
    )
    parser.add_argument("folder", type=str, nargs="?", help="of toy-table: VARIANT-seedN.json; of toy-pairs: ode_pairs")
    parser.add_argument("--world", type=str, default="varied", help="of toy-pairs: in which they were made")
    parser.add_argument("--model", type=str, default="toy", help="name of a shipped model, or a folder")
    parser.add_argument("--prompts", type=int, help="how many of the held-out prompts; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of all noise; every prompt has noise of its own")
    parser.add_argument(
        "--num-frames", type=list[int] | int | None, help="one length or several; default: as trained, and 6 times that"
    )
    parser.add_argument(
        "--order",
        type=list[str] | str | None,
        help="one or several to compare; default: the model's own, else step_first and block_first",
    )
    parser.add_argument("--cache-source", type=str, help="own or next_step; default: the model's")
    parser.add_argument(
        "--window-frames",
        type=int | list[int | None] | None | Literal["model"],
        default="model",
        help="latent frames a block sees, its own among them: a number, one per step as [6,9,12,12], or null for all",
    )
    parser.add_argument("--parts", type=int, default=6, help="stretches that a video is judged in")
    parser.add_argument("--seeds", type=int, default=0, help="first blocks of each prompt, to say how diverse they are")
    parser.add_argument("--batch", type=int, default=16, help="videos made at once; does not change the result")
    parser.add_argument("--json", type=str, help="write the figures there as well")
    parser.add_argument("--markdown", type=str, help="of toy-table: write the table there as well")
    machine_arguments(parser)


def evaluate(a: Namespace) -> None:
    if a.what != "toy":
        (_table if a.what == "toy-table" else _pairs)(a)
        return
    if a.folder is not None or a.markdown is not None:
        raise ValueError("a folder and --markdown belong to hiar evaluate toy-table; a model is --model FOLDER")
    target = _target(a.json)
    from ..evaluation.evaluate import PARTS, evaluate_toy
    from ..toy.prompt import split_prompts
    from ..version import NOISE, versions

    _, prompts = split_prompts()
    if a.prompts is not None and not 1 <= a.prompts <= len(prompts):
        raise ValueError(f"prompts must be in 1..{len(prompts)}, the number of held-out prompts, got {a.prompts}")
    prompts = prompts[: a.prompts]
    model = load_model(a)
    lengths = [a.num_frames] if isinstance(a.num_frames, int) else a.num_frames
    lengths = lengths or [model.train_frames, PARTS * model.train_frames]
    orders = [a.order] if isinstance(a.order, str) else a.order or None
    with progress_bar("videos {task.completed}/{task.total}") as bar:
        task = bar.add_task("", total=None)
        rows = evaluate_toy(
            model, prompts, seed=a.seed, num_frames=lengths, order=orders, cache_source=a.cache_source,
            window_frames=a.window_frames, parts=a.parts, seeds=a.seeds, batch=a.batch,
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
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": versions("torch"),
        }
        atomic_write(target, json.dumps({**about, "rows": [row.to_dict() for row in rows]}, indent=2) + "\n")


def _table(a: Namespace) -> None:
    if a.folder is None:
        raise ValueError("hiar evaluate toy-table needs the folder of its files VARIANT-seedN.json")
    target = _target(a.markdown)
    from ..evaluation.table import table

    text = table(a.folder)
    print(text, end="")
    if target is not None:
        atomic_write(target, text)


def _pairs(a: Namespace) -> None:
    if a.folder is None:
        raise ValueError("hiar evaluate toy-pairs needs the folder of a stage ode_pairs")
    if a.json is not None or a.markdown is not None:
        raise ValueError("hiar evaluate toy-pairs writes no file: leave out --json and --markdown")
    import torch

    from ..train.data.toy_pairs import read_toy_pairs

    torch.set_num_threads(a.threads or 1)
    summaries = read_toy_pairs(a.folder, a.world)
    print("| the teacher's | number | colour % | shape % | valid % | direction % | speed/truth |")
    print("|---|---|---|---|---|---|---|")
    for kind, (number, means) in summaries.items():
        shares = " | ".join(f"{100 * share:.1f}" for share in (means.colour, means.shape, means.valid, means.direction))
        print(f"| {kind} | {number} | {shares} | {means.speed_ratio:.2f} |")


def _target(name: str | None) -> Path | None:
    """The output file, checked to be writable before any work."""
    return None if name is None else check_output(name)


def _print_rows(rows: Sequence[Any], title: str) -> None:
    """A table with a line for each row: percentages, of the whole video and its stretches in order."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(title)  # as the title of the table it would be wrapped
    count = len(rows[0].parts)
    by = f"by {ORDINALS.get(count, f'1/{count}')}"
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
            row.order, str(row.num_frames), f"{100 * whole.colour:.1f}", colours, f"{100 * whole.valid:.1f}", valids,
            f"{100 * whole.direction:.1f}", f"{whole.speed_ratio:.2f}",
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
