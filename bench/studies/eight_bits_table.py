"""The table of :mod:`bench.studies.eight_bits_drift`: every variant beside bfloat16, video by video.

    python -m bench.studies.eight_bits_table [bench/results/eight-bits]

Of each pair of videos (one prompt, one seed: the same noise) the difference is taken; the table holds the mean of these
differences ± its standard error. Prompts are the sample: of each the seeds are averaged first, because 8 bits do much
the same to a prompt with every seed. Two separate means over videos would differ by far more than that by chance.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.lib.report import table as markdown
from bench.lib.script import script

RESULTS = Path(__file__).resolve().parents[1] / "results" / "eight-bits"
BASELINE = "bfloat16"
EIGHTHS = 8
Video = Mapping[str, Any]
HEADINGS = ("model", "order", "frames", "variant", "pairs", "valid %", "valid, points", "drift, points",
            "overlap, points", "background", "speed/truth")  # fmt: skip
LEGEND = (
    "Rows of bfloat16: means. Other rows: valid % is the mean, and the columns after it hold differences to bfloat16, "
    "mean over pairs of videos of one prompt and noise ± standard error (over prompts, their seeds averaged); in bold "
    "where it is more than 2 standard errors, which chance alone does in one cell of 20. drift: valid frames of the "
    "last eighth of the video less those of the first. overlap: of the shape with the prompted one. background: in the "
    "last eighth, root mean square from the first frames of the video in [0, 1] RGB. speed: of the whole video."
)
SHAPE_LEGEND = (
    "Overlap with the prompted shape in points, whole videos, by the prompt's shape: bfloat16, and differences to it. "
    "Below 75 a frame is not valid."
)
SHAPES = ("circle", "triangle", "plus")
"""Of which there are several prompts."""


def read(folder: Path) -> dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]]:
    """(model, order) -> variant -> seed -> a run of that folder.

    Raises:
        ValueError: nothing is there, or a file that is not such a run.
    """
    runs: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            key = run["model"], run["order"]
            runs.setdefault(key, {}).setdefault(run["variant"], {})[run["seed"]] = run
            _ = run["weights_sha256"], run["stretch_frames"], _valid(run), [v["prompt"] for v in run["videos"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a run of bench.studies.eight_bits_drift: {error!r}") from error
    if not runs:
        raise ValueError(f"{folder} holds no run of bench.studies.eight_bits_drift")
    return runs


def mean(values: Sequence[float | None]) -> float | None:
    """None where one of them could not be measured."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def eighths(values: Sequence[float | None], stretches: int) -> list[float | None]:
    """Means over the eighths of the first ``stretches`` stretches."""
    each = stretches // EIGHTHS
    return [mean(values[i * each : (i + 1) * each]) for i in range(EIGHTHS)]


def measured(run: Mapping[str, Any], video: Video, stretches: int) -> dict[str, float | None]:
    """What the table compares, of a video's first ``stretches`` stretches; shares in percent."""
    valid = [100 * frames / run["stretch_frames"] for frames in video["valid"]]
    overlap = mean(video["overlap"][:stretches])
    by_eighth = [part for part in eighths(valid, stretches) if part is not None]
    return {
        "valid": mean(valid[:stretches]),
        "drift": by_eighth[-1] - by_eighth[0],
        "overlap": None if overlap is None else 100 * overlap,
        "background": eighths(video["background_change"], stretches)[-1],
        "speed": video["speed"] if stretches == len(valid) else None,
    }


def by_eighth(model: str, order: str, variant: str, folder: Path = RESULTS) -> list[list[float]]:
    """Of each seed, valid frames in the eighths of the whole video, in percent."""
    runs = read(folder).get((model, order), {}).get(variant, {})
    shares = []
    for _, run in sorted(runs.items()):
        valid = [100 * fmean(frames) / run["stretch_frames"] for frames in zip(*_valid(run), strict=True)]
        shares.append([part for part in eighths(valid, len(valid)) if part is not None])
    return shares


def _valid(run: Mapping[str, Any]) -> list[list[int]]:
    return [video["valid"] for video in run["videos"]]


