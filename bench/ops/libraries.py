"""Attention of libraries, called directly: what anchors.py and the op benchmarks compare with. Needs torch alone."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.lib.machine import error_line
from bench.lib.measure import Bench

# A library is two functions of q, k, v [B, T, H, D]: one gives out [B, T, H, D], the other (out, lse [B, H, T]) with a
# natural logarithm. Queries of an LSE may be padded; None stands where the library hands none out.
Library = tuple[Callable[..., Any], Callable[..., Any] | None]


def swapped(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def sdpa(backend: str, op: str = "", *options: Any) -> Library:
    def alone(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = swapped(qkv)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def with_lse(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = getattr(torch.ops.aten, f"_scaled_dot_product_{op}")(*swapped(qkv), *options)
        return out.transpose(1, 2), lse

    return alone, with_lse if op else None


def flash(module: str) -> Library:
    """A member of the flash-attn family: some releases give out alone, others always (out, lse, ...)."""
    function = importlib.import_module(module).flash_attn_func
    parameters = inspect.signature(function).parameters
    flags = {name: True for name in ("return_lse", "return_attn_probs") if name in parameters}

    def alone(*qkv: Tensor) -> Tensor:
        result = function(*qkv)
        return result[0] if isinstance(result, tuple) else result

    return alone, lambda *qkv: function(*qkv, **flags)[:2]


def xformers(_: Bench) -> Library:
    ops = importlib.import_module("xformers.ops")
    return ops.memory_efficient_attention, ops.memory_efficient_attention_forward_requires_grad


def flex(bench: Bench) -> Library:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    function = bench.compiled(flex_attention)

    def with_lse(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = function(*swapped(qkv), return_aux=AuxRequest(lse=True))
        return out.transpose(1, 2), aux.lse

    return lambda *qkv: function(*swapped(qkv)).transpose(1, 2), with_lse


LIBRARIES: dict[str, tuple[str, Callable[[Bench], Library]]] = {  # name: devices, maker
    "sdpa-cudnn": ("cuda", lambda _: sdpa("CUDNN_ATTENTION", "cudnn_attention", None, True)),
    "sdpa-flash": ("cuda", lambda _: sdpa("FLASH_ATTENTION", "flash_attention")),
    "sdpa-efficient": ("cuda", lambda _: sdpa("EFFICIENT_ATTENTION", "efficient_attention", None, True)),
    "sdpa-flash-cpu": ("cpu", lambda _: sdpa("FLASH_ATTENTION", "flash_attention_for_cpu")),
    "flash-attn-2": ("cuda cpu", lambda _: flash("flash_attn")),
    "flash-attn-3": ("cuda cpu", lambda _: flash("flash_attn_interface")),
    "flash-attn-4": ("cuda cpu", lambda _: flash("flash_attn.cute")),
    "xformers": ("cuda cpu", xformers),
    "flex": ("cuda cpu", flex),  # last: it compiles anew for every shape and takes what time is left
}


@functools.cache  # once a process: some compile
def library(bench: Bench, name: str) -> Library:
    return LIBRARIES[name][1](bench)


def available(bench: Bench, absent: dict[str, str], leave_out: Collection[str] = ()) -> dict[str, Library]:
    """The libraries that the device can use; why one cannot be loaded goes into ``absent``."""
    present: dict[str, Library] = {}
    for name, (devices, _) in LIBRARIES.items():
        if bench.device in devices.split() and name not in leave_out:
            try:
                present[name] = library(bench, name)
            except Exception as error:
                absent[name] = error_line(error)
    return present
