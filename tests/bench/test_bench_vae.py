"""The table of the VAE benchmark: what it tells, and what it makes of a rollout's frames per second."""

from __future__ import annotations

import json

import pytest

from bench.vae import bench_vae

pytestmark = pytest.mark.cpu

VAES = [
    {"vae": "slow", "block_ms": [190.0, 200.0, 210.0], "frames": 12, "peak_gib": None, "rehearsal": False},
    {"vae": "fast", "block_ms": [90.0, 100.0, 110.0], "frames": 12, "peak_gib": 1.5, "rehearsal": False},
    {"vae": "tiny", "small": True, "block_ms": [9.0, 10.0, 11.0], "frames": 12, "peak_gib": 1.0, "rehearsal": False},
    {"vae": "other", "absent": "needs diffusers", "rehearsal": False},
]
ROLLOUT = {"rollout": "stream", "block_ms": 400.0, "fps": 30.0}


def test_every_fps_with_and_without():
    """12 frames in 400 ms of the transformer and 100 ms of the fastest full VAE after it: 24 a second instead of 30."""
    (row,) = bench_vae.with_vae([ROLLOUT], [ROLLOUT, *VAES])
    assert row == {**ROLLOUT, "fps_vae": pytest.approx(24.0), "fps_small_vae": pytest.approx(30 * 400 / 410)}
    (row,) = bench_vae.with_vae([ROLLOUT], [ROLLOUT, VAES[3]])
    assert row["fps_vae"] is None and row["fps_small_vae"] is None


def test_the_goal_stands_beside_the_fastest(tmp_path):
    lines = bench_vae.table(VAES)
    assert "| fast | 100.00 [90.00, 110.00] | 120 | 1.5 |" in lines and "- absent: other: needs diffusers" in lines
    assert "- goal: fast: 100.0 ms a block, at most 150 ms" in lines
    assert "- goal: tiny: 10.0 ms a block, at most 12 ms" in lines
    rehearsed = [{**row, "rehearsal": True} for row in VAES]
    assert not [line for line in bench_vae.table(rehearsed) if "goal" in line]
    page = bench_vae.write(rehearsed, {"device": "CPU"}, tmp_path)
    assert "**REHEARSAL" in page.read_text() and json.loads((tmp_path / "vae.json").read_text())["rows"] == rehearsed
