"""Attention through libraries: layouts, parts that are merged, the call of every package, and what auto chooses."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels import BlockCausal, KVContext, attention, attention_layout, reference
from hiar_kernels.attention import library, table
from hiar_kernels.attention.layout import Group

pytestmark = pytest.mark.cpu

TOKENS, HEADS, DIM = 3, 2, 8


def normal(rows: int, slots: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, slots * TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64).to(dtype)


def refusal(call) -> str:
    with pytest.raises(ValueError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Layouts


def test_a_layout_is_runs_of_slots():
    mask = BlockCausal(TOKENS, 3, window_frames=7, sink_frames=1)
    ring = [0, 12, 13, 14, 8, 9, 10, 11]  # slot 4, frame 8: only the first block's window of 6 and the sink reaches it
    found = attention_layout(mask, [[9, 10, 11, 12, 13, 14]], [ring])
    assert found.rows == ((Group((0, 3), (), ((0, 1), (4, 8))), Group((3, 6), (), ((0, 4), (5, 8)))),)
    by_rule = mask.visible(torch.tensor([[9, 12]]), torch.tensor([ring]), 1)[0]
    for group, seen in zip(found.rows[0], by_rule.tolist(), strict=True):
        assert [slot for start, stop in group.own for slot in range(start, stop)] == [
            i for i, visible in enumerate(seen) if visible
        ]


def test_a_layout_of_alike_rows_is_one_row():
    mask = BlockCausal(1, 2, window_frames=(4, 4))
    alike = attention_layout(mask, [[4, 5]], [[2, 3, 4, 5]])
    assert len(alike.rows) == 1
    unlike = attention_layout(BlockCausal(1, 2, window_frames=(2, 4)), [[4, 5]], [[2, 3, 4, 5]])
    assert [row[0].own for row in unlike.rows] == [((2, 4),), ((0, 4),)]
    assert unlike.select(0, 2) == unlike and unlike.select(1, 2).rows == (unlike.rows[1],)
    assert len({alike, attention_layout(mask, torch.tensor([[4, 5]]), [[2, 3, 4, 5]])}) == 1  # keys of a dictionary


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_layout_gives_the_oracles_result(data):
    block = data.draw(st.integers(1, 3), "block")
    sink = data.draw(st.integers(0, 2), "sink")
    rows = data.draw(st.integers(1, 2), "rows")
    window = st.none() | st.integers(sink + block, sink + 3 * block)
    mask = BlockCausal(TOKENS, block, tuple(data.draw(window) for _ in range(rows)), sink)
    last = data.draw(st.integers(1, 4), "blocks") * block
    ring = data.draw(st.permutations([*range(last), -1]), "ring")
    queries = list(range(max(0, last - 2 * block), last))
    parts = data.draw(st.integers(1, 4), "parts")
    q, k, v = normal(rows, len(queries), 1), normal(rows, len(ring), 2), normal(rows, len(ring), 3)
    empty = ring.index(-1) * TOKENS
    k[:, empty : empty + TOKENS] = v[:, empty : empty + TOKENS] = torch.nan
    ids = {"q_frames": torch.tensor([queries]), "kv_frames": torch.tensor([ring])}
    layout = attention_layout(mask, [queries], [ring], rows=rows)
    out, lse = attention(q, k, v, mask=mask, **ids, layout=layout, impl="sdpa", parts=parts, return_lse=True)
    wanted, wanted_lse = reference.attention(q, k, v, mask=mask, **ids, return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=1e-12)


def test_a_given_layout_is_all_that_is_read():
    """Ids are then not looked at on the host: a device would be waited for."""
    mask = BlockCausal(TOKENS, 2, window_frames=4)
    q, k = normal(1, 2), normal(1, 4, 1)
    layout = attention_layout(mask, [[4, 5]], [[4, 5, 2, 3]])
    wrong = {"q_frames": torch.tensor([[0, 1]]), "kv_frames": torch.tensor([[-1, -1, -1, -1]])}
    found = attention(q, k, k, mask=mask, **wrong, layout=layout, impl="sdpa")
    torch.testing.assert_close(found, reference.attention(q, k, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_keep_the_error_budget(dtype):
    q, k, v = (normal(1, n, seed, dtype) for n, seed in ((2, 1), (400, 2), (400, 3)))
    exact = reference.attention(q.double(), k.double(), v.double())
    eager = attention(q, k, v, impl="reference")
    for parts in (1, 2, 3):
        assert_within_budget(attention(q, k, v, impl="sdpa", parts=parts), eager, exact, f"{parts} parts")


def test_keys_are_cut_evenly_at_whole_tiles():
    k = normal(1, 400)
    assert [part[0].shape[1] for part in library._cut([k], [k], 3)] == [512, 512, 176]
    for parts in (1, 2, 3, 5):
        cut = library._cut([k], [k], parts)
        assert len(cut) == parts and sum(part.shape[1] for part, _ in cut) == k.shape[1]
        assert all(part.shape[1] % 128 == 0 for part, _ in cut[:-1])
        assert all(part.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() for part, _ in cut)
    assert len(library._cut([k[:, :100]], [k[:, :100]], 4)) == 1  # less than a tile


def test_a_gradient_needs_one_part():
    mask = BlockCausal(TOKENS, 2)
    q, k = normal(1, 4).requires_grad_(), normal(1, 4, 1).requires_grad_()
    context = KVContext(normal(1, 4, 2), normal(1, 4, 3), torch.tensor([[0, 1, 2, 3]]))
    ids = {"q_frames": torch.tensor([[2, 3, 4, 5]]), "kv_frames": torch.tensor([[2, 3, 4, 5]])}
    layout = attention_layout(mask, ids["q_frames"], ids["kv_frames"], context.frames)
    grads = []
    for options in ({"impl": "reference"}, {"impl": "sdpa", "layout": layout, "parts": 3}):
        out = attention(q, k, k, mask=mask, **ids, context=context, **options)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k)))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    line = refusal(lambda: attention(q, k, k, return_lse=True, impl="sdpa"))
    assert line == "attention: impl='sdpa' has no gradient with return_lse; use 'reference'"


# Libraries that are not here


@pytest.mark.parametrize("impl", library.PACKAGES)
def test_the_call_of_a_package(impl, monkeypatch):
    """By a stand-in with the package's signature: which option asks for the logsumexp, and where it comes back."""

    def two_and_three(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        out, lse = reference.attention(q, k, v, scale=softmax_scale, return_lse=True)
        return (out, lse, None) if return_attn_probs else out

    def four(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        out, lse = reference.attention(q, k, v, scale=softmax_scale, return_lse=True)
        return (out, lse) if return_lse else (out, None)

    module = ModuleType(library.PACKAGES[impl])
    module.flash_attn_func = four if impl == "flash-attn-4" else two_and_three
    for name in {"flash_attn", library.PACKAGES[impl]}:
        monkeypatch.setitem(sys.modules, name, module)
    library._packaged.cache_clear()
    monkeypatch.setattr(library, "unavailable", lambda *_: None)
    q, k, v = (normal(1, n, seed, torch.bfloat16) for n, seed in ((2, 1), (200, 2), (200, 3)))
    eager, exact = reference.attention(q, k, v), reference.attention(q.double(), k.double(), v.double())
    for parts in (1, 2):
        assert_within_budget(attention(q, k, v, impl=impl, parts=parts), eager, exact, f"{parts} parts")
    library._packaged.cache_clear()


def test_a_library_that_cannot_run_says_why():
    q = torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16)
    for impl in ("cudnn", "flash"):
        line = refusal(lambda impl=impl: attention(q, q, q, impl=impl))
        assert line == f"attention: impl={impl!r} cannot run: it needs a CUDA device, got cpu"
    line = refusal(lambda: attention(q, q, q, impl="flash-attn-3"))
    assert line == "attention: impl='flash-attn-3' cannot run: flash_attn_interface is not installed"
    line = refusal(lambda: attention(q, q, q, impl="flash-attn-4"))
    assert line == "attention: impl='flash-attn-4' cannot run: flash_attn.cute is not installed"


def test_wrong_layouts_and_parts_are_refused():
    mask = BlockCausal(TOKENS, 2)
    q, k = normal(1, 2), normal(1, 4, 1)
    ids = {"q_frames": torch.tensor([[2, 3]]), "kv_frames": torch.tensor([[0, 1, 2, 3]])}

    def call(layout, **options):
        return lambda: attention(q, k, k, mask=mask, **ids, layout=layout, **options)

    good = attention_layout(mask, **ids)
    assert refusal(call(good, parts=0)) == "attention: parts must be at least 1, got 0"
    longer = attention_layout(mask, [[4, 5]], [[0, 1, 2, 3, 4, 5]])
    assert refusal(call(longer)) == "attention: layout has 6 slots of own keys, there are 4"
    shorter = attention_layout(mask, [[3]], [[0, 1, 2, 3]])
    assert refusal(call(shorter)) == "attention: layout has 1 slots of queries, there are 2"
    other = attention_layout(BlockCausal(1, 2), **ids)
    assert "layout is of 1 frame_tokens and 1 rows, the mask of 3 and q of 1" in refusal(call(other))
    line = refusal(lambda: attention(q, k, k, layout=good))
    assert line == "attention: layout needs the BlockCausal mask that it was made of, got mask=None"
    line = refusal(lambda: attention_layout(BlockCausal(1, 1, (1, 2)), [[0]] * 3, [[0]]))
    assert line == "attention_layout: windows and ids have [2, 3, 1] rows; each must have 1 or 3"


# What auto chooses

ROW = {
    "architecture": 90, "shape": "visit", "impl": "cudnn", "parts": 2, "milliseconds": 1.5,
    "others": {"triton": 1.75, "flash": 2.0}, "source": "GPU, 2026-01-01, 0123abc",
}  # fmt: skip


def decide(shape="visit", architecture=90, rows=(ROW,), runs=lambda impl: True, **options):
    options = {"known": True, "counts": False, "return_lse": False, "trains": False, **options}
    return table.decide(architecture, shape, runs=runs, table=[table.Winner(**row) for row in rows], **options)


def test_what_was_measured_decides():
    found = decide()
    assert (found.impl, found.parts) == ("cudnn", 2)
    assert found.why == (
        "sm_90 visit: cudnn in 2 parts 1.500 ms (others: triton 1.750, flash 2.000), GPU, 2026-01-01, 0123abc"
    )
    assert decide("pair").impl == decide(architecture=80).impl == "sdpa"
    assert decide("pair").why == "nothing measured for pair on sm_90: torch's own choice"


def test_what_cannot_run_is_not_chosen():
    assert decide(known=False).impl == "triton"  # a library would read the ids from the device
    assert decide(runs=lambda impl: impl != "cudnn").impl == "sdpa"
    assert decide(known=False, runs=lambda impl: False).impl == "sdpa"
    assert decide(rows=[{**ROW, "impl": "triton", "parts": 1}], known=False).why.startswith("sm_90 visit: triton")
    assert decide(counts=True).impl == "sdpa"
    assert decide("pair", return_lse=True).impl == "triton" and decide(return_lse=True, trains=True).impl == "reference"


def test_shape_classes():
    mask = BlockCausal(TOKENS, 2)
    context = KVContext(normal(1, 2), normal(1, 2), torch.tensor([[0, 1]]))
    one, two, many = normal(1, 2), normal(1, 4), normal(1, 400)
    found = [
        table.shape_class(one, two, mask, None, False),
        table.shape_class(two, two, mask, None, False),
        table.shape_class(two, two, mask, None, True),
        table.shape_class(two, two, mask, context, True),
        table.shape_class(two, one, None, None, False),
        table.shape_class(two, many, None, None, False),
    ]
    assert found == list(table.SHAPES)


def test_the_measured_file(tmp_path, monkeypatch):
    file = tmp_path / "measured.json"
    assert table.read(file) == ()
    file.write_text(json.dumps([ROW]))
    assert table.read(file)[0].others == ROW["others"]
    monkeypatch.setattr(table, "winners", lambda: table.read(file))
    assert "attention measured: sm_90 visit: cudnn in 2 parts 1.500 ms" in str(hk.backends())
    file.write_text(json.dumps([{**ROW, "shape": "square"}]))
    assert "unknown shape 'square'; legal: visit, pair, block_causal" in refusal(lambda: table.read(file))


def test_on_a_cpu():
    q = normal(1, 2)
    assert table.choose(q, q, None, None, None, None, False, False).impl == "sdpa"
    assert table.choose(q, q, None, None, None, None, True, False).impl == "reference"
