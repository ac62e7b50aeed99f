"""Detect faults in a job of several processes and report each once, in a line that names rank, step and block.

Every process writes its position and a heartbeat to the job's store (torch.distributed) and reads those of the others.
The first process that detects a fault reports it; the others read the report and end.

    a process raises             it reports its own error
    a process is killed          its neighbours see the link break; or the launcher ends the others (SIGTERM), and the
                                 process that does not answer the roll call is reported
    a process is stopped         no heartbeat for the time limit
    a process hangs              heartbeats, but the same task for the time limit
    the launcher is killed       the store is gone: every process ends by itself

Until a process has finished its first block the limit is ten times as long: it loads weights and compiles kernels.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .peers import PATIENCE, has_ended, link_error

TIMEOUT = 60.0
_DETECTION = 0.8  # share of the time limit; the rest is for reporting and ending
_FIRST_BLOCK = 10  # times the limit
_BARRIER_POLL = 0.005  # seconds
_FAILED = 1  # exit code


class PipelineFault(RuntimeError):
    """Another process of the job failed; the message names it, and is on stderr already."""


class Stopped(Exception):
    """The consumer of the blocks ended the job."""


class Watchdog:
    """The watchdog of one process of a job.

    Args:
        group: the processes of the job. timeout: seconds within which a fault ends the job, above 0.
        advice: number of finished blocks -> text to append to the message.

    Use it as a context manager. Inside, the main thread calls :meth:`at` when it moves on and :meth:`check` while it
    waits; if it does not call them after a fault, the process exits without it. SIGTERM is handled in the meantime,
    unless the program has a handler or this is not its main thread.

    Raises:
        ValueError: timeout is not above 0.
    """

    _counts: ClassVar[dict[str, int]] = {}  # by group

    def __init__(
        self, group: dist.ProcessGroup, timeout: float = TIMEOUT, advice: Callable[[int], str] = lambda finished: ""
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be seconds above 0, got {timeout!r}")
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.timeout, self.advice = timeout, advice
        name = f"hiar/{group.group_name}/{dist.get_global_rank(group, 0)}"
        # the same on every rank, since the ranks of a group create its watchdogs in the same order
        self._counts[name] = self._counts.get(name, 0) + 1
        name = f"{name}/{self._counts[name]}"
        # a connection of its own, so that requests of the main thread do not delay heartbeats
        own = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.store = dist.PrefixStore(name, own)
        self.store.set_timeout(timedelta(seconds=timeout))
        self.beat = min(1.0, timeout / 20)
        self.name = f"rank {self.rank}"
        self.position, self.state, self.moves, self.finished, self.warmed_up = "start", "wait", 0, 0, False
        self.fault: str | None = None
        self.stopped = self.terminated = self.closed = False
        self._beats = self._barriers = 0
        self._seen = [(-1, -1, 0.0, 0.0)] * self.ranks  # beats, moves, when each of them last changed
        self._statuses: list[dict[str, Any]] = [{"name": f"rank {r}", "at": "start"} for r in range(self.ranks)]
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._inner, self._outer = os.pipe()  # wakes the thread: the number of a signal, or a zero byte
        for end in (self._inner, self._outer):
            os.set_blocking(end, False)

    # The main thread.

    def __enter__(self) -> Watchdog:
        self._old: Any = None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._old = (
                signal.signal(signal.SIGTERM, self._terminate),
                signal.set_wakeup_fd(self._outer, warn_on_full_buffer=False),
            )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.state, self.closed = "end", True
        os.write(self._outer, b"\0")
        self._thread.join(self.timeout)
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old[0])
            signal.set_wakeup_fd(self._old[1])
        for end in (self._inner, self._outer):
            os.close(end)

    def at(self, position: str, state: str = "run") -> None:
        """Set the position of the main thread; state "wait" while it depends on others and cannot hang by itself."""
        self.check()
        self.position, self.state, self.moves = position, state, self.moves + 1
        with suppress(RuntimeError):  # without the store, the thread ends the process
            self._write()

    def check(self) -> None:
        """Raise if the job has failed, was terminated or stopped."""
        if self.fault is not None:
            raise PipelineFault(self.fault)
        if self.terminated:
            raise SystemExit(128 + signal.SIGTERM)
        if self.stopped:
            raise Stopped

    def barrier(self) -> None:
        """Wait until every process has called this."""
        self._barriers += 1
        count = self.store.add(f"barrier/{self._barriers}", 1)
        while count < self.ranks:
            self.check()
            time.sleep(_BARRIER_POLL)
            count = self.store.add(f"barrier/{self._barriers}", 0)

    def stop(self) -> None:
        """End the job without a fault."""
        with suppress(RuntimeError):
            self.store.set("stopped", "1")

    def report(self, message: str, culprit: int | None = None) -> None:
        """Report a fault of this process or of rank `culprit`, unless another process has reported one."""
        with suppress(RuntimeError):  # report even if the store is gone
            if self.fault is not None or self.store.add("faults", 1) > 1:
                return
        finished = max([self.finished, *(status.get("finished", 0) for status in self._statuses)])
        advice = self.advice(finished) or ("" if culprit is None else "; run the command again")
        line = " ".join(f"{message}{advice}".split())
        with suppress(OSError):  # stderr is closed
            print(f"hiar: {line}", file=sys.stderr, flush=True)
        status = self._statuses[self.rank if culprit is None else culprit]
        with suppress(RuntimeError):
            self.store.set("fault", json.dumps({"message": line, "host": status.get("host"), "pid": status.get("pid")}))
        self.fault = line

    def report_error(self, error: BaseException) -> None:
        """Report an exception of this process at its position; of one that another process has caused by its death,
        that.
        """
        if link_error(error) is not None and (dead := self._dead()) is not None:
            return self.report(f"{self._name_of(dead)} died{self._where(dead)}", dead)
        what = "is out of memory" if _out_of_memory(error) else "failed"
        self.report(f"{self.name} {what} at {self.position}: {_line(error)}")

    def report_broken_link(self, peer: int) -> None:
        """Find out why the link to rank `peer` broke, report it if nobody has, and raise."""
        for _ in range(20):  # if a fault or a signal ended the peer, that becomes known in a moment
            self.check()
            time.sleep(self.beat / 10)
        self._read()
        self.check()
        self.report(f"{self._name_of(peer)} died{self._where(peer)}", peer)
        self._await_fault()
        self.check()
        raise PipelineFault(f"the link to {self._name_of(peer)} broke")

    def _dead(self) -> int | None:
        """A rank on this machine that has ended without a word; waits for it a moment. None: none has, or another
        process has reported a fault.
        """
        until = time.monotonic() + PATIENCE
        while self.fault is None and time.monotonic() < until:
            with suppress(RuntimeError):
                self._read()
            for rank, status in enumerate(self._statuses):
                ended = rank != self.rank and has_ended(status.get("host"), status.get("pid"))
                if ended and status.get("state") != "end":
                    return rank
            time.sleep(0.02)
        return None

    def _where(self, rank: int) -> str:
        """Where a rank was; "" for one that never said it."""
        position = self._statuses[rank]["at"]
        return "" if position == "start" else f" at {position}"

    # The thread.

    def _run(self) -> None:
        last = time.monotonic()
        try:
            while True:
                self._write()
                if self.closed:
                    return
                self._read()
                now = time.monotonic()
                if now - last > 4 * self.beat + 1:  # this process itself was stopped: do not blame the others
                    self._seen = [(*seen[:2], now, now) for seen in self._seen]
                last = now
                if self.fault is None and not self.stopped and self.ranks > 1:
                    self._judge(now)
                if self.fault is not None:
                    self._end(_FAILED)
                    return
                self._sleep()
        except RuntimeError as error:
            if not self.closed:
                self._statuses[self.rank] = {}
                self.report(f"{self.name} has lost the store of the job at {self.position}: {_line(error)}")
                self._end(_FAILED)

    def _write(self) -> None:
        with self._writing:  # keep the order of writes
            self._beats += 1
            status = {
                "name": self.name,
                "at": self.position,
                "state": self.state,
                "beats": self._beats,
                "moves": self.moves,
                "finished": self.finished,
                "warmed_up": self.warmed_up,
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            self.store.set(f"status/{self.rank}", json.dumps(status))

    def _read(self) -> None:
        with self._reading:
            for rank in range(self.ranks):
                if self.store.check([f"status/{rank}"]):
                    self._statuses[rank] = json.loads(self.store.get(f"status/{rank}"))
            if self.fault is None and self.store.check(["fault"]):
                fault = json.loads(self.store.get("fault"))
                self.fault = fault["message"]
                if fault["host"] == socket.gethostname() and fault["pid"] not in (None, os.getpid()):
                    with suppress(OSError):
                        os.kill(fault["pid"], signal.SIGCONT)  # a stopped process could not end
            self.stopped = self.stopped or self.store.check(["stopped"])

    def _judge(self, now: float) -> None:
        limit = _DETECTION * self.timeout
        for rank, status in enumerate(self._statuses):
            beats, moves, heard, moved = self._seen[rank]
            if status.get("beats", 0) != beats or status.get("state") == "end":
                beats, heard = status.get("beats", 0), now
            if status.get("moves", 0) != moves or status.get("state") != "run":
                moves, moved = status.get("moves", 0), now
            self._seen[rank] = beats, moves, heard, moved
            if now - heard > limit * (1 if beats else _FIRST_BLOCK):
                self.report(f"{self._name_of(rank)} sent no heartbeat for {now - heard:.0f} s at {status['at']}", rank)
            elif now - moved > limit * (1 if status.get("warmed_up") else _FIRST_BLOCK):
                self.report(f"{self._name_of(rank)} hangs for {now - moved:.0f} s at {status['at']}", rank)

    def _sleep(self) -> None:
        if not select.select([self._inner], [], [], self.beat)[0]:
            return
        heard = set(os.read(self._inner, 4096))
        if signal.SIGTERM in heard:
            self._roll_call()
        if signal.SIGINT in heard:
            self._end(128 + signal.SIGINT)

    def _roll_call(self) -> None:
        """After SIGTERM: if the launcher ends the job because a process died, that process does not answer."""
        self.store.set(f"alive/{self.rank}", "1")
        until = time.monotonic() + max(4 * self.beat, 0.4)
        self._read()
        while (missing := self._missing()) and time.monotonic() < until and self.fault is None:
            time.sleep(0.05)
            self._read()
        time.sleep(0.1)  # for the others to learn it too: this process may hold the store
        if missing and self.fault is None:
            self.report(f"{self._name_of(missing[0])} died{self._where(missing[0])}", missing[0])
            self._await_fault()
        self.terminated = True
        self._end(128 + signal.SIGTERM)

    def _missing(self) -> list[int]:
        """The ranks that have neither come to their end nor answered."""
        working = (rank for rank, status in enumerate(self._statuses) if status.get("state") != "end")
        return [rank for rank in working if not self.store.check([f"alive/{rank}"])]

    def _await_fault(self) -> None:
        """Wait for the message of the process that reported the fault."""
        until = time.monotonic() + max(4 * self.beat, 0.4)
        while self.fault is None and time.monotonic() < until:
            time.sleep(0.02)
            self._read()

    def _end(self, code: int) -> None:
        """Give the main thread time to end by itself (`check` raises); if it does not, exit the process."""
        until = time.monotonic() + max(self.timeout / 20, 0.5)
        while time.monotonic() < until:
            if self.closed:
                return
            time.sleep(0.02)
        os._exit(code)

    def _terminate(self, *_: object) -> None:
        """Nothing to do: the thread gets SIGTERM through the wake-up pipe and finds out why."""

    def _name_of(self, rank: int) -> str:
        return str(self._statuses[rank].get("name", f"rank {rank}"))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorOutOfMemoryError")


def _line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:300] if message else type(error).__name__
