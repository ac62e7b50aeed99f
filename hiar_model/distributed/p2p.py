"""Latents from one rank to the next: sends and receives beside the work, two buffers in each direction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

BUFFERS = 2
_TICK = 0.05  # seconds between two looks at whether the wait still makes sense
_POLL = 50e-6
_LONG = timedelta(days=30)  # how long to wait is not the transport's business


class Neighbours:
    """The links of one rank of a pipeline: blocks of latents from the rank before it and to the rank behind it.

    A receive is posted a block ahead of the one in use, so that latents arrive while the rank works; a send returns at
    once, and waits only for the buffer, which is free when the send before the last one is through.

    Args:
        group: the ranks in order of their steps. shape, dtype: of a block of latents. device: of the model.
        num_blocks: in all; None: endless. check: called during waits; what it raises ends them.

    Raises:
        LinkBroken: from any method, when the process at the other end is gone.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int | None,
        check: Callable[[], None],
    ) -> None:
        self.group, self.rank, self.num_blocks, self.check = group, dist.get_rank(group), num_blocks, check
        self.streams = device.type == "cuda" and "nccl" in str(dist.get_backend_config(group))
        place = device if self.streams else torch.device("cpu")  # gloo takes latents from the host
        self.inbox = [torch.empty(shape, dtype=dtype, device=place) for _ in range(BUFFERS)]
        self.outbox = [torch.empty(shape, dtype=dtype, device=place) for _ in range(BUFFERS)]
        self.posted: dict[int, dist.Work] = {}  # block -> its receive
        self.sent: dict[int, dist.Work] = {}  # block -> its send
        self.bytes_sent = 0

    def receive(self, block: int) -> Tensor:
        """Latents of a block from the rank before; valid until the next call."""
        for ahead in range(block, block + BUFFERS):
            if ahead not in self.posted and (self.num_blocks is None or ahead < self.num_blocks):
                slot = ahead % BUFFERS
                self.posted[ahead] = self._post(dist.irecv, self.inbox[slot], tag=slot, group_src=self.rank - 1)
        self._finish(self.posted.pop(block), self.rank - 1)
        return self.inbox[block % BUFFERS]

    def send(self, block: int, latents: Tensor) -> None:
        """Send latents of a block to the rank behind; they may be overwritten as soon as this returns."""
        slot = block % BUFFERS
        if block - BUFFERS in self.sent:
            self._finish(self.sent.pop(block - BUFFERS), self.rank + 1)
        self.outbox[slot].copy_(latents)
        self.sent[block] = self._post(dist.isend, self.outbox[slot], tag=slot, group_dst=self.rank + 1)
        self.bytes_sent += latents.numel() * latents.element_size()

    def flush(self) -> None:
        """Wait until all that was sent is through."""
        while self.sent:
            self._finish(self.sent.pop(min(self.sent)), self.rank + 1)

    def _post(self, transfer: Callable[..., dist.Work | None], buffer: Tensor, tag: int, **peer: int) -> dist.Work:
        try:
            work = transfer(buffer, group=self.group, tag=tag, **peer)
        except RuntimeError as error:  # gloo refuses a link that broke meanwhile
            raise LinkBroken(*peer.values()) from error
        assert work is not None
        return work

    def _finish(self, work: dist.Work, peer: int) -> None:
        """Wait for a transfer: on the host, so that it never runs ahead of what has arrived."""
        if self.streams:
            while not work.is_completed():
                self.check()
                time.sleep(_POLL)
            work.wait()  # the stream too
            return
        # gloo can only be waited for, and tears the links down where that is given up: a thread waits, and this one
        # stays free to notice that it is in vain
        done, errors = threading.Event(), []

        def wait() -> None:
            try:
                work.wait(_LONG)
            except Exception as error:  # whatever gloo says of a link that broke
                errors.append(error)
            done.set()

        threading.Thread(target=wait, daemon=True).start()
        while not done.wait(_TICK):
            self.check()
        if errors:
            raise LinkBroken(peer) from errors[0]


class LinkBroken(ConnectionError):
    """The process at the other end of a link is gone."""

    def __init__(self, peer: int) -> None:
        super().__init__(f"the link to rank {peer} of the pipeline broke")
        self.peer = peer
