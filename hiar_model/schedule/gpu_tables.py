"""What was measured on GPUs: the tables that README and docs quote, from the folders of bench/results.

A folder bench/results/<device>/<date>-<revision>/ counts where it holds rollouts: ``rollouts.jsonl`` (profiles of
`hiar profile`, one a line), ``rollout.json`` (bench/rollout/bench_rollout.py) or ``ab.json`` (bench/rollout/ab.py).
``vae.json`` beside them gives the frames per second with the VAE, ``anchors.json`` a plain PyTorch forward to compare
with, ``notes.json`` what has to be said of a file: {"rollouts.jsonl": [a note for each line]}. A further folder needs
no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..config import WAN

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
FILES = ("rollouts.jsonl", "rollout.json", "ab.json")
PARTS = ("attention", "matmul", "pointwise", "copy", "idle")
FRAMES = WAN.frames_per_block * WAN.temporal_compression  # pixel frames of a block


@dataclass(frozen=True)
class Measured:
    """One rollout on one GPU, per task (one forward of one block).

    Attributes:
        run: date and revision. note: what has to be said of it.
        task, fps: milliseconds, pixel frames a second without the VAE.
        peak_gib, launches, syncs: None where they were not counted. parts: milliseconds by kind of work.
    """

    device: str
    run: str
    rollout: str
    note: str
    task: float
    fps: float
    peak_gib: float | None
    launches: float | None
    syncs: float | None
    parts: dict[str, float]

    def with_vae(self, block_ms: float | None) -> float | None:
        """Frames a second that remain where the same GPU decodes each block afterwards, in so many milliseconds."""
        return None if block_ms is None else FRAMES / (FRAMES / self.fps + block_ms / 1e3)


def folders(root: Path | None = None) -> list[Path]:
    """Folders with rollouts on a GPU, the oldest first; none in an installation without bench/."""
    found = {file.parent for name in FILES for file in (root or RESULTS).glob(f"*/*/{name}")}
    return sorted((f for f in found if not f.parent.name.startswith("cpu")), key=lambda f: (f.name, f.parent.name))


def rollouts(folder: Path) -> list[Measured]:
    """All that a folder holds, in the order of its files; rehearsals on a CPU are left out.

    Raises:
        ValueError: a file is not what its name says.
    """
    found: list[Measured] = []
    for name, read in (("rollouts.jsonl", _profiles), ("rollout.json", _bench), ("ab.json", _ab)):
        file = folder / name
        if file.is_file():
            try:
                found += read(file)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"{file} is no result of the benches: {error!r}") from None
    return found


def _notes(file: Path) -> Iterator[str]:
    notes = file.with_name("notes.json")
    yield from (json.loads(notes.read_text(encoding="utf-8")).get(file.name, []) if notes.is_file() else [])
    while True:
        yield ""


def _name(order: str, pairs: bool, shared_keys: bool, executor: str) -> str:
    return f"{order}{', pairs' if pairs else ''}{', shared keys' if shared_keys else ''}, {executor}"


def _profiles(file: Path) -> Iterator[Measured]:
    for line, note in zip(file.read_text(encoding="utf-8").splitlines(), _notes(file), strict=False):
        p = json.loads(line)
        s = p["setting"]
        shared = "next_step" in (s.get("cache_source"), p.get("extra", {}).get("cache_source"))
        yield Measured(
            p["device"], file.parent.name, _name(s["order"], s["pairs"], shared, s["executor"]), note,
            1e3 * p["seconds"], p["frames_per_second"], None if p["peak_bytes"] is None else p["peak_bytes"] / 2**30,
            p["launches"], p["syncs"], {part["name"]: 1e3 * part["seconds"] for part in p["parts"]},
        )  # fmt: skip


def _bench(file: Path) -> Iterator[Measured]:
    values = json.loads(file.read_text(encoding="utf-8"))
    for row, note in zip(values["rows"], _notes(file), strict=False):
        if not row["rehearsal"]:
            yield Measured(
                values["environment"]["device"], file.parent.name, row["rollout"], note, row["visit_ms"], row["fps"],
                row["peak_gib"], row["launches"], row["syncs"],
                {part["name"]: 1e3 * part["seconds"] for part in row["parts"]},
            )  # fmt: skip


def _ab(file: Path) -> Iterator[Measured]:
    values = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for row in values["rows"] if row["kind"] == "rollout" and "error" not in row]
    for side in "AB" if not values["rehearsal"] else "":
        for row in rows:

            def middle(name: str, kind: str = "traces", row: Any = row, side: str = side) -> float | None:
                found = [sample[name] for sample in row.get(kind, {}).get(side, []) if sample.get(name) is not None]
                return median(found) if found else None

            task, fps = middle("task_ms", "samples"), middle("fps", "samples")
            if task is None or fps is None:
                continue
            parts = {kind: value for kind in PARTS if (value := middle(kind)) is not None}
            busy = middle("busy")
            if busy is not None:
                parts["idle"] = max(0.0, task - busy)
            yield Measured(
                values["environment"]["device"], f"{file.parent.name} {side}",
                _name(row["order"], row["pairs"], row["shared_keys"], row["executor"]),
                f"revision {values['sides'][side]['revision']}", task, fps, middle("peak_gib", "samples"),
                middle("launches"), middle("syncs"), parts,
            )  # fmt: skip


def vae_ms(folder: Path) -> tuple[float | None, float | None]:
    """Milliseconds to decode a block: by diffusers' modules, and by the fastest of ours; None where unknown."""
    file = folder / "vae.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    times = {row["vae"]: row["block_ms"][1] for row in rows if "block_ms" in row and not row["rehearsal"]}
    full = times.pop("diffusers' modules", None)
    return full, min(times.values(), default=None)


