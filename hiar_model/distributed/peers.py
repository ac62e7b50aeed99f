"""Which processes of a job have died, so that the others can say so in place of "Connection closed by peer"."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

LINK_WORDS = ("gloo", "nccl", "connection", "broken pipe", "socket", "tcpstore")
"""One of them is in the message of an error of torch that means a broken link."""
PATIENCE = 2.0
"""Seconds in which a process whose links break can be seen to have ended."""


def has_ended(host: str | None, pid: int | None) -> bool:
    """Whether a process of this machine is no more, or waits for its parent to notice. False for one elsewhere."""
    if pid is None or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):  # a system without it
        return False


def link_error(error: BaseException | None) -> str | None:
    """The first line of an error of torch that means a broken link, or of one that has such a cause; None: another."""
    while error is not None:
        text = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and any(word in text.lower() for word in LINK_WORDS):
            return text
        error = error.__cause__ or error.__context__
    return None


class Peers:
    """The processes of the default group of torch.distributed. Every one of them makes such an object, at once."""

    def __init__(self) -> None:
        self.store = dist.PrefixStore("hiar/peers", distributed_c10d._get_default_store())
        self.rank = dist.get_rank()
        self.store.set(str(self.rank), json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self.processes: dict[int, dict[str, Any]] = {
            rank: json.loads(self.store.get(str(rank))) for rank in range(dist.get_world_size())
        }

    def leave(self) -> None:
        """This process ends by itself, and is not to be blamed."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "1")

    def _left(self, rank: int) -> bool:
        try:
            return self.store.check([f"left/{rank}"])
        except RuntimeError:  # the store has gone, with the launcher
            return False

    def dead(self, patience: float = 0.0) -> int | None:
        """The first rank that has died, of those on this machine; waits so many seconds for one. None: none has."""
        until = time.monotonic() + patience
        while True:
            for rank, process in self.processes.items():
                ended = rank != self.rank and has_ended(process["host"], process["pid"])
                if ended and not self._left(rank):
                    return rank
            if time.monotonic() >= until:
                return None
            time.sleep(0.02)
