"""What `make` and CI run: every step of setting up announced, every tier whatever fails, numbers as other processors
compute them, both ends of the versions.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYTEST = """#!/bin/sh
case "$*" in
*"-m pytest"*) echo "$ATEN_CPU_CAPABILITY: $*" >> tiers; case "$*" in *"-m cpu"*) exit 1 ;; esac ;;
esac
"""
PIP = """#!/bin/sh
case "$*" in
*pip*install*) echo "Collecting for: $*" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A function that runs `make` of the project, with a shell script in place of the interpreter."""
    assert shutil.which("make"), "make is not installed"
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", "hiar_kernels/common/extension.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`

    def run(goal: str, interpreter: str) -> subprocess.CompletedProcess[str]:
        python.write_text(interpreter)
        python.chmod(0o755)
        return subprocess.run(["make", goal], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def make_tests(make, tmp_path):
    """`make` where everything is installed: what it says, and the tiers that it runs, of which `cpu` fails."""
    (tmp_path / ".venv" / "installed-dev").touch()

    def run(goal: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        return make(goal, PYTEST), (tmp_path / "tiers").read_text().splitlines()

    return run


@pytest.mark.parametrize("goal", ["setup", "setup-dev"])
def test_setting_up_shows_its_progress(make, goal):
    """Every step is announced, and pip is not told to be quiet."""
    done = make(goal, PIP)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:6] for line in lines if " of 3: " in line] == ["1 of 3", "2 of 3", "3 of 3"]
    collected = [line for line in lines if line.startswith("Collecting for:")]
    assert len(collected) == 2 and not any("-q" in line.split() or "--quiet" in line for line in collected)
    assert lines.index(collected[0]) == 1, "pip's own lines come between ours, as it works"
    assert "of 3" not in make(goal, PIP).stdout, "what is set up is not set up again"


def test_a_red_tier_does_not_keep_the_next_from_running(make_tests):
    done, tiers = make_tests("test")
    assert [re.search(r"-m (cpu|interpreter|compile)", tier)[1] for tier in tiers] == ["cpu", "interpreter", "compile"]
    assert done.returncode and done.stderr.splitlines()[-2].strip() == "failed: cpu"
    announced = [line for line in done.stdout.splitlines() if line.startswith("tests: ")]
    assert len(announced) == 3 and all(re.search(r"about \d+ minutes on two cores", line) for line in announced)


def test_numbers_are_tested_as_other_processors_compute_them(make_tests):
    """One that has AVX2 and no AVX-512 was red: its attention has other code."""
    done, tiers = make_tests("test-processors")
    assert done.returncode  # red is red, behind which the next one runs
    assert [tier.partition(":")[0] for tier in tiers] == ["default", "avx2"]
    files = re.findall(r"tests/\S+\.py", tiers[1])
    assert "tests/kernels/test_attention.py" in files and all((ROOT / file).is_file() for file in files)
    tiers_of_ci = re.search(r"for tier in (.*); do", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))[1]
    assert {"cpu", "processors", "interpreter", "compile"} <= set(tiers_of_ci.split())


def test_both_ends_of_the_versions_are_tested():
    oldest, newest = re.search(r"^VERSIONS := (\S+) (\S+)$", MAKEFILE, re.MULTILINE).groups()
    page = " ".join((ROOT / "docs/contributing/compatibility.md").read_text(encoding="utf-8").split())
    for torch, triton in (oldest.split("-"), newest.split("-")):
        assert f"torch {torch} with Triton {triton}" in page
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    first, here, last = ([int(n) for n in v.split("-")[0].split(".")] for v in (oldest, pinned, newest))
    assert first < here < last


def test_ctrl_c_is_heard_where_the_suite_runs_in_the_background(request):
    """A shell ignores SIGINT for its jobs in the background, and their children inherit that."""
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        conftest.pytest_configure()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
