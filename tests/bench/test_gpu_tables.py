"""The tables of what was measured on GPUs: every kind of result is read, and the figures follow from the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.lib import gpu_tables
from bench.rollout import bench_rollout
from hiar_model.benchmark.parts import KINDS
from hiar_model.benchmark.run import bench
from hiar_model.benchmark.setting import Setting

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
FUSED = {"order": "wavefront", "fuse_cache_denoise": True, "kv_source": "own"}
PARTS = [{"name": name, "seconds": 0.01, "kernels": 3.0, "limit": 0.0, "why": ""} for name in (*KINDS, "idle")]


def cells(table: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")][2:]


def profile(**setting) -> dict:
    return {
        "setting": setting or {"order": "stream", "pairs": False, "executor": "graph"}, "device": "NVIDIA X",
        "seconds": 0.05, "frames_per_second": 30.0, "peak_bytes": 3 * 2**30, "launches": 0.75, "syncs": 0.25,
        "parts": PARTS,
    }  # fmt: skip


def vae(*times: tuple[str, float]) -> dict:
    rows = [{"vae": name, "rehearsal": False, "block_ms": [ms, ms, ms], "peak_gib": 1.0} for name, ms in times]
    return {"environment": {}, "rows": [*rows, {"vae": "tiled", "absent": "no room"}]}


@pytest.fixture
def root(tmp_path):
    """Two GPUs' results in all three forms, and a rehearsal that must not show."""

    def write(name: str, *values: dict) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, values)) + "\n")

    write("x/2026-01-02-aaa/rollouts.jsonl", profile(), profile(rollout=FUSED, cuda_graph=True))
    write("x/2026-01-02-aaa/notes.json", {"rollouts.jsonl": ["as it was"]})
    write("x/2026-01-02-aaa/vae.json", vae(("diffusers' modules", 600.0), ("fused", 200.0), ("fused, wide", 100.0)))
    row = {
        "rollout": "block-first, graph", "visit_ms": 40.0, "block_ms": 200.0, "fps": 60.0, "peak_gib": 2.0,
        "launches": 1.0, "syncs": 0.2, "parts": PARTS, "rehearsal": False,
    }  # fmt: skip
    about = {"device": "NVIDIA X"}
    write("x/2026-01-03-bbb/rollout.json", {"environment": about, "rows": [row, {**row, "rehearsal": True}]})
    case = {"kind": "rollout", "order": "stream", "pairs": False, "shared_keys": True, "executor": "graph"}
    samples = {"A": [{"task_ms": 80.0, "fps": 20.0}], "B": [{"task_ms": t, "fps": 24.0} for t in (50.0, 60.0, 70.0)]}
    trace = {**dict.fromkeys(KINDS, 10.0), "busy": 39.0, "launches": 0.5, "syncs": None}
    rows = [{**case, "samples": samples, "traces": {"B": [trace]}}, {"kind": "op"}, {**case, "error": "A died"}]
    sides = {"A": {"revision": "old"}, "B": {"revision": "new"}}
    write("y/2026-01-01-ab/ab.json", {"environment": about, "rehearsal": False, "sides": sides, "rows": rows})
    write("cpu-x86-64/2026-01-05-ccc/rollouts.jsonl", profile())
    return tmp_path


def test_rollouts_of_every_kind_of_file(root):
    table = gpu_tables.rollout_table(root)
    rows = cells(table)
    assert [row[:2] for row in rows] == [
        ["X, 2026-01-01-ab A", "stream, shared KV, graph (1)"],
        ["X, 2026-01-01-ab B", "stream, shared KV, graph (2)"],
        ["X, 2026-01-02-aaa", "stream, graph (3)"],
        ["X, 2026-01-02-aaa", "wavefront, fused, graph"],
        ["X, 2026-01-03-bbb", "block-first, graph"],
    ]
    assert rows[0][2:] == ["80.0", "20.0", "", "", ""] and rows[1][2:4] == ["60.0", "24.0"]
    # 12 frames: 0.4 s to make, 0.6 or 0.1 to decode; 0.2 s with the VAE of the same GPU's older folder
    assert rows[2][2:] == ["50.0", "30.0", "12.0", "24.0", "3.00"]
    assert rows[4][2:] == ["40.0", "60.0", "15.0", "40.0", "2.00"]
    assert table[-4:-1] == ["- (1) revision old", "- (2) revision new", "- (3) as it was"]
    assert table[-1].endswith("same GPU: diffusers' modules 600.0 ms, fused 100.0 ms (2026-01-02-aaa)")


