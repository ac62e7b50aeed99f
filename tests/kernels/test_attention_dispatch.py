"""Attention through libraries: layouts, splits of the keys, the call of every package, and what auto chooses."""

from __future__ import annotations

import functools
import json
import re
import sys
import warnings
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from torch import Tensor
from torch._subclasses import fake_tensor

import hiar_kernels as hk
from hiar_kernels import (
    AttentionLayout,
    BlockCausal,
    KVContext,
    attention,
    attention_layout,
    attention_with_lse,
    reference,
)
from hiar_kernels.attention import dispatch, library, selection
from hiar_kernels.attention.inputs import AttentionInputs
from hiar_kernels.attention.layout import Group, even_cut
from hiar_model.cli.doctor import report

pytestmark = pytest.mark.cpu

TOKENS, HEADS, DIM = 3, 2, 8


def normal(rows: int, slots: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, slots * TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64).to(dtype)


# Layouts


def test_a_layout_is_runs_of_slots():
    mask = BlockCausal(TOKENS, 3, window_frames=7, sink_frames=1)
    ring = [0, 12, 13, 14, 8, 9, 10, 11]  # slot 4, frame 8: only the first block's window of 6 and the sink reaches it
    found = attention_layout(mask, [[9, 10, 11, 12, 13, 14]], [ring])
    assert found.rows == ((Group((0, 3), (), ((0, 1), (4, 8))), Group((3, 6), (), ((0, 4), (5, 8)))),)
    later = found.rows[0][1]
    assert found.select(0, 1, 3).rows == ((replace(later, queries=(0, 3)),),)
    assert found.select(0, 1, 4).rows == ((replace(later, queries=(0, 2)),),)
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
    splits = data.draw(st.integers(1, 4), "splits")
    q, k, v = normal(rows, len(queries), 1), normal(rows, len(ring), 2), normal(rows, len(ring), 3)
    empty = ring.index(-1) * TOKENS
    k[:, empty : empty + TOKENS] = v[:, empty : empty + TOKENS] = torch.nan
    ids = {"q_frames": torch.tensor([queries]), "kv_frames": torch.tensor([ring])}
    layout = attention_layout(mask, [queries], [ring], rows=rows)
    out, lse = attention_with_lse(q, k, v, mask=mask, **ids, layout=layout, impl="sdpa", num_splits=splits)
    wanted, wanted_lse = reference.attention_with_lse(q, k, v, mask=mask, **ids)
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


# Splits of the keys


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_even_cut_covers_every_key_once(data):
    edges = sorted(data.draw(st.sets(st.integers(0, 40), min_size=2, max_size=8), "edges"))
    runs = tuple(zip(edges[::2], edges[1::2], strict=False))
    rows = data.draw(st.integers(1, 5), "rows")
    cut = even_cut(runs, rows)
    keys = [key for start, stop in runs for key in range(start, stop)]
    longest = max(stop - start for start, stop in runs)
    if cut is None:
        assert longest < rows
        return
    starts = [cut.first + row * cut.step for row in range(rows)]
    covered = [key for start in starts for key in range(start, start + cut.length)]
    rest = [key for start, stop in cut.rest for key in range(start, stop)]
    assert sorted(covered + rest) == keys
    assert cut.length >= longest // rows - 1 and all(start < stop for start, stop in cut.rest)


