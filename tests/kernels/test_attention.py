"""Attention: every implementation against plain softmax in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import naive
import pytest
import torch
from budget import assert_within_budget, normal
from torch import Tensor

from hiar_kernels import EMPTY, BlockCausal, KVContext, attention, attention_with_lse, merge_attention, reference
from hiar_kernels.attention.inputs import AttentionInputs

pytestmark = pytest.mark.cpu

IMPLS = ("sdpa", "reference")
NAN = float("nan")


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@dataclass
class AttentionCase:
    """Arguments of one call, and its dense mask by the oracle ([B, Tq, Tk], keys of the context first)."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor | None = None
    mask: BlockCausal | None = None
    options: dict = field(default_factory=dict)
    context: KVContext | None = None

    def tensors(self) -> list[Tensor]:
        """q, k, v and the context's k and v."""
        return [self.q, self.k, self.v, *([] if self.context is None else [self.context.k, self.context.v])]

    def rounded(self, dtype: torch.dtype) -> AttentionCase:
        """float64 again, but with the values that a narrow dtype can hold."""
        q, k, v, *rest = (x.to(dtype).double() for x in self.tensors())
        context = None if self.context is None else KVContext(rest[0], rest[1], self.context.frames)
        return AttentionCase(q, k, v, self.seen, self.mask, self.options, context)

    def call(self, dtype: torch.dtype = torch.float64, **more: object):
        """The public function, with everything cast; and the leaves that gradients may be asked of."""
        grad = bool(more.pop("grad", False))
        leaves = [x.to(dtype).clone().requires_grad_(grad) for x in self.tensors()]
        context = None if self.context is None else KVContext(leaves[3], leaves[4], self.context.frames)
        function = attention_with_lse if more.pop("lse", False) else attention
        return function(*leaves[:3], mask=self.mask, context=context, **self.options, **more), leaves

    def plain(self, dtype: torch.dtype = torch.float64, grad: bool = False):
        """The same by the oracle."""
        leaves = [x.to(dtype).clone().requires_grad_(grad) for x in self.tensors()]
        k, v = leaves[1:3]
        if self.context is not None:
            k, v = torch.cat([leaves[3], k], 1), torch.cat([leaves[4], v], 1)
        counts, scale = self.options.get("kv_counts"), self.options.get("scale")
        if counts is not None:
            counts = counts.expand(len(k), -1)
        return naive.attend(leaves[0], k, v, self.seen, counts, scale), leaves

    def cancelling_terms(self, dout: Tensor, dlse: Tensor | float = 0.0) -> list[Tensor | None]:
        """For the gradient of each of tensors(): the sizes of what it is a difference of; None: a plain sum."""
        k, v, own = self.k, self.v, 0
        if self.context is not None:
            k, v, own = torch.cat([self.context.k, k], 1), torch.cat([self.context.v, v], 1), self.context.k.shape[1]
        counts = self.options.get("kv_counts")
        counts = None if counts is None else counts.double().expand(len(k), -1)
        dq, dk = naive.cancelling_terms(self.q, k, v, self.seen, counts, self.options.get("scale"), dout, dlse)
        return [dq, dk[:, own:], None, *([] if self.context is None else [dk[:, :own], None])]


