"""The implementation of each op: which one runs, which one is refused and why, what is told of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from refusals import refusal
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels import BlockCausal

pytestmark = pytest.mark.cpu


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def e4m3(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


FP8_RING = (e4m3(1, 12, 2, 4), e4m3(1, 4, 2, 4, 16), torch.ones(1, 4, 2), torch.ones(1, 4, 2))  # 4 slots of 3 tokens
INT8_ROWS = (torch.ones(1, 2, dtype=torch.int8), torch.ones(1))
CALLS: dict[str, Callable[[str], object]] = {
    "attention": lambda impl: hk.attention(*[torch.zeros(1, 2, 1, 2)] * 3, impl=impl),
    "merge_attention": lambda impl: hk.merge_attention([torch.zeros(1, 2, 1, 2)], [torch.zeros(1, 1, 2)], impl=impl),
    "qk_norm_rope": lambda impl: hk.qk_norm_rope(
        torch.ones(1, 1, 6), *[torch.ones(2)] * 2, ids([0]), num_heads=1, grid=(1, 1), impl=impl
    ),
    "qk_norm_rope_append": lambda impl: hk.qk_norm_rope_append(
        torch.ones(1, 1, 6), *[torch.ones(2)] * 2, ids([0]), ids([0]), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2),
        num_heads=1, grid=(1, 1), impl=impl,
    ),
    "attention_fp8": lambda impl: hk.attention_fp8(
        torch.ones(1, 1, 1, 16), e4m3(1, 1, 1, 16),
        e4m3(1, 1, 1, 16, 16), *[torch.ones(1, 1, 1)] * 2,
        mask=BlockCausal(1, 1), q_frames=ids([0]), kv_frames=ids([0]), impl=impl,
    ),
    "append_fp8": lambda impl: hk.append_fp8(
        *[torch.ones(1, 3, 2, 4)] * 2, ids([0]), *FP8_RING, impl=impl
    ),
    "qk_norm_rope_append_fp8": lambda impl: hk.qk_norm_rope_append_fp8(
        torch.ones(1, 3, 24), *[torch.ones(8)] * 2, ids([0]), ids([0]), *FP8_RING, num_heads=2, grid=(1, 3), impl=impl,
    ),
    "ring_advance": lambda impl: hk.ring_advance(
        ids([0])[0], ids([0]), ids([0]), ids([-1]), advance=ids([1])[0], capacities=ids([1])[0], impl=impl
    ),
    "ada_layer_norm": lambda impl: hk.ada_layer_norm(*[torch.ones(1, 1, 2)] * 3, impl=impl),
    "layer_norm": lambda impl: hk.layer_norm(torch.ones(1, 1, 2), *[torch.ones(2)] * 2, impl=impl),
    "gated_residual": lambda impl: hk.gated_residual(*[torch.ones(1, 1, 2)] * 3, impl=impl),
    "gated_residual_ada_layer_norm": lambda impl: hk.gated_residual_ada_layer_norm(
        *[torch.ones(1, 1, 2)] * 5, impl=impl
    ),
    "gated_residual_layer_norm": lambda impl: hk.gated_residual_layer_norm(
        *[torch.ones(1, 1, 2)] * 3, *[torch.ones(2)] * 2, impl=impl
    ),
    "rms_norm": lambda impl: hk.rms_norm(torch.ones(1, 1, 2), torch.ones(2), impl=impl),
    "ada_layer_norm_quantized": lambda impl: hk.ada_layer_norm_quantized(*[torch.ones(1, 1, 2)] * 3, impl=impl),
    "gated_residual_ada_layer_norm_quantized": lambda impl: hk.gated_residual_ada_layer_norm_quantized(
        *[torch.ones(1, 1, 2)] * 5, impl=impl
    ),
    "quantize_rows": lambda impl: hk.quantize_rows(torch.ones(1, 2), impl=impl),
    "int8_linear": lambda impl: hk.int8_linear(
        *INT8_ROWS, *INT8_ROWS, torch.zeros(1), impl=impl
    ),
    "flow_step": lambda impl: hk.flow_step(*[torch.ones(1, 1, 1, 1, 1)] * 2, *[torch.ones(1, 1)] * 2, impl=impl),
    "rms_silu_pad": lambda impl: hk.rms_silu_pad(torch.ones(1, 2, 1, 1, 1), torch.ones(2), impl=impl),
}  # fmt: skip


def assert_says(line: str, op: str, *parts: str) -> None:
    """The message of an op names the culprit and the legal values."""
    assert line.startswith(f"{op}: ")
    assert not [part for part in parts if part not in line], line


@pytest.mark.parametrize("name", CALLS)
def test_an_explicit_impl_never_falls_back(name):
    there = hk.backends().ops[name].implementations
    legal = ", ".join(("auto", *there))
    for impl in {"auto", "reference", "sdpa"} & {"auto", *there}:
        CALLS[name](impl)
    if "triton" in there:
        line = refusal(lambda: CALLS[name]("triton"))
        assert_says(line, name, "impl='triton'", "CUDA", "TRITON_INTERPRET=1", "cpu")
    if "cuda" in there:
        line = refusal(lambda: CALLS[name]("cuda"))
        assert line.startswith(f"{name}: impl='cuda' needs ")
    for impl in {"sdpa", "triton", "cuda"} - set(there):
        line = refusal(lambda impl=impl: CALLS[name](impl))
        assert_says(line, name, repr(impl), legal)
    assert_says(refusal(lambda: CALLS[name]("fast")), name, "'fast'", legal)


def test_the_oracle_is_the_reference():
    q = normal(1, 6, 1, 4)
    assert torch.equal(hk.reference.attention(q, q, q), hk.attention(q, q, q, impl="reference"))
    assert {name for name in vars(hk.reference) if name in CALLS} == set(CALLS)


def test_backends_say_what_is_chosen_and_why():
    found = hk.backends()
    assert set(found.ops) == set(CALLS)
    for name, choice in found.ops.items():
        assert choice.auto in choice.implementations and choice.why
        CALLS[name](choice.auto)
        assert "reference" in choice.implementations
    assert found.devices[0] == "cpu" and found.libraries["torch"] == torch.__version__
    assert all(f"{name}: auto = " in str(found) for name in CALLS)


def test_every_implementation_can_be_preferred():
    """By the name that an explicit ``impl`` takes; ops without it go on by themselves."""
    names = {impl for choice in hk.backends().ops.values() for impl in choice.implementations}
    assert names >= {"cudnn", "flash", "flash-attn-3", "gluon"}
    for impl in sorted(names):
        with hk.prefer(impl):
            if impl in ("reference", "sdpa", "cuda"):  # attention has no "cuda"
                CALLS["attention"]("auto")
            else:
                assert f"impl={impl!r}" in refusal(lambda: CALLS["attention"]("auto"))
    with pytest.raises(ValueError, match="unknown impl 'cudn'; known: auto, reference, sdpa, cudnn"), hk.prefer("cudn"):
        pass


def test_only_what_ran_was_taken():
    """A question about what would run is not a call."""
    q = normal(1, 4, 1, 2)
    with hk.taken() as calls:
        hk.takes_layout(q, BlockCausal(2, 1)), hk.takes_schedule(q, q, BlockCausal(2, 1))
        assert calls == []
        hk.attention(q, q, q)
    assert calls == [("attention", "sdpa")]