def vae_of(found: Sequence[Path], folder: Path) -> tuple[Path, float | None, float | None]:
    """The VAE's times for a folder: its own, or those of the newest folder of the same GPU that has any."""
    same = [f for f in reversed(found) if f.parent == folder.parent]
    source = next((f for f in (folder, *same) if (f / "vae.json").is_file()), folder)
    return source, *vae_ms(source)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _run(device: str, run: str) -> str:
    return f"{device.removeprefix('NVIDIA ')}, {run}"


class _Marks:
    """Notes below a table, each once, and the mark that stands for it in a row."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def mark(self, m: Measured) -> str:
        if m.note and m.note not in self.notes:
            self.notes.append(m.note)
        return f"{m.rollout} ({self.notes.index(m.note) + 1})" if m.note else m.rollout

    def lines(self) -> list[str]:
        return ["", *(f"- ({i}) {note}" for i, note in enumerate(self.notes, 1))]


HEAD = ("measured", "rollout", "ms a visit", "fps", "fps, diffusers' VAE", "fps, fused VAE", "peak GiB")
NOTHING = ["Nothing was measured on a GPU here: bench/results/ holds no rollouts."]


def rollout_table(root: Path | None = None) -> list[str]:
    """Markdown: every measured rollout, and a plain PyTorch forward where one was measured beside them.

    >>> from hiar_model.schedule.gpu_tables import rollout_table
    >>> print("\\n".join(rollout_table()))  # doctest: +SKIP
    """
    found = folders(root)
    if not found:
        return NOTHING
    lines, marks, decoders = [_line(HEAD), _line(["---"] * 2 + ["---:"] * (len(HEAD) - 2))], _Marks(), {}
    for folder in found:
        source, full, fused = vae_of(found, folder)
        for m in rollouts(folder):
            figures = (m.task, m.fps, m.with_vae(full), m.with_vae(fused), m.peak_gib)
            lines.append(_line([_run(m.device, m.run), marks.mark(m), *map(_number, figures)]))
        for device, how, ms in plain(folder):
            about = f"one forward in plain PyTorch, {how}"
            lines.append(_line([_run(device, folder.name), about, _number(ms), "", "", "", ""]))
        if full is not None or fused is not None:
            decoders[f"diffusers' modules {_number(full)} ms, fused {_number(fused)} ms ({source.name})"] = True
    lines += marks.lines()
    return lines + [f"- VAE of a block, after the block on the same GPU: {text}" for text in decoders]


def parts_table(root: Path | None = None) -> list[str]:
    """Markdown: where the milliseconds of a task go and what the host does, of the newest folder of each GPU."""
    newest = {folder.parent: folder for folder in folders(root)}
    if not newest:
        return NOTHING
    head = ("measured", "rollout", "ms a visit", *PARTS, "launches", "host syncs")
    lines, marks = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))], _Marks()
    for folder in newest.values():
        for m in rollouts(folder):
            figures = (m.task, *(m.parts.get(kind) for kind in PARTS), m.launches, m.syncs)
            lines.append(_line([_run(m.device, m.run), marks.mark(m), *map(_number, figures)]))
    return lines + marks.lines()


def plain(folder: Path) -> Iterator[tuple[str, str, float]]:
    """(device, how, milliseconds) of bench/studies/anchors.py's task: one batch row, nothing of ours in it."""
    file = folder / "anchors.json"
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rehearsal": True}
    if not values["rehearsal"]:
        for case in values["sections"]["visit"]["cases"]:
            if case["rows"] == 1 and "ms" in case:
                yield values["environment"]["device"], f"{case['how']}, {case['attention']}", case["ms"]["p50"]


def stage_times(root: Path | None = None) -> Path | None:
    """The newest stage times that were measured on a GPU."""
    found = [file for file in (root or RESULTS).glob("*/*/stage_times.json") if "cpu" not in file.parent.parent.name]
    return max(found, key=lambda file: file.parent.name, default=None)
