"""attention_fp8: the arithmetic of its reference, which is the oracle of the kernels."""

from __future__ import annotations

import math

import pytest
import torch
from eight_bits import Ring, exactly, queries
from refusals import refusal

import hiar_kernels as hk
from hiar_kernels.attention_fp8 import gluon
from hiar_kernels.attention_fp8.inputs import Float8Inputs, triton_problem
from hiar_kernels.common.float8 import E4M3, quantize_last, unpack_values

pytestmark = pytest.mark.cpu

H, D = 2, 32
SHAPES = {"less than a group": 5, "a group": 16, "not whole groups": 37, "a block and a bit": 130, "three blocks": 300}


def setting(tokens: int) -> dict:
    """Two rows at different tasks, a window with a sink, an empty slot (2), and one not visible yet (3 of row 1)."""
    mask = hk.BlockCausal(tokens, frames_per_block=2, window_frames=(5, 4), sink_frames=1)
    return {
        "mask": mask,
        "q_frames": torch.tensor([[4, 5], [2, 3]]),
        "kv_frames": torch.tensor([[0, 4, -1, 3, 5, 1], [0, 2, -1, 9, 3, 1]]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_as_wide_as_q(shape, dtype):
    """Nothing but the result is rounded."""
    tokens = SHAPES[shape]
    ring, ids = Ring.random(2, 6, tokens, H, D), setting(tokens)
    q = queries(2, 2 * tokens, H, D).to(dtype)
    out = hk.attention_fp8(q, *ring.without(2, tokens).arguments, **ids)
    assert out.dtype == dtype and out.is_contiguous()
    tolerance = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), exactly(q, ring, **ids), rtol=tolerance, atol=tolerance)


