"""bench/rollout/ab.py rehearsed on the CPU: two revisions in turn, with no more installed than a GPU machine has."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from test_bench import BARE

from bench.rollout import ab as ab_module
from bench.rollout import ab_results as results

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
SLOW = """

import bench.rollout.ab  # which needs no more than its sides do

def _slowed(self, blocks=Rollout.__iter__):
    import time
    for block in blocks(self):
        time.sleep(0.03)
        yield block

Rollout.__iter__ = _slowed
"""
RECORDED = """

from .recorder import Recorder

CudaGraphs = lambda device: Recorder.capture
"""
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository of two revisions, the second slower by 0.03 s a block."""
    tree = tmp_path_factory.mktemp("ab") / "tree"
    for folder in ("bench", "hiar_kernels", "hiar_model"):
        ignored = shutil.ignore_patterns("results", "*.so")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)

    def git(*words):
        return subprocess.run([*GIT, *words], cwd=tree, check=True, capture_output=True, text=True).stdout

    # What a CUDA graph would do, on a CPU: the tests' recorder is the capture of both revisions.
    shutil.copy(ROOT / "tests" / "helpers" / "recorder.py", tree / "hiar_model" / "rollout")
    with (tree / "hiar_model" / "rollout" / "executor.py").open("a") as file:
        file.write(RECORDED)
    git("init", "-q")
    (tree / ".gitignore").write_text("__pycache__\nout\n")
    git("add", "-A")
    git("commit", "-qm", "fast")
    with (tree / "hiar_model" / "rollout" / "__init__.py").open("a") as file:
        file.write(SLOW)
    git("commit", "-qam", "slow")
    return tree, git


@pytest.fixture(scope="module")
def compared(repository, tmp_path_factory):
    """Rollouts and ops of both revisions, all by one process of each: exit status, results, stdout, page.

    Through worktrees, with the fill and capture of a GPU's graphs.
    """
    tree, _ = repository
    folder = tmp_path_factory.mktemp("compared")
    (folder / "sitecustomize.py").write_text(BARE.replace("xdist", "xdist pytest"))
    asked = ["--case", "rollout", "--order", "stream", "--order", "stream+shared_keys", "--executor", "graph"]
    asked += ["--case", "op", "--op", "attention: visit", "--op", "flow_step", "--variant", "auto", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        for name, value in {**environment, "TRITON_INTERPRET": "0"}.items():
            patch.setenv(name, value)
        patch.setattr(ab_module, "ROOT", tree)
        patch.setattr(ab_module, "CUDA", False)
        patch.setattr(sys, "argv", ["ab.py", "HEAD~1", "HEAD", *asked, "--results", str(folder / "results")])
        status = ab_module.main()
    file = folder / "results" / "ab.json"
    page = (folder / "results" / "ab.md").read_text()
    return status, json.loads(file.read_text()), out.getvalue(), page


def ratio(row, figure):
    return results.compared(*(results.figures(row)[figure][side] for side in "AB"))


def test_a_slower_revision_is_seen(compared, repository):
    """In both of two rollouts."""
    _, git = repository
    _, found, out, page = compared
    rollouts = found["rows"][:2]
    assert [row["label"] for row in rollouts] == ["stream, graph", "stream, shared keys, graph"], out
    for row in rollouts:
        assert [len(row["samples"][side]) for side in "AB"] == [2, 2] and len(row["prepared"]) == 2
        tasks = 8 if "shared" not in row["label"] else 5
        times = results.figures(row)["task_ms"]
        assert 30 / tasks < min(times["B"])  # it sleeps so long; how long A takes is the machine's business
        assert all(a["fps"] * a["task_ms"] == pytest.approx(12e3 / tasks) for a in row["samples"]["A"])
        slower = ratio(row, "task_ms")
        assert 0 < slower["pairs"][0] <= slower["ratio"] <= slower["pairs"][1]
        kinds = {"attention", "matmul", "pointwise", "copy"}
        assert {*kinds, "idle"} <= set(results.figures(row))
        for trace in (*row["traces"]["A"], *row["traces"]["B"]):
            assert 0 < sum(trace[kind] for kind in kinds) == pytest.approx(trace["busy"])
    assert [found["sides"][side]["revision"] for side in "AB"] == [
        git("rev-parse", "--short=10", f"HEAD{back}").strip() for back in ("~1", "")
    ]
    assert "REHEARSAL" in page and "| stream, graph | ms a task |" in page
    assert [found["sides"][side]["threads"] for side in "AB"] == [1, 1], "a side was not asked about itself"
    assert len(git("worktree", "list").splitlines()) == 1, "a worktree was left behind"


def test_idle_is_what_the_clock_saw_beyond_the_traced_work():
    """Of a side: its own clock, and the work of its own traces. Never less than nothing, as on a busy machine."""
    row = {
        "samples": {"A": [{"task_ms": 5.0}], "B": [{"task_ms": 8.0}, {"task_ms": 12.0}]},
        "traces": {"A": [{"busy": 4.5}], "B": [{"busy": 4.0}, {"busy": 11.0}]},
    }
    assert results.figures(row)["idle"] == {"A": [0.5], "B": [6.0, 0.0]}


def test_ops(compared):
    status, found, out, *_ = compared
    assert status == 1  # no pointwise op has that way
    attention, flow = found["rows"][2:]
    assert ratio(attention, "ms")["ratio"] > 0
    assert "flow_step has no variant 'auto' here; it has eager, compiled" in flow["error"]
    assert f"- failed: {flow['label']}: A: ValueError" in out
    assert [row["label"] for row in found["rows"] if "error" in row] == [flow["label"]]


def test_commands_in_cpu_seconds(repository, tmp_path, monkeypatch, capsys):
    tree, _ = repository
    burn = "import time, hiar_model; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    fails = "import sys; print('no\\nluck', file=sys.stderr); sys.exit(3)"
    asked = ["HEAD~1", "--b-dir", str(tree), "--case", "command", "--rounds", "1", "--results", str(tmp_path)]
    asked += [f'--command=python -c "{line}"' for line in (burn, fails)]
    monkeypatch.setattr(ab_module, "ROOT", tree)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "argv", ["ab.py", *asked])
    assert ab_module.main() == 1
    found = json.loads((tmp_path / "ab.json").read_text())
    assert not found["rehearsal"], capsys.readouterr()
    for side in "AB":
        (sample,) = found["rows"][0]["samples"][side]
        assert 0.3 <= sample["cpu_s"] < 3 and sample["wall_s"] >= 0.3 and 5 < sample["rss_mib"] < 2000
    assert found["rows"][1]["error"] == "A: exit status 3: luck"


