"""A pytest plugin for runs that may be cut short: what has passed once is not run again, time is bounded.

    python -m pytest -p bench.lib.resume --resume FILE --budget SECONDS ...        bench/ itself loads it

FILE holds a line of JSON for each test that began and for each that finished, written at once: after a kill -9 the next
run goes on where this one ended. It counts for one device, revision, state of the sources and set of versions. Tests
that failed run again, after those that never ran; last come tests in which a run died. After the budget no further test
is begun, and the exit status is UNFINISHED. What a test hands to record_property("row", ...) is stored with its result.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.machine import environment, sources

UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: try again


class Journal:
    """What is known of a run's tests, in memory and, given a file, on disk.

    Attributes:
        about: the :func:`measure.environment` that the run began in, with the digest of its sources.
        anew: why what the file held is not used; empty where it is, or where there was nothing.
        finished: test -> its last line, {"test", "outcome", "seconds", "row"}.
        running: tests that began and never finished.
    """

    def __init__(self, file: Path | None, about: dict[str, str]):
        self.file, self.about = file, about
        self.finished: dict[str, dict[str, Any]] = {}
        self.running: set[str] = set()
        lines = self._read() if file is not None and file.exists() else []
        self.anew = _difference(lines[0], about) if lines else ""
        if lines and not self.anew:
            self.about = lines[0]
            for line in lines[1:]:
                self._take(line)
        elif file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("", encoding="utf-8")
            self._write(about)

    def _read(self) -> list[dict[str, Any]]:
        """Whole lines; what a kill cut off is removed, so that the next line begins its own."""
        assert self.file is not None
        text = self.file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.file.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]

    def _take(self, line: dict[str, Any]) -> None:
        if "outcome" in line:
            self.running.discard(line["test"])
            self.finished[line["test"]] = line
        else:
            self.running.add(line["test"])

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                os.fsync(journal.fileno())

    def began(self, test: str) -> None:
        self._take(line := {"test": test})
        self._write(line)

    def ended(self, test: str, outcome: str, seconds: float, row: Any) -> None:
        self._take(line := {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "row": row})
        self._write(line)

    def passed(self, test: str) -> bool:
        return test not in self.running and self.finished.get(test, {}).get("outcome") == "passed"

    def turn(self, test: str) -> int:
        """0: never ran. 1: failed. 2: a run died in it."""
        return 2 if test in self.running else int(test in self.finished)


def _difference(old: dict[str, str], new: dict[str, str]) -> str:
    names = [name for name in {**old, **new} if name != "date" and old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


class Resume:
    """The hooks of one run of pytest."""

    def __init__(self, config: pytest.Config):
        about = environment("cuda" if torch.cuda.is_available() else "cpu") | {"sources": sources(config.rootpath)}
        self.budget: float | None = config.getoption("budget")
        self.begun, self.earlier, self.left = time.monotonic(), 0, 0
        self.order: list[str] = []  # all tests of the files that are run, those left out by marker or name too
        self.result: dict[str, Any] = {}
        self.journal = Journal(config.getoption("resume"), about)

    def rows(self) -> list[Any]:
        """What the tests of this run and of those before it handed over, in the order of the suite."""
        finished = self.journal.finished
        return [finished[test]["row"] for test in self.order if test in finished and finished[test]["row"] is not None]

    @pytest.hookimpl(wrapper=True)  # what the others leave out is known after them
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        self.order = [item.nodeid for item in items]
        yield
        done = [item for item in items if self.journal.passed(item.nodeid)]
        if done:
            config.hook.pytest_deselected(items=done)
        rest = [item for item in items if not self.journal.passed(item.nodeid)]
        items[:] = sorted(rest, key=lambda item: self.journal.turn(item.nodeid))
        self.earlier, self.left = len(done), len(items)

    def pytest_report_collectionfinish(self) -> list[str]:
        journal, lines = self.journal, []
        if journal.anew:
            lines.append(f"{journal.file} begun anew: {journal.anew}")
        if self.earlier:
            lines.append(f"{self.earlier} passed in an earlier run and do not run again ({journal.file})")
        return lines + [f"a run died in {test}: now the last" for test in self.order if test in journal.running]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
        self.journal.began(item.nodeid)
        self.result = {"outcome": "passed", "seconds": 0.0, "row": None}
        done = yield  # an interrupt does not come back: the test stays among those running
        self.journal.ended(item.nodeid, **self.result)
        self.left -= 1
        spent = time.monotonic() - self.begun
        if nextitem is not None and self.budget is not None and spent > self.budget:
            item.session.shouldstop = f"{self.budget:.0f} s are spent, {self.left} unfinished: run again"
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.result["seconds"] += report.duration
        if report.outcome != "passed" and self.result["outcome"] != "failed":
            self.result["outcome"] = report.outcome
        self.result["row"] = dict(report.user_properties).get("row", self.result["row"])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if str(session.shouldstop).endswith("run again"):
            session.exitstatus = UNFINISHED
        elif session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.earlier:
            session.exitstatus = pytest.ExitCode.OK


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resume")
    group.addoption("--resume", type=Path, metavar="FILE", help="leave out what passed according to FILE, add to it")
    group.addoption("--budget", type=float, metavar="SECONDS", help="begin no further test after so long")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("resume") is not None and config.getoption("numprocesses", None):
        raise pytest.UsageError("--resume keeps the tests of one process: leave -n out")
    config.pluginmanager.register(Resume(config), "resume-run")
