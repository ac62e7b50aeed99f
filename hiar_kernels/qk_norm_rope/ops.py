"""``hiar::qk_norm_rope`` (functional, differentiable) and ``hiar::qk_norm_rope_append`` (mutates the ring)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common.torch_library import define
from . import reference
from .inputs import RopeInputs, append_from_schema, empty_like_q


def _eager(*arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.qk_norm_rope(RopeInputs(*arguments))


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = RopeInputs(*arguments)
    return empty_like_q(inputs), empty_like_q(inputs)


def _eager_append(*arguments: Any) -> Tensor:
    return reference.qk_norm_rope_append(*append_from_schema(*arguments))


def _fake_append(*arguments: Any) -> Tensor:
    return empty_like_q(append_from_schema(*arguments)[0])


_INPUTS = "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames"
_OPTIONS = "int num_heads, int height, int width, float eps, float theta, int[]? cells=None"
_RINGS = "Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache"
define(__package__, "qk_norm_rope", f"{_INPUTS}, {_OPTIONS}", 2, _eager, _fake, (0, 1, 2))
for _name in ("qk_norm_rope_append", "qk_norm_rope_append_cuda"):  # an op has one kernel for a device: Triton's, CUDA's
    schema = f"{_INPUTS}, {_RINGS}, {_OPTIONS}, Tensor? rows=None"
    define(__package__, _name, schema, 1, _eager_append, _fake_append, (), mutates=True)