def test_the_small_vae_has_a_column_once_it_is_measured(root):
    file = root / "x/2026-01-02-aaa/vae.json"
    content = json.loads(file.read_text())
    content["rows"].append({"vae": "small", "small": True, "rehearsal": False, "block_ms": [0.0, 10.0, 20.0]})
    file.write_text(json.dumps(content))
    table = gpu_tables.rollout_table(root)
    assert table[0].endswith("| peak GiB | fps, small VAE |")
    assert cells(table)[2][2:] == ["50.0", "30.0", "12.0", "24.0", "3.00", "29.3"]
    assert cells(table)[0][2:] == ["80.0", "20.0", "", "", "", ""]


def test_the_breakdown_is_of_the_newest_folder_of_a_gpu(root):
    rows = cells(gpu_tables.breakdown_table(root))
    assert [row[0] for row in rows] == ["X, 2026-01-01-ab A", "X, 2026-01-01-ab B", "X, 2026-01-03-bbb"]
    assert rows[0][2:] == ["80.0", *[""] * 7]
    assert rows[1][2:] == ["60.0", *["10.0"] * 4, "21.0", "0.50", ""]
    assert rows[2][2:] == ["40.0", *["10.0"] * 5, "1.00", "0.20"]


def test_the_readme_has_the_last_revision_of_each_gpu(root):
    rows = cells(gpu_tables.newest_table(root))
    assert [row[:3] for row in rows] == [["X", "stream, shared KV, graph", "8"], ["X", "block-first, graph", "5"]]
    # B alone; 12 frames in 0.5 s are 8 forwards of 60 ms, in 0.2 s 5 of 40; 0.1 s more with the VAE, where measured
    assert rows[0][3:] == ["60.0", "24.0", "", ""] and rows[1][3:] == ["40.0", "60.0", "40.0", "2.00"]


def test_a_rollout_of_the_bench_is_read(tmp_path):
    """What bench/rollout/bench_rollout.py writes of a result of hiar bench."""
    setting = Setting(**bench_rollout.SMALL, rollout={"window_frames": 6}, repeats=1)
    row = bench_rollout.row_of("stream, eager", bench(setting, decode=False, plain=False, parts=True))
    assert row["rehearsal"] and row["block_ms"] == pytest.approx(8 * row["visit_ms"]) and row["cold_s"] > 0
    assert "stream, eager" in "\n".join(bench_rollout.table([row]))
    folder = tmp_path / "x" / "2026-01-01-aaa"
    folder.mkdir(parents=True)
    result = {"environment": {"device": "NVIDIA X"}, "rows": [{**row, "rehearsal": False}]}
    (folder / "rollout.json").write_text(json.dumps(result))
    (read,) = gpu_tables.rollouts(folder)
    assert (read.task, read.fps) == (row["visit_ms"], row["fps"]) and set(read.milliseconds) == {*KINDS, "idle"}


def test_a_file_that_is_no_result_is_named(root):
    (root / "y/2026-01-01-ab/ab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ab.json is not a result of the benches: KeyError\('rows'\)"):
        gpu_tables.rollout_table(root)


def test_nothing_measured(tmp_path):
    assert gpu_tables.rollout_table(tmp_path) == gpu_tables.breakdown_table(tmp_path) == gpu_tables.NOTHING
    assert gpu_tables.newest_table(tmp_path) == gpu_tables.NOTHING
    assert gpu_tables.stage_times(tmp_path) is None


def test_committed_results_are_complete():
    """Every folder of a GPU has a README, and every line of rollouts.jsonl a note that says what it is of."""
    folders = gpu_tables.folders(ROOT / "bench" / "results")
    assert folders
    for folder in folders:
        assert (folder / "README.md").is_file() or (folder / "ab.md").is_file(), folder
        assert gpu_tables.rollouts(folder)
    first = next(f for f in folders if f.name == "2026-11-27-6a287b229b")
    assert [m.note[:21] for m in gpu_tables.rollouts(first)] == ["revision 6a287b229b a"] + [
        "the changed tile, att"
    ] * 4
    assert gpu_tables.vae_ms(first) == (pytest.approx(268.8, abs=0.05), pytest.approx(145.5, abs=0.05))
