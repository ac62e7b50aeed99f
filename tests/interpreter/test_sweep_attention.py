"""bench/ops/sweep_attention.py at small sizes: every configuration is run in place of the pinned one, and checked."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from bench.lib import measure
from bench.lib.measure import Bench
from bench.ops import attention_cases
from bench.ops import sweep_attention as sweep
from bench.ops.work import Sizes
from hiar_kernels.attention import _launch
from hiar_kernels.attention._launch import Tile

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("part", ["forward", "dq", "dkdv"])
def test_every_configuration_is_run_and_checked(device, monkeypatch, part):
    other = Tile(64, 64, 4, 1, 16)
    monkeypatch.setattr(_launch, "CANDIDATES", {part: {0: (other,)}})
    sizes = Sizes(heads=1, head_dim=128, grid=(2, 3), window=6)
    tile_options, used = Tile.options, []
    monkeypatch.setattr(Tile, "options", lambda tile: used.append(tile) or tile_options(tile))

    def measured(shape: str) -> list[dict]:
        bench = Bench(device.type, (1, 1), 0.0)
        with torch.no_grad():
            bench.section(part, sweep.cases(bench, sizes, part, ["pair", shape], 0), budget=300.0)
        return [case for case in bench.sections[part]["cases"] if case["shape"] == shape]

    found = measured("constant_context")
    assert [case["configuration"] for case in found] == ["pinned", "q=64 kv=64 warps=4 stages=1 masked=16"]
    assert not [case for case in found if "error" in case], found
    assert other in used and len(set(used)) > 1
    assert len(sweep.best({"cases": found})) == 1
    monkeypatch.setattr(measure, "check", functools.partial(measure.check, tolerance=-1.0))
    assert all("off by" in case["error"] for case in measured("constant_context"))


def test_work_of_the_parts(device):
    bench = Bench(device.type, (1, 1), 0.0)
    sizes = Sizes(heads=1, head_dim=16, grid=(1, 1), window=6)
    unit = 4 * 16  # own keys in 2 blocks of 3 frames: 18 pairs, earlier ones: 9
    work = attention_cases.constant_context(bench, sizes)
    assert [sweep.work_of(part, work) for part in sweep.PARTS] == [unit * 27, unit * 27 * 1.5, unit * 18 * 2]


def test_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["sweep_attention.py"])
    with pytest.raises(SystemExit) as ended:
        sweep.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "sweep_attention.py: error: a sweep measures kernels on a CUDA device, torch finds none"
