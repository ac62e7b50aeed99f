"""docs/claims.md shows the tables that the committed evaluations make, all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.studies.toy_table import table

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
FOLDERS = sorted(path.name for path in (ROOT / "bench" / "results").glob("toy-training*"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_comparison_is_that_of_the_committed_evaluations(folder: str) -> None:
    command = f"python -m bench.studies.toy_table bench/results/{folder}"
    match = re.search(rf"<!-- {re.escape(command)} -->\n\n((?:\|.*\n)+)\n", SHOWN)
    assert match, f"docs/claims.md lacks the table of {folder}"
    rows, _, legend = table(ROOT / "bench" / "results" / folder).partition("\n\n")
    assert match[1].strip() == rows.strip(), f"run: {command}, and paste it"
    assert legend.strip() in SHOWN
