"""What ``impl="auto"`` runs for attention, and why: by measurement if there is one, else by rule.

``measured.json`` beside this file holds what the benchmarks measured: for an (architecture, shape class) one row or
several, the preferred one first, and the first that can run wins. ``bench/`` writes it. An architecture that is not in
it runs by rule.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common import pointwise
from . import gluon
from .inputs import TRITON_HEAD_DIMS, AttentionInputs
from .layout import AttentionLayout
from .library import LIBRARIES, unavailable

OWN = ("triton", "gluon")
"""Kernels of this package: they read frame ids on the device, so one launch serves every layout."""
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
class Measurement:
    """What one implementation took at a shape, in one run of the benchmarks.

    Attributes:
        architecture: 10 x major + minor of the compute capability. shape: a key of ``SHAPES``.
        impl: of :func:`hiar_kernels.attention`. num_splits: into how many rows of one launch it cuts the keys.
        milliseconds: median device time; where it is trained, of forward and backward together.
        others: label -> milliseconds in the same run.
        source: GPU, versions, date and revision of the run.
        note: anything to know about the figure.
    """

    architecture: int
    shape: str
    impl: str
    num_splits: int
    milliseconds: float
    others: dict[str, float]
    source: str
    note: str = ""

    def __str__(self) -> str:
        others = ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(self.others.items(), key=lambda item: item[1]))
        return (
            f"sm_{self.architecture} {self.shape}: {label(self.impl, self.num_splits)} {self.milliseconds:.3f} ms"
            f"{f' (others: {others})' if others else ''}, {self.source}{f'; {self.note}' if self.note else ''}"
        )


@dataclass(frozen=True)
class Choice:
    """An implementation, the rows of one launch that it cuts the keys into, and the reason."""

    impl: str
    num_splits: int
    why: str

    def __str__(self) -> str:
        return f"{label(self.impl, self.num_splits)}: {self.why}"


def label(impl: str, num_splits: int) -> str:
    """Display name of an implementation, such as "cudnn with num_splits=2"."""
    return f"{impl} with num_splits={num_splits}" if num_splits > 1 else impl


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """All measurements, in order of preference."""
    return read(_FILE)


def read(file: Path) -> tuple[Measurement, ...]:
    """The measurements in a file, none if there is no such file.

    Raises:
        ValueError: the file has unknown or missing fields or values.
    """
    if not file.exists():
        return ()
    columns = {field.name: field.default is MISSING for field in fields(Measurement)}
    rows = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        missing = [name for name, required in columns.items() if required and name not in row]
        for problem, names in (("unknown", sorted(row.keys() - columns.keys())), ("no", missing)):
            if names:
                raise ValueError(f"{file}: {problem} {', '.join(names)} in a row; legal: {', '.join(columns)}")
        rows.append(Measurement(**row))
        for name, value, legal in (("shape", rows[-1].shape, SHAPES), ("impl", rows[-1].impl, (*LIBRARIES, *OWN))):
            if value not in legal:
                raise ValueError(f"{file}: unknown {name} {value!r}; legal: {', '.join(legal)}")
    return tuple(rows)


def shape_class(call: AttentionInputs) -> str:
    """The key of ``SHAPES`` that a call belongs to."""
    mask = call.mask
    if mask is None:
        return "cross" if call.k.shape[1] <= _FEW_KEYS else "bidirectional"
    if call.needs_grad:
        return "block_causal" if call.context is None else "constant_context"
    return "visit" if call.q.shape[1] <= mask.frames_per_block * mask.frame_tokens else "pair"


def choose(call: AttentionInputs, layout: AttentionLayout | None = None, return_lse: bool = False) -> Choice:
    """Choose the implementation for a call; see :func:`rules`."""
    q, trains = call.q, call.needs_grad
    if not q.is_cuda:
        return Choice("reference", 1, "logsumexp on a CPU") if return_lse else Choice("sdpa", 1, "a CPU")
    major, minor = torch.cuda.get_device_capability(q.device)
    choice = decide(
        10 * major + minor,
        shape_class(call),
        layout_known=call.mask is None or layout is not None,
        counts=call.kv_counts is not None,
        return_lse=return_lse,
        trains=trains,
        runs=lambda impl: (
            usable(impl, q, return_lse) and (impl != "gluon" or (not trains and gluon.unfit(call) is None))
        ),
    )
    in_one_call = layout is None or len(layout.rows) == 1
    if choice.num_splits > 1 and q.shape[0] > 1 and in_one_call:  # the batch fills the chip as the splits would
        return replace(choice, num_splits=1, why=f"{choice.why}; uncut, for {q.shape[0]} videos are one call")
    return choice


def decide(
    architecture: int,
    shape: str,
    *,
    layout_known: bool,
    counts: bool,
    return_lse: bool,
    trains: bool,
    runs: Callable[[str], bool],
    table: Sequence[Measurement] | None = None,
) -> Choice:
    """The choice on CUDA.

    Args:
        layout_known: the visible keys are known on the host. counts: keys have counts. runs: whether an implementation
            can. table: default: what was measured.
    """
    if counts and not trains and runs("triton"):
        # H200, 4680 queries of 12 heads, 16 keys: 0.027 ms; sdpa 0.031 and the logarithm and cast of its bias
        return Choice("triton", 1, "keys with counts: one launch that reads no hidden key")
    if counts and not return_lse:
        return Choice("sdpa", 1, "keys with counts: the library that takes them, as a bias")
    rows = measurements() if table is None else table
    for row in () if counts or (trains and return_lse) else rows:
        matches = (row.architecture, row.shape) == (architecture, shape)
        if matches and (row.impl in OWN or layout_known) and runs(row.impl):
            return Choice(row.impl, row.num_splits, str(row))
    if layout_known and not return_lse:
        return Choice("sdpa", 1, f"nothing measured for {shape} on sm_{architecture}: torch's own choice")
    reason = "frame ids are on the device only"
    if return_lse:
        reason = "a logsumexp with gradient is asked for" if trains else "a logsumexp is asked for"
    if runs("triton"):
        return Choice("triton", 1, reason)
    if not return_lse:
        return Choice("sdpa", 1, f"{reason}, and triton cannot run")
    if not (trains or counts) and runs("flash"):
        return Choice("flash", 1, f"{reason}, and triton cannot run")
    return Choice("reference", 1, f"{reason}, and no other implementation can run")


def choices() -> dict[str, Choice]:
    """What runs here for each shape class, of bfloat16 and head_dim 128, where the layout is known on the host."""
    if not torch.cuda.is_available():
        return dict.fromkeys(SHAPES, Choice("sdpa", 1, "a CPU"))
    major, minor = torch.cuda.get_device_capability()
    q = torch.empty(0, 0, 1, 128, dtype=torch.bfloat16, device="cuda")
    return {
        shape: decide(
            10 * major + minor,
            shape,
            layout_known=True,
            counts=False,
            return_lse=False,
            trains=shape in ("block_causal", "constant_context"),
            runs=lambda impl: usable(impl, q),
        )
        for shape in SHAPES
    }


def triton_takes(q: Tensor) -> bool:
    """Whether Triton is installed and its kernels support tensors like q."""
    return pointwise.TRITON_INSTALLED and q.dtype in pointwise.DTYPES and q.shape[-1] in TRITON_HEAD_DIMS


def usable(impl: str, q: Tensor, return_lse: bool = False) -> bool:
    """Whether an implementation of the table can run here on tensors like q; ``return_lse``: and give a logsumexp."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    if impl == "triton":
        return triton_takes(q)
    if impl == "gluon":
        return half and q.shape[-1] == gluon.HEAD_DIM and gluon.unavailable(q.device) is None
    return (half or (impl == "sdpa" and not return_lse)) and unavailable(impl, q.device) is None


def warn_of_scores(call: AttentionInputs, choice: Choice) -> None:
    """Warn that the eager reference, which materialises all scores, runs on a GPU."""
    b, queries, heads, _ = call.q.shape
    keys = call.k.shape[1] + (0 if call.context is None else call.context.k.shape[1])
    gib = b * heads * queries * keys * (8 if call.q.dtype == torch.float64 else 4) / 2**30
    advice = "" if pointwise.TRITON_INSTALLED else "; install triton"
    warnings.warn(
        f"attention: impl='auto' runs the eager reference on {call.q.device}, which holds {gib:.3g} GiB of scores: "
        f"{choice.why}{advice}",
        stacklevel=5,
    )


def rules() -> str:
    """How ``auto`` is resolved, as text."""
    return (
        "on a CPU sdpa (reference where a logsumexp is asked for); on CUDA triton for keys with counts and no "
        "gradient, else the first measured row of (architecture, shape class) that can run; where nothing was "
        "measured sdpa if the layout is known on the host, triton if frame ids are on the device only or a logsumexp "
        "is asked for; under torch.compile triton; where nothing else can run reference, with a warning"
    )
