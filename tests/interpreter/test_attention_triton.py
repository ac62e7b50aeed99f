"""Attention in Triton, forward and backward, against plain softmax in float64."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from random import Random

import naive
import pytest
import test_attention as plain
import torch
from any_rule import any_ring, any_rule
from budget import assert_within_budget, normal
from refusals import refused
from test_attention import AttentionCase, gradient, ids, make
from torch import Tensor

from hiar_kernels import EMPTY, BlockCausal, KVContext, attention, attention_with_lse
from hiar_kernels.attention.inputs import AttentionInputs
from hiar_kernels.common import triton_loader

pytestmark = pytest.mark.interpreter

NAN = float("nan")
NAMES = ("q", "k", "v", "context.k", "context.v")
RING = plain.RING


def poison(case: AttentionCase) -> AttentionCase:
    """NaN wherever no query of the row looks: slots outside the window, later blocks, empty slots."""
    seen = case.seen.any(1)[..., None, None]
    parts = [case.k, case.v] if case.context is None else [case.context.k, case.context.v, case.k, case.v]
    split = 0 if case.context is None else case.context.k.shape[1]
    for i, x in enumerate(parts):
        held = seen[:, split:] if case.context is None or i >= 2 else seen[:, :split]
        x.copy_(x.masked_fill(~held, NAN))
    return case


def bidirectional(tq: int, tk: int, counts: list[list[int]] | None = None, scale: float | None = None, width: int = 16):
    options: dict = {} if counts is None else {"kv_counts": torch.tensor(counts, dtype=torch.float32)}
    q, (k, v) = normal(2, tq, 2, width, seed=1), normal(2, 2, tk, 2, width, seed=2)
    return AttentionCase(q, k, v, options=options | ({} if scale is None else {"scale": scale}))


def default_ids() -> AttentionCase:
    case = make([[4, 5, 6, 7]], [[4, 5, 6, 7]], {"block": 2, "first": 4}, tokens=9, width=16)
    case.options = {}
    return case


def default_ids_beside_a_context() -> AttentionCase:
    case = make([[0, 1, 2]] * 2, [[0, 1, 2]], {"block": 2}, context=[[0, 1, EMPTY]], tokens=5, width=16)
    case.options = {}
    return case


# In the interpreter a tile is 16 to 32 wide: frames of 3 tokens share tiles, those of 40 fill several.
CASES = {
    "one token": lambda: bidirectional(1, 1),
    "odd lengths": lambda: bidirectional(13, 71, width=64),
    "own scale": lambda: bidirectional(5, 37, scale=0.7),
    "negative scale": lambda: bidirectional(5, 37, scale=-0.2),
    "no scale": lambda: bidirectional(5, 37, scale=0.0),
    "counts": lambda: bidirectional(7, 40, [[1, 3, 0, 200] * 10, [0, 0, 2, 0] + [0] * 36]),
    "counts of all rows": lambda: bidirectional(7, 4, [[1, 1, 1, 509]], width=128),
    "ids by default": default_ids,
    "ids by default beside a context": default_ids_beside_a_context,
    "one frame of one token": lambda: make([[0]], [[0]], {"block": 1}, tokens=1, width=16),
    "block-causal": lambda: make([list(range(7))] * 2, [list(range(7))], tokens=5, width=32),
    "block-causal, wide frames": lambda: make([list(range(4))], [list(range(4))], {"block": 2}, tokens=35, width=16),
    "window and sink": lambda: make(
        [list(range(8))] * 2, [list(range(8))], {"block": 3, "sink": 1}, [5, None], tokens=4, width=16
    ),
    "short first block": lambda: make(
        [list(range(5))], [list(range(5))], {"block": 3, "first_block": 1}, [4], width=16
    ),
    "ring": lambda: make([[6, 7, 8]], [RING], {"block": 3, "sink": 1}, [6], width=16),
    "ring of wide frames, far on": lambda: make(
        [[1_000_006, 1_000_007]], [[f + 1_000_000 if f >= 0 else f for f in RING]],
        {"block": 2, "sink": 1, "first": 1_000_000}, [5], tokens=21, width=16,
    ),
    "pair": lambda: make([[3, 4, 5, 6, 7, 8]], [RING], {"block": 3}, [4], tokens=7, width=16),
    "rows at different steps": lambda: make(
        [[6, 7, 8], [3, 4, 5], [0, 1, 2]], [RING, [5, 4, 3, 2, 1, 0] + [EMPTY] * 3, [2, 0, 1] + [EMPTY] * 6],
        {"block": 3, "sink": 1}, [5, None, 4], tokens=6, heads=1, width=16,
    ),
    "nothing to see": lambda: make([[0, 1, 2, 6]], [[6, 7, 8, EMPTY]], {"block": 3}, [3], width=16),
    "teacher forcing": lambda: make(
        [list(range(6))] * 2, [list(range(6))], {"block": 2, "sink": 1}, [3, 5], context=[list(range(6))], width=16
    ),
    "constant caches": lambda: make(
        [[0, 1, 2, 3, 4]] * 2, [[0, 1, 2, 3, 4]], {"block": 3, "first_block": 2}, [4, None],
        context=[[4, 0, EMPTY, 3, 1, 2], [0, EMPTY, EMPTY, 1, EMPTY, 2]], tokens=7, heads=1, width=16,
    ),
    "first block over empty caches": lambda: make([[0, 1]], [[0, 1]], {"block": 2}, context=[[EMPTY, EMPTY]], width=16),
}  # fmt: skip
NARROW = ("odd lengths", "counts", "window and sink", "pair", "nothing to see", "constant caches")  # in 16 bits too


def build(name: str) -> AttentionCase:
    case = CASES[name]()
    return case if case.seen is None else poison(case)


def run(case: AttentionCase, dtype: torch.dtype, device: torch.device, grad: bool = False):
    """(out, logsumexp) and the leaves, by Triton; everything comes back to the CPU."""
    leaves = [x.to(device, dtype).clone().requires_grad_(grad) for x in case.tensors()]
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in case.options.items()}
    context = None if case.context is None else KVContext(leaves[3], leaves[4], case.context.frames.to(device))
    out, lse = attention_with_lse(*leaves[:3], mask=case.mask, context=context, impl="triton", **options)
    assert out.is_contiguous() and out.dtype == dtype and lse.is_contiguous() and lse.dtype == torch.float32
    return out.cpu(), lse.cpu(), leaves


def assert_good(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> None:
    """Output, logsumexp and every gradient within the budget; the logsumexp takes part in the loss."""
    out, lse, leaves = run(case, dtype, device, grad=True)
    narrow = case.rounded(dtype)
    (exact, exact_lse), wanted = narrow.plain(grad=True)
    (eager, eager_lse), rough = narrow.plain(dtype, grad=True)
    assert_within_budget(out.detach(), eager.detach(), exact.detach())
    some = exact_lse > -math.inf
    assert torch.equal(lse == -math.inf, ~some)
    torch.testing.assert_close(lse.double()[some], exact_lse[some], rtol=1e-5, atol=1e-5)
    probe, other = normal(*exact.shape, seed=7).to(dtype), normal(*exact_lse.shape, seed=8).to(dtype) * some
    for o, s in ((out, lse), (eager, eager_lse), (exact, exact_lse)):
        ((o * probe.to(o.dtype)).sum() + (s.masked_fill(~some, 0) * other.to(s.dtype)).sum()).backward()
    terms = narrow.cancelling_terms(probe.double(), other.double())
    for name, a, b, c, size in zip(NAMES, leaves, rough, wanted, terms):
        found = gradient(a)
        assert found.is_contiguous()
        assert_within_budget(found.cpu(), gradient(b), gradient(c), f"gradient of {name}", size)


@pytest.mark.parametrize("name", CASES)
def test_float32(name, device, poisoned):
    assert_good(build(name), torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_sixteen_bits(name, dtype, device, poisoned):
    assert_good(build(name), dtype, device)


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_behind_a_hidden_key_matters(dtype, what, device):
    """The very bits of output and gradients that zeros there give; a row without a key gives 0."""
    results = []
    for fill in (0.0, what):
        case = CASES["counts"]()
        case.options["kv_counts"][1] = 0
        hidden = (case.options["kv_counts"] == 0)[..., None, None]
        case.k, case.v = case.k.masked_fill(hidden, fill), case.v.masked_fill(hidden, fill)
        out, lse, leaves = run(case, dtype, device, grad=True)
        out.float().square().sum().backward()
        assert (lse[0].isfinite()).all() and (lse[1] == -math.inf).all() and (out[1] == 0).all()
        grads = [leaf.grad.cpu() for leaf in leaves]
        assert all((grad[1] == 0).all() for grad in grads)
        assert all((grad.masked_fill(~hidden, 0) == 0).all() for grad in grads[1:])
        results.append([out.detach(), lse.detach(), *grads])
    assert results[0][0][0].abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("seed", range(8))
def test_any_ring_and_rule(seed, device):
    """The mask, so with a plain tolerance: the budget of a handful of numbers is a matter of luck."""
    random = Random(seed)
    _, arguments, windows, frames = any_rule(random)
    frames = frames[-7:]
    slots = any_ring(random, frames)
    queries = random.choices(frames, k=random.randint(1, 3))
    context = random.choice([None, [any_ring(random, frames)]])
    tokens = random.choice([2, 5])
    case = make([queries], [slots], arguments, list(windows[:1]), context=context, tokens=tokens, heads=1, width=16)
    case = poison(case)
    out, lse, leaves = run(case, torch.float32, device, grad=True)
    (exact, exact_lse), wanted = case.plain(grad=True)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)
    probe = normal(*exact.shape, seed=7)
    (out * probe.float()).sum().backward()
    (exact * probe).sum().backward()
    for name, a, b in zip(NAMES, leaves, wanted):
        assert (gradient(a).cpu().double() - gradient(b)).abs().max().item() < 1e-4, f"gradient of {name}"


# Shapes in memory


def test_strided_inputs(device, poisoned):
    """q out of a fused projection, keys and values rows of a ring of several steps: used as they lie."""
    case = build("rows at different steps")
    expected = run(case, torch.float32, device)[0]
    b, t, h, d = case.q.shape
    qkv = torch.full((b, t, 3, h, d), NAN, device=device)
    qkv[:, :, 1] = case.q.to(device)
    k, v = (torch.stack([x * NAN, x], 1).to(device, torch.float32)[:, 1] for x in (case.k, case.v))
    options = {key: x.to(device) for key, x in case.options.items()}
    out = attention(qkv[:, :, 1], k, v, mask=case.mask, impl="triton", **options)
    assert torch.equal(out.cpu(), expected)
    turned = [
        x.to(device, torch.float32).transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v)
    ]
    assert torch.equal(attention(*turned, mask=case.mask, impl="triton", **options).cpu(), expected)
    long = {key: x.long() for key, x in options.items()}
    assert torch.equal(attention(*turned, mask=case.mask, impl="triton", **long).cpu(), expected)


def test_no_queries_and_no_keys(device):
    q, k = torch.zeros(1, 3, 1, 16, device=device), torch.zeros(1, 0, 1, 16, device=device)
    out, lse = attention_with_lse(q, k, k, impl="triton")
    assert out.abs().max() == 0 and bool((lse == -math.inf).all())
    assert attention(k, q, q, impl="triton").shape == (1, 0, 1, 16)


def test_the_same_bits_every_time(device):
    case = build("constant caches")
    results = []
    for _ in range(2):
        out, _, leaves = run(case, torch.float32, device, grad=True)
        out.square().sum().backward()
        results.append([out.detach(), *[x.grad.cpu() for x in leaves]])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# What is not needed is not computed


def test_constant_caches_cost_no_gradient(device, monkeypatch):
    """The kernel over the context's keys is not launched; the other gradients have the same bits."""
    case = build("constant caches")
    out, _, everything = run(case, torch.float32, device, grad=True)
    out.square().sum().backward()
    from hiar_kernels.attention import triton_bwd

    launches = []
    kernel = triton_bwd._attention_bwd_dkdv_kernel

    class Counting:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launches.append(options["KEYS"])
                return kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(triton_bwd, "_attention_bwd_dkdv_kernel", Counting())
    tensors = [x.to(device, torch.float32) for x in case.tensors()]
    for wanted, expected in (((0, 1, 2), [triton_bwd.OWN.value]), ((0,), []), ((2,), [triton_bwd.OWN.value])):
        launches.clear()
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        options = {key: x.to(device) for key, x in case.options.items()}
        context = KVContext(leaves[3], leaves[4], case.context.frames.to(device))
        attention(*leaves[:3], mask=case.mask, context=context, impl="triton", **options).square().sum().backward()
        assert launches == expected
        for i, (leaf, other) in enumerate(zip(leaves, everything)):
            assert (leaf.grad is None) == (i not in wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, other.grad)