def test_two_folders_need_no_git(tmp_path):
    a = ab_module.arguments().parse_args(["--a-dir", str(tmp_path / "a"), "--b-dir", str(tmp_path / "b")])
    with ab_module.folders(a, tmp_path) as both:
        assert both == [tmp_path / "a", tmp_path / "b"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["HEAD"], "give two revisions, --a-dir and --b-dir, or one of each; got 1 revisions"),
        (["HEAD", "no-such"], "git rev-parse --verify no-such^{commit}: fatal: Needed a single revision"),
        (["HEAD", "--b-dir", "bench"], "B: bench holds no hiar_model: give the root of a checkout"),
        (["HEAD", "HEAD", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["HEAD", "HEAD", "--case", "op"], "--case op needs --op NAME"),
        (["HEAD", "HEAD", "--case", "command"], "--case command needs --command 'LINE'"),
    ],
    ids=str,
)
def test_wrong_requests(repository, monkeypatch, arguments, line):
    tree, git = repository
    monkeypatch.setattr(ab_module, "ROOT", tree)
    monkeypatch.setattr(sys, "argv", ["ab.py", *arguments])
    with pytest.raises(SystemExit, match=re.escape(line)):
        ab_module.main()
    assert len(git("worktree", "list").splitlines()) == 1


def test_parts_of_a_trace():
    """Two tasks in one forward of three layers; the kernels overlap by half a millisecond."""
    trace = {
        "tasks": 2, "forwards": 1, "layers": 3, "spans": [[0, 2000], [1500, 3000]],
        "device": [["_attention_fwd_kernel", 0.002, 3], ["nvjet_sm90", 0.001, 6], ["Memset (Unknown)", 0.0005, 3]],
        "host": {"cudaGraphLaunch": 1, "cudaLaunchKernel": 3, "cudaEventSynchronize": 1, "aten::add": 9},
    }  # fmt: skip
    found = results.parts(trace, cuda=True)
    assert found == {
        "attention": 1.0, "matmul": 0.5, "pointwise": 0.0, "copy": 0.25, "busy": 1.5,
        "launches": 2.0, "syncs": 0.5, "device_ops": 6.0, "device_ops_layer": 4.0,
    }  # fmt: skip
    row = {"label": "x", "samples": {side: [{"task_ms": 2.0, "fps": 6.0}] for side in "AB"}}
    row["traces"] = {side: [found] for side in "AB"}
    assert results.figures(row)["idle"] == {"A": [0.5], "B": [0.5]}
    assert "| x | idle, ms a task | 0.5 | 0.5 | 1.000 |  |" in results.table([row])


def test_the_spread_is_of_the_pairs():
    """Drift that both sides share is no spread of the ratio."""
    found = results.compared([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found == {"a": [4.0, 2.0, 6.0], "b": [2.0, 1.0, 3.0], "ratio": 2.0, "pairs": [2.0, 2.0]}
