"""``hiar::append_fp8`` and ``hiar::qk_norm_rope_append_fp8``: schema, fake; both mutate the rings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.float8 import E4M3
from ..common.torch_library import define
from ..qk_norm_rope.inputs import RopeInputs
from . import reference
from .inputs import Fp8Rings, rope_from_schema


def empty_q(inputs: RopeInputs, quantize_q: bool) -> tuple[Tensor, Tensor]:
    """Memory for q and its scales; no scales for a q in the dtype of qkv."""
    shape, device = inputs.split_heads, inputs.qkv.device
    q = torch.empty(shape, dtype=E4M3 if quantize_q else inputs.qkv.dtype, device=device)
    return q, torch.empty(shape[:3] if quantize_q else (0,), dtype=torch.float32, device=device)


def _eager(k: Tensor, v: Tensor, *rings: Any) -> None:
    reference.append_fp8(k, v, Fp8Rings.of_schema(*rings))


def _fake(*arguments: Any) -> None:
    return None


def _eager_rope(*arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.qk_norm_rope_append_fp8(*rope_from_schema(*arguments))


def _fake_rope(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, _, quantize_q = rope_from_schema(*arguments)
    return empty_q(inputs, quantize_q)


_RINGS = "Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scales, Tensor(d!) v_scales"
_INPUTS = "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames"
_OPTIONS = "int num_heads, int height, int width, float eps, float theta, bool quantize_q"
define(
    __package__, "append_fp8", f"Tensor k, Tensor v, {_RINGS}, Tensor? rows=None", 0, _eager, _fake, (), mutates=True
)
for _name in ("qk_norm_rope_append_fp8", "qk_norm_rope_append_fp8_cuda"):  # one kernel for a device: Triton's, CUDA's
    schema = f"{_INPUTS}, {_RINGS}, {_OPTIONS}, Tensor? rows=None"
    define(__package__, _name, schema, 2, _eager_rope, _fake_rope, (), mutates=True)
