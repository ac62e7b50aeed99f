"""Environment variables: read in one place, nonsense in them is one line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hiar_model.cli import main
from hiar_model.common import environment

pytestmark = pytest.mark.cpu

PACKAGE = Path(environment.__file__).resolve().parents[1]
NUMBERS = {
    "WORLD_SIZE": (environment.world_size, 1, "at least 1"),
    "RANK": (environment.rank, 0, "at least 0"),
    "LOCAL_RANK": (environment.local_rank, 0, "at least 0"),
}


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (*NUMBERS, "WANDB_PROJECT", "HIAR_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_they_are_read_nowhere_else():
    files = [file for file in PACKAGE.rglob("*.py") if file != Path(environment.__file__).resolve()]
    assert files
    assert not [str(f) for f in files if re.search(r"\benviron\b|\bgetenv\b", f.read_text(encoding="utf-8"))]


def test_each_is_in_the_table():
    source = Path(environment.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r'"([A-Z]+_[A-Z_]+|RANK)"', source))
    assert used == set(re.findall(r"^\| ([A-Z_]+) \|", environment.__doc__, re.M)) and len(used) == 7


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name, monkeypatch):
    read, default, legal = NUMBERS[name]
    for value, expected in ((None, default), ("", default), ("1", 1)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        assert read() == expected
    for value in ("two", "-1", "1.0", " 1", "0" if name == "WORLD_SIZE" else "x"):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=rf"{name} must be a whole number of {legal}, got '{value}'$"):
            read()


def test_a_rank_outside_the_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK must be below WORLD_SIZE 2, got 2"):
        environment.rank()


def test_nonsense_is_one_line_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["generate", "a red circle moving right", "-o", str(tmp_path / "v.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hiar: ") and "WORLD_SIZE" in error and "'many'" in error and error.count("\n") == 1


def test_names(monkeypatch):
    assert environment.wandb_project() is None and environment.error_file() is None
    assert not environment.under_torchrun()
    monkeypatch.setenv("WANDB_PROJECT", "films")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert environment.wandb_project() == "films" and environment.under_torchrun()


def test_one_of_several_processes_reports(monkeypatch, tmp_path):
    """And one whose launcher has gone, with its folder: where a run resumes from is not lost in an error about it."""
    assert environment.claim_error_report() and environment.claim_error_report(), "no launcher of ours"
    monkeypatch.setenv("HIAR_ERROR_FILE", str(tmp_path / "reported"))
    assert environment.claim_error_report() and not environment.claim_error_report()
    monkeypatch.setenv("HIAR_ERROR_FILE", str(tmp_path / "gone" / "reported"))
    assert environment.claim_error_report()


def test_what_children_find(monkeypatch, tmp_path):
    """And what a program has in its own environment afterwards: what it had before."""
    names = ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "3")
    with environment.for_children(tmp_path / "error"):
        assert environment.error_file() == tmp_path / "error" and [os.environ[name] for name in names] == ["3", "3"]
    assert environment.error_file() is None and [os.environ[name] for name in names] == ["3", "3"]
    for name in names:
        monkeypatch.delenv(name)
    with pytest.raises(KeyError), environment.for_children(tmp_path / "error"):
        assert [os.environ[name] for name in names] == ["1", "120"]
        raise KeyError
    assert environment.error_file() is None and not os.environ.keys() & names
