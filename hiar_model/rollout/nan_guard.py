"""Detection of latents that are not finite, and a retry with the reference ops.

"stop": every task leaves a flag on the device. When a block is finished, the flags are copied to the host
asynchronously and read before the block is handed over (on a CPU: after each task): one wait per block, none per task.
The inputs of unchecked tasks are kept until then; a failed task is run again on them, layer by layer, to find the
first result that is not finite.

"retry": every task is checked before the next one, its keys and values in the cache too; the host waits for the device
once per task. A failed task is run again with the reference implementations, which hold all attention scores of a task
at once, and overwrites its own keys and values. If that result is finite the rollout continues, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hiar_kernels import EMPTY, prefer, taken

from ..models.cached_attention import CachedAttention
from ..models.conditions import OutputSelection
from ..models.self_attention import SelfAttention
from ..schedule.plan import BatchItem, Task
from .batched_forward import BatchedForward
from .readback import Readback

_FLAGS = 256  # denoise tasks between two checks, at most

Inputs = list[list[Tensor]]  # of each batch item and task
Prepare = Callable[[list[BatchItem], Inputs, Tensor | None], BatchedForward]
"""Prepares the forward of batch items, also one that has run already: same inputs, caches at the same position. The
last argument replaces the prompt embeddings of the blocks.
"""


@dataclass(frozen=True)
class NaNLocation:
    """Where the first non-finite number appeared, and the implementation that computed it."""

    module: str
    implementation: str = ""

    def __str__(self) -> str:
        return f"{self.module} ({self.implementation})" if self.implementation else self.module


class NaNGuard:
    """Checks the forwards of one executor.

    Args:
        mode: "stop" or "retry". prepare: see ``Prepare``. device: of the latents.
        last_step: denoise tasks of this step finish a block here.

    Attributes:
        unchecked, inputs: denoise tasks whose flags have not been sent to the host, and their inputs.
        sent: the inputs and flags of the tasks whose flags are being copied.
        quarantined: free latent buffers that a rerun may still need.
    """

    def __init__(self, mode: str, prepare: Prepare, device: torch.device, last_step: int) -> None:
        self.mode, self.prepare, self.device, self.last_step = mode, prepare, device, last_step
        self.unchecked: list[Task] = []
        self.inputs: list[tuple[BatchItem, list[Tensor]]] = []
        self.flags = torch.ones(_FLAGS, dtype=torch.bool, device=device)
        self.sent: tuple[list[tuple[BatchItem, list[Tensor]]], Readback] | None = None
        self.quarantined: list[Tensor] = []
        self.retried = 0

    def check(
        self, items: list[BatchItem], inputs: Inputs, forward: BatchedForward, prompt_embeds: Tensor | None
    ) -> BatchedForward:
        """Check batch items that have run. Returns the forward that holds their results."""
        if self.mode == "retry":
            return forward if _is_finite(forward) else self._retry(items, inputs, prompt_embeds)
        denoised = [(item, x) for item, x in zip(items, inputs, strict=True) if item[-1].kind == "denoise"]
        if len(self.unchecked) + len(denoised) > len(self.flags):
            self.send()
        if denoised:
            first = len(self.unchecked)
            self.flags[first : first + len(denoised)].copy_(forward.finite)
            self.unchecked += [item[-1] for item, _ in denoised]
            self.inputs += denoised
            if self.device.type == "cpu" or any(item[-1].step == self.last_step for item, _ in denoised):
                self.send()
            if self.device.type == "cpu":
                self.read()
        return forward

    def send(self) -> None:
        """Start copying the flags of all unchecked tasks to the host; reads those sent before first."""
        self.read()
        self.sent = list(self.inputs), Readback(self.flags[: len(self.unchecked)])
        self.unchecked.clear()
        self.inputs.clear()

    def read(self) -> None:
        """Wait for the flags that were sent, if any.

        Raises:
            FloatingPointError: names the first task that failed, and where in it.
        """
        if self.sent is None:
            return
        (checked, flags), self.sent = self.sent, None
        failed = [one for one, finite in zip(checked, flags.numbers(), strict=True) if not finite]
        if failed:
            item, inputs = failed[0]
            location = locate(self.prepare([item], [inputs], None))
            unknown = "a second run of the task is finite (on_nan='retry' checks every task before the next)"
            raise FloatingPointError(f"{_not_finite(item[-1])}: {location or unknown}")

    def release(self) -> Iterator[Tensor]:
        """The quarantined buffers, once nothing is unchecked."""
        while self.quarantined and not self.unchecked and self.sent is None:
            yield self.quarantined.pop()

    def _retry(self, items: list[BatchItem], inputs: Inputs, prompt_embeds: Tensor | None) -> BatchedForward:
        located = (
            (item, locate(self.prepare([item], [x], prompt_embeds))) for item, x in zip(items, inputs, strict=True)
        )
        item, location = next(((item, where) for item, where in located if where), (items[0], None))
        task, forward = item[-1], self.prepare(items, inputs, prompt_embeds)
        with prefer("reference"), forward.attend.with_impl("auto"):
            forward.body()
            if not _is_finite(forward):
                again = locate(self.prepare(items, inputs, prompt_embeds))
                raise FloatingPointError(f"{_not_finite(task)}: {location}; with the reference ops again: {again}")
        self.retried += 1
        if self.retried == 1:
            message = f"{_not_finite(task)}: {location}; finite with the reference ops, continuing (warned once)"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return forward


def _not_finite(task: Task) -> str:
    what = "latents" if task.kind == "denoise" else "cached keys"
    return f"{what} are not finite from step {task.step} of block {task.block} on"


def _is_finite(forward: BatchedForward) -> bool:
    """Whether the latents of a forward, and the KV that it wrote, are finite; waits for the device."""
    attend, cache = forward.attend, forward.attend.cache
    written = torch.arange(len(attend.slots), device=attend.slots.device)[:, None], attend.slots.long()
    rings = (*cache.k, *cache.v, *cache.k_scales, *cache.v_scales)
    flags = [forward.finite.all()] if forward.key.denoising else []
    flags += [_finite(_at(ring, attend, written)) for ring in rings]
    return bool(torch.stack(flags).all())


def _at(ring: Tensor, attend: CachedAttention, slots: Any) -> Tensor:
    """Frames of one layer's ring; ``slots`` index [batch items * B, slot]."""
    framed = attend.cache.view(ring, attend.ring_slice, attend.used_slots).unflatten(1, (attend.used_slots, -1))
    return framed[slots] if framed.dtype.itemsize > 1 else framed.view(torch.uint8)[slots].view(framed.dtype)


