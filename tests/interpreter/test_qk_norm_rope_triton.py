"""qk_norm_rope and its appending form in Triton against the reference in float64, outputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from budget import assert_within_budget, normal
from torch import Tensor

from hiar_kernels import backends, qk_norm_rope

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MILLION = 1_000_000


def ids(*rows: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


@dataclass(frozen=True)
class Shape:
    batch: int
    frames: list[list[int]]
    grid: tuple[int, int]
    heads: int
    head_dim: int
    cells: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        start, stop = self.cells or (0, self.grid[0] * self.grid[1])
        return len(self.frames[0]) * (stop - start)

    def inputs(self) -> list[Tensor]:
        """qkv and both weights."""
        c = self.heads * self.head_dim
        return [normal(self.batch, self.tokens, 3 * c, seed=1), 1 + normal(c, seed=2) / 10, 1 + normal(c, seed=3) / 10]

    def call(self, *tensors: Tensor, impl: str, frames: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        frames = ids(*self.frames).to(tensors[0].device) if frames is None else frames
        options = {"num_heads": self.heads, "grid": self.grid, "cells": self.cells}
        return qk_norm_rope(*tensors, frames, impl=impl, **options)


SHAPES = {
    "one token": Shape(1, [[5]], (1, 1), 1, 2),
    "one frame of odd size": Shape(2, [[MILLION]], (3, 5), 3, 10),
    "rows at different frames": Shape(2, [[3, 4, MILLION], [0, 7, 2]], (2, 3), 2, 16),
    "one row of ids": Shape(3, [[2, 9]], (1, 3), 5, 6),
    "several programs": Shape(2, [[MILLION + 1]], (1, 17), 1, 8),
    "heads of 64": Shape(1, [[20, 21]], (2, 1), 3, 64),
    "heads of 128": Shape(1, [[20]], (1, 3), 12, 128),
    "cells across rows": Shape(2, [[3, 4, MILLION], [0, 7, 2]], (3, 5), 3, 10, cells=(4, 11)),
    "the last cell": Shape(1, [[2, 9]], (4, 3), 2, 16, cells=(11, 12)),
}


def run(
    shape: Shape, tensors: list[Tensor], impl: str, view: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the inputs for a fixed weighting of the outputs; all on the CPU."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    outs = shape.call(view(leaves[0]), *leaves[1:], impl=impl)
    sum((out * normal(*out.shape, seed=9 + i).to(out)).sum() for i, out in enumerate(outs)).backward()
    return [out.detach().cpu() for out in outs], [leaf.grad.cpu() for leaf in leaves]


def assert_within_budgets(shape: Shape, found, tensors: list[Tensor]) -> None:
    eager, exact = run(shape, tensors, "reference"), run(shape, [x.double() for x in tensors], "reference")
    for kind, names, a, b, c in zip(
        ("output", "gradient"), ("qkv", ("qkv", "q_weight", "k_weight")), found, eager, exact
    ):
        assert len(a) == len(b) == 3
        for name, *three in zip(names, a, b, c):
            assert_within_budget(*three, f"{kind} {name}")


# Outputs and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_error_budget(name, dtype, device):
    shape = SHAPES[name]
    tensors = [x.to(dtype) for x in shape.inputs()]
    assert_within_budgets(shape, run(shape, [x.to(device) for x in tensors], "triton"), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights(dtype, device):
    shape = SHAPES["rows at different frames"]
    qkv, *weights = shape.inputs()
    tensors = [qkv.to(dtype), *(w.float() for w in weights)]
    assert_within_budgets(shape, run(shape, [x.to(device) for x in tensors], "triton"), tensors)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "part of a wider tensor": lambda x: torch.cat([x, x[..., :5]], -1)[..., : x.shape[-1]],
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last but one": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other row": lambda x: x.repeat_interleave(2, 0)[1::2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_memory_order_of_qkv_is_free(name, device):
    shape = SHAPES["rows at different frames"]
    tensors = [x.float() for x in shape.inputs()]
    assert not VIEWS[name](tensors[0]).is_contiguous()
    found = run(shape, [x.to(device) for x in tensors], "triton", VIEWS[name])
    assert_within_budgets(shape, found, tensors)


def test_memory_order_of_the_rest_is_free(device):
    shape = SHAPES["rows at different frames"]
    qkv, *weights = (x.float().to(device) for x in shape.inputs())
    frames = ids(*shape.frames, dtype=torch.int64).to(device)
    spread = [w.repeat_interleave(2)[::2] for w in weights]
    strided = frames.T.repeat_interleave(3, 0).contiguous().T[:, ::3]
    assert not strided.is_contiguous() and not spread[0].is_contiguous() and torch.equal(strided, frames)
    for a, b in zip(
        shape.call(qkv, *spread, frames=strided, impl="triton"), shape.call(qkv, *weights, impl="triton"), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_only_what_is_needed(device):
    """The backward op alone, for choices of gradients; the same bits every time, and nothing for v."""
    shape = Shape(1, [[MILLION]], (1, 17), 1, 8)
    qkv, *weights = (x.float().to(device) for x in shape.inputs())
    q, k, _ = shape.call(qkv, *weights, impl="triton")
    grads = [normal(*x.shape, seed=i).to(x) for i, x in enumerate((q, k))]
    arguments = (qkv, *weights, ids(*shape.frames).to(device), shape.heads, *shape.grid, 1e-6, 10000.0)
    backward = torch.ops.hiar.qk_norm_rope_backward
    everything = backward(grads, [True] * 3, *arguments)
    assert (everything[0][..., -8:] == 0).all() and (everything[0][..., :-8] != 0).any()
    for bits in (0, 1, 2, 4, 5, 7):
        needed = [bool(bits >> i & 1) for i in range(3)]
        found = backward(grads, needed, *arguments)
        assert len(found) == sum(needed)
        for a, b in zip(found, (g for g, need in zip(everything, needed) if need)):
            torch.testing.assert_close(a, b)
            assert a.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(everything, found))


def test_many_shares_of_a_weight(device, monkeypatch):
    """One token a program: the second stage of the weight gradients takes more than one step."""
    shape = Shape(2, [[MILLION]], (1, 20), 1, 4)
    tensors = [x.float() for x in shape.inputs()]
    shape.call(*(x.to(device) for x in tensors), impl="triton")  # loads the kernels
    from hiar_kernels.qk_norm_rope import triton_bwd

    monkeypatch.setattr(triton_bwd, "FEWEST_ROWS", 1)
    assert triton_bwd.rows_of(40) == 1 and triton_bwd.SUM_TILE["BLOCK_N"] < 40
    assert_within_budgets(shape, run(shape, [x.to(device) for x in tensors], "triton"), tensors)


def test_no_tokens(device):
    shape = Shape(1, [[]], (2, 3), 2, 4)
    leaves = [x.float().to(device).requires_grad_() for x in shape.inputs()]
    outs = shape.call(*leaves, impl="triton", frames=torch.zeros(1, 0, dtype=torch.int32, device=device))
    assert [out.shape for out in outs] == [(1, 0, 2, 4)] * 3
    sum(out.sum() for out in outs).backward()
    assert leaves[0].grad.shape == (1, 0, 24) and all((leaf.grad == 0).all() for leaf in leaves[1:])


# Angles

FULL_TURN = Fraction("6.283185307179586476925286766559005768394338798750211641949889")
PAIRS = 10  # 4 turn with the frame, by 10000^(-i / 4) = 10^-i; 3 with the row, 3 with the column


def turned_ones(frames: list[int], grid: tuple[int, int], device: torch.device, theta: float = 10000.0) -> Tensor:
    """cos and sin [F rows columns, PAIRS, 2], float64, as the kernel made them in float32."""
    tokens = len(frames) * grid[0] * grid[1]
    qkv = torch.zeros(1, tokens, 6 * PAIRS, device=device)
    qkv[..., : 4 * PAIRS : 2] = 1  # every pair is the number 1, so it becomes its turn
    ones = torch.ones(2 * PAIRS, device=device)
    q, k, _ = qk_norm_rope(
        qkv, ones, ones, ids(frames, dtype=torch.int64).to(device), num_heads=1, grid=grid, eps=0.5, theta=theta,
        impl="triton",
    )  # fmt: skip
    torch.testing.assert_close(q, k)
    return q[0, :, 0].unflatten(-1, (PAIRS, 2)).cpu().double()  # mean square 1/2, eps 1/2: nothing to norm


def remainder(angle: Fraction) -> tuple[float, float]:
    """cos and sin of an exact angle."""
    rest = float(angle % FULL_TURN)
    return math.cos(rest), math.sin(rest)


@pytest.mark.parametrize("frame", [0, 1, 20, 4096, MILLION, 987_654_321, 2**31 - 1, 2**36, -7])
def test_angles_are_exact_far_on(frame, device):
    """Angles reduced in exact fractions: what is left of the error is float32 rounding, for any frame."""
    found = turned_ones([frame], (1, 1), device)[0]
    for pair in range(4):
        expected = torch.tensor(remainder(Fraction(frame, 10**pair)), dtype=torch.float64)
        assert (found[pair] - expected).abs().max() <= 2e-7, (pair, found[pair], expected)


def test_angles_of_rows_and_columns(device):
    found = turned_ones([MILLION], (3, 30), device).unflatten(0, (3, 30))
    for axis, first in ((0, 4), (1, 7)):
        for pair in range(3):
            angles = torch.arange((3, 30)[axis], dtype=torch.float64) / 10000 ** (pair / 3)
            expected = torch.stack([angles.cos(), angles.sin()], -1)
            row = found[:, 0, first + pair] if axis == 0 else found[0, :, first + pair]
            assert (row - expected).abs().max() <= 2e-7


def test_whole_circle(device):
    """Every part of the circle, quarters included; 1 + 0i where nothing turns."""
    theta = 1e12  # pairs of the frame: steps of 1, 10^-3, 10^-6, 10^-9
    frames = list(range(0, 6300, 67))
    found = turned_ones(frames, (1, 1), device, theta)
    for pair in range(2):
        expected = torch.tensor([remainder(Fraction(f, 1000**pair)) for f in frames], dtype=torch.float64)
        assert (found[:, pair] - expected).abs().max() <= 2e-7
    still = turned_ones([0], (1, 1), device)[0]
    assert (still[:, 1] == 0).all() and (still[:, 0] == 1).all()


# As torch sees them


def test_opcheck(device):
    shape = Shape(2, [[0, 9]], (1, 3), 2, 4)
    tensors = [x.float().to(device) for x in shape.inputs()]
    shape.call(*tensors, impl="triton")  # loads the kernels
    frames, rest = ids([0, 9]).to(device), (2, 1, 3, 1e-6, 10000.0)
    leaves = [x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.hiar.qk_norm_rope.default, (*leaves, frames, *rest))
    torch.library.opcheck(torch.ops.hiar.qk_norm_rope.default, (*leaves, frames, 2, 2, 3, *rest[3:], [2, 5]))


def test_compile_without_breaks(device):
    shape = SHAPES["one row of ids"]
    tensors = [x.float().to(device) for x in shape.inputs()]

    def loss(*tensors: Tensor) -> Tensor:
        return sum((out * (1 + i)).square().sum() for i, out in enumerate(shape.call(*tensors, impl="triton")))

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        value = f(*leaves)
        value.backward()
        results.append((value.detach(), [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(results[1], results[0])


# Refusals

ONES = torch.ones(4)
QKV = torch.ones(2, 3, 12)


def rope(device: torch.device, qkv: Tensor = QKV, k_weight: Tensor = ONES, heads: int = 2, grid=(1, 3)) -> object:
    tensors = (x.to(device) for x in (qkv, k_weight.float(), k_weight, ids([0])))
    return qk_norm_rope(*tensors, num_heads=heads, grid=grid, impl="triton")


BAD: dict[str, tuple[dict, str]] = {
    "float64": ({"qkv": QKV.double()}, "impl='triton' takes qkv as bfloat16, float16 or float32, got torch.float64"),
    "a float64 weight": (
        {"k_weight": ONES.double()}, "takes k_weight as bfloat16, float16 or float32, got torch.float64"
    ),
    "a very wide model": (
        {"qkv": torch.ones(1, 1, 3 * 8194), "k_weight": torch.ones(8194), "heads": 1, "grid": (1, 1)},
        "takes at most 8192 channels, got 8194",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what, device):
    arguments, message = BAD[what]
    with pytest.raises(ValueError) as refused:
        rope(device, **arguments)
    line = str(refused.value)
    assert message in line and line.startswith("qk_norm_rope") and "\n" not in line


def test_another_device(device):
    shape = SHAPES["one token"]
    tensors = [x.float().to(device) for x in shape.inputs()]
    with pytest.raises(ValueError, match=f"frames must be on {tensors[0].device} like qkv, got meta"):
        shape.call(*tensors, frames=ids(*shape.frames).to("meta"), impl="triton")


def test_the_choice_of_auto(device):
    assert backends().ops["qk_norm_rope"].implementations == ("reference", "triton")
    assert backends().ops["qk_norm_rope_append"].implementations == ("reference", "triton", "cuda")
    shape = SHAPES["one token"]
    tensors = [x.float().to(device) for x in shape.inputs()]
    chosen = "triton" if device.type == "cuda" else "reference"
    for a, b in zip(shape.call(*tensors, impl="auto"), shape.call(*tensors, impl=chosen)):
        assert torch.equal(a, b)
