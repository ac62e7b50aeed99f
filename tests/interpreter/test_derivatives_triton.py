"""A kernel has the gradient of torch.autograd's backward, once. Whatever else torch can ask for is refused in one line:
without that it takes what a kernel gives for a constant, and the derivative is wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import hiar_kernels as hk

pytestmark = pytest.mark.interpreter

Case = tuple[Callable[..., Any], list[tuple[int, ...]]]
X, LATENT, HEADS = (1, 4, 16), (1, 2, 1, 2, 2), (1, 4, 1, 16)


def levels(x: Tensor) -> list[Tensor]:
    return [torch.full((1, 1), level, device=x.device) for level in (0.7, 0.4)]


def rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **options: Any) -> Any:
    frames = torch.tensor([[3, 4]], dtype=torch.int32, device=qkv.device)
    return hk.qk_norm_rope(qkv, q_weight, k_weight, frames, num_heads=1, grid=(1, 2), **options)[:2]


OPS: dict[str, Case] = {
    "attention": (lambda *a, **o: hk.attention_with_lse(*a, **o), [HEADS] * 3),
    "qk_norm_rope": (rope, [(1, 4, 48), (16,), (16,)]),
    "layer_norm": (hk.layer_norm, [X, (16,), (16,)]),
    "rms_norm": (hk.rms_norm, [X, (16,)]),
    "ada_layer_norm": (hk.ada_layer_norm, [X, (1, 2, 16), (1, 2, 16)]),
    "gated_residual": (hk.gated_residual, [X, X, (1, 2, 16)]),
    "gated_residual_layer_norm": (hk.gated_residual_layer_norm, [X, X, (1, 2, 16), (16,), (16,)]),
    "flow_step": (lambda x, v, n, **o: hk.flow_step(x, v, *levels(x), n, **o), [LATENT] * 3),
    "rms_silu_pad": (hk.rms_silu_pad, [(1, 16, 1, 2, 2), (16,)]),
}


def total(op: str, impl: str, *tensors: Tensor) -> Tensor:
    outs = OPS[op][0](*tensors, impl=impl)
    return sum(((out.float() ** 2).sum() for out in ((outs,) if isinstance(outs, Tensor) else outs)), torch.zeros(()))


def tensors_of(op: str, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in OPS[op][1]]


@pytest.mark.parametrize("op", OPS)
def test_a_second_gradient_is_refused(device, op):
    leaves = [x.requires_grad_() for x in tensors_of(op, device)]
    first = torch.autograd.grad(total(op, "triton", *leaves), leaves, create_graph=True)
    expected = torch.autograd.grad(total(op, "reference", *leaves), leaves)
    for ours, theirs in zip(first, expected, strict=True):  # the first one is there, with create_graph too
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"{op}: kernels have no second gradient; use impl='reference'"):
        sum((g**2).sum() for g in first).backward()


@pytest.mark.parametrize("op", [*OPS, "merge_attention"])
@pytest.mark.parametrize("how", ["jvp", "dual", "func.grad"])
def test_forward_mode_and_torch_func_are_refused(device, op, how):
    if op == "merge_attention":
        tensors, line = [torch.randn(HEADS, device=device), torch.randn(1, 1, 4, device=device)], "has no gradient"

        def function(out: Tensor, lse: Tensor) -> Tensor:
            return hk.merge_attention([out, out], [lse, lse], impl="triton")[0].sum()
    else:
        tensors, line = tensors_of(op, device), "not by torch.func or in forward mode; use impl='reference' there"

        def function(*tensors: Tensor) -> Tensor:
            return total(op, "triton", *tensors)

    with pytest.raises(ValueError, match=rf"{op}: .*{line}"):
        if how == "jvp":
            torch.func.jvp(function, tuple(tensors), tuple(torch.ones_like(x) for x in tensors))
        elif how == "dual":
            with forward_ad.dual_level():
                function(forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0])), *tensors[1:])
        else:
            torch.func.grad(function)(*tensors)


def test_what_is_not_differentiated_passes(device):
    """In a function that torch.func differentiates, a frozen part may run on kernels."""
    x, weight = tensors_of("rms_norm", device)

    def function(y: Tensor) -> Tensor:
        return (hk.rms_norm(x, weight, impl="triton") * y).sum()

    assert torch.equal(torch.func.grad(function)(x), hk.rms_norm(x, weight, impl="triton"))
