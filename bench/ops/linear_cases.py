"""A linear layer of the feed-forward in full and in 8 bits: the libraries' products and ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hiar_kernels
from bench.lib.measure import Bench
from bench.ops.work import Op, Sizes, Work
from hiar_kernels.common.float8 import E4M3


def feed_forward_up(bench: Bench, z: Sizes) -> Work:
    """A block's tokens from the model's channels to the hidden ones, quantised already. Whole numbers up to 4, which
    every format holds: all variants have the same result."""
    x, weight = (torch.randint(-4, 5, shape, device=bench.device) for shape in ((z.tokens, z.width), (z.ffn, z.width)))
    bias = bench.normal(z.ffn)
    full = x.to(bias.dtype), weight.to(bias.dtype)
    eight = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (E4M3, torch.int8)}
    rows, outputs = torch.ones(z.tokens, device=bench.device), torch.ones(z.ffn, device=bench.device)

    def run(variant: str) -> Tensor:
        if variant == "full":
            return F.linear(*full, bias)
        x8, w8 = eight[E4M3 if variant == "float8" else torch.int8]
        if variant == "float8":
            scales: dict[str, Any] = {"scale_a": rows[:, None], "scale_b": outputs[None]}
            return torch._scaled_mm(x8, w8.t(), **scales, bias=bias, out_dtype=bias.dtype, use_fast_accum=False)
        if variant == "int8 library":
            product = torch._int_mm(x8, w8.t()).float()
            return torch.addcmul(bias.float(), product * rows[:, None], outputs).to(bias.dtype)
        y: Tensor = hiar_kernels.int8_linear(x8, rows, w8, outputs, bias, impl=variant.removeprefix("int8 "))
        return y

    return Work([], run, 2.0 * z.tokens * z.width * z.ffn)


def table(bench: Bench, own: tuple[str, ...]) -> list[Op]:
    ours = [f"int8 {impl}" for impl in own] or ["int8 reference"]
    libraries = ["float8", "int8 library"] if bench.cuda else []
    variants = ("full", *libraries, *ours)
    return [Op("linear: up", feed_forward_up, "flop", False, variants, peers=frozenset(libraries))]