def pairs(
    runs: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[Video, Video]]:
    """Videos of one prompt and noise.

    Raises:
        ValueError: runs that are not of the same weights and prompts.
    """
    for seed in sorted(runs.keys() & others.keys()):
        one, other = runs[seed], others[seed]
        for what in ("weights_sha256", "prompts", "num_frames"):
            if one[what] != other[what]:
                raise ValueError(
                    f"{one['model']}, {one['order']}, seed {seed}: {what} of {one['variant']} and {other['variant']} "
                    f"differ: {one[what]} and {other[what]}"
                )
        yield from zip(one["videos"], other["videos"], strict=True)


class Paired:
    """One measure of several pairs: of each prompt the values by seed, and their differences to bfloat16."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.differences: dict[str, list[float]] = {}

    def add(self, prompt: str, value: float | None, other: float | None) -> None:
        """What could not be measured is left out."""
        if value is not None and other is not None:
            self.values.setdefault(prompt, []).append(value)
            self.differences.setdefault(prompt, []).append(value - other)

    def mean(self, digits: int) -> str:
        """Of the values."""
        return f"{fmean(map(fmean, self.values.values())):.{digits}f}" if self.values else ""

    def difference(self, digits: int) -> str:
        """Mean ± standard error over prompts, bold where it is beyond 2 of them."""
        by_prompt = [fmean(seeds) for seeds in self.differences.values()]
        if len(by_prompt) < 2:
            return ""
        middle, error = fmean(by_prompt), stdev(by_prompt) / math.sqrt(len(by_prompt))
        text = f"{middle:+.{digits}f} ± {error:.{digits}f}"
        return f"**{text}**" if abs(middle) > 2 * error else text


DIGITS = {"valid": 1, "drift": 1, "overlap": 2, "background": 4, "speed": 3}
Variants = Mapping[str, Mapping[int, Mapping[str, Any]]]


def compared(variants: Variants, quarter: bool = False) -> Iterator[tuple[str, int, int, dict[str, Paired]]]:
    """(variant, pairs, frames, what was measured of the first quarter or the whole of the videos), bfloat16 first."""
    base = variants.get(BASELINE, {})
    for variant, runs in sorted(variants.items(), key=lambda item: item[0] != BASELINE):
        samples = {name: Paired() for name in DIGITS}
        count = stretches = 0
        for one, other in pairs(runs, base):
            count, stretches = count + 1, len(one["valid"]) // (4 if quarter else 1)
            run = next(iter(runs.values()))
            mine, theirs = (measured(run, video, stretches) for video in (one, other))
            for name, sample in samples.items():
                sample.add(one["prompt"], mine[name], theirs[name])
        if count:
            yield variant, count, stretches * run["stretch_frames"], samples


def rows(folder: Path = RESULTS) -> Iterator[list[str]]:
    """Cells of the table."""
    for (model, order), variants in read(folder).items():
        for quarter in (True, False):
            for variant, count, frames, samples in compared(variants, quarter):
                cells = [model, order, str(frames), variant, str(count), samples["valid"].mean(1)]
                for name, digits in DIGITS.items():
                    own = "" if name == "valid" else samples[name].mean(digits)
                    cells.append(own if variant == BASELINE else samples[name].difference(digits))
                yield cells


def shape_rows(folder: Path = RESULTS) -> Iterator[list[str]]:
    """Cells of the table by shape: overlap, of whole videos."""
    for (model, order), variants in read(folder).items():
        for variant, _, _, samples in compared(variants):
            cells, overlap = [model, order, variant], samples["overlap"]
            for shape in SHAPES:
                part = Paired()
                part.values = {prompt: v for prompt, v in overlap.values.items() if shape in prompt.split()}
                part.differences = {prompt: overlap.differences[prompt] for prompt in part.values}
                cells.append(part.mean(2) if variant == BASELINE else part.difference(2))
            yield cells


def table(folder: Path = RESULTS) -> str:
    """Both tables, Markdown."""
    shapes = ["model", "order", "variant", *SHAPES]
    lines = markdown(HEADINGS, rows(folder), 4) + ["", LEGEND, ""]
    return "\n".join(lines + markdown(shapes, shape_rows(folder), 3) + ["", SHAPE_LEGEND])


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of the runs")
    try:
        print(table(parser.parse_args().folder))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    script(main)
