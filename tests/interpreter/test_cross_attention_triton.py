"""The Triton cross_attention against the float64 reference: error budget, counts, shared prompts, refusals."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from hiar_kernels import cross_attention

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

SHAPES = {  # B, T, rows of the prompt, L, H, D
    "a prompt for two videos": (2, 37, 1, 5, 3, 32),
    "a prompt each": (2, 16, 2, 16, 2, 64),
    "one key, one query": (1, 1, 1, 1, 1, 16),
    "a long prompt": (1, 20, 1, 100, 2, 32),
    "heads of Wan": (1, 18, 1, 9, 2, 128),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(shape: str, counted: bool = True) -> tuple[list[Tensor], Tensor | None]:
    b, t, rows, keys, h, d = SHAPES[shape]
    tensors = [3 * normal(b, t, h * d, seed=1), 1 + 0.2 * normal(h * d, seed=2)]
    tensors += [normal(rows, keys, h, d, seed=seed) for seed in (3, 4)]
    counts = torch.arange(1.0, keys + 1)[None] ** 2 % 509 if counted else None
    return tensors, counts


@pytest.mark.parametrize("counted", [False, True], ids=["once", "counted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, dtype, counted, device):
    tensors, counts = arguments(shape, counted)
    narrow = [x.to(dtype) for x in tensors]
    exact = cross_attention(*(x.double() for x in narrow), kv_counts=counts, impl="reference")
    eager = cross_attention(*narrow, kv_counts=counts, impl="reference")
    counts = None if counts is None else counts.to(device)
    found = cross_attention(*(x.to(device) for x in narrow), kv_counts=counts, impl="triton")
    assert_within_budget(found.cpu(), eager, exact)


def test_a_key_that_counts_nothing_is_not_read(device):
    tensors, _ = arguments("a prompt each")
    q, weight, k, v = (x.to(device, torch.bfloat16) for x in tensors)
    counts = torch.ones(2, 16, device=device)
    counts[0, 3:7], counts[1] = 0, 0
    want = cross_attention(q[:1], weight, *(torch.cat([x[:1, :3], x[:1, 7:]], 1) for x in (k, v)), impl="triton")
    hidden = (counts == 0)[:, :, None, None]
    out = cross_attention(
        q, weight, *(x.masked_fill(hidden, torch.nan) for x in (k, v)), kv_counts=counts, impl="triton"
    )
    torch.testing.assert_close(out[:1], want, atol=1e-2, rtol=1e-2)
    assert not out[1].any()


def test_views_are_read_where_they_lie(device):
    tensors, _ = arguments("a prompt for two videos")
    q, weight, k, v = (x.to(device, torch.float32) for x in tensors)
    around = torch.full((2, 80, 2 * q.shape[2]), torch.nan, device=device)
    view = around[:, 3:77:2, : q.shape[2]]
    view.copy_(q)
    wide = torch.full((1, 9, 5, 32), torch.nan, device=device)
    keys = wide[:, 2:7, 1:4]
    keys.copy_(k)
    assert torch.equal(
        cross_attention(view, weight, keys, v, impl="triton"), cross_attention(q, weight, k, v, impl="triton")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, w, k, v: (q.double(), w, k.double(), v.double()), "takes q as bfloat16, float16 or float32"),
        (lambda q, w, k, v: (q, w, *(x.repeat(1, 30, 1, 1) for x in (k, v))), "takes 1 to 128 keys of head_dim"),
        (lambda q, w, k, v: (q, w[1:], k, v), "q_weight must be [96]"),
        (lambda q, w, k, v: (q, w, k[..., 1:], v), "with H D = 96"),
        (lambda q, w, k, v: (q, w, k, v[:, 1:]), "v must be [1, 5, 3, 32] like k"),
        (lambda q, w, k, v: (q, w, k.half(), v), "k must be torch.float32 like q"),
    ],
)
def test_bad_input_is_one_line(change, message, device):
    tensors, _ = arguments("a prompt for two videos")
    with pytest.raises(ValueError) as refused:
        cross_attention(*change(*(x.to(device, torch.float32) for x in tensors)), impl="triton")
    line = str(refused.value)
    assert message in line and line.startswith("cross_attention: ") and "\n" not in line
