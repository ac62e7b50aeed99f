"""Send latents from rank to rank of a pipeline, overlapped with compute; two buffers in each direction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

BUFFERS = 2
_TICK = 0.05  # seconds between two calls of `check` during a wait
_POLL = 50e-6  # seconds between two queries of a NCCL transfer
_LONG = timedelta(days=30)  # the watchdog decides when a wait has been too long


class Neighbours:
    """The links of one rank of a pipeline: blocks of latents from the previous rank and to the next.

    Receives are posted one block ahead, so that latents arrive while the rank computes. A send returns at once unless
    both buffers are still in use.

    Args:
        group: the ranks in order of their steps. shape, dtype: of a block of latents. device: of the model.
        num_blocks: of the video; None: endless. check: called during waits; an exception from it ends the wait.

    Raises:
        LinkBroken: from any method, if the process at the other end is gone.
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
        device = device if self.streams else torch.device("cpu")  # gloo needs host memory
        self.inbox = [torch.empty(shape, dtype=dtype, device=device) for _ in range(BUFFERS)]
        self.outbox = [torch.empty(shape, dtype=dtype, device=device) for _ in range(BUFFERS)]
        self.posted: dict[int, dist.Work] = {}  # block -> its receive
        self.sent: dict[int, dist.Work] = {}  # block -> its send
        self.bytes_sent = 0

    def receive(self, block: int) -> Tensor:
        """Latents of a block from the previous rank; valid until the next call."""
        for ahead in range(block, block + BUFFERS):
            if ahead not in self.posted and (self.num_blocks is None or ahead < self.num_blocks):
                slot = ahead % BUFFERS
                self.posted[ahead] = self._post(dist.irecv, self.inbox[slot], tag=slot, group_src=self.rank - 1)
        self._finish(self.posted.pop(block), self.rank - 1)
        return self.inbox[block % BUFFERS]

    def send(self, block: int, latents: Tensor) -> None:
        """Send latents of a block to the next rank; they may be overwritten when this returns."""
        slot = block % BUFFERS
        if block - BUFFERS in self.sent:
            self._finish(self.sent.pop(block - BUFFERS), self.rank + 1)
        self.outbox[slot].copy_(latents)
        self.sent[block] = self._post(dist.isend, self.outbox[slot], tag=slot, group_dst=self.rank + 1)
        self.bytes_sent += latents.numel() * latents.element_size()

    def flush(self) -> None:
        """Wait for all sends to complete."""
        while self.sent:
            self._finish(self.sent.pop(min(self.sent)), self.rank + 1)

    def _post(self, transfer: Callable[..., dist.Work | None], buffer: Tensor, tag: int, **peer: int) -> dist.Work:
        try:
            work = transfer(buffer, group=self.group, tag=tag, **peer)
        except RuntimeError as error:  # gloo raises if the link is already broken
            raise LinkBroken(*peer.values()) from error
        assert work is not None
        return work

    def _finish(self, work: dist.Work, peer: int) -> None:
        """Wait for a transfer on the host, so that the host never runs ahead of the data."""
        if self.streams:
            while not work.is_completed():
                self.check()
                time.sleep(_POLL)
            work.wait()  # make the current stream wait too
            return
        # gloo has no query, and a wait that times out breaks the links: wait in a thread and call `check` from this one
        done, errors = threading.Event(), []

        def wait() -> None:
            try:
                work.wait(_LONG)
            except Exception as error:  # gloo raises various types for a broken link
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
