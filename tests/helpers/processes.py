"""Processes that need not import torch anew: forked from a server that has it (multiprocessing's forkserver).

Words are given as behind `python`; folder, variables, output, exit status and signals are the process's own, as those
of a new interpreter, and what pytest can import it can. The ranks that torch's launcher starts in it are forks of it.
Not for what only a new interpreter shows: what is imported, how long a start takes, variables that torch reads when it
is loaded, another copy of the code.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

PATIENCE = 240  # seconds that any process may take on a busy machine
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])


class Started:
    """A process at work; as much of subprocess.Popen as the tests use."""

    def __init__(
        self, words: Sequence[object], *, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self._said = Path(tempfile.mkdtemp())
        told = [*map(str, words)], str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        self._process = _CONTEXT.Process(target=_begin, args=(*told, self._said), daemon=False)
        _start_server()
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def poll(self) -> int | None:
        return self._process.exitcode

    def said(self, stream: str = "stderr") -> str:
        """What it wrote so far to "stdout" or "stderr"."""
        file = self._said / stream
        return file.read_text(errors="replace") if file.exists() else ""

    def lines(self) -> Iterator[str]:
        """Of its standard output, as they come, up to its end."""
        seen, until = 0, time.time() + PATIENCE
        while time.time() < until:
            ended = self.poll() is not None
            lines = self.said("stdout").splitlines(keepends=True)
            for line in lines[seen:]:
                if line.endswith("\n") or ended:
                    seen += 1
                    yield line
            if ended:
                return
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit status. What lives too long ends, and those that it started with it."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
            raise subprocess.TimeoutExpired("a process of a test", timeout, self.said("stdout"), self.said())
        return code

    def done(self, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """At its end."""
        code = self.wait(timeout)
        found = subprocess.CompletedProcess([], code, self.said("stdout"), self.said("stderr"))
        shutil.rmtree(self._said)
        return found


def run(words: Sequence[object], timeout: float = PATIENCE, **place: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *words], capture_output=True, text=True)``."""
    return Started(words, **place).done(timeout)


def start_torchrun(processes: int, *words: object, **place: Any) -> Started:
    """A script on so many processes, at work."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return Started([*launcher, *words], **place)


def torchrun(processes: int, *words: object, **place: Any) -> subprocess.CompletedProcess[str]:
    """The same, at its end."""
    return start_torchrun(processes, *words, **place).done()


def on_ranks(count: int, function: Callable[..., None], *arguments: object) -> None:
    """function(rank, *arguments) on so many processes, to their end."""
    import torch.multiprocessing as torch_processes

    _start_server()
    torch_processes.start_processes(function, arguments, nprocs=count, start_method="forkserver")


def _start_server() -> None:
    """Unless it runs. It says nothing of a module that it does not find."""
    paths = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}):
        forkserver.ensure_running()


def _begin(words: list[str], cwd: str, variables: dict[str, str], said: Path) -> None:
    """In the new process."""
    os.setsid()
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(said / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    SubprocessHandler._popen = lambda handler, words, env: _Rank(words[1:], env)  # type: ignore
    dynamic_rendezvous._delay = lambda seconds: time.sleep(0.01)  # not up to 0.3 s, as one of many nodes
    dynamic_rendezvous.get_method_name = lambda depth=2: ""  # of its log: two walks through the sources of the stack
    os._exit(_execute(words, variables))


def _execute(words: Sequence[str], variables: Mapping[str, str]) -> int:
    """Do as an interpreter does that is begun with these words; the exit status."""
    os.environ.clear()
    os.environ.update(variables)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    logging.disable(logging.NOTSET)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding=variables.get("PYTHONIOENCODING"), closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    sys.excepthook, code = sys.__excepthook__, 0
    try:
        _interpret([*words[words[0] == "-u" :]], variables.get("PYTHONPATH", ""))
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    return code


def _interpret(words: list[str], further: str) -> None:
    kind, *rest = words
    script = kind not in ("-c", "-m")
    place = str(Path(kind).resolve().parent) if script else ""
    sys.path[:] = [place, *filter(None, further.split(os.pathsep)), *filter(None, sys.path)]
    sys.argv = [kind, *rest] if script else ["-c" if kind == "-c" else rest[0], *rest[1:]]
    if script:
        runpy.run_path(kind, run_name="__main__")
    elif kind == "-m":
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)


class _Rank:
    """A fork; as much of subprocess.Popen as torch's launcher uses."""

    def __init__(self, words: Sequence[str], variables: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.setsid()
                code = _execute(words, variables)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("a rank", timeout)  # type: ignore[arg-type]
            time.sleep(0.01)
        return self.returncode  # type: ignore[return-value]