def by_blocks(q, q_scales, ring: Ring, mask, q_frames, kv_frames) -> torch.Tensor:
    """One query of one head at a time, slot after slot and block after block, as a kernel goes."""
    tokens, out = mask.frame_tokens, torch.zeros(q.shape)
    v = unpack_values(ring.v, tokens)
    seen = mask.visible(q_frames, kv_frames, len(q))
    for b, t, h in ((b, t, h) for b in range(q.shape[0]) for t in range(0, q.shape[1], 7) for h in range(q.shape[2])):
        m, total, acc = -math.inf, 0.0, torch.zeros(q.shape[3])
        for slot in (s for s in range(kv_frames.shape[1]) if seen[b, t // tokens, s]):
            for start in range(0, tokens, 128):
                at = slice(slot * tokens + start, slot * tokens + min(start + 128, tokens))
                scale = q_scales[b, t, h] * q.shape[3] ** -0.5 * math.log2(math.e) * ring.k_scales[b, slot, h]
                scores = (ring.k[b, at, h].float() @ q[b, t, h].float()) * scale
                highest = max(m, float(scores.max()))
                p = torch.exp2(scores - highest)
                alpha, m = 2.0 ** (m - highest), highest
                total = total * alpha + float(p.sum())
                p8 = (p * 256).to(E4M3).float() / 256
                acc = acc * alpha + (p8 @ v[b, slot, start : start + 128, h].float()) * ring.v_scales[b, slot, h]
        out[b, t, h] = acc / total
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_8_bits_go_by_blocks(shape):
    tokens = SHAPES[shape]
    ring, ids = Ring.random(2, 6, tokens, H, D), setting(tokens)
    q, q_scales = quantize_last(queries(2, 2 * tokens, H, D))
    out = hk.attention_fp8(q, *ring.without(2, tokens).arguments, q_scales=q_scales, out_dtype=torch.float32, **ids)
    expected = by_blocks(q, q_scales, ring, **ids)
    some = slice(0, None, 7)
    # a probability next to a tie of e4m3 may go to its other side: one of many
    off = (out - expected)[:, some].abs()
    assert off.median() < 1e-6 and off.max() < 2e-2
    assert (off < 1e-5).double().mean() > 0.9
    exact = exactly(q, ring, q_scales, **ids)
    relative = float((out - exact).norm() / exact.norm())
    assert 1e-3 < relative < 0.05  # rounding probabilities to 4 bits: at most 1/16 each
    assert hk.attention_fp8(q, *ring.arguments, q_scales=q_scales, **ids).dtype == torch.bfloat16


@pytest.mark.parametrize("eight", [False, True])
def test_rows_do_not_depend_on_the_batch(eight):
    """Bit for bit, at a size where torch 2.13's exp2 and batched products on a CPU give others."""
    ring, q = Ring.random(4, 6, 2, H, 8), queries(4, 6, H, 8) / 3
    q, options = (quantize_last(q)[0], {"q_scales": quantize_last(q)[1]}) if eight else (q, {})
    ids = {"mask": hk.BlockCausal(2, 3, 6), "q_frames": torch.tensor([[3, 4, 5]])}
    ids["kv_frames"] = torch.tensor([[0, 1, 2, 3, 4, 5]])
    whole = hk.attention_fp8(q, *ring.arguments, **ids, **options)
    for row in range(4):
        one, more = slice(row, row + 1), {name: x[row : row + 1] for name, x in options.items()}
        assert torch.equal(hk.attention_fp8(q[one], *(x[one] for x in ring.arguments), **ids, **more), whole[one])


@pytest.mark.parametrize("eight", [False, True])
def test_nothing_visible_gives_0_and_what_is_seen_shows(eight):
    ring = Ring.random(1, 2, 5, H, D)
    q = queries(1, 5, H, D)
    q, options = (q, {}) if not eight else (quantize_last(q)[0], {"q_scales": quantize_last(q)[1]})
    ids = {"mask": hk.BlockCausal(5, 1), "q_frames": torch.tensor([[3]])}
    nothing = hk.attention_fp8(q, *ring.arguments, kv_frames=torch.tensor([[-1, 7]]), **ids, **options)
    assert not nothing.any()
    bad = ring.without(1, 5)
    for slot, frames in ((0, [3, 7]), (1, [3, 2])):
        out = hk.attention_fp8(q, *bad.arguments, kv_frames=torch.tensor([frames]), **ids, **options)
        assert bool(out.isnan().any()) == (slot == 1)


RING = Ring.random(1, 2, 5, H, D)
Q = queries(1, 5, H, D)
IDS = {"mask": hk.BlockCausal(5, 1), "q_frames": torch.tensor([[1]]), "kv_frames": torch.tensor([[0, 1]])}


def call(**changed):
    given = {"q": Q, "k": RING.k, "v": RING.v, "k_scales": RING.k_scales, "v_scales": RING.v_scales, **IDS, **changed}
    return hk.attention_fp8(**given)


WRONG = {
    "mask": ({"mask": None}, "mask must be a BlockCausal, got NoneType"),
    "scale": ({"scale": math.inf}, "scale must be a finite number"),
    "8 bits without scales": ({"q": Q.to(E4M3)}, "q must be bfloat16, .* got torch.float8_e4m3fn; .* needs q_scales"),
    "scales without 8 bits": ({"q_scales": torch.ones(1, 5, H)}, "q must be torch.float8_e4m3fn beside q_scales"),
    "keys": ({"k": RING.k.float()}, "k must be torch.float8_e4m3fn, got torch.float32"),
    "out_dtype": ({"out_dtype": torch.bfloat16}, "out_dtype must be torch.float32 like q, got torch.bfloat16"),
    "length": ({"q": Q[:, :3]}, "q has 3 tokens, no multiple of frame_tokens 5"),
    "values": (
        {"v": RING.v[..., :5]},
        r"v must be \[1, 2, 2, 32, 16\] for 2 slots of 5 tokens, got \[1, 2, 2, 32, 5\]",
    ),
    "scales": ({"v_scales": RING.v_scales[:, :1]}, r"v_scales must be \[1, 2, 2\] .* got \[1, 1, 2\]"),
    "dtype of scales": ({"k_scales": RING.k_scales.double()}, "k_scales must be torch.float32, got torch.float64"),
    "ids": ({"q_frames": torch.tensor([1])}, r"q_frames must be \[1 or 1, 1\], got \[1\]"),
    "a list": ({"kv_frames": [[0, 1]]}, "kv_frames must be a torch.Tensor, got list"),
    "gradient": ({"q": Q.clone().requires_grad_()}, "has no gradient"),
    "impl": ({"impl": "cudnn"}, "has no implementation 'cudnn'; legal: auto, reference, triton"),
}


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_slot_that_32_bits_cannot_count_is_not_for_the_triton_kernel(name):
    def problem(stride):
        strides = {"k": (0, stride, D, 1), "v": (0, 16 * H * D, 16 * D, stride, 1)}[name]
        shape = {"k": RING.k, "v": RING.v}[name].shape
        ring = {"k": RING.k, "v": RING.v, name: torch.empty_strided(shape, strides, dtype=E4M3, device="meta")}
        scales = RING.k_scales, RING.v_scales, None
        return triton_problem(Float8Inputs(Q, ring["k"], ring["v"], *scales, **IDS))

    most = 2**31 // {"k": 5, "v": D}[name]
    assert problem(most - 1) == "" and f"a slot of {name} within 2147483648 numbers" in problem(most + 1)


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(what):
    changed, said = WRONG[what]
    with pytest.raises(ValueError, match=said) as error:
        call(**changed)
    assert str(error.value).startswith("attention_fp8: ") and "\n" not in str(error.value)


def test_an_explicit_triton_says_what_it_takes():
    assert "needs a CUDA tensor" in refusal(lambda: call(impl="triton"))


def test_the_hopper_kernel_says_what_it_needs():
    line = refusal(lambda: call(impl="gluon"))
    assert line == "attention_fp8: impl='gluon' cannot run: it needs a Hopper GPU (sm_90), got cpu"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda a: a, None),
        (lambda a: {**a, "q_scales": None, "q": a["q"].float()}, "it takes q in 8 bits, beside q_scales"),
        (lambda a: {**a, "q": a["q"].expand(2, -1, -1, -1), "k": a["k"].expand(2, -1, -1, -1)}, "of their own"),
        (lambda a: {**a, "q": torch.zeros(1, 2, 5, 128, dtype=E4M3).transpose(1, 2)}, "heads side by side"),
        (
            lambda a: {**a, "v": torch.zeros(1, 2, 128, 2, 16, dtype=E4M3).transpose(2, 3)},
            "it takes v with dense slots",
        ),
        (lambda a: {**a, "k_scales": torch.ones(1, 2, 2).transpose(1, 2)}, "it takes k_scales with dense slots"),
        (lambda a: {**a, "q": a["q"][:, :0], "q_frames": torch.zeros(1, 0)}, "it takes at least one token, got q"),
    ],
)
def test_what_the_hopper_kernel_takes(change, line):
    ring, (q, q_scales) = Ring.random(1, 2, 5, 2, 128), quantize_last(queries(1, 5, 2, 128))
    names = ("k", "v", "k_scales", "v_scales")
    given = {"q": q, "q_scales": q_scales, **dict(zip(names, ring.arguments, strict=True)), **IDS}
    said = gluon.unfit(Float8Inputs(**change(given)))
    assert said is None if line is None else line in said
