"""merge_attention, Triton and CUDA C++ alike, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from hiar_kernels import merge_attention

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {  # of parts [B, T, H, D] or [B, H, T]
    "halves of one tensor": lambda parts: list(torch.stack(parts)),
    "anywhere": lambda parts: [x.clone() for x in parts],
    "backwards": lambda parts: list(torch.stack(parts[::-1]))[::-1],
    "heads outside": lambda parts: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts],
    "every other number": lambda parts: [x.repeat_interleave(2, -1)[..., ::2] for x in parts],
    "rows one longer": lambda parts: [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in parts],
    "part of wider rows": lambda parts: [torch.cat([x[..., :1], x], -1)[..., 1:] for x in parts],
    "a row and another": lambda parts: [*torch.stack(parts[:-1]), parts[-1].clone()],
    "of one row": lambda parts: [x[:1].expand_as(x) for x in parts],
}


def parts(count: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Random parts; the last but the first saw nothing at token 3, whatever it holds, none saw anything at token 5."""
    generator = torch.Generator().manual_seed(count)
    b, t, h, _ = shape
    outs = list(torch.randn(count, *shape, generator=generator).to(dtype))
    lses = list(torch.randn(count, b, h, t, generator=generator) * 4)
    if count > 1:
        outs[-1][:, 3], lses[-1][:, :, 3] = torch.nan, -math.inf
    for out, lse in zip(outs, lses):
        out[:, 5], lse[:, :, 5] = torch.nan, -math.inf
    return outs, lses


def merged(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By the definition, in a dtype."""
    weights = torch.softmax(torch.stack(lses).double(), 0).nan_to_num(0).transpose(2, 3)[..., None]
    held = torch.stack(outs).double().nan_to_num(0)
    return (weights.to(dtype) * held.to(dtype)).sum(0), torch.logsumexp(torch.stack(lses).double(), 0)


def assert_good(outs: list[Tensor], lses: list[Tensor], kernel: str, device: torch.device) -> None:
    dtype = outs[0].dtype
    out, lse = merge_attention(outs, lses, impl=kernel)
    assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    host = [x.cpu() for x in outs], [x.cpu() for x in lses]
    (eager, _), (exact, total) = merged(*host, dtype), merged(*host, torch.float64)
    assert_within_budget(out.cpu(), eager, exact)
    torch.testing.assert_close(lse.cpu(), total.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_is_free(layout, dtype, kernel, device):
    outs, lses = parts(2, (2, 7, 3, 16), dtype)
    assert_good(
        LAYOUTS[layout]([x.to(device) for x in outs]), LAYOUTS[layout]([x.to(device) for x in lses]), kernel, device
    )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("width", [1, 10, 24, 128, 520])
@pytest.mark.parametrize("count", [1, 2, 3, 32])
def test_any_number_of_parts_of_any_width(count, width, dtype, kernel, device):
    outs, lses = parts(count, (1, 6, 5, width), dtype)
    assert_good([x.to(device) for x in outs], [x.to(device) for x in lses], kernel, device)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_rows_of_a_launch_and_a_rest(first, kernel, device):
    """As a library leaves them: [n, T, H, D] of one launch, the rest of another; both are read where they lie."""
    outs, lses = parts(4, (2, 7, 3, 16), torch.bfloat16)
    split = [
        [x for stack in (xs[:first], xs[first:]) if stack for x in torch.stack(stack).to(device)] for xs in (outs, lses)
    ]
    assert_good(*split, kernel, device)
    if kernel == "triton":
        from hiar_kernels.merge_attention import triton_fwd

        stacks = triton_fwd._stacks(*split)
        assert [len(x) for x, _ in stacks] == ([first, 4 - first] if first < 4 else [4])
        read = [x.data_ptr() for stack in stacks for tensor in stack for x in tensor]
        given = [x.data_ptr() for n in (slice(first), slice(first, 4)) for xs in split for x in xs[n]]
        assert read == given, "parts were copied"


def test_a_stacked_tensor_is_its_parts(kernel, device):
    outs, lses = (torch.stack(xs).to(device) for xs in parts(3, (1, 6, 2, 16), torch.float32))
    for found, wanted in zip(merge_attention(outs, lses, impl=kernel), merge_attention([*outs], [*lses], impl=kernel)):
        assert torch.equal(found, wanted)


def test_many_rows(kernel, device):
    """More than one block of rows, the last one not full."""
    outs, lses = parts(2, (2, 67, 3, 64), torch.bfloat16)
    assert_good([x.to(device) for x in outs], [x.to(device) for x in lses], kernel, device)


def test_a_part_far_below_counts_nothing(kernel, device):
    outs, lses = parts(2, (1, 6, 1, 8), torch.float32)
    lses[1] = lses[0] - 200
    outs[1][:] = torch.inf
    out, lse = merge_attention([x.to(device) for x in outs], [x.to(device) for x in lses], impl=kernel)
    assert torch.equal(out[:, :5].cpu(), outs[0][:, :5]) and torch.equal(lse.cpu(), lses[0])
    assert (out[:, 5] == 0).all()


def test_nothing_to_do(kernel, device):
    for shape in ((0, 2, 1, 8), (1, 0, 1, 8)):
        b, t, h, _ = shape
        out, lse = merge_attention(
            [torch.ones(shape, device=device)], [torch.ones(b, h, t, device=device)], impl=kernel
        )
        assert out.shape == shape and lse.shape == (b, h, t)


def test_opcheck(kernel, device):
    outs, lses = parts(3, (1, 6, 2, 8), torch.float32)
    outs, lses = [x.nan_to_num(0).to(device) for x in outs], [x.to(device) for x in lses]
    merge_attention(outs, lses, impl=kernel)  # loads the kernel
    op = torch.ops.hiar.merge_attention_cuda if kernel == "cuda" else torch.ops.hiar.merge_attention
    torch.library.opcheck(op.default, (outs, lses))


def test_compile_without_breaks(kernel, device):
    outs, lses = parts(2, (1, 6, 2, 8), torch.float32)
    arguments = [x.to(device) for x in (*outs, *lses)]

    def merge(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention([a, b], [x, y], impl=kernel)

    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), merge(*arguments))


def test_bad_input_is_one_line(kernel, device):
    def refusal(outs: list[Tensor], lses: list[Tensor]) -> str:
        with pytest.raises(ValueError) as refused:
            merge_attention(outs, lses, impl=kernel)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    x, s = torch.ones(1, 2, 1, 16, device=device), torch.zeros(1, 1, 2, device=device)
    op = "merge_attention: "
    assert refusal([x.clone().requires_grad_()], [s]).startswith(f"{op}impl={kernel!r} has no gradient")
    takes = f"{op}impl={kernel!r} takes bfloat16, float16 or float32, got torch.float64"
    assert refusal([x.double()], [s]) == takes
    assert f"on {x.device} like every out, got meta" in refusal([x, x], [s, s.to("meta")])
    if kernel == "cuda":
        assert "at most 32" in (line := refusal([x] * 33, [s] * 33)) and "got 33" in line