def _finite(x: Tensor) -> Tensor:
    return torch.isfinite(x if x.dtype.itemsize > 1 else x.float()).all()


def locate(forward: BatchedForward) -> NaNLocation | None:
    """Run a prepared forward eagerly and find the first module whose result is not finite."""
    tracer = _ForwardTracer()
    tracer.see("its input latents", forward.x)
    if forward.noise is not None:
        tracer.see("the noise of its step", forward.noise)
    for layer, (k, v) in enumerate(forward.prompt_kv.layers):
        tracer.see(f"the prompt's keys for layer {layer}", k, v)
    attend = forward.attend
    try:
        with torch.no_grad(), taken() as choices, tracer.hooks(forward.model):
            tracer.choices = choices
            forward.attend = _TracedAttention(attend, tracer)  # type: ignore[assignment]
            forward.body()
        tracer.see("the step of the schedule", forward.out)
    finally:
        forward.attend = attend
    return tracer.location


class _ForwardTracer:
    """Keeps the first result that is not finite; the ops that ran since the result before it have computed it."""

    def __init__(self) -> None:
        self.location: NaNLocation | None = None
        self.choices: list[tuple[str, str]] = []
        self.passed = 0

    def see(self, module: str, *results: Tensor | None, computed: bool = True) -> None:
        ran = dict.fromkeys(f"{op}: {impl}" for op, impl in self.choices[self.passed :])
        self.passed = len(self.choices)
        if self.location is None and not all(bool(_finite(x)) for x in results if x is not None):
            self.location = NaNLocation(module, ", ".join(ran) or "torch" if computed and self.choices else "")

    @contextmanager
    def hooks(self, model: Any) -> Iterator[None]:
        with ExitStack() as stack:

            def add(module: nn.Module, name: str) -> None:
                def hook(_: nn.Module, __: Any, result: Any) -> None:
                    self.see(name, *_tensors(result))

                stack.callback(module.register_forward_hook(hook).remove)

            for i, block in enumerate(model.blocks):
                add(block.self_attn.qkv, f"layer {i}, query, key and value projection")
                add(block.self_attn.o, f"layer {i}, output projection")
                add(block.cross_attn, f"layer {i}, cross-attention")
                add(block, f"layer {i}, feed-forward")
            add(model.head, "the head")
            yield


def _tensors(result: Any) -> Sequence[Tensor]:
    """A layer returns x and a residual that is still to be added; other modules one tensor."""
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [result[0], result[1].y]


class _TracedAttention(SelfAttention):
    """Self-attention that reports the KV that it reads and the result."""

    def __init__(self, attend: CachedAttention, tracer: _ForwardTracer) -> None:
        self.attend, self.tracer = attend, tracer

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        for x in self._earlier(layer):
            self.tracer.see(f"layer {layer}, keys that an earlier task left in the cache", x, computed=False)
        out = self.attend(layer, qkv, q_weight, k_weight, selection)
        self.tracer.see(f"layer {layer}, self-attention", out)
        return out

    def _earlier(self, layer: int) -> Iterator[Tensor]:
        """Keys, then values, of the frames before this task's own; not what later tasks have written since."""
        attend, cache = self.attend, self.attend.cache
        earlier = (attend.kv_frames != EMPTY) & (attend.kv_frames < attend.frames[:, :1])
        for rings in (cache.k, cache.v):
            yield _at(rings[layer], attend, earlier)

    def advance_device(self) -> None:
        self.attend.advance_device()

    def share(self, x: Tensor, frames: int) -> Tensor:
        return self.attend.share(x, frames)

    def join(self, x: Tensor, frames: int) -> Tensor:
        return self.attend.join(x, frames)
