"""bench/lib/resume.py: a run that is cut short goes on where it ended, and forgets what was of another state."""

from __future__ import annotations

import json
import os
import subprocess

import processes
import pytest

from bench.lib import resume
from bench.lib.machine import ROOT, revision, sources

pytestmark = pytest.mark.cpu

SUITE = """
import os, pathlib, signal
import processes
import pytest

HERE = pathlib.Path(__file__).parent

def first_time(what):
    there = (HERE / what).exists()
    (HERE / what).touch()
    return not there

@pytest.mark.parametrize("i", range(6))
def test_case(i, record_property):
    with (HERE / "ran.txt").open("a") as ran:
        ran.write(f"{i} ")
    if i == 1:
        assert not first_time("failed"), "fails once"
    if i == 3 and first_time("ended"):
        os.kill(os.getpid(), getattr(signal, os.environ["END"]))
    record_property("row", {"i": i})
"""


@pytest.fixture
def suite(tmp_path):
    """Runs six tests, of which one fails the first time and one ends the process; gives (status, said, what ran)."""
    (tmp_path / "test_suite.py").write_text(SUITE)

    def run(*arguments: str, end: str = "SIGKILL") -> tuple[int, str, str]:
        (tmp_path / "ran.txt").write_text("")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        command = ["-m", "pytest", "-p", "bench.lib.resume", "--resume", "out/journal.jsonl", *arguments]
        done = processes.run(command, cwd=tmp_path, env=environment | {"END": end})
        return done.returncode, done.stdout + done.stderr, (tmp_path / "ran.txt").read_text().strip()

    return run


@pytest.mark.parametrize(("end", "status"), [("SIGKILL", -9), ("SIGINT", 2)])
def test_a_killed_run_goes_on(suite, tmp_path, end, status):
    assert suite(end=end)[::2] == (status, "0 1 2 3")
    status, said, ran = suite()
    assert (status, ran) == (0, "4 5 1 3"), said  # those that never ran, then what failed, then what was running
    assert "2 passed in an earlier run and do not run again (out/journal.jsonl)" in said
    assert "a run died in test_suite.py::test_case[3]: now the last" in said
    status, said, ran = suite()
    assert (status, ran) == (0, ""), said
    assert "6 passed in an earlier run" in said and "6 deselected" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    passed = [line for line in lines if line.get("outcome") == "passed"]
    assert [line["row"]["i"] for line in passed] == [0, 2, 4, 5, 1, 3]
    with (tmp_path / "test_suite.py").open("a") as source:
        source.write("# changed\n")
    status, said, ran = suite()
    assert (status, ran) == (0, "0 1 2 3 4 5"), said
    assert "out/journal.jsonl begun anew: sources was " in said


def test_a_failure_stays_one(suite, tmp_path):
    (tmp_path / "ended").touch()
    assert suite()[::2] == (1, "0 1 2 3 4 5")
    (tmp_path / "failed").unlink()
    status, said, ran = suite()
    assert (status, ran) == (1, "1") and "fails once" in said
    assert suite()[::2] == (0, "1")


def test_a_budget_ends_a_run(suite, tmp_path):
    for made in ("ended", "failed"):
        (tmp_path / made).touch()
    for left in (5, 4):
        status, said, ran = suite("--budget", "0")
        assert status == 75 and ran == str(5 - left)
        assert f"0 s are spent, {left} unfinished: run again" in said
    assert suite("--budget", "100")[::2] == (0, "2 3 4 5")


# The journal


ABOUT = {"device": "H200", "date": "2026-01-01", "revision": "abc", "torch": "2.11", "sources": "f00"}


def begun(file):
    journal = resume.Journal(file, ABOUT)
    for test in ("a", "b", "c"):
        journal.began(test)
        if test != "c":
            journal.ended(test, "passed" if test == "a" else "failed", 0.5, {"ms": 1})
    return file


def test_it_counts_for_the_same_state(tmp_path):
    found = resume.Journal(begun(tmp_path / "j"), {**ABOUT, "date": "2026-01-02"})
    assert found.about == ABOUT and found.anew == ""
    assert [found.passed(test) for test in "abcd"] == [True, False, False, False]
    assert [found.turn(test) for test in "bcd"] == [1, 2, 0]


@pytest.mark.parametrize("what", sorted(set(ABOUT) - {"date"}))
def test_anything_else_begins_anew(tmp_path, what):
    found = resume.Journal(begun(tmp_path / "j"), {**ABOUT, what: "other"})
    assert not found.finished and not found.running
    assert found.anew == f"{what} was {ABOUT[what]}, is other"
    assert len((tmp_path / "j").read_text().splitlines()) == 1


def test_a_line_that_a_kill_cut_off(tmp_path):
    file = begun(tmp_path / "j")
    whole = file.read_text()
    file.write_text(whole + '{"test": "d", "outc')
    found = resume.Journal(file, ABOUT)
    assert set(found.finished) == {"a", "b"}
    found.began("d")
    assert file.read_text() == whole + '{"test": "d"}\n'
    file.write_text('{"device": "H2')
    assert not resume.Journal(file, ABOUT).finished
    assert json.loads(file.read_text()) == ABOUT


def test_the_digest_knows_every_source(tmp_path):
    def digest() -> str:
        return sources(tmp_path)

    (tmp_path / "op").mkdir()
    seen = {digest()}
    for name, text in (("op/a.py", "1"), ("op/a.py", "2"), ("op/b.cu", ""), ("op/measured.json", "[]")):
        (tmp_path / name).write_text(text)
        assert digest() not in seen, name
        seen.add(digest())
    (tmp_path / "op/b.cu").rename(tmp_path / "op/c.cu")
    last = digest()
    assert last not in seen
    for name in ("out/x.py", "bench/results/gpu/ops.json", ".venv/y.py", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        assert digest() == last, name


def test_results_do_not_make_a_revision_dirty(tmp_path):
    """They are written into the repository while their run is still going on."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert revision(tmp_path) == "unknown"
    (tmp_path / "kernel.py").touch()
    for command in (["init"], ["add", "."], ["commit", "-m", "all"]):
        git(*command)
    clean = revision(tmp_path)
    assert len(clean) == 10
    (tmp_path / "bench" / "results" / "ops.md").touch()
    assert revision(tmp_path) == clean
    (tmp_path / "kernel.py").write_text("changed")
    assert revision(tmp_path) == f"{clean}-dirty"
