"""LoRA beside the weights: low-rank branches whose scales lie on the device and can change while a video runs.

A linear layer with adapters computes W x + up (scale * (down x)), the adapters of all files side by side in one pair of
matrices. The branch is a forward hook, so it works with any module in the place of a linear layer. What is no low-rank
change of a linear layer (plain differences, biases, norms, the patch embedding) is written into the tensor instead,
from a base that is kept. Either way no address changes: captured graphs see a new scale.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .lora import AppliedLora, Delta, Lora, applied_lora
from .quantized_linear import QuantizedLinear, cannot_follow
from .transformer import HiARTransformer

_FUSED = re.compile(r"(.*\bself_attn)\.([qkv])\.(weight|bias)")


@dataclass(eq=False)
class Adapter:
    """An adapter and the scale that is wanted now."""

    lora: Lora
    name: str
    scale: float


class LowRankBranch(nn.Module):
    """up (scale * (down x)) of all adapters of a linear layer.

    Args:
        parts: (adapter, delta, first output row) of each adapter. linear: the layer, for shapes, dtype and device;
            also one in 8 bits.
    """

    down: Tensor
    up: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear | QuantizedLinear, parts: Sequence[tuple[Adapter, Delta, int]]) -> None:
        super().__init__()
        self.ranks: list[tuple[Adapter, slice]] = []  # of ``down`` and ``up``
        ranks, like = sum(delta.rank or 0 for _, delta, _ in parts), linear.bias  # of the dtype of the work
        down, up, first = like.new_zeros(ranks, linear.in_features), like.new_zeros(linear.out_features, ranks), 0
        for adapter, delta, row in parts:
            assert delta.down is not None and delta.up is not None
            of = slice(first, first := first + delta.down.shape[0])
            down[of] = delta.down.flatten(1).to(like)
            up[row : row + delta.up.shape[0], of] = (delta.up.flatten(1).double() * delta.factor).to(like)
            self.ranks.append((adapter, of))
        for name, value in (("down", down), ("up", up), ("scale", like.new_zeros(ranks))):
            self.register_buffer(name, value, persistent=False)  # state dicts keep the published keys

    def write(self) -> None:
        """Bring the scales on the device up to date."""
        for adapter, of in self.ranks:
            self.scale[of].fill_(adapter.scale)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x [..., in], out [..., out] -> out plus the branch."""
        hidden = (x.flatten(0, -2) @ self.down.t()) * self.scale
        return torch.addmm(out.flatten(0, -2), hidden, self.up.t()).view_as(out)


class _Rewritten:
    """A parameter that is written anew from its base at each change of scale."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.base: Tensor = getattr(module, name).detach()
        self.value = nn.Parameter(self.base.clone(), requires_grad=False)
        self.value.rewritten = True  # type: ignore[attr-defined]
        setattr(module, name, self.value)
        self.parts: list[tuple[Adapter, Delta, slice]] = []

    @torch.no_grad()
    def write(self) -> None:
        total = self.base.to(torch.promote_types(self.base.dtype, torch.float32), copy=True)
        for adapter, delta, rows in self.parts:
            total[rows].add_(delta.dense(total[rows]), alpha=adapter.scale)
        self.value.copy_(total)


class Adapters:
    """Adapters on copies of transformers that share the parameters; the transformers themselves stay as they are.

    Args:
        base: the transformers, one for each step or one; None and repetitions are allowed. adapters: in order.

    Attributes:
        transformers: the copies, in the order of ``base``.
    """

    def __init__(self, base: Sequence[HiARTransformer | None], adapters: Sequence[Adapter]) -> None:
        self.base, self.adapters = tuple(base), tuple(adapters)
        self._writers: list[LowRankBranch | _Rewritten] = []
        copies: dict[int, HiARTransformer] = {}
        for model in filter(None, base):
            if id(model) not in copies:
                copies[id(model)] = self._copy(model)
        self.transformers = tuple(None if model is None else copies[id(model)] for model in base)
        self._written: tuple[float, ...] | None = None
        self.write()

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales that are wanted now."""
        return tuple(adapter.scale for adapter in self.adapters)

    @property
    def applied(self) -> tuple[AppliedLora, ...]:
        """A record of each adapter, with the scale that is wanted now."""
        return tuple(applied_lora(adapter.lora, adapter.scale, adapter.name) for adapter in self.adapters)

    def write(self) -> None:
        """Bring the device up to date with :attr:`scales`; queued, nothing is waited for."""
        if self._written != (scales := self.scales):
            for writer in self._writers:
                writer.write()
            self._written = scales

    def _copy(self, model: HiARTransformer) -> HiARTransformer:
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        result = copy.deepcopy(model, shared)
        branches: dict[str, list[tuple[Adapter, Delta, int]]] = {}
        rewritten: dict[tuple[str, str], _Rewritten] = {}
        for adapter, key, delta in _parts(self.adapters):
            path, name, first = _place(key, model.config.dim)
            module = result.get_submodule(path)
            layer = isinstance(module, nn.Linear | QuantizedLinear) and name == "weight"
            if layer and delta.rank is not None:
                branches.setdefault(path, []).append((adapter, delta, first))
                continue
            if layer and isinstance(module, QuantizedLinear):
                raise ValueError(cannot_follow(path))
            if (path, name) not in rewritten:
                rewritten[path, name] = _Rewritten(module, name)
            rows = slice(first, first + model.config.dim) if _FUSED.fullmatch(key) else slice(None)
            rewritten[path, name].parts.append((adapter, delta, rows))
        for path, parts in branches.items():
            linear = result.get_submodule(path)
            assert isinstance(linear, nn.Linear | QuantizedLinear)
            linear.low_rank = branch = LowRankBranch(linear, parts)
            linear.register_forward_hook(_add_branch)
            self._writers.append(branch)
        self._writers += rewritten.values()
        return result


def _add_branch(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    branch: Any = module.low_rank
    result: Tensor = branch(inputs[0], out)
    return result


def _parts(adapters: Iterable[Adapter]) -> Iterable[tuple[Adapter, str, Delta]]:
    for adapter in adapters:
        for key, deltas in adapter.lora.deltas.items():
            for delta in deltas:
                yield adapter, key, delta


def _place(key: str, dim: int) -> tuple[str, str, int]:
    """Native key -> path of the module, name of its parameter, first row there: q, k and v are one layer."""
    if match := _FUSED.fullmatch(key):
        return f"{match[1]}.qkv", match[3], "qkv".index(match[2]) * dim
    path, _, name = key.rpartition(".")
    return path, name, 0
