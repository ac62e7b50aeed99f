"""Tables of rollouts measured on GPUs, for README and docs, from the folders of bench/results.

A folder bench/results/<device>/<date>-<revision>/ is read if it has rollouts: ``rollouts.jsonl`` (one profile a line),
``rollout.json`` (bench/rollout/bench_rollout.py) or ``ab.json`` (bench/rollout/ab.py). Beside them ``vae.json`` adds
frames per second with the VAE, ``anchors.json`` a plain PyTorch forward to compare with, and ``notes.json`` notes for
the results of a file: {"rollouts.jsonl": [a note for each line]}. New folders need no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hiar_model.config import WAN

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
FILES = ("rollouts.jsonl", "rollout.json", "ab.json")
KINDS = ("attention", "matmul", "pointwise", "copy", "idle")
FRAMES = WAN.frames_per_block * WAN.temporal_compression  # pixel frames of a block


@dataclass(frozen=True)
class Measured:
    """A rollout measured on one GPU; times and counts are per task (one forward of one block).

    Attributes:
        device: name of the GPU. run: date and revision. rollout: its options. note: a remark for below the table.
        task: milliseconds. fps: pixel frames per second without the VAE.
        peak_gib, launches, syncs: None where they were not counted.
        milliseconds: by kind of work, of `KINDS`.
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
    milliseconds: dict[str, float]

    def with_vae(self, block_ms: float | None) -> float | None:
        """Frames per second if the same GPU then decodes each block in `block_ms` milliseconds."""
        return None if block_ms is None else FRAMES / (FRAMES / self.fps + block_ms / 1e3)


def folders(root: Path | None = None) -> list[Path]:
    """Folders with rollouts on a GPU, the oldest first; none in an installation without bench/."""
    candidates = {file.parent for name in FILES for file in (root or RESULTS).glob(f"*/*/{name}")}
    return sorted((f for f in candidates if not f.parent.name.startswith("cpu")), key=lambda f: (f.name, f.parent.name))


def rollouts(folder: Path) -> list[Measured]:
    """All rollouts of a folder, in the order of its files, without rehearsals on a CPU.

    Raises:
        ValueError: names a file that is not a result of its bench.
    """
    result: list[Measured] = []
    for name, read in (("rollouts.jsonl", _profiles), ("rollout.json", _bench), ("ab.json", _ab)):
        file = folder / name
        if file.is_file():
            try:
                result += read(file)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"{file} is not a result of the benches: {error!r}") from None
    return result


def _notes(file: Path) -> Iterator[str]:
    notes = file.with_name("notes.json")
    yield from (json.loads(notes.read_text(encoding="utf-8")).get(file.name, []) if notes.is_file() else [])
    while True:
        yield ""


def _name(order: str, fused: bool, shared_kv: bool, how: str) -> str:
    return f"{order}{', fused' if fused else ''}{', shared KV' if shared_kv else ''}, {how}"


def _profiles(file: Path) -> Iterator[Measured]:
    for line, note in zip(file.read_text(encoding="utf-8").splitlines(), _notes(file), strict=False):
        p = json.loads(line)
        yield Measured(
            p["device"], file.parent.name, _profiled(p), note,
            1e3 * p["seconds"], p["frames_per_second"], None if p["peak_bytes"] is None else p["peak_bytes"] / 2**30,
            p["launches"], p["syncs"], {part["name"]: 1e3 * part["seconds"] for part in p["parts"]},
        )  # fmt: skip


def _profiled(p: dict[str, Any]) -> str:
    """The name of a profiled rollout; settings have a "rollout" since 2026-11-28."""
    s = p["setting"]
    if "rollout" in s:
        r = s["rollout"]
        how = "graph" if s["cuda_graph"] else "eager"
        return _name(r["order"], r["fuse_cache_denoise"], r["kv_source"] == "next_step", how)
    shared = "next_step" in (s.get("cache_source"), p.get("extra", {}).get("cache_source"))
    return _name(s["order"], s["pairs"], shared, s["executor"])


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
                values = [sample[name] for sample in row.get(kind, {}).get(side, []) if sample.get(name) is not None]
                return median(values) if values else None

            task, fps = middle("task_ms", "samples"), middle("fps", "samples")
            if task is None or fps is None:
                continue
            milliseconds = {kind: value for kind in KINDS if (value := middle(kind)) is not None}
            busy = middle("busy")
            if busy is not None:
                milliseconds["idle"] = max(0.0, task - busy)
            yield Measured(
                values["environment"]["device"], f"{file.parent.name} {side}",
                _name(row["order"], row["pairs"], row["shared_keys"], row["executor"]),
                f"revision {values['sides'][side]['revision']}", task, fps, middle("peak_gib", "samples"),
                middle("launches"), middle("syncs"), milliseconds,
            )  # fmt: skip


def vae_ms(folder: Path) -> tuple[float | None, float | None]:
    """Milliseconds to decode a block with diffusers' modules and with our fastest VAE; None where not measured."""
    file = folder / "vae.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    times = {row["vae"]: row["block_ms"][1] for row in _timed(rows) if not row.get("small")}
    full = times.pop("diffusers' modules", None)
    return full, min(times.values(), default=None)


