"""Every script of bench/ and examples/ says on any machine what it does, and does nothing else then."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = ROOT / "bench/rollout/ab_driver.py"  # a program starts it, and writes requests to it
FILES = (*ROOT.glob("bench/**/*.py"), *ROOT.glob("examples/*.py"))
SCRIPTS = sorted(file for file in FILES if "__main__" in file.read_text(encoding="utf-8") and file != ANSWERS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_help(here, monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 0 and said.out.startswith(f"usage: {script.name} [-h]") and not said.err
    assert not list(here.iterdir())
