"""docs/training.md shows the table that the committed evaluations make."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiar_model.toy.table import table

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]


def test_the_comparison_is_that_of_the_committed_evaluations() -> None:
    shown = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    made = table(ROOT / "bench" / "results" / "toy-training")
    assert made.strip() in shown, "run: hiar evaluate toy-table bench/results/toy-training, and paste it"