# Split keys, merging


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize(
    "name", ["odd lengths", "counts", "block-causal, wide frames", "rows at different steps", "constant caches"]
)
def test_split_keys(name, splits, device, poisoned):
    case = build(name)
    triton_loader.load("attention", case.q.to(device))
    from hiar_kernels.attention import _launch, triton_fwd

    config = replace(_launch.tile_for(case.q.to(device).float(), _launch.FORWARD), num_splits=splits)
    mask, options = case.mask, {key: x.to(device) for key, x in case.options.items()}
    context = case.context
    if context is not None:
        context = KVContext(*(x.to(device, torch.float32) for x in case.tensors()[3:]), context.frames.to(device))
    q, k, v = (x.to(device, torch.float32) for x in case.tensors()[:3])
    call = AttentionInputs(q, k, v, mask, context=context, **options)
    out, lse = triton_fwd.launch(*call.as_schema(), config=config)
    (exact, exact_lse), _ = case.rounded(torch.float32).plain()
    (eager, _), _ = case.plain(torch.float32)
    assert_within_budget(out.cpu(), eager, exact)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_how_many_splits(device):
    triton_loader.load("attention", torch.zeros(1, device=device))
    from hiar_kernels.attention.triton_fwd import choose_num_splits

    assert choose_num_splits(444, 32760, 132) == 2  # a visit of Wan 1.3B on 132 SMs: 3.5 waves for 4
    assert choose_num_splits(132, 32760, 132) == 1
    assert choose_num_splits(444, 512, 132) == 1  # text
    assert choose_num_splits(37, 32760, 132) == 3


