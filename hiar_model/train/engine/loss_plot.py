"""The loss plot of a run."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

from ...io.atomic import atomic

PICTURE = "loss.png"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_losses(losses: str | Path, picture: str | Path) -> None:
    """Draw every column "NETWORK_loss" of a loss.csv over "update" into a .png, raw and averaged; needs matplotlib.

    Raises:
        ValueError: the file has no rows.
    """
    from matplotlib.figure import Figure

    with Path(losses).open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), [name for name in reader.fieldnames or [] if name.endswith("_loss")]
    if not rows:
        raise ValueError(f"{losses} has no rows")
    figure = Figure(figsize=(8, 4 * len(names) + 0.5), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        updates, values = zip(*((int(row["update"]), float(row[name])) for row in rows if row[name]), strict=True)
        reach = max(1, len(values) // 40)
        means = [sum(part) / len(part) for part in (values[max(0, i - reach) : i + 1] for i in range(len(values)))]
        axes.plot(updates, values, color="0.75", linewidth=0.8, label="logged")
        axes.plot(updates, means, color="tab:blue", label=f"mean of the last {reach + 1}")
        axes.set(xlabel="update", ylabel=name.replace("_", " "), yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic(picture) as partial:
        figure.savefig(partial, dpi=120, format="png")
