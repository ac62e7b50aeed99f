"""torch.compile(dynamic=True): one compilation serves every length, of each op and of the transformer.

A message that is made before it is needed (``require(fits, f"... {x.shape}")``) turns its lengths into constants.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import SHALLOW, TEXT
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import hiar_kernels as hk
from hiar_kernels import BlockCausal, KVContext
from hiar_kernels.common import triton_loader

pytestmark = pytest.mark.cpu
LENGTHS = (11, 13, 17, 19)  # equal to no other size: torch takes equal sizes to stay equal
HOOKS = ("_fuse_qkv", "_split_qkv")  # of loading: not traced
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def opaque(monkeypatch):
    """Ops are opaque to the compiler, as on a GPU; references stand in for the kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(triton_loader, "load", lambda op, tensor: None)
    with hk.prefer("triton"), torch.no_grad():
        yield
    torch._dynamo.reset()


def ids(n: int, rows: int = 1) -> Tensor:
    return torch.arange(n, dtype=torch.int32).repeat(rows, 1)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def heads(n: int) -> Tensor:
    return randn(2, n, 2, 4)


def rows(n: int, *more: int) -> Tensor:
    return torch.zeros(n, *more, dtype=torch.int32)


def append(n: int, shared: bool) -> list:
    slots = ids(n)[None] if shared else ids(n)
    rings = torch.zeros(2, 2, 3 * n + 6, 2, 4)
    return [
        randn(2, 3 * n, 24),
        randn(8),
        randn(8),
        ids(n),
        slots,
        *rings,
        *([torch.tensor([[1, 0]])] if shared else []),
    ]


def fp8_rings(n: int) -> list[Tensor]:
    """Of n slots and 3 tokens, for the heads of GRID."""
    caches = [torch.zeros(size, dtype=torch.uint8) for size in ((2, 3 * n, 2, 4), (2, n, 2, 4, 16))]
    return [*(x.view(torch.float8_e4m3fn) for x in caches), torch.ones(2, n, 2), torch.ones(2, n, 2)]


MASK = BlockCausal(2, 2, window_frames=3)
GRID = {"num_heads": 2, "grid": (1, 3)}
OPS: dict[str, tuple[Callable, Callable[[int], list]]] = {
    "attention": (hk.attention, lambda n: [heads(n), heads(n + 2), heads(n + 2)]),
    "attention with its logsumexp, of counts": (
        lambda q, k, v, c: hk.attention_with_lse(q, k, v, kv_counts=c),
        lambda n: [heads(5), heads(n), heads(n), torch.ones(1, n)],
    ),
    "attention by default ids": (lambda q, k, v: hk.attention(q, k, v, mask=MASK), lambda n: [heads(2 * n)] * 3),
    "attention over a ring": (
        lambda q, k, v, a, b: hk.attention(q, k, v, mask=MASK, q_frames=a, kv_frames=b),
        lambda n: [heads(2 * n), heads(2 * n + 14), heads(2 * n + 14), ids(n), ids(n + 7)],
    ),
    "attention beside a context": (
        lambda q, k, v, a, b, c: hk.attention(q, k, v, mask=MASK, context=KVContext(a, b, c)),
        lambda n: [heads(2 * n)] * 3 + [heads(2 * n + 14)] * 2 + [ids(n + 7)],
    ),
    "merge_attention": (
        lambda a, b, x, y: hk.merge_attention([a, b], [x, y]),
        lambda n: [heads(n), heads(n), randn(2, 2, n), randn(2, 2, n)],
    ),
    "qk_norm_rope": (
        lambda x, a, b, f: hk.qk_norm_rope(x, a, b, f, **GRID),
        lambda n: [randn(2, 3 * n, 24), randn(8), randn(8), ids(n)],
    ),
    "qk_norm_rope_append": (lambda *x: hk.qk_norm_rope_append(*x, **GRID), lambda n: append(n, False)),
    "qk_norm_rope_append to rows": (
        lambda *x: hk.qk_norm_rope_append(*x[:-1], rows=x[-1], **GRID), lambda n: append(n, True),
    ),
    "attention_fp8": (
        lambda *x: hk.attention_fp8(*x[:4], x[3], mask=BlockCausal(1, 2, 3), q_frames=x[4], kv_frames=x[5]),
        lambda n: [
            randn(2, n, 2, 16), randn(2, n + 7, 2, 16).to(torch.float8_e4m3fn),
            randn(2, n + 7, 2, 16, 16).to(torch.float8_e4m3fn), randn(2, n + 7, 2), ids(n), ids(n + 7),
        ],
    ),
    "append_fp8": (hk.append_fp8, lambda n: [*[heads(3 * n)] * 2, ids(n), *fp8_rings(n)]),
    "qk_norm_rope_append_fp8": (
        lambda *x: hk.qk_norm_rope_append_fp8(*x, quantize_q=True, **GRID),
        lambda n: [randn(2, 3 * n, 24), randn(8), randn(8), ids(n), ids(n), *fp8_rings(n)],
    ),
    "ada_layer_norm": (hk.ada_layer_norm, lambda n: [randn(2, 2 * n, 8), randn(2, n, 8), randn(2, n, 8)]),
    "layer_norm": (hk.layer_norm, lambda n: [randn(2, n, 8), randn(8), randn(8)]),
    "rms_norm": (hk.rms_norm, lambda n: [randn(2, n, 8), randn(8)]),
    "gated_residual": (hk.gated_residual, lambda n: [randn(2, 2 * n, 8), randn(2, 2 * n, 8), randn(1, n, 8)]),
    "gated_residual_ada_layer_norm": (
        hk.gated_residual_ada_layer_norm, lambda n: [randn(2, 2 * n, 8)] * 2 + [randn(1, n, 8)] * 3,
    ),
    "gated_residual_ada_layer_norm without a gate": (
        lambda x, y, *m: hk.gated_residual_ada_layer_norm(x, y, None, *m),
        lambda n: [randn(2, 2 * n, 8)] * 2 + [randn(1, n, 8)] * 2,
    ),
    "gated_residual_layer_norm": (
        hk.gated_residual_layer_norm, lambda n: [randn(2, 2 * n, 8)] * 2 + [randn(1, n, 8), randn(8), randn(8)],
    ),
    "ada_layer_norm_quantized": (
        hk.ada_layer_norm_quantized, lambda n: [randn(2, 2 * n, 8), randn(2, n, 8), randn(2, n, 8)],
    ),
    "gated_residual_ada_layer_norm_quantized": (
        hk.gated_residual_ada_layer_norm_quantized, lambda n: [randn(2, 2 * n, 8)] * 2 + [randn(1, n, 8)] * 3,
    ),
    "quantize_rows": (hk.quantize_rows, lambda n: [randn(2, n, 8)]),
    "int8_linear": (
        lambda x, w, b: hk.int8_linear(*(t for y in (x, w) for t in hk.quantize_rows(y, dtype=torch.int8)), b),
        lambda n: [randn(2, n, 8), randn(16, 8), randn(16)],
    ),
    "flow_step": (
        hk.flow_step, lambda n: [randn(2, n, 2, 4, 4)] * 2 + [randn(2, n).sigmoid()] * 2 + [randn(2, n, 2, 4, 4)],
    ),
    "rms_silu_pad": (hk.rms_silu_pad, lambda n: [randn(2, 6, n, 2, 4), randn(6), randn(2, 6, 2, 2, 4)]),
    "ring_advance": (
        lambda p, f, s, r, a, c: hk.ring_advance(p, f, s, r, advance=a, capacities=c, first_frame=0),
        lambda n: [rows(n), rows(n, 3), rows(n, 3), rows(n, 9), rows(n), rows(n) + 7],
    ),
}  # fmt: skip


