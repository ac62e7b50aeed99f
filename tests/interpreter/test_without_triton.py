"""An installation without Triton: ``impl="auto"`` takes the CUDA extension where it is built, here for the host."""

from __future__ import annotations

import pytest
import torch
from emulation import use
from on_cuda import OnCuda
from torch import Tensor

import hiar_kernels as hk

E4M3 = torch.float8_e4m3fn

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def append(impl: str) -> list[Tensor]:
    qkv = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(0))
    k, v = torch.zeros(2, 4, 9, 2, 16)
    rows, slots = ids([2, 0], [1, -1]), torch.stack([ids([0, 2]), ids([1, 0])])
    ones, options = torch.ones(32), {"num_heads": 2, "grid": (1, 3), "rows": rows}
    return [hk.qk_norm_rope_append(qkv, ones, ones, ids([5, 6]), slots, k, v, impl=impl, **options), k, v]


def append_fp8(impl: str) -> list[Tensor]:
    qkv = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(0))
    caches = [torch.zeros(size, dtype=torch.uint8).view(E4M3) for size in ((2, 9, 2, 16), (2, 3, 2, 16, 16))]
    scales, ones = torch.zeros(2, 2, 3, 2), torch.ones(32)
    where = (ids([5, 6]), ids([2, 0]), *caches, *scales)
    q, q_scales = hk.qk_norm_rope_append_fp8(
        qkv, ones, ones, *where, num_heads=2, grid=(1, 3), quantize_q=True, impl=impl
    )  # fmt: skip
    k_cache = caches[0].float().unflatten(1, (3, 3)) * scales[0][:, :, None, :, None]
    return [q.float() * q_scales[..., None], k_cache, caches[1].float() * scales[1][..., None, None]]


def merge(impl: str) -> list[Tensor]:
    outs = torch.randn(2, 1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    return list(hk.merge_attention(list(outs), list(torch.zeros(2, 1, 2, 5)), impl=impl))


def advance(impl: str) -> list[Tensor]:
    written = [ids([4, 7])[0], ids([0, 0], [0, 0]), ids([0, 0], [0, 0]), ids([-1] * 5, [-1] * 5)]
    hk.ring_advance(*written, advance=ids([2, 0])[0], capacities=ids([5, 4])[0], impl=impl)
    return written


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("qk_norm_rope_append", append), ("qk_norm_rope_append_fp8", append_fp8), ("merge_attention", merge),
        ("ring_advance", advance),
    ],
)  # fmt: skip
@pytest.mark.parametrize("built", [True, False])
def test_auto_takes_the_extension(op, call, built, emulation, monkeypatch):
    use(emulation)
    if not built:
        monkeypatch.setattr("hiar_kernels.common.cuda_loader.missing", lambda: "not built")
    monkeypatch.setattr("hiar_kernels.common.pointwise.TRITON_INSTALLED", False)
    with torch.no_grad(), OnCuda(), hk.taken() as ways:
        found = call("auto")
    assert ways == [(op, "cuda" if built else "reference")]
    near = {"rtol": 0.13, "atol": 1e-3} if op.endswith("fp8") else {}  # 8 bits may round to the next number
    torch.testing.assert_close(found, call("reference"), **near)
