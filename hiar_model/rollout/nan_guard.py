"""The watch over latents that are not finite: where they came from, and the task once more with the reference ops.

"stop": every task leaves a flag on the device. When a block is finished the flags are sent to the host, which goes on
and reads them before it hands the block over (on a CPU: after each task): one wait a block, none a task. What the
tasks since the last look were given is kept until then; a task that went wrong is run again on that, layer by layer,
to find the first one with a non-finite result.

"retry": every task is looked at before the next one, its keys in the rings too, which has the host wait for the device
once a task. One that went wrong is run again by the reference implementations (whose attention holds all scores of a
task at once): it overwrites its own keys, so that nothing of the first try is left. If that is finite the rollout goes
on, and says so once.
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

from ..models.conditions import OutputSelection
from ..models.kv_cache import CachedAttention
from ..models.transformer import SelfAttention
from ..schedule.plan import Row, Task
from .batched_forward import BatchedForward
from .readback import Readback

_FLAGS = 256  # denoise tasks between two looks, at most

Inputs = list[list[Tensor]]  # of each row and task
Prepare = Callable[[list[Row], Inputs, Tensor | None], BatchedForward]
"""Makes the launch of rows ready to run, once more if it has run: same inputs, rings where they stood. The last
argument is a text in place of that of the blocks.
"""


@dataclass(frozen=True)
class Place:
    """Where the first non-finite number is: a part of a layer or of a task, and what computed it."""

    part: str
    implementation: str = ""

    def __str__(self) -> str:
        return f"{self.part} ({self.implementation})" if self.implementation else self.part


class NaNGuard:
    """Watches the launches of one executor.

    Args:
        mode: "stop" | "retry". prepare: see ``Prepare``. device: of the latents.
        last_step: tasks of this step finish a block here.

    Attributes:
        unchecked: denoise tasks whose flags nobody has asked for. sent: those whose flags are on their way, what
            each of them was given, and the flags. quarantined: latents that a second look may still need and nobody
            else does.
    """

    def __init__(self, mode: str, prepare: Prepare, device: torch.device, last_step: int) -> None:
        self.mode, self.prepare, self.device, self.last_step = mode, prepare, device, last_step
        self.unchecked: list[Task] = []
        self.given: list[tuple[Row, list[Tensor]]] = []  # what each of them was given
        self.flags = torch.ones(_FLAGS, dtype=torch.bool, device=device)
        self.sent: tuple[list[tuple[Row, list[Tensor]]], Readback] | None = None
        self.quarantined: list[Tensor] = []
        self.retried = 0

    def watch(self, rows: list[Row], inputs: Inputs, launch: BatchedForward, text: Tensor | None) -> BatchedForward:
        """Rows have been run. Returns the launch that holds their results."""
        if self.mode == "retry":
            return launch if _is_sound(launch) else self._retry(rows, inputs, text)
        denoised = [(row, given) for row, given in zip(rows, inputs, strict=True) if row[-1].kind == "denoise"]
        if len(self.unchecked) + len(denoised) > len(self.flags):
            self.send()
        if denoised:
            first = len(self.unchecked)
            self.flags[first : first + len(denoised)].copy_(launch.finite)
            self.unchecked += [row[-1] for row, _ in denoised]
            self.given += denoised
            if self.device.type == "cpu" or any(row[-1].step == self.last_step for row, _ in denoised):
                self.send()
            if self.device.type == "cpu":
                self.look()
        return launch

    def send(self) -> None:
        """Send the flags of all unchecked tasks to the host, once those that were sent before are looked at."""
        self.look()
        self.sent = list(self.given), Readback(self.flags[: len(self.unchecked)])
        self.unchecked.clear()
        self.given.clear()

    def look(self) -> None:
        """Look at the flags that were sent, if there are any; waits for them.

        Raises:
            FloatingPointError: names the first task that went wrong, and where in it.
        """
        if self.sent is None:
            return
        (watched, flags), self.sent = self.sent, None
        bad = [given for given, fine in zip(watched, flags.numbers(), strict=True) if not fine]
        if bad:
            row, given = bad[0]
            place = find(self.prepare([row], [given], None))
            unknown = "a second run of the task is finite (on_nan='retry' looks at every task before the next)"
            raise FloatingPointError(f"{_not_finite(row[-1])}: {place or unknown}")

    def release(self) -> Iterator[Tensor]:
        """What was quarantined, if nothing is unchecked any more."""
        while self.quarantined and not self.unchecked and self.sent is None:
            yield self.quarantined.pop()

    def _retry(self, rows: list[Row], inputs: Inputs, text: Tensor | None) -> BatchedForward:
        found = ((row, find(self.prepare([row], [given], text))) for row, given in zip(rows, inputs, strict=True))
        row, place = next(((row, place) for row, place in found if place), (rows[0], None))
        task, launch = row[-1], self.prepare(rows, inputs, text)
        with prefer("reference"):
            launch.body()
            if not _is_sound(launch):
                again = find(self.prepare(rows, inputs, text))
                raise FloatingPointError(f"{_not_finite(task)}: {place}; with the reference ops again: {again}")
        self.retried += 1
        if self.retried == 1:
            told = f"{_not_finite(task)}: {place}; finite with the reference ops, going on (told once)"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        return launch


def _not_finite(task: Task) -> str:
    what = "latents" if task.kind == "denoise" else "cached keys"
    return f"{what} are not finite from step {task.step} of block {task.block} on"


def _is_sound(launch: BatchedForward) -> bool:
    """Whether the latents that a launch made, and the keys it left in the rings, are finite; waits for the device."""
    attend, cache = launch.attend, launch.attend.cache
    written = torch.arange(len(attend.slots), device=attend.slots.device)[:, None], attend.slots.long()
    rings = (*cache.k, *cache.v, *cache.k_scales, *cache.v_scales)
    flags = [launch.finite.all()] if launch.kind.wanted else []
    flags += [_finite(_at(ring, attend, written)) for ring in rings]
    return bool(torch.stack(flags).all())


def _at(ring: Tensor, attend: CachedAttention, slots: Any) -> Tensor:
    """What one layer's ring holds in some slots of this launch's rows; ``slots`` index [rows * batch, slot]."""
    framed = attend.cache.view(ring, attend.ring_slice, attend.used_slots).unflatten(1, (attend.used_slots, -1))
    return framed[slots] if framed.dtype.itemsize > 1 else framed.view(torch.uint8)[slots].view(framed.dtype)


def _finite(x: Tensor) -> Tensor:
    return torch.isfinite(x if x.dtype.itemsize > 1 else x.float()).all()


# Layer by layer.


def find(launch: BatchedForward) -> Place | None:
    """Run a launch that is ready, eagerly, and name the first part of it whose result is not finite."""
    watch = _Watch()
    watch.see("its input latents", launch.x)
    if launch.noise is not None:
        watch.see("the noise of its step", launch.noise)
    for layer, (k, v) in enumerate(launch.text.layers):
        watch.see(f"the text's keys for layer {layer}", k, v)
    whole = launch.attend
    try:
        with torch.no_grad(), taken() as choices, watch.layers(launch.model):
            watch.choices = choices
            launch.attend = _Watched(whole, watch)  # type: ignore[assignment]
            launch.body()
        watch.see("the step of the schedule", launch.out)
    finally:
        launch.attend = whole
    return watch.found


class _Watch:
    """Keeps the first part that is not finite; what ran since the part before it is what computed it."""

    def __init__(self) -> None:
        self.found: Place | None = None
        self.choices: list[tuple[str, str]] = []
        self.passed = 0

    def see(self, part: str, *results: Tensor | None, made: bool = True) -> None:
        ran = dict.fromkeys(f"{op}: {impl}" for op, impl in self.choices[self.passed :])
        self.passed = len(self.choices)
        if self.found is None and not all(bool(_finite(x)) for x in results if x is not None):
            self.found = Place(part, ", ".join(ran) or "torch" if made and self.choices else "")

    @contextmanager
    def layers(self, model: Any) -> Iterator[None]:
        with ExitStack() as stack:

            def hook(module: nn.Module, part: str) -> None:
                def seen(_: nn.Module, __: Any, result: Any) -> None:
                    self.see(part, *_tensors(result))

                stack.enter_context(_removed(module.register_forward_hook(seen)))

            for i, block in enumerate(model.blocks):
                hook(block.self_attn.qkv, f"layer {i}, query, key and value projection")
                hook(block.self_attn.o, f"layer {i}, output projection")
                hook(block.cross_attn, f"layer {i}, cross-attention")
                hook(block, f"layer {i}, feed-forward")
            hook(model.head, "the head")
            yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _tensors(result: Any) -> Sequence[Tensor]:
    """x, and the residual that is still to be added to it, of a layer; or the one result."""
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [result[0], result[1].y]


class _Watched(SelfAttention):
    """Self-attention under watch: what it finds in the rings, and what it makes."""

    def __init__(self, whole: CachedAttention, watch: _Watch) -> None:
        self.whole, self.watch = whole, watch

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        for k in self._held(layer):
            self.watch.see(f"layer {layer}, keys that an earlier task left in the cache", k, made=False)
        out = self.whole(layer, qkv, q_weight, k_weight, selection)
        self.watch.see(f"layer {layer}, self-attention", out)
        return out

    def _held(self, layer: int) -> Iterator[Tensor]:
        """Keys and values of the frames before the visit's own; what later tasks have left since is none of it."""
        attend, cache = self.whole, self.whole.cache
        earlier = (attend.kv_frames != EMPTY) & (attend.kv_frames < attend.frames[:, :1])
        for rings in (cache.k, cache.v):
            yield _at(rings[layer], attend, earlier)

    def advance_device(self) -> None:
        self.whole.advance_device()

    def share(self, x: Tensor, frames: int) -> Tensor:
        return self.whole.share(x, frames)

    def join(self, x: Tensor, frames: int) -> Tensor:
        return self.whole.join(x, frames)
