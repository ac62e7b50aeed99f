"""How large are weights, as hiar_model/models/weight_check.py measures them: of the shipped models, or of any file.

    python -m bench.studies.weight_gains [toy scenes FILE ...]

Its limits for dequantised weights lie far outside what this prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median

from bench.lib import report
from bench.lib.script import script
from hiar_model.models.checkpoint import read_checkpoint
from hiar_model.models.weight_check import LARGEST, ROWS, SIBLINGS, WeightCheck, role

HEADINGS = ("weights", "smallest gain", "largest gain", "between blocks", "between rows")


def measure(path: str) -> list[str]:
    """A row of the table."""
    check = WeightCheck(path)
    for key, value in read_checkpoint(path)[0].items():
        check.see(key, value, quantised=False)
    roles: dict[str, list[float]] = {}
    for key, gain in check.gains.items():
        if gain > 0:
            roles.setdefault(role(key), []).append(gain)
    between = [max(x / median(gains), median(gains) / x) for gains in roles.values() for x in gains]
    gains = [gain for several in roles.values() for gain in several]
    return [path, f"{min(gains):.2f}", f"{max(gains):.2f}", f"{max(between):.2f}", f"{max(check.rows.values()):.2f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*", default=["toy", "scenes"])
    rows = [measure(path) for path in parser.parse_args(argv).weights]
    limits = ["limit", "", f"{LARGEST:g}", f"{SIBLINGS:g}", f"{ROWS:g}"]
    print("\n".join(report.table(HEADINGS, [*rows, limits])))


if __name__ == "__main__":
    script(main)
