"""Scripts of bench/ say in one line what cannot be, before they measure anything."""

from __future__ import annotations

import importlib
import runpy
import sys

import pytest

pytestmark = pytest.mark.cpu

WRONG = {
    "an output that cannot be": (["studies.stage_times", "no/such.json"], "cannot write no/such.json: no is no folder"),
    "no times": (["studies.parallel", "--stage-times", "no.json"], "No such file or directory: 'no.json'"),
    "no evaluations": (["studies.toy_table", "no"], "no is not a folder of evaluations"),
    "no trajectories": (["studies.toy_pairs", "no"], "no: no trajectories"),
    "no weights": (["studies.infill_join", "no.safetensors"], "no.safetensors: no such file or folder"),
    "another word": (["studies.long_stream", "a red zebra", "-o", "a.mp4"], "'zebra' is no legal shape"),
    "no viewers": (["serve", "--viewers", "0"], "--viewers must be at least 1, got 0"),
    "no time": (["serve", "--seconds", "-5"], "--seconds must be a number above 0, got -5.0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line(here, capsys, monkeypatch, what):
    (module, *words), line = WRONG[what]
    file = importlib.import_module(f"bench.{module}").__file__
    monkeypatch.setattr(sys, "argv", [file, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(file, run_name="__main__")
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and last.startswith(f"{module.rpartition('.')[2]}.py: ") and line in last
    assert not list(here.iterdir())
