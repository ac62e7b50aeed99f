"""What the op benchmarks are made of: sizes, the work of one op on its inputs, its variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.lib.measure import Bench


@dataclass(frozen=True)
class Sizes:
    """The one table of sizes. The defaults are Wan 1.3B at 480x832: blocks of 3 latent frames, a window of 21."""

    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    layers: int = 30
    grid: tuple[int, int] = (30, 52)
    block: int = 3
    window: int = 21
    text_tokens: int = 512
    channels: int = 16
    vae_width: int = 96  # channels of the VAE's features at full size

    width = property(lambda z: z.heads * z.head_dim)
    frame_tokens = property(lambda z: z.grid[0] * z.grid[1])
    tokens = property(lambda z: z.block * z.frame_tokens)  # of a block: the queries of a task


SMALL = Sizes(heads=2, head_dim=64, ffn=192, layers=2, grid=(2, 3), window=6, text_tokens=8)


@dataclass
class Work:
    """One op on its inputs.

    Attributes:
        inputs: tensors that gradients are taken of, where they are.
        run: the op, given the name of a variant; the first outputs are compared with those of the baseline.
        forward, backward: FLOP of attention, bytes of the others that an ideal kernel has to do or to move.
    """

    inputs: list[Tensor]
    run: Callable[[str], Any]
    forward: float
    backward: float = 0.0


@dataclass(frozen=True)
class Op:
    """An op and how to run it.

    Attributes:
        variants: names to run it by, the baseline first. unit: of the work, "flop" or "bytes".
        peers: variants that are not ours: what they refuse to do is reported, and is no failure.
        shape: the dispatcher's name for it (hiar_kernels.attention.selection.py).
        goal_ms: milliseconds to reach at the full sizes.
    """

    label: str
    make: Callable[[Bench, Sizes], Work]
    unit: str
    trained: bool
    variants: tuple[str, ...]
    peers: frozenset[str] = field(default_factory=frozenset)
    shape: str | None = None
    goal_ms: float | None = None


def timed(work: Work, variant: str, direction: str) -> Callable[[], list[Tensor]]:
    """What is measured: the op, or the gradients of its inputs with the forward done once before."""

    def forward() -> list[Tensor]:
        result = work.run(variant)
        return [result] if isinstance(result, Tensor) else list(result)

    if direction == "forward":
        return forward
    for x in work.inputs:
        x.requires_grad_()
    outs = forward()
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outs)]
    return lambda: list(torch.autograd.grad(outs, work.inputs, grads, retain_graph=True))


def ids(bench: Bench, frames: list[int]) -> Tensor:
    return torch.tensor([frames], dtype=torch.int32, device=bench.device)
