"""Faults of a job of several processes: found by all, told once, in a line that names rank, step and block.

Every process writes down in the job's store (torch.distributed) where it is; a thread of it writes that it lives, and
reads the same of the others. Whoever finds a fault first tells it; the others hear of it and end.

    a process that failed        tells its own error
    a process that was killed    its neighbours see the link break; where a launcher ends the rest (SIGTERM), whoever
                                 does not answer the roll call is the one
    a process that stopped       nothing heard from it for the time limit
    a process that hangs         heard from, but in one task for the time limit
    a launcher that was killed   takes the store with it: every process ends by itself

Until a process has made its first block it has ten times the limit: weights are loaded and kernels compiled then.
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

TIMEOUT = 60.0
_SHARE = 0.8  # of the time limit for noticing; the rest for telling and ending
_FIRST_BLOCK = 10  # times the limit
_MEETING = 0.005
_FAILED = 1


class PipelineFault(RuntimeError):
    """Another process of the job failed; the message names it. It has been told already."""


class Stopped(Exception):
    """The consumer of the blocks has had enough."""


class Watch:
    """One process's part in watching over a job.

    Args:
        group: the processes that belong together. timeout: seconds within which a fault ends the job.
        advice: given how many blocks are finished, what is said behind the message.

    Use as a context; then the main thread is to call :meth:`at` where it goes on, and :meth:`check` while it waits.
    Where it does not in time, the process ends without it. SIGTERM is handled meanwhile, in the main thread of a
    program that does not do so itself.
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
        # alike on every rank: the ranks of a group make its watches in the same order
        self._counts[name] = self._counts.get(name, 0) + 1
        name = f"{name}/{self._counts[name]}"
        # a connection of its own: what the main thread asks of the store must not hold up a sign of life
        own = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.store = dist.PrefixStore(name, own)
        self.store.set_timeout(timedelta(seconds=timeout))
        self.beat = min(1.0, timeout / 20)
        self.name = f"rank {self.rank}"
        self.place, self.state, self.moves, self.finished, self.begun = "start", "wait", 0, 0, False
        self.fault: str | None = None
        self.stopped = self.terminated = self.closed = False
        self._beats = self._met = 0
        self._seen = [(-1, -1, 0.0, 0.0)] * self.ranks  # beats, moves, when each of them last changed
        self._known: list[dict[str, Any]] = [{"name": f"rank {r}", "at": "start"} for r in range(self.ranks)]
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._inner, self._outer = os.pipe()  # wakes the thread: a signal's number, or a zero byte
        for end in (self._inner, self._outer):
            os.set_blocking(end, False)

    # The main thread.

    def __enter__(self) -> Watch:
        self._old: Any = None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._old = (
                signal.signal(signal.SIGTERM, self._terminate),
                signal.set_wakeup_fd(self._outer, warn_on_full_buffer=False),
            )
        self._thread = threading.Thread(target=self._live, daemon=True)
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

    def at(self, place: str, state: str = "run") -> None:
        """The main thread has come to a place; state "wait" where it is not its own business to go on."""
        self.check()
        self.place, self.state, self.moves = place, state, self.moves + 1
        with suppress(RuntimeError):  # without a store the thread ends the process
            self._write()

    def check(self) -> None:
        """Raise what is known of the job by now."""
        if self.fault is not None:
            raise PipelineFault(self.fault)
        if self.terminated:
            raise SystemExit(128 + signal.SIGTERM)
        if self.stopped:
            raise Stopped

    def meet(self) -> None:
        """Wait until every process has come here."""
        self._met += 1
        count = self.store.add(f"met/{self._met}", 1)
        while count < self.ranks:
            self.check()
            time.sleep(_MEETING)
            count = self.store.add(f"met/{self._met}", 0)

    def stop(self) -> None:
        """End the job without a fault."""
        with suppress(RuntimeError):
            self.store.set("stopped", "1")

    def tell(self, message: str, culprit: int | None = None) -> None:
        """Tell a fault, unless another process has told one."""
        with suppress(RuntimeError):  # a store that is gone cannot keep anyone from telling
            if self.fault is not None or self.store.add("faults", 1) > 1:
                return
        finished = max([self.finished, *(known.get("finished", 0) for known in self._known)])
        line = " ".join(f"{message}{self.advice(finished)}".split())
        with suppress(OSError):  # nobody listens any more
            print(f"hiar: {line}", file=sys.stderr, flush=True)
        known = self._known[self.rank if culprit is None else culprit]
        with suppress(RuntimeError):
            self.store.set("fault", json.dumps({"message": line, "host": known.get("host"), "pid": known.get("pid")}))
        self.fault = line

    def failed(self, error: BaseException) -> None:
        """This process failed where it is."""
        what = "is out of memory" if _out_of_memory(error) else "failed"
        self.tell(f"{self.name} {what} at {self.place}: {_line(error)}")

    def lost(self, peer: int) -> None:
        """The link to another process broke: raises what is to be made of it."""
        for _ in range(20):  # if the peer ended because of a fault or a signal, that is known any moment now
            self.check()
            time.sleep(self.beat / 10)
        self._read()
        self.check()
        self.tell(f"{self._of(peer)} died at {self._known[peer]['at']}", peer)
        self._await_fault()
        self.check()
        raise PipelineFault(f"the link to {self._of(peer)} broke")

    # The thread.

    def _live(self) -> None:
        last = time.monotonic()
        try:
            while True:
                self._write()
                if self.closed:
                    return
                self._read()
                now = time.monotonic()
                if now - last > 4 * self.beat + 1:  # this process itself stood still: nobody else is to blame
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
                self._known[self.rank] = {}
                self.tell(f"{self.name} has lost the store of the job at {self.place}: {_line(error)}")
                self._end(_FAILED)

    def _write(self) -> None:
        with self._writing:  # what is older must not come later
            self._beats += 1
            told = {
                "name": self.name,
                "at": self.place,
                "state": self.state,
                "beats": self._beats,
                "moves": self.moves,
                "finished": self.finished,
                "begun": self.begun,
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            self.store.set(f"of/{self.rank}", json.dumps(told))

    def _read(self) -> None:
        with self._reading:
            for rank in range(self.ranks):
                if self.store.check([f"of/{rank}"]):
                    self._known[rank] = json.loads(self.store.get(f"of/{rank}"))
            if self.fault is None and self.store.check(["fault"]):
                found = json.loads(self.store.get("fault"))
                self.fault = found["message"]
                if found["host"] == socket.gethostname() and found["pid"] not in (None, os.getpid()):
                    with suppress(OSError):
                        os.kill(found["pid"], signal.SIGCONT)  # a stopped process could not end
            self.stopped = self.stopped or self.store.check(["stopped"])

    def _judge(self, now: float) -> None:
        limit = _SHARE * self.timeout
        for rank, known in enumerate(self._known):
            beats, moves, heard, moved = self._seen[rank]
            if known.get("beats", 0) != beats or known.get("state") == "end":
                beats, heard = known.get("beats", 0), now
            if known.get("moves", 0) != moves or known.get("state") != "run":
                moves, moved = known.get("moves", 0), now
            self._seen[rank] = beats, moves, heard, moved
            if now - heard > limit * (1 if beats else _FIRST_BLOCK):
                self.tell(f"{self._of(rank)} gave no sign of life for {now - heard:.0f} s at {known['at']}", rank)
            elif now - moved > limit * (1 if known.get("begun") else _FIRST_BLOCK):
                self.tell(f"{self._of(rank)} hangs for {now - moved:.0f} s at {known['at']}", rank)

    def _sleep(self) -> None:
        if not select.select([self._inner], [], [], self.beat)[0]:
            return
        heard = set(os.read(self._inner, 4096))
        if signal.SIGTERM in heard:
            self._roll_call()
        if signal.SIGINT in heard:
            self._end(128 + signal.SIGINT)

    def _roll_call(self) -> None:
        """Somebody ends the job: because a process of it died, or for reasons of its own."""
        self.store.set(f"here/{self.rank}", "1")
        until = time.monotonic() + max(4 * self.beat, 0.4)
        missing: list[int] = []
        while time.monotonic() < until and self.fault is None:
            time.sleep(0.05)
            self._read()
            missing = [rank for rank in range(self.ranks) if not self._answered(rank)]
        if missing and self.fault is None:
            self.tell(f"{self._of(missing[0])} died at {self._known[missing[0]]['at']}", missing[0])
            self._await_fault()
        self.terminated = True
        self._end(128 + signal.SIGTERM)

    def _answered(self, rank: int) -> bool:
        return self._known[rank].get("state") == "end" or self.store.check([f"here/{rank}"])

    def _await_fault(self) -> None:
        """Until the words of whoever told the fault are there."""
        until = time.monotonic() + max(4 * self.beat, 0.4)
        while self.fault is None and time.monotonic() < until:
            time.sleep(0.02)
            self._read()

    def _end(self, code: int) -> None:
        """The main thread learns of it from `check`; where it does not come there, the process ends without it."""
        until = time.monotonic() + max(self.timeout / 20, 0.5)
        while time.monotonic() < until:
            if self.closed:
                return
            time.sleep(0.02)
        os._exit(code)

    def _terminate(self, *_: object) -> None:
        """The thread hears of SIGTERM too, and finds out why."""

    def _of(self, rank: int) -> str:
        return str(self._known[rank].get("name", f"rank {rank}"))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorOutOfMemoryError")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
