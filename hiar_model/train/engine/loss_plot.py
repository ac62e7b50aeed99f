"""The loss plot of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from ...io.plot import PALE, Lines, Series, save_plot

PICTURE = "loss.png"


def draw_losses(losses: str | Path, picture: str | Path) -> None:
    """Draw every column "NETWORK_loss" of a loss.csv over "update" into a .png, raw and averaged.

    Raises:
        ValueError: the file has no rows.
    """
    with Path(losses).open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), [name for name in reader.fieldnames or [] if name.endswith("_loss")]
    if not rows:
        raise ValueError(f"{losses} has no rows")
    panels = []
    for name in names:
        updates, values = zip(*((int(row["update"]), float(row[name])) for row in rows if row[name]), strict=True)
        reach = max(1, len(values) // 40)
        means = [sum(part) / len(part) for part in (values[max(0, i - reach) : i + 1] for i in range(len(values)))]
        lines = [Series("logged", updates, values, PALE), Series(f"mean of the last {reach + 1}", updates, means)]
        panels.append(Lines(name.replace("_", " "), lines, "update", log_y=True))
    save_plot(panels, picture)
