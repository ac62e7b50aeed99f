"""What ``impl="auto"`` runs for attention: by measurement where there is one, else by rule; always with the reason.

``measured.json`` beside this file holds the winners of the op benchmarks, one for each (architecture, shape class);
``bench/`` writes it. An architecture that is not in it runs by rule.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import gluon
from .layout import AttentionLayout
from .library import unavailable
from .mask import BlockCausal, KVContext

SHAPES = {
    "visit": "queries of one block over a ring",
    "pair": "queries of two blocks over a ring",
    "block_causal": "a whole video, with gradient",
    "constant_context": "a video beside its context, with gradient",
    "cross": "at most 1024 keys, no mask",
    "bidirectional": "more keys, no mask",
}
_FEW_KEYS = 1024
_FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Winner:
    """The fastest correct implementation of one run of the benchmarks.

    Attributes:
        architecture: 10 x major + minor of the compute capability. shape: a key of ``SHAPES``.
        impl: of :func:`hiar_kernels.attention`. parts: into how many calls it cuts the keys.
        milliseconds: median device time. others: implementation -> its milliseconds in the same run.
        source: GPU, versions, date and revision of the run.
    """

    architecture: int
    shape: str
    impl: str
    parts: int
    milliseconds: float
    others: dict[str, float]
    source: str

    def __str__(self) -> str:
        others = ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(self.others.items(), key=lambda item: item[1]))
        cut = f" in {self.parts} parts" if self.parts > 1 else ""
        return (
            f"sm_{self.architecture} {self.shape}: {self.impl}{cut} {self.milliseconds:.3f} ms"
            f"{f' (others: {others})' if others else ''}, {self.source}"
        )


@dataclass(frozen=True)
class Choice:
    """An implementation, the calls that it cuts the keys into, and the reason."""

    impl: str
    parts: int
    why: str


@functools.cache
def winners() -> tuple[Winner, ...]:
    """The measured table; empty where nothing was measured yet."""
    return read(_FILE)


def read(file: Path) -> tuple[Winner, ...]:
    """The winners in a file, none if there is no such file.

    Raises:
        ValueError: the file says what this version does not know.
    """
    if not file.exists():
        return ()
    found = tuple(Winner(**row) for row in json.loads(file.read_text(encoding="utf-8")))
    for row in found:
        if row.shape not in SHAPES:
            raise ValueError(f"{file}: unknown shape {row.shape!r}; legal: {', '.join(SHAPES)}")
    return found


def shape_class(q: Tensor, k: Tensor, mask: BlockCausal | None, context: KVContext | None, trains: bool) -> str:
    """The key of ``SHAPES`` that a call belongs to."""
    if mask is None:
        return "cross" if k.shape[1] <= _FEW_KEYS else "bidirectional"
    if trains:
        return "block_causal" if context is None else "constant_context"
    return "visit" if q.shape[1] <= mask.frames_per_block * mask.frame_tokens else "pair"


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockCausal | None,
    context: KVContext | None,
    kv_counts: Tensor | None,
    layout: AttentionLayout | None,
    return_lse: bool,
    trains: bool,
) -> Choice:
    """What to run for tensors like these; see :func:`rules`."""
    if not q.is_cuda:
        return Choice("reference", 1, "logsumexp on a CPU") if return_lse else Choice("sdpa", 1, "a CPU")
    major, minor = torch.cuda.get_device_capability(q.device)
    return decide(
        10 * major + minor,
        shape_class(q, k, mask, context, trains),
        known=mask is None or layout is not None,
        counts=kv_counts is not None,
        return_lse=return_lse,
        trains=trains,
        runs=lambda impl: (
            gluon.unavailable(q.device) is None and gluon.unfit(q, k, v, mask, context, kv_counts) is None
            if impl == "gluon"
            else usable(impl, q)
        ),
    )


def decide(
    architecture: int,
    shape: str,
    *,
    known: bool,
    counts: bool,
    return_lse: bool,
    trains: bool,
    runs: Callable[[str], bool],
    table: Sequence[Winner] | None = None,
) -> Choice:
    """The choice on CUDA.

    Args:
        known: the visible keys are known on the host. counts: keys have counts. runs: whether an implementation can.
        table: default: what was measured.
    """
    if trains and return_lse:
        return Choice("reference", 1, "a logsumexp with gradient")
    if counts and not return_lse:
        return Choice("sdpa", 1, "the fused one that takes counts, as a bias")
    for row in () if counts else winners() if table is None else table:
        here = (row.architecture, row.shape) == (architecture, shape)
        if here and (row.impl in ("triton", "gluon") or known) and runs(row.impl):
            return Choice(row.impl, row.parts, str(row))
    if known and not return_lse:
        return Choice("sdpa", 1, f"nothing measured for {shape} on sm_{architecture}: torch's own choice")
    reason = "a logsumexp is asked" if return_lse else "frame ids are on the device only"
    if runs("triton"):
        return Choice("triton", 1, reason)
    return Choice("reference" if return_lse else "sdpa", 1, f"{reason}, and triton cannot run")


def usable(impl: str, q: Tensor) -> bool:
    """Whether an implementation of the table can run here on tensors like q."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    if impl == "triton":
        installed = importlib.util.find_spec("triton") is not None
        return installed and q.dtype != torch.float64 and q.shape[-1] in (16, 32, 64, 128)
    return impl == "sdpa" or (half and unavailable(impl, q.device) is None)


def rules() -> str:
    """How ``auto`` is resolved, in words."""
    return (
        "on a CPU sdpa (reference where a logsumexp is asked); on CUDA the measured winner of (architecture, shape "
        "class), and where nothing was measured: sdpa if the layout is known on the host, triton if frame ids are on "
        "the device only or a logsumexp is asked"
    )