def test_every_op_is_here():
    functions = {name for name in hk.__all__ if callable(getattr(hk, name)) and hasattr(torch.ops.hiar, name)}
    assert functions == {name.split()[0] for name in OPS}


@pytest.mark.parametrize("name", OPS)
def test_an_op_compiles_once(name, opaque):
    function, arguments = OPS[name]
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    for n in LENGTHS:
        compiled(*arguments(n))
    assert counter.frame_count == 1, f"{counter.frame_count} compilations for {len(LENGTHS)} lengths"


def compile_transformer(mode: str) -> None:
    torch._dynamo.reset()
    model, counter = SHALLOW, CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    with torch.no_grad():
        for frames in (9, 12, 15, 18):
            x, t = randn(1, frames, 2, 2, 4), 1000 * randn(1, frames).sigmoid()
            torch.testing.assert_close(compiled(x, t, TEXT, mode), model(x, t, TEXT, mode), rtol=0, atol=1e-4)
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["bidirectional", "block_causal"])
def test_the_transformer_compiles_once(mode, opaque):
    compile_transformer(mode)


def test_the_transformer_compiles_once_on_a_cpu():
    """Where the references are traced through. (Lengths that nest in each other took minutes there.)"""
    compile_transformer("block_causal")


def traced() -> list[Path]:
    shared = [ROOT / "hiar_model" / "models" / f"{name}.py" for name in ("transformer", "conditions")]
    attention = [ROOT / "hiar_kernels" / "attention" / f"{name}.py" for name in ("inputs", "dispatch")]
    return [*sorted((ROOT / "hiar_kernels").glob("*/api.py")), *attention, *shared]


@pytest.mark.parametrize("file", traced(), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_texts_are_made_where_they_are_raised(file):
    """No f-string outside of ``if ...: ... raise`` in what torch.compile traces."""
    early = []

    def look(node: ast.AST, raising: bool) -> None:
        if isinstance(node, ast.If):
            raising = isinstance(node.body[-1], ast.Raise)
        elif isinstance(node, ast.FunctionDef) and node.name in HOOKS:
            return
        if isinstance(node, ast.JoinedStr) and not raising:
            early.append(f"line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            look(child, raising or isinstance(node, ast.Raise))

    look(ast.parse(file.read_text(encoding="utf-8")), False)
    assert not early