# The op


def test_opcheck(device):
    case = build("constant caches")
    q, k, v, ck, cv = (x.to(device, torch.float32).nan_to_num(0).requires_grad_() for x in case.tensors())
    triton_loader.load("attention", q)
    frames = [x.to(device) for x in (case.options["q_frames"], case.options["kv_frames"], case.context.frames)]
    context = KVContext(ck, cv, frames[2])
    schema = AttentionInputs(q, k, v, case.mask, *frames[:2], context, None, 0.25).as_schema()
    assert schema[-3:] == ([7, 3, 0, 0, 2], [4, -1], 0.25)
    torch.library.opcheck(
        torch.ops.hiar.attention.default, schema,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    out, lse = torch.ops.hiar.attention(*schema)
    needed = [True, False, True, True, False]
    grads, kept = [torch.ones_like(out), torch.ones_like(lse)], [out.detach(), lse.detach()]
    arguments = [x.detach() for x in (q, k, v, ck, cv)]
    torch.library.opcheck(
        torch.ops.hiar.attention_backward.default,
        (grads, needed, kept, *arguments, *schema[5:]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            [torch.zeros(1, 2, 1, 16, dtype=torch.float64)] * 3,
            "takes q as bfloat16, float16 or float32, got torch.float64",
        ),
        ([torch.zeros(1, 2, 1, 24)] * 3, "has head_dim 16, 32, 64, 128, got 24"),
        (
            [torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 16, 2).transpose(2, 3)[:, :, :1], torch.zeros(1, 2, 1, 16)],
            "needs k with a last stride of 1, got 2",
        ),
        (
            [torch.zeros(1, 2, 1, 16), torch.zeros(1).expand(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)],
            "needs k with a last stride of 1, got 0",
        ),
    ],
)
def test_bad_input_is_one_line(tensors, message, device):
    with refused(re.escape(message)):
        attention(
            *(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in tensors), impl="triton"
        )


