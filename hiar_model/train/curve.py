"""The loss curve of a run as a picture."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path

PICTURE = "loss.png"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_loss_curve(losses: str | Path, picture: str | Path) -> None:
    """Draw the column "loss" of a loss.csv over "iteration" into a .png, raw and averaged; needs matplotlib.

    Raises:
        ValueError: the file holds no row.
    """
    from matplotlib.figure import Figure

    with Path(losses).open(newline="") as file:
        rows = [(int(row["iteration"]), float(row["loss"])) for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{losses} holds no row")
    iterations, values = zip(*rows, strict=True)
    reach = max(1, len(values) // 40)
    means = [sum(part) / len(part) for part in (values[max(0, i - reach) : i + 1] for i in range(len(values)))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(iterations, values, color="0.75", linewidth=0.8, label="logged")
    axes.plot(iterations, means, color="tab:blue", label=f"mean of the last {reach + 1}")
    axes.set(xlabel="iteration", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = Path(f"{picture}.partial")
    try:
        figure.savefig(partial, dpi=120, format="png")
        os.replace(partial, picture)
    finally:
        partial.unlink(missing_ok=True)