def test_the_rows_of_rings():
    """Whole rings, shorter ones, a window that has moved on, a sink before it; of two frames' tokens, 10 each."""
    assert even_cut(((0, 210),), 2) == (0, 105, 105, ())  # a cut between frames would leave one of 21
    assert even_cut(((0, 21),), 2) == (0, 9, 9, ((18, 21),))  # never a single key: cuDNN may refuse it
    assert even_cut(((0, 210),), 4) == (0, 52, 52, ((208, 210),))
    assert even_cut(((0, 100), (130, 240)), 2) == (0, 130, 100, ((230, 240),))
    assert even_cut(((0, 10), (40, 240)), 2) == (40, 100, 100, ((0, 10),))
    assert even_cut(((0, 30), (50, 80), (100, 140)), 3) == (0, 50, 30, ((130, 140),))
    assert even_cut(((0, 30), (45, 90), (120, 150)), 3) == (0, 60, 30, ((45, 60),))  # the middle row within a run
    assert even_cut(((0, 1), (3, 4)), 3) is None and even_cut((), 2) is None


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every call of a library."""
    made, partial = [], library.partial
    monkeypatch.setattr(library, "partial", lambda *given: made.append(given[1:3]) or partial(*given))
    return made


RINGS = {  # slots of a ring of 8 frames with a window of 7 that queries 9..11 see; calls and their keys, in tokens
    "all of it": ([3, 4, 5, 6, 7, 8, 9, 10, 11][1:], 0, [(2, 4 * TOKENS)]),
    "an odd number": ([5, 6, 7, 8, 9, 10, 11, -1], 0, [(2, 9), (1, 3)]),
    "two equal runs": ([9, 10, 11, -1, 6, 7, 8, -1], 0, [(2, 3 * TOKENS)]),
    "a sink": ([0, -1, 6, 7, 8, 9, 10, 11], 1, [(2, 3 * TOKENS), (1, TOKENS)]),
}


@pytest.mark.parametrize("name", RINGS)
def test_splits_are_rows_of_one_launch(name, calls):
    ring, sink, expected = RINGS[name]
    mask = BlockCausal(TOKENS, 3, window_frames=8, sink_frames=sink)
    q, k, v = normal(1, 3, 1), normal(1, 8, 2), normal(1, 8, 3)
    hidden = torch.tensor(ring).repeat_interleave(TOKENS) < 0
    k[:, hidden] = v[:, hidden] = torch.nan
    ids = {"q_frames": torch.tensor([[9, 10, 11]]), "kv_frames": torch.tensor([ring])}
    layout = attention_layout(mask, **ids)
    found = attention_with_lse(q, k, v, mask=mask, **ids, layout=layout, impl="sdpa", num_splits=2)
    for got, wanted in zip(found, reference.attention_with_lse(q, k, v, mask=mask, **ids), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert [tuple(keys.shape[:2]) for _, keys in calls] == expected
    queries, keys = calls[0]
    assert queries.stride(0) == 0, "queries were copied"
    assert keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr(), "keys were copied"


def test_splits_of_several_videos_and_of_a_context(calls):
    """Each video by itself; of own keys and a context the longer is cut, the other is the rest."""
    q, k = normal(2, 2, 1), normal(2, 4, 2)
    found = attention(q, k, k, impl="sdpa", num_splits=2)
    torch.testing.assert_close(found, reference.attention(q, k, k), rtol=0, atol=1e-12)
    assert [tuple(keys.shape[:2]) for _, keys in calls] == [(2, 2 * TOKENS)] * 2
    calls.clear()
    mask = BlockCausal(TOKENS, 2)
    context = KVContext(normal(2, 4, 3), normal(2, 4, 4), torch.tensor([[0, 1, 2, 3]]))
    ids = {"q_frames": torch.tensor([[4, 5]]), "kv_frames": torch.tensor([[4, 5]])}
    q, k = normal(2, 2, 1), normal(2, 2, 2)
    options = {"mask": mask, **ids, "context": context}
    found = attention(q, k, k, **options, impl="sdpa", num_splits=2)
    torch.testing.assert_close(found, reference.attention(q, k, k, **options), rtol=0, atol=1e-12)
    assert [tuple(keys.shape[:2]) for _, keys in calls] == [(2, 2 * TOKENS), (1, 2 * TOKENS)] * 2


def test_more_splits_than_keys_are_one_call(calls):
    q, k = normal(1, 2), normal(1, 1, 1)
    found = attention(q, k, k, impl="sdpa", num_splits=4)
    torch.testing.assert_close(found, reference.attention(q, k, k), rtol=0, atol=1e-12)
    assert [keys.shape[1] for _, keys in calls] == [TOKENS]
    assert attention(q[:0], k[:0], k[:0], impl="sdpa", num_splits=2).shape == (0, 2 * TOKENS, HEADS, DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_keep_the_error_budget(dtype):
    q, k, v = (normal(1, n, seed, dtype) for n, seed in ((2, 1), (400, 2), (400, 3)))
    exact = reference.attention(q.double(), k.double(), v.double())
    eager = attention(q, k, v, impl="reference")
    for n in (1, 2, 3, 7):
        assert_within_budget(attention(q, k, v, impl="sdpa", num_splits=n), eager, exact, f"{n} splits")


def test_a_gradient_takes_no_splits():
    mask = BlockCausal(TOKENS, 2)
    q, k = normal(1, 4).requires_grad_(), normal(1, 4, 1).requires_grad_()
    context = KVContext(normal(1, 4, 2), normal(1, 4, 3), torch.tensor([[0, 1, 2, 3]]))
    ids = {"q_frames": torch.tensor([[2, 3, 4, 5]]), "kv_frames": torch.tensor([[2, 3, 4, 5]])}
    layout = attention_layout(mask, ids["q_frames"], ids["kv_frames"], context.frames)
    grads = []
    for options in ({"impl": "reference"}, {"impl": "sdpa", "layout": layout, "num_splits": 3}):
        out = attention(q, k, k, mask=mask, **ids, context=context, **options)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k)))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    line = refusal(lambda: attention_with_lse(q, k, k, impl="sdpa"))
    assert "impl='sdpa' has no gradient with a logsumexp" in line and "'triton' or 'reference'" in line


# Libraries that are not here


@pytest.mark.parametrize("impl", library.PACKAGES)
def test_the_call_of_a_package(impl, monkeypatch):
    """By a stand-in with the package's signature: which option asks for the logsumexp, and where it comes back."""

    def two_and_three(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        out, lse = reference.attention_with_lse(q, k, v, scale=softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    def four(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        out, lse = reference.attention_with_lse(q, k, v, scale=softmax_scale)
        return (out, lse) if return_lse else (out, None)

    module = ModuleType(library.PACKAGES[impl])
    module.flash_attn_func = four if impl == "flash-attn-4" else two_and_three
    for name in {"flash_attn", library.PACKAGES[impl]}:
        monkeypatch.setitem(sys.modules, name, module)
    library._packaged.cache_clear()
    monkeypatch.setattr(library, "unavailable", lambda *_: None)
    q, k, v = (normal(1, n, seed, torch.bfloat16) for n, seed in ((2, 1), (200, 2), (200, 3)))
    eager, exact = reference.attention(q, k, v), reference.attention(q.double(), k.double(), v.double())
    for n in (1, 2):
        assert_within_budget(attention(q, k, v, impl=impl, num_splits=n), eager, exact, f"{n} splits")
    library._packaged.cache_clear()


def test_a_library_that_cannot_run_says_why():
    q = torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16)
    for impl in ("cudnn", "flash"):
        line = refusal(lambda impl=impl: attention(q, q, q, impl=impl))
        assert f"impl={impl!r}" in line and "CUDA" in line and "cpu" in line
    line = refusal(lambda: attention(q, q, q, impl="flash-attn-3"))
    assert "'flash-attn-3'" in line and "flash_attn_interface" in line
    line = refusal(lambda: attention(q, q, q, impl="flash-attn-4"))
    assert "'flash-attn-4'" in line and "flash_attn.cute" in line


def test_wrong_layouts_and_splits_are_refused():
    mask = BlockCausal(TOKENS, 2)
    q, k = normal(1, 2), normal(1, 4, 1)
    ids = {"q_frames": torch.tensor([[2, 3]]), "kv_frames": torch.tensor([[0, 1, 2, 3]])}

    def call(layout, **options):
        return lambda: attention(q, k, k, mask=mask, **ids, layout=layout, **options)

    good = attention_layout(mask, **ids)
    assert "num_splits must be at least 1, got 0" in refusal(call(good, num_splits=0))
    longer = attention_layout(mask, [[4, 5]], [[0, 1, 2, 3, 4, 5]])
    assert "6 slots of own keys" in (line := refusal(call(longer))) and "4" in line
    shorter = attention_layout(mask, [[3]], [[0, 1, 2, 3]])
    assert "1 slots of queries" in (line := refusal(call(shorter))) and "2" in line
    other = attention_layout(BlockCausal(1, 2), **ids)
    assert "layout is of 1 frame_tokens and 1 rows, the mask of 3 and q of 1" in refusal(call(other))
    line = refusal(lambda: attention(q, k, k, layout=good))
    assert "layout needs the BlockCausal mask" in line and "mask=None" in line
    line = refusal(lambda: attention_layout(BlockCausal(1, 1, (1, 2)), [[0]] * 3, [[0]]))
    assert "[2, 3, 1] rows" in line and "1 or 3" in line


# What auto chooses

ROW = {
    "architecture": 90, "shape": "visit", "impl": "cudnn", "num_splits": 2, "milliseconds": 1.5,
    "others": {"triton": 1.75, "flash": 2.0}, "source": "GPU, 2026-01-01, 0123abc",
}  # fmt: skip


def decide(shape="visit", architecture=90, rows=(ROW,), runs=lambda impl: True, **options):
    options = {"layout_known": True, "counts": False, "return_lse": False, "trains": False, **options}
    measured = None if rows is None else [selection.Measurement(**row) for row in rows]
    return selection.decide(architecture, shape, runs=runs, table=measured, **options)


def test_what_was_measured_decides():
    found = decide()
    assert (found.impl, found.num_splits) == ("cudnn", 2)
    assert found.why == (
        "sm_90 visit: cudnn with num_splits=2 1.500 ms (others: triton 1.750, flash 2.000), GPU, 2026-01-01, 0123abc"
    )
    assert decide("pair").impl == decide(architecture=80).impl == "sdpa"
    assert decide("pair").why == "nothing measured for pair on sm_90: torch's own choice"


def test_what_cannot_run_is_not_chosen():
    assert decide(layout_known=False).impl == "triton"  # a library would read the ids from the device
    assert decide(runs=lambda impl: impl != "cudnn").impl == "sdpa"
    assert decide(layout_known=False, runs=lambda impl: False).impl == "sdpa"
    own = {**ROW, "impl": "triton", "num_splits": 1}
    assert decide(rows=[own], layout_known=False).why.startswith("sm_90 visit: triton")
    no_triton = lambda impl: impl != "triton"  # noqa: E731
    assert decide(counts=True).impl == decide(counts=True, return_lse=True).impl == "triton"
    assert decide(counts=True, trains=True).impl == decide(counts=True, runs=no_triton).impl == "sdpa"
    for options in ({}, {"trains": True}):
        assert decide("pair", return_lse=True, **options).impl == "triton"
    assert decide("pair", return_lse=True, runs=no_triton).impl == "flash"
    for options in ({"trains": True}, {"counts": True}, {"runs": lambda impl: False}):
        assert decide("pair", return_lse=True, **{"runs": no_triton, **options}).impl == "reference"


def test_the_first_row_that_can_run_wins():
    preferred = ("flash-attn-4", "cudnn", "triton", "sdpa")
    rows = [{**ROW, "impl": impl, "num_splits": 1, "others": {}} for impl in preferred]
    assert decide(rows=rows).impl == "flash-attn-4"
    assert decide(rows=rows, runs=lambda impl: impl != "flash-attn-4").impl == "cudnn"
    assert decide(rows=rows, runs=lambda impl: impl in ("sdpa", "triton")).impl == "triton"
    assert decide(rows=rows, layout_known=False).why == "sm_90 visit: triton 1.500 ms, GPU, 2026-01-01, 0123abc"


@pytest.fixture
def h200(monkeypatch):
    """As on that GPU: tensors without memory, for torch is asked only what it would run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)  # a driver that is not there
    with fake_tensor.FakeTensorMode():
        yield functools.partial(torch.empty, dtype=torch.bfloat16, device="cuda")


def test_what_runs_on_an_h200(h200):
    """By the table of the package, which says where every row is from."""
    chosen = selection.choices()
    ways = {shape: selection.label(choice.impl, choice.num_splits) for shape, choice in chosen.items()}
    assert ways == {
        "visit": "gluon", "pair": "gluon", "block_causal": "sdpa", "constant_context": "triton", "cross": "sdpa",
        "bidirectional": "sdpa",
    }  # fmt: skip
    second = decide(rows=None, runs=lambda impl: impl != "gluon")
    assert second.why.startswith("sm_90 visit: cudnn with num_splits=2 1.528 ms (others: gluon 1.326, cudnn 1.710")
    assert chosen["bidirectional"].why == "nothing measured for bidirectional on sm_90: torch's own choice"
    unknown = {shape: decide(shape, rows=None, layout_known=False).impl for shape in list(selection.SHAPES)[:4]}
    assert unknown == {"visit": "gluon", "pair": "gluon", "block_causal": "triton", "constant_context": "triton"}
    ways = {selection.label(row.impl, row.num_splits) for row in selection.measurements() if row.shape == "visit"}
    assert {"gluon", "cudnn with num_splits=2", "triton"} <= ways  # what is taken where it cannot run
    assert selection.measurements()
    source = r"NVIDIA \w+, torch [\w.+]+, cudnn \d+, triton [\d.]+, \d{4}-\d\d-\d\d, revision \w+"
    for row in selection.measurements():
        assert re.match(source, row.source) and row.milliseconds > 0, row
        assert selection.label(row.impl, row.num_splits) not in row.others and row.architecture == 90
    assert re.match(r"sm_90 visit: gluon 1\.\d+ ms \(others: .*cudnn", chosen["visit"].why)


def test_people_are_told_the_choices(monkeypatch):
    monkeypatch.setattr(selection, "choices", lambda: {"visit": decide(), "bidirectional": decide("bidirectional")})
    told = str(hk.backends()).splitlines()
    reason = f"cudnn with num_splits=2: {selection.Measurement(**ROW)}"
    assert f"attention, queries of one block over a ring: {reason}" in told
    lines = list(report())
    assert ("attention visit", reason) in lines
    why = "sdpa: nothing measured for bidirectional on sm_90: torch's own choice"
    assert ("attention bidirectional", why) in lines
    assert [line for topic, line in lines if topic == "attention measured"] == [
        str(m) for m in selection.measurements()
    ]


def test_videos_that_are_one_call_are_not_split(h200, monkeypatch):
    monkeypatch.setattr(selection.gluon, "unavailable", lambda device: "an older triton")
    mask = BlockCausal(TOKENS, 2, window_frames=(4, 6))
    ring = [[0, 1, 2, 3, 4, 5]]
    layout = attention_layout(BlockCausal(TOKENS, 2), [[4, 5]], ring)
    unlike = AttentionLayout(TOKENS, (((Group((0, 2), (), ((0, 6),))),), ((Group((0, 2), (), ((2, 6),))),)))

    def chosen(videos: int, layout: AttentionLayout) -> selection.Choice:
        q, k = (h200(videos, slots * TOKENS, HEADS, 64) for slots in (2, 6))
        return selection.choose(AttentionInputs(q, k, k, mask), layout)

    assert chosen(1, layout).num_splits == chosen(2, unlike).num_splits == 2
    assert chosen(2, layout).num_splits == 1
    assert chosen(2, layout).why.endswith("; uncut, for 2 videos are one call")


def test_shape_classes():
    mask = BlockCausal(TOKENS, 2)
    context = KVContext(normal(1, 2), normal(1, 2), torch.tensor([[0, 1]]))
    one, two, many = normal(1, 2), normal(1, 4), normal(1, 400)
    trained = two.clone().requires_grad_()
    found = [
        selection.shape_class(AttentionInputs(one, two, two, mask)),
        selection.shape_class(AttentionInputs(two, two, two, mask)),
        selection.shape_class(AttentionInputs(trained, two, two, mask)),
        selection.shape_class(AttentionInputs(trained, two, two, mask, context=context)),
        selection.shape_class(AttentionInputs(two, one, one)),
        selection.shape_class(AttentionInputs(two, many, many)),
    ]
    assert found == list(selection.SHAPES)


def test_the_measured_file(tmp_path, monkeypatch):
    file = tmp_path / "measured.json"
    assert selection.read(file) == ()
    file.write_text(json.dumps([ROW]))
    assert selection.read(file)[0].others == ROW["others"]
    monkeypatch.setattr(selection, "measurements", lambda: selection.read(file))
    assert "attention measured: sm_90 visit: cudnn with num_splits=2 1.500 ms" in str(hk.backends())
    wrong = {
        "unknown shape 'square'; legal: visit, pair, block_causal": {**ROW, "shape": "square"},
        "unknown impl 'cudn'; legal: sdpa, cudnn, flash": {**ROW, "impl": "cudn"},
        "unknown parts in a row; legal: architecture, shape, impl, num_splits": {**ROW, "parts": 2},
        "no source in a row; legal: architecture": {key: value for key, value in ROW.items() if key != "source"},
    }
    for said, row in wrong.items():
        file.write_text(json.dumps([row]))
        assert said in refusal(lambda: selection.read(file))


def test_on_a_cpu():
    q = normal(1, 2)
    assert selection.choose(AttentionInputs(q, q, q)).impl == "sdpa"
    assert selection.choose(AttentionInputs(q, q, q), return_lse=True).impl == "reference"


def test_the_eager_reference_on_a_gpu_is_not_silent(h200, monkeypatch):
    """A logsumexp with gradient in float64, which nothing else takes: one line says what it costs and why."""
    monkeypatch.setattr(selection.pointwise, "TRITON_INSTALLED", False)
    monkeypatch.setattr(dispatch.reference, "attention", lambda call: (call.q, call.q))
    q = h200(1, 4680, 12, 128, dtype=torch.float64).requires_grad_()
    k = h200(1, 32760, 12, 128, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"eager reference on cuda:0.* 13.7 GiB .*with gradient.*; install triton"):
        attention_with_lse(q, k, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_with_lse(q, k, k, impl="reference")  # asked for
