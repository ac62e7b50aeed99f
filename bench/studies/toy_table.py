"""Compares training variants: evaluations of several variants and seeds as one table.

    python -m bench.studies.toy_table bench/results/toy-training
    python -m bench.studies.toy_table bench/results/scenes --by-part

The folder holds one file ``VARIANT-seedN.json`` of `hiar evaluate toy --json` for each variant and seed N: of training
(other weights, the same noise), or of the noise (the same weights). With --by-part: valid frames of each stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib.script import script

NAME = re.compile(r"(?P<variant>.+)-seed(?P<seed>\d+)\.json")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One figure of a row of an evaluation."""

    heading: str
    value: Callable[[Row], float | None]
    digits: int = 1


def _whole(name: str, scale: float = 100.0) -> Callable[[Row], float | None]:
    return lambda row: _times(row["whole"][name], scale)


def _last(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["parts"][-1][name]


def _diverse(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if row["diversity"] is None else row["diversity"].get(name)


def _times(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


COLUMNS = (
    Column("colour %", _whole("colour")),
    Column("shape %", _whole("shape")),
    Column("valid %", _whole("valid")),
    Column("direction %", _whole("direction")),
    Column("speed/truth", _whole("speed_ratio", 1), 2),
    Column("drift of valid", lambda row: _times(row["drift"], 100)),
    Column("background change", _last("background_change"), 3),
    Column("texture kept", _last("texture_kept"), 2),
    Column("contrast", _last("texture_ratio"), 2),
    Column("diversity: background", _diverse("background"), 2),
    Column("texture", _diverse("texture"), 2),
    Column("start", _diverse("start"), 2),
    Column("speed", _diverse("speed"), 2),
)
BY_PART_LEGEND = (
    "Valid % of the whole video and of its stretches in order: colour and shape right, and overlap with the prompted "
    "shape above 0.75. Mean over seeds ± their standard deviation."
)
LEGEND = (
    "Mean over training seeds ± their standard deviation. colour, shape, valid: share of frames (valid: both right, "
    "and overlap with the prompted shape above 0.75); direction: share of videos; speed/truth: measured over prompted "
    "speed (dynamic degree), over the world's mean where prompts leave it open. Of the last stretch of a video "
    "({parts}): drift, valid less that of the first stretch, in percentage points; background change, root mean square "
    "from the video's first frames in [0, 1] RGB; texture kept, share of the first frames' texture that is there, and "
    "its contrast over theirs, where a video begins with one. Diversity: standard deviation over seeds of one prompt, "
    "over the world's. forwards: of the network for a block, and the latent frames that one of them sees."
)


def table(folder: str | Path, by_part: bool = False) -> str:
    """Markdown: a row for each (length, variant, order), mean and spread over seeds, by rising length; ``by_part``:
    valid frames of each stretch instead of all figures of the whole.

    Raises:
        ValueError: no folder or nothing in it; a file that is not an evaluation or not named ``VARIANT-seedN.json``;
            seeds of a variant that were measured in different ways, or have the same weights and noise.
    """
    groups: dict[tuple[int, str, str], list[Row]] = {}
    parts: set[int] = set()
    for variant, files in _variants(Path(folder)).items():
        contents = [_read(path) for path in files]
        _require_comparable(variant, files, contents)
        for content in contents:
            for row in content["rows"]:
                groups.setdefault((row["num_frames"], variant, _rollout(row)["order"]), []).append(row)
                parts.add(len(row["parts"]))
    columns = _by_part(max(parts)) if by_part else COLUMNS
    shown = [c for c in columns if any(c.value(row) is not None for rows in groups.values() for row in rows)]
    headings = ["frames", "variant", "order", "seeds", *(column.heading for column in shown), "forwards", "see"]
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(["---"] * len(headings)) + "|"]
    for (frames, variant, order), rows in sorted(groups.items()):
        cells = [str(frames), variant, order, str(len(rows))]
        cells += [_spread([column.value(row) for row in rows], column.digits) for column in shown]
        lines.append("| " + " | ".join([*cells, f"{rows[0]['forwards']:g}", f"{rows[0]['visible_frames']:.1f}"]) + " |")
    stretches = ", ".join("whole" if n == 1 else f"1/{n}" for n in sorted(parts))
    legend = BY_PART_LEGEND if by_part else LEGEND.format(parts=stretches)
    return "\n".join([*lines, "", legend]) + "\n"


def _by_part(parts: int) -> tuple[Column, ...]:
    def valid(part: int) -> Callable[[Row], float | None]:
        return lambda row: _times(row["parts"][part]["valid"], 100) if part < len(row["parts"]) else None

    return Column("valid %", _whole("valid")), *(Column(f"{i + 1}/{parts}", valid(i)) for i in range(parts))


def _rollout(row: Row) -> Mapping[str, Any]:
    """How it was rolled out; evaluations of before 0.2 spell three options."""
    return row["rollout"] if "rollout" in row else {key: row[key] for key in ("order", "cache_source", "window_frames")}


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation (of the sample); of one value no deviation, of a missing one a dash."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return f"{mean:.{digits}f}"
    spread = math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _variants(folder: Path) -> dict[str, list[Path]]:
    """Variant -> its files, by seed."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of evaluations")
    variants: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.json")):
        match = NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is not named VARIANT-seedN.json")
        variants.setdefault(match["variant"], []).append((int(match["seed"]), path))
    if not variants:
        raise ValueError(f"{folder} holds no VARIANT-seedN.json")
    return {variant: [path for _, path in sorted(files)] for variant, files in variants.items()}


def _read(path: Path) -> dict[str, Any]:
    """An evaluation with everything that the table looks at."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content["rows"]:
            raise ValueError("no rows")
        for row in content["rows"]:
            for column in COLUMNS:
                column.value(row)
            _ = row["num_frames"], _rollout(row)["order"], row["forwards"], row["visible_frames"]
        _ = content["weights_sha256"], content["prompts"], content["seed"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a result of hiar evaluate toy: {error!r}") from error
    return content


def _require_comparable(variant: str, files: Sequence[Path], contents: Sequence[Mapping[str, Any]]) -> None:
    """Mean and spread make sense over other weights, or other noise, that were measured in the same way."""
    noises = len({content["weights_sha256"] for content in contents}) == 1

    def measured(content: Mapping[str, Any]) -> list[Any]:
        rows = [(row["num_frames"], dict(_rollout(row)), len(row["parts"])) for row in content["rows"]]
        return [content["prompts"], None if noises else content["seed"], rows]

    for path, content in zip(files[1:], contents[1:], strict=True):
        if measured(content) != measured(contents[0]):
            raise ValueError(
                f"variant {variant}: {path.name} was measured in another way than {files[0].name}: "
                f"{measured(content)} and {measured(contents[0])} (prompts, seed, rows)"
            )
    seen: dict[Any, Path] = {}
    for path, content in zip(files, contents, strict=True):
        same = seen.setdefault((content["weights_sha256"], content["seed"]), path)
        if same is not path:
            raise ValueError(f"variant {variant}: {path.name} and {same.name} are of the same weights and noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of files VARIANT-seedN.json")
    parser.add_argument("--by-part", action="store_true", help="valid frames of each stretch of the videos")
    args = parser.parse_args()
    print(table(args.folder, args.by_part), end="")


if __name__ == "__main__":
    script(main)