def small_vae_ms(folder: Path) -> float | None:
    """Milliseconds to decode a block with the small VAE (taew2_1), the fastest way; None where not measured."""
    file = folder / "vae.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return min((row["block_ms"][1] for row in _timed(rows) if row.get("small")), default=None)


def _timed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "block_ms" in row and not row["rehearsal"]]


def vae_of(all_folders: Sequence[Path], folder: Path) -> tuple[Path, float | None, float | None]:
    """(source, *`vae_ms`) of a folder, or of the newest folder of the same GPU that has them."""
    same = [f for f in reversed(all_folders) if f.parent == folder.parent]
    source = next((f for f in (folder, *same) if (f / "vae.json").is_file()), folder)
    return source, *vae_ms(source)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _run(device: str, run: str) -> str:
    return f"{device.removeprefix('NVIDIA ')}, {run}"


class _Marks:
    """The notes below a table, each once, and their numbers in its rows."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def mark(self, m: Measured) -> str:
        if m.note and m.note not in self.notes:
            self.notes.append(m.note)
        return f"{m.rollout} ({self.notes.index(m.note) + 1})" if m.note else m.rollout

    def lines(self) -> list[str]:
        return ["", *(f"- ({i}) {note}" for i, note in enumerate(self.notes, 1))]


HEAD = ("measured", "rollout", "ms a task", "fps", "fps, diffusers' VAE", "fps, fused VAE", "peak GiB")
SMALL_HEAD = "fps, small VAE"  # behind the other figures, where any is measured
NOTHING = ["No measurements: bench/results/ has no rollouts on a GPU."]


def rollout_table(root: Path | None = None) -> list[str]:
    """Markdown table of all measured rollouts, with plain PyTorch forwards measured beside them.

    >>> from bench.lib.gpu_tables import rollout_table
    >>> print("\\n".join(rollout_table()))  # doctest: +SKIP
    """
    measured = folders(root)
    if not measured:
        return NOTHING
    small_times = {folder: small_vae_ms(vae_of(measured, folder)[0]) for folder in measured}
    head = (*HEAD, *([SMALL_HEAD] if any(small_times.values()) else []))
    lines, marks, decoders = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))], _Marks(), {}
    for folder in measured:
        source, full, fused = vae_of(measured, folder)
        for m in rollouts(folder):
            figures = [m.task, m.fps, m.with_vae(full), m.with_vae(fused), m.peak_gib]
            figures += [m.with_vae(small_times[folder])] if len(head) > len(HEAD) else []
            lines.append(_line([_run(m.device, m.run), marks.mark(m), *map(_number, figures)]))
        for device, how, ms in plain(folder):
            about = f"one forward in plain PyTorch, {how}"
            lines.append(_line([_run(device, folder.name), about, _number(ms), *[""] * (len(head) - 3)]))
        if full is not None or fused is not None:
            decoders[f"diffusers' modules {_number(full)} ms, fused {_number(fused)} ms ({source.name})"] = True
    lines += marks.lines()
    return lines + [f"- VAE of a block, after the block on the same GPU: {times}" for times in decoders]


def newest_table(root: Path | None = None) -> list[str]:
    """Markdown table of the last revision measured on each GPU, in short: what the README shows."""
    newest = {folder.parent: folder for folder in folders(root)}
    if not newest:
        return NOTHING
    head = ("GPU", "order", "forwards a block", "ms each", "fps", "fps with VAE", "peak GiB")
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for folder in newest.values():
        _, full, fused = vae_of(folders(root), folder)
        measured = rollouts(folder)
        for m in (m for m in measured if m.run == measured[-1].run):
            forwards = round(1e3 * FRAMES / m.fps / m.task)
            figures = map(_number, (m.task, m.fps, m.with_vae(fused or full), m.peak_gib))
            lines.append(_line([m.device.removeprefix("NVIDIA "), m.rollout, str(forwards), *figures]))
    return lines


def breakdown_table(root: Path | None = None) -> list[str]:
    """Markdown table of the milliseconds of a task by kind of work, launches and syncs; newest folder of each GPU."""
    newest = {folder.parent: folder for folder in folders(root)}
    if not newest:
        return NOTHING
    head = ("measured", "rollout", "ms a task", *KINDS, "launches", "host syncs")
    lines, marks = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))], _Marks()
    for folder in newest.values():
        for m in rollouts(folder):
            figures = (m.task, *(m.milliseconds.get(kind) for kind in KINDS), m.launches, m.syncs)
            lines.append(_line([_run(m.device, m.run), marks.mark(m), *map(_number, figures)]))
    return lines + marks.lines()


def plain(folder: Path) -> Iterator[tuple[str, str, float]]:
    """(device, how, milliseconds) of a task in plain PyTorch: bench/studies/anchors.py, one batch item."""
    file = folder / "anchors.json"
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rehearsal": True}
    if not values["rehearsal"]:
        for case in values["sections"]["visit"]["cases"]:
            if case["rows"] == 1 and "ms" in case:
                yield values["environment"]["device"], f"{case['how']}, {case['attention']}", case["ms"]["p50"]


def stage_times(root: Path | None = None) -> Path | None:
    """The newest file of stage times measured on a GPU; None: there is none."""
    files = [file for file in (root or RESULTS).glob("*/*/stage_times.json") if "cpu" not in file.parent.parent.name]
    return max(files, key=lambda file: file.parent.name, default=None)