def make(
    q_rows: list[list[int]], kv_rows: list[list[int]], rule: dict | None = None,
    windows: list[int | None] | None = None, context: list[list[int]] | None = None, tokens: int = 3, heads: int = 2,
    width: int = 8,
) -> AttentionCase:  # fmt: skip
    """Random tensors for rows of frame ids; keys and values of empty slots are NaN."""
    rule = rule or {"block": 3}
    b = len(q_rows)
    windows = windows or [None] * b
    q = normal(b, len(q_rows[0]) * tokens, heads, width, seed=1)

    def keys(rows: list[list[int]], seed: int) -> tuple[Tensor, Tensor]:
        rows = [list(row) for row in rows] * (b // len(rows))
        empty = (ids(*rows) == EMPTY).repeat_interleave(tokens, 1)
        k, v = normal(2, b, len(rows[0]) * tokens, heads, width, seed=seed)
        return k.masked_fill(empty[..., None, None], NAN), v.masked_fill(empty[..., None, None], NAN)

    k, v = keys(kv_rows, 2)
    every = [kv_rows[i % len(kv_rows)] for i in range(b)]
    earlier, ctx = [[]] * b, None
    if context is not None:
        earlier = [context[i % len(context)] for i in range(b)]
        ctx = KVContext(*keys(context, 3), ids(*context))
    seen = []
    for queries, own, before, w in zip(q_rows, every, earlier, windows):
        if context is None:
            rows = [[naive.sees(i, j, window=w, **rule) for j in own] for i in queries]
        else:
            both = [(True, j) for j in before] + [(False, j) for j in own]
            rows = [[naive.sees_beside_context(i, j, c, window=w, **rule) for c, j in both] for i in queries]
        seen.append(naive.spread(rows, tokens))
    mask = BlockCausal(
        tokens, rule["block"], tuple(windows), rule.get("sink", 0), rule.get("first", 0), rule.get("first_block")
    )
    return AttentionCase(q, k, v, torch.stack(seen), mask, {"q_frames": ids(*q_rows), "kv_frames": ids(*kv_rows)}, ctx)


def bidirectional(tq: int, tk: int, counts: list[list[int]] | None = None, scale: float | None = None) -> AttentionCase:
    options: dict = {} if counts is None else {"kv_counts": torch.tensor(counts, dtype=torch.float32)}
    q, (k, v) = normal(2, tq, 2, 8, seed=1), normal(2, 2, tk, 2, 8, seed=2)
    return AttentionCase(q, k, v, options=options | ({} if scale is None else {"scale": scale}))


def default_ids() -> AttentionCase:
    case = make([[4, 5, 6, 7, 8]] * 2, [[4, 5, 6, 7, 8]], {"block": 2, "first": 4})
    case.options = {}
    return case


RING = [7, EMPTY, 3, 0, 5, 8, EMPTY, 6, 4]  # wrapped, with two slots that hold nothing
CASES = {
    "one key": lambda: bidirectional(1, 1),
    "odd lengths": lambda: bidirectional(13, 37),
    "own scale": lambda: bidirectional(5, 7, scale=0.7),
    "counts": lambda: bidirectional(7, 5, [[1, 3, 0, 200, 1], [0, 0, 2, 0, 1]]),
    "counts of all rows": lambda: bidirectional(7, 4, [[1, 1, 1, 509]]),
    "block-causal": lambda: make([list(range(8))] * 2, [list(range(8))]),
    "ids by default": default_ids,
    "window and sink": lambda: make([list(range(11))], [list(range(11))], {"block": 3, "sink": 2}, [7]),
    "short first block": lambda: make([list(range(7))], [list(range(7))], {"block": 3, "first_block": 1}, [4]),
    "ring": lambda: make([[6, 7, 8]], [RING], {"block": 3, "sink": 1}, [6]),
    "ring, far on": lambda: make(
        [[1_000_006, 1_000_007, 1_000_008]], [[f + 1_000_000 if f >= 0 else f for f in RING]],
        {"block": 3, "sink": 1, "first": 1_000_000}, [5],
    ),
    "pair": lambda: make([[3, 4, 5, 6, 7, 8]], [RING], {"block": 3}, [4]),
    "rows at different steps": lambda: make(
        [[6, 7, 8], [3, 4, 5], [0, 1, 2]], [RING, [5, 4, 3, 2, 1, 0] + [EMPTY] * 3, [2, 0, 1] + [EMPTY] * 6],
        {"block": 3, "sink": 1}, [5, None, 4],
    ),
    "nothing to see": lambda: make([[0, 1, 2, 6]], [[6, 7, 8, EMPTY]], {"block": 3}, [3]),
    "teacher forcing": lambda: make(
        [list(range(9))] * 2, [list(range(9))], {"block": 3, "sink": 1}, [5, 9], context=[list(range(9))]
    ),
    "constant caches": lambda: make(
        [[0, 1, 2, 3, 4, 5, 6, 7]] * 2, [[0, 1, 2, 3, 4, 5, 6, 7]], {"block": 3, "first_block": 2}, [4, None],
        context=[[4, 0, EMPTY, 3, 1, 2], [0, EMPTY, EMPTY, 1, EMPTY, 2]],
    ),
    "first block over empty caches": lambda: make([[0, 1]], [[0, 1]], {"block": 2}, context=[[EMPTY, EMPTY]]),
}  # fmt: skip


def gradient(leaf: Tensor) -> Tensor:
    """None is zero: keys of a context that nobody sees."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@pytest.fixture(params=CASES)
def case(request) -> AttentionCase:
    return CASES[request.param]()


@pytest.mark.parametrize("impl", IMPLS)
def test_float64(case, impl):
    (expected, lse), _ = case.plain()
    out, _ = case.call(impl=impl)
    assert out.is_contiguous() and out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    if impl == "reference":
        again, found = case.call(impl=impl, lse=True)[0]
        assert torch.equal(again, out)
        torch.testing.assert_close(found, lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_in_float64(case, impl):
    """Of queries, keys, values and the context's; the output with gradients asked for as well."""
    (expected, _), wanted = case.plain(grad=True)
    out, found = case.call(impl=impl, grad=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    probe = normal(*expected.shape, seed=7)
    (expected * probe).sum().backward()
    (out * probe).sum().backward()
    for name, a, b in zip(("q", "k", "v", "context.k", "context.v"), found, wanted):
        assert gradient(a).sub(gradient(b)).abs().max() <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_error_budget(case, impl, dtype):
    (out, found), (again, _) = case.call(dtype, impl=impl, grad=True), case.call(dtype, impl=impl)
    narrow = case.rounded(dtype)
    ((exact, _), wanted), ((eager, _), plain) = narrow.plain(grad=True), narrow.plain(dtype, grad=True)
    assert_within_budget(again, eager.detach(), exact.detach())
    assert_within_budget(out.detach(), eager.detach(), exact.detach(), "output with gradients")
    probe = normal(*exact.shape, seed=7).to(dtype)
    (exact * probe.double()).sum().backward()
    (eager * probe).sum().backward()
    (out * probe).sum().backward()
    terms = narrow.cancelling_terms(probe.double())
    for name, a, b, c, size in zip(("q", "k", "v", "context.k", "context.v"), found, plain, wanted, terms):
        assert_within_budget(gradient(a), gradient(b), gradient(c), f"gradient of {name}", size)


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_caches_take_no_gradient(impl):
    """Training over caches: the context needs none, q, k and v get theirs."""
    case = CASES["constant caches"]()
    (expected, _), wanted = case.plain(grad=True)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = attention(*leaves, mask=case.mask, context=case.context, impl=impl, **case.options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert case.context.k.grad is None
    for a, b in zip(leaves, wanted):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["odd lengths", "counts", "ring", "pair", "nothing to see", "constant caches"])
def test_gradcheck(name, impl):
    case = CASES[name]()
    mask, options, context = case.mask, case.options, case.context
    tensors = [x[:, :, :1, :2] for x in (case.q, case.k, case.v)]
    if context is not None:
        tensors += [x[:, :, :1, :2] for x in (context.k, context.v)]

    def run(*x: Tensor) -> Tensor:
        ctx = None if context is None else KVContext(x[3], x[4], context.frames)
        return attention(*x[:3], mask=mask, context=ctx, impl=impl, **options)

    # empty slots hold zeros here: a numerical derivative cannot be had at NaN
    leaves = [x.nan_to_num(0).clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_a_query_that_sees_nothing():
    case = CASES["nothing to see"]()
    (out, lse), _ = case.call(lse=True)
    assert out[:, :9].abs().max() == 0 and (lse[..., :9] == -torch.inf).all()
    assert out[:, 9:].abs().min() > 0 and lse[..., 9:].isfinite().all()
    for impl in IMPLS:
        for grad in (False, True):
            out, _ = case.call(impl=impl, grad=grad)
            assert out[:, :9].abs().max() == 0
    hidden = bidirectional(3, 2, [[0, 0], [0, 1]])
    (out, lse), leaves = hidden.call(impl="reference", lse=True, grad=True)
    assert out[0].abs().max() == 0 and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    for grad in (False, True):
        out, leaves = hidden.call(impl="sdpa", grad=grad)
        assert out[0].abs().max() == 0
        if grad:
            out.sum().backward()
            assert all(leaf.grad.isfinite().all() for leaf in leaves)


COUNTS = {"shared by the rows": [[1, 0, 3, 1]], "a row without keys": [[1, 0, 3, 1], [0, 0, 0, 0]]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", [NAN, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("impl", [*IMPLS, "auto", "op", "compiled"])
def test_nothing_behind_a_hidden_key_matters(impl, counts, what, dtype):
    """Output and gradients have the very bits that they have with zeros there; a row without keys gives 0."""
    times = torch.tensor(COUNTS[counts], dtype=torch.float32)
    hidden = (times == 0).expand(2, -1)[..., None, None]
    q, k, v = normal(2, 3, 2, 8, seed=1), *normal(2, 2, 4, 2, 8, seed=2)
    results = []
    for fill in (0.0, what):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k.masked_fill(hidden, fill), v.masked_fill(hidden, fill))]
        schema = AttentionInputs(*leaves, kv_counts=times).as_schema()
        if impl == "op":
            out, _ = torch.ops.hiar.attention(*schema)
        elif impl == "compiled":
            out, _ = torch.ops.hiar.attention_eager(*schema[:-1], None, "auto", 0, False)
        else:
            out = attention(*leaves, kv_counts=times, impl=impl)
        out.float().square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    out, dq, *dkv = results[1]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert out[0].abs().min() > 0 and all((g[hidden.expand_as(g)] == 0).all() for g in dkv)
    if len(times) > 1:
        assert (out[1] == 0).all() and all((g[1] == 0).all() for g in (dq, *dkv))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_largest_scores_beside_a_hidden_key(impl):
    """A hidden key takes no share, however low the scores of the others are."""
    for dtype, low in ((torch.float32, -1e30), (torch.bfloat16, -1e30), (torch.float16, -3e4)):
        q, k = torch.ones(1, 1, 1, 1, dtype=dtype), torch.tensor([[low, 1.0]], dtype=dtype)[..., None, None]
        v = torch.tensor([[2.0, 5.0]], dtype=dtype)[..., None, None]
        out = attention(q, k, v, kv_counts=torch.tensor([[1.0, 0.0]]), scale=1.0, impl=impl)
        assert out.item() == 2.0


def test_counts_that_are_written_to():
    """What sdpa made of them for an earlier call is not used again; another dtype of queries has its own."""
    q, (k, v) = normal(2, 3, 2, 8, seed=1), normal(2, 2, 4, 2, 8, seed=2)
    times = torch.tensor([[1.0, 0.0, 3.0, 1.0]])
    for dtype in (torch.float64, torch.float32):
        for values in ([1.0, 0.0, 3.0, 1.0], [1.0, 2.0, 0.0, 1.0]):
            times.copy_(torch.tensor([values]))
            call = [x.to(dtype) for x in (q, k, v)]
            expected = reference.attention(*call, kv_counts=times)
            torch.testing.assert_close(attention(*call, kv_counts=times, impl="sdpa"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_no_keys_with_counts(impl):
    q, k = normal(2, 3, 2, 8).requires_grad_(), torch.zeros(2, 0, 2, 8, dtype=torch.float64).requires_grad_()
    out = attention(q, k, k, kv_counts=torch.zeros(1, 0), impl=impl)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


def test_slot_order_changes_nothing():
    """The same keys in any order of slots: only the order of summation differs."""
    ring = [0, 4, 5, 6, 7, 8]
    case = make([[6, 7, 8]], [ring], {"block": 3, "sink": 1}, [6])
    expected, _ = case.call()
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        tokens = (order[:, None] * 3 + torch.arange(3)).flatten()
        other = AttentionCase(case.q, case.k[:, tokens], case.v[:, tokens], None, case.mask, dict(case.options))
        other.options["kv_frames"] = ids([ring[i] for i in order])
        for impl in IMPLS:
            torch.testing.assert_close(other.call(impl=impl)[0], expected, rtol=0, atol=1e-14)


def test_a_pair_is_two_visits():
    """Queries of two blocks in one row, each with its own window: exactly the two rows apart."""
    pair, tokens = CASES["pair"](), 3
    both = pair.call()[0]
    for block, frames in enumerate(([3, 4, 5], [6, 7, 8])):
        own = slice(block * 3 * tokens, (block + 1) * 3 * tokens)
        options = {**pair.options, "q_frames": ids(frames)}
        alone = AttentionCase(pair.q[:, own], pair.k, pair.v, mask=pair.mask, options=options)
        torch.testing.assert_close(alone.call()[0], both[:, own], rtol=0, atol=1e-14)


def test_strided_rows_of_a_ring():
    """Caches are views [step, slot, H, D] of one tensor: rows of it are used as they lie."""
    case = CASES["rows at different steps"]()
    k, v = (torch.stack([x, x * 0 + NAN], 1)[:, 0] for x in (case.k, case.v))
    assert not k.is_contiguous()
    for impl in IMPLS:
        out = attention(case.q, k, v, mask=case.mask, impl=impl, **case.options)
        assert torch.equal(out, case.call(impl=impl)[0])


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cuts", [(20,), (1, 36), (5, 10, 30), (37,)])
def test_merged_parts_are_the_whole(dtype, cuts):
    q, (k, v) = normal(2, 9, 2, 8, seed=1).to(dtype), normal(2, 2, 37, 2, 8, seed=2).to(dtype)
    whole, lse = reference.attention_with_lse(q, k, v)
    pieces = zip(k.tensor_split(cuts, 1), v.tensor_split(cuts, 1))
    parts = [reference.attention_with_lse(q, *kv) for kv in pieces]
    out, found = merge_attention([o for o, _ in parts], [s for _, s in parts])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(out, whole, rtol=0, atol=tolerance)
    torch.testing.assert_close(found, lse, rtol=0, atol=2 * tolerance)
    assert out.is_contiguous() and found.dtype == dtype


def test_merging_with_parts_that_saw_nothing():
    q, (k, v) = normal(1, 5, 2, 8, seed=1), normal(2, 1, 7, 2, 8, seed=2)
    whole, lse = reference.attention_with_lse(q, k, v)
    nothing, never = torch.full_like(whole, NAN), torch.full_like(lse, -torch.inf)
    for outs, lses in (([whole, nothing], [lse, never]), ([nothing, nothing, whole], [never, never, lse])):
        out, found = merge_attention(outs, lses)
        assert torch.equal(out, whole) and torch.equal(found, lse)
    out, found = merge_attention([nothing, nothing], [never, never])
    assert out.abs().max() == 0 and (found == -torch.inf).all()


def test_gradients_of_merging_with_parts_that_saw_nothing():
    q, (k, v) = normal(1, 5, 2, 8, seed=1), normal(2, 1, 7, 2, 8, seed=2)
    out, lse = (x.requires_grad_() for x in reference.attention_with_lse(q, k, v))
    nothing, never = torch.full_like(out, NAN, requires_grad=True), torch.full_like(lse, -torch.inf, requires_grad=True)
    for outs, lses, expected in (([out, nothing], [lse, never], 1.0), ([nothing, nothing], [never, never], 0.0)):
        merged, merged_lse = merge_attention(outs, lses)
        gradients = torch.autograd.grad(
            (merged.sum(), merged_lse.nan_to_num(neginf=0).sum()), (outs[0], lses[0], nothing, never)
        )
        for gradient, number in zip(gradients, (expected, expected, 0.0, 0.0)):
            torch.testing.assert_close(gradient, torch.full_like(gradient, number))


def test_merging_parts_of_a_ring():
    """The ring cut in two, as a kernel splits it: some queries see one half only, some none."""
    case = make([[6, 7, 8], [0, 1, 2]], [RING, [EMPTY] * 9], {"block": 3, "sink": 1}, [5, 4])
    (whole, lse), _ = case.call(lse=True)
    parts = []
    for half in (slice(0, 4), slice(4, 9)):
        tokens = slice(half.start * 3, half.stop * 3)
        part = AttentionCase(case.q, case.k[:, tokens], case.v[:, tokens], None, case.mask, dict(case.options))
        part.options["kv_frames"] = case.options["kv_frames"][:, half]
        parts.append(part.call(lse=True)[0])
    out, found = merge_attention([o for o, _ in parts], [s for _, s in parts])
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(found, lse, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_budget_of_merging(dtype):
    q, (k, v) = normal(2, 9, 2, 8, seed=1), normal(2, 2, 37, 2, 8, seed=2)
    parts = [reference.attention_with_lse(q, *kv) for kv in zip(k.split(19, 1), v.split(19, 1))]
    outs, lses = [o.to(dtype) for o, _ in parts], [s.float() for _, s in parts]

    def plain(outs, lses):
        weights = torch.softmax(torch.stack(lses), 0).transpose(2, 3)[..., None]
        return (weights * torch.stack(outs)).sum(0)

    out, _ = merge_attention(outs, lses)
    exact = plain([o.double() for o in outs], [s.double() for s in lses])
    assert_within_budget(out, plain(outs, [s.to(dtype) for s in lses]), exact)