def test_the_rule_of_the_kernels_is_that_of_the_oracle(device):
    """Visible keys by what they do to the logsumexp: zero queries make it the logarithm of their number."""
    frames = list(range(9))
    for rule, window in (({"block": 3, "sink": 2}, 6), ({"block": 2, "first_block": 1}, None), ({"block": 4}, 5)):
        mask = BlockCausal(1, rule["block"], window, rule.get("sink", 0), 0, rule.get("first_block"))
        x = torch.zeros(1, 9, 1, 16, device=device)
        frame_ids = {"q_frames": ids(frames).to(device), "kv_frames": ids(frames).to(device)}
        _, lse = attention_with_lse(x, x, x, mask=mask, **frame_ids, impl="triton")
        seen = [sum(naive.sees(i, j, window=window, **rule) for j in frames) for i in frames]
        assert lse[0, 0].exp().round().int().tolist() == seen


def test_frame_ids_beyond_32_bit_sums_are_refused(device):
    x = torch.zeros(1, 1, 1, 16, device=device)
    largest = BlockCausal(1, 1, first_frame=2**30 - 1)
    assert attention(x, x, x, mask=largest, impl="triton").shape == x.shape
    beyond = BlockCausal(1, 1, first_frame=2**30)
    with pytest.raises(ValueError, match=r"takes frame ids below 1073741824, got mask.first_frame 1073741824"):
        attention(x, x, x, mask=beyond, impl="triton")
    context = KVContext(x, x, torch.zeros(1, 1, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="got mask.first_frame"):
        attention(x, x, x, mask=beyond, context=context, impl="triton")
