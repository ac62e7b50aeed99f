"""What is installed and what each op would run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, field

import torch

from .append_fp8 import api as append_fp8
from .attention import api as attention
from .attention import selection
from .attention_fp8 import api as attention_fp8
from .common import cuda_loader
from .common.pointwise import WHY as POINTWISE
from .flow_step import api as flow_step
from .int8_linear import api as int8_linear
from .merge_attention import api as merge_attention
from .norm import api as norm
from .norm.inputs import ARGUMENTS as NORMS
from .norm.inputs import QUANTIZED
from .qk_norm_rope import api as qk_norm_rope
from .quantize_rows import api as quantize_rows
from .ring_advance import api as ring_advance
from .rms_silu_pad import api as rms_silu_pad

_OPS = {
    "attention": (attention.IMPLS, "sdpa", selection.rules()),
    "attention_fp8": (
        attention_fp8.IMPLS,
        "reference",
        "triton, which was never timed, on CUDA where it is installed: the only one there that reads 8 bits without a "
        "copy; reference elsewhere",
    ),
    "merge_attention": (
        merge_attention.IMPLS,
        "reference",
        "for CUDA tensors that need no gradient in one pass: triton where it is installed, else cuda where the CUDA "
        "extension is built; reference elsewhere",
    ),
    "qk_norm_rope": (qk_norm_rope.IMPLS, "reference", POINTWISE),
    "qk_norm_rope_append": (
        qk_norm_rope.APPEND_IMPLS,
        "reference",
        f"{POINTWISE}; cuda in its place where only the CUDA extension is there, else on request, until it is measured",
    ),
    "append_fp8": (append_fp8.IMPLS, "reference", f"{POINTWISE}; not measured"),
    "qk_norm_rope_append_fp8": (
        append_fp8.ROPE_IMPLS,
        "reference",
        f"{POINTWISE}; cuda in its place where only the CUDA extension is there; neither is measured",
    ),
    "ring_advance": (
        ring_advance.IMPLS,
        "reference",
        "for CUDA tensors in one launch: cuda where the CUDA extension is built, else triton where that is installed; "
        "reference elsewhere",
    ),
    **dict.fromkeys((*NORMS, *QUANTIZED), (norm.IMPLS, "reference", POINTWISE)),
    "quantize_rows": (quantize_rows.IMPLS, "reference", POINTWISE),
    "int8_linear": (
        int8_linear.IMPLS,
        "reference",
        "triton, which was never timed, on CUDA where it is installed; reference elsewhere",
    ),
    "flow_step": (flow_step.IMPLS, "reference", POINTWISE),
    "rms_silu_pad": (rms_silu_pad.IMPLS, "reference", POINTWISE),
}


@dataclass(frozen=True)
class OpBackend:
    """One op: its implementations, the one ``impl="auto"`` takes, and why."""

    implementations: tuple[str, ...]
    auto: str
    why: str


@dataclass(frozen=True)
class Backends:
    """``devices``, ``libraries`` (None: not installed), the :class:`OpBackend` of every op, that of ``attention``
    for each shape class, what was ``measured`` of it, on any GPU, and whether the CUDA ``extension`` is built.
    """

    devices: tuple[str, ...]
    libraries: dict[str, str | None]
    ops: dict[str, OpBackend] = field(default_factory=dict)
    attention: dict[str, selection.Choice] = field(default_factory=dict)
    measured: tuple[selection.Measurement, ...] = ()
    extension: str = ""

    def __str__(self) -> str:
        lines = [f"devices: {', '.join(self.devices)}"]
        lines += [f"{name}: {version or 'not installed'}" for name, version in self.libraries.items()]
        lines += [f"CUDA extension: {self.extension}"]
        lines += [f"{op}: auto = {c.auto} of ({', '.join(c.implementations)}): {c.why}" for op, c in self.ops.items()]
        lines += [f"attention, {selection.SHAPES[shape]}: {choice}" for shape, choice in self.attention.items()]
        lines += [f"attention measured: {row}" for row in self.measured] or ["attention measured: nothing yet"]
        return "\n".join(lines)


def backends() -> Backends:
    """Report devices, optional libraries (looked up, never imported) and the choice of every op."""
    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    libraries = {"torch": torch.__version__}
    installed = {name: _version(name) for name in ("triton", "flash-attn", "xformers")}
    ops = {name: OpBackend(impls, auto, why) for name, (impls, auto, why) in _OPS.items()}
    by_shape, measured = selection.choices(), selection.measurements()
    return Backends(tuple(devices), {**libraries, **installed}, ops, by_shape, measured, cuda_loader.status())


def _version(distribution: str) -> str | None:
    if importlib.util.find_spec(distribution.replace("-", "_")) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"
