"""Bad input of every op is answered in one line that names the op, what is wrong and what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from refusals import refusal
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels import BlockCausal, KVContext
from hiar_kernels.attention.schedule import allocate

pytestmark = pytest.mark.cpu


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


Q = torch.zeros(2, 4, 2, 8)
X = torch.zeros(2, 6, 8)
LATENT = CLIP = torch.zeros(2, 3, 1, 4, 4)
RULE = BlockCausal(2, 2)
LEVEL = torch.zeros(1, 1)
FITTED = allocate((2, 4, 2, 4), 2, 0, torch.device("cpu"), 4, one_slot=True)


FLOATS = "bfloat16, float16, float32 or float64"
QKV, WEIGHT, TWO, CACHE = torch.zeros(2, 6, 24), torch.ones(8), ids([0, 1]), torch.zeros(2, 6, 2, 4)


INFERENCE = "has no gradient; 8 bits are for inference: use torch.no_grad()"
LEARNED, INT8 = torch.ones(2, 6, 8, requires_grad=True), torch.ones(4, 4, dtype=torch.int8)


def rope(qkv=QKV, weight=WEIGHT, frames=TWO, heads=2):
    return hk.qk_norm_rope(qkv, weight, WEIGHT, frames, num_heads=heads, grid=(1, 3))


def append(slots=TWO, k=CACHE, v=CACHE, frames=TWO, rows=None):
    return hk.qk_norm_rope_append(QKV, WEIGHT, WEIGHT, frames, slots, k, v, num_heads=2, grid=(1, 3), rows=rows)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "q of three dimensions": (lambda: hk.attention(Q[0], Q, Q), "q must be [B, Tq, H, D], got [4, 2, 8]"),
    "k of another dtype": (lambda: hk.attention(Q, Q.half(), Q), "k must be torch.float32 like q, got torch.float16"),
    "v of another dtype": (lambda: hk.attention(Q, Q, Q.double()), "v must be torch.float32 like q, got torch.float64"),
    "k on another device": (lambda: hk.attention(Q, Q.to("meta"), Q), "k must be on cpu like q, got meta"),
    "integers": (lambda: hk.attention(*[Q.int()] * 3), f"q must be {FLOATS}, got torch.int32"),
    "8 bits": (lambda: hk.attention(*[Q.to(torch.float8_e4m3fn)] * 3), f"q must be {FLOATS}, got torch.float8_e4m3fn"),
    "an array of numpy": (lambda: hk.attention(Q.numpy(), Q, Q), "q must be a torch.Tensor, got ndarray"),
    "no keys at all": (lambda: hk.attention(Q, None, Q), "k must be a torch.Tensor, got NoneType"),
    "ids in a list": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, q_frames=[[0, 1]]), "q_frames must be a torch.Tensor, got list"
    ),
    "a bool for a scale": (lambda: hk.attention(Q, Q, Q, scale=True), "scale must be a finite number"),
    "a complex scale": (lambda: hk.attention(Q, Q, Q, scale=1j), "scale must be a finite number"),
    "a context in a tuple": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, context=(Q, Q, TWO)), "context must be None or a KVContext, got tuple"
    ),
    "a context of arrays": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, context=KVContext(Q, Q.numpy(), TWO)),
        "attention: context: v must be a torch.Tensor, got ndarray",
    ),
    "a nested q": (
        lambda: hk.attention(torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged), Q, Q),
        "q must be a dense tensor, got a nested one",
    ),
    "a layout without a mask": (lambda: hk.attention_layout(None, TWO, TWO), "mask must be a BlockCausal, got None"),
    "a layout without ids": (lambda: hk.attention_layout(RULE, None, TWO), "frame ids must be [[number, ...], ...]"),
    "a merge without a batch": (
        lambda: hk.merge_attention([Q[0]], [Q[0]]), "every out must be [B, T, H, D], got [4, 2, 8]"
    ),
    "a merge with a batch too many": (
        lambda: hk.merge_attention([Q[None]], [Q]), "every out must be [B, T, H, D], got [1, 2, 4, 2, 8]"
    ),
    "heads of a float": (lambda: rope(heads=2.0), "num_heads must be a whole number of at least 1, got 2.0"),
    "a bool of heads": (lambda: rope(heads=True), "num_heads must be a whole number of at least 1, got True"),
    "a list of heads": (lambda: rope(heads=[2]), "num_heads must be a whole number of at least 1, got [2]"),
    **{
        f"a grid {grid!r}": (
            lambda grid=grid: hk.qk_norm_rope(QKV, WEIGHT, WEIGHT, TWO, num_heads=2, grid=grid),
            f"grid must be (rows, columns) of at least 1, got {grid!r}",
        )
        for grid in ((1.0, 3), (True, 3), (None, 3), ((1,), 3))
    },
    **{
        f"cells {cells!r}": (
            lambda cells=cells: hk.qk_norm_rope(QKV, WEIGHT, WEIGHT, TWO, num_heads=2, grid=(1, 3), cells=cells),
            f"cells must be (start, stop) with 0 <= start < stop <= 3, got {cells}",
        )
        for cells in (3, "03", (None, 3), (0.0, 3), slice(0, 3))
    },
    "a complex theta": (
        lambda: hk.qk_norm_rope(QKV, WEIGHT, WEIGHT, TWO, num_heads=2, grid=(1, 3), theta=1j),
        "theta must be a finite number above 0, got 1j",
    ),
    "a mask of a list": (lambda: BlockCausal([2], 2), "frame_tokens must be a whole number, got [2]"),
    "a mask of complex numbers": (lambda: BlockCausal(2, 2, 4j), "window_frames must be a whole number, got 4j"),
    "a scale that is no number": (lambda: hk.attention(Q, Q, Q, scale=float("nan")), "scale must be a finite number"),
    "a scale in words": (lambda: hk.attention(Q, Q, Q, scale="1"), "scale must be a finite number, or None for 1 /"),
    "half a frame of window": (lambda: BlockCausal(2, 2, 2.5), "window_frames must be a whole number, got 2.5"),
    "half a frame of block": (lambda: BlockCausal(2, 1.5), "frames_per_block must be a whole number, got 1.5"),
    "tokens in words": (lambda: BlockCausal("2", 2), "frame_tokens must be a whole number, got '2'"),
    "frames elsewhere": (lambda: rope(frames=TWO.to("meta")), "frames must be on cpu like qkv, got meta"),
    "a base of 0": (
        lambda: hk.qk_norm_rope(QKV, WEIGHT, WEIGHT, TWO, num_heads=2, grid=(1, 3), theta=0.0),
        "theta must be a finite number above 0, got 0.0",
    ),
    "half a grid": (
        lambda: hk.qk_norm_rope(QKV, WEIGHT, WEIGHT, TWO, num_heads=2, grid=(3,)), "grid must be (rows, columns)"
    ),
    "parts in a word": (lambda: hk.merge_attention([Q], None), "lses must be tensors, got NoneType"),
    "rings in lists": (
        lambda: hk.ring_advance([0], TWO, TWO, TWO, advance=TWO, capacities=TWO), "position must be a torch.Tensor, got"
    ),
    "k of another width": (lambda: hk.attention(Q, Q[..., :4], Q), "k must be [2, 4, 2, 8], got [2, 4, 2, 4]"),
    "k of another batch": (lambda: hk.attention(Q, Q[:1], Q), "k must be [2, 4, 2, 8], got [1, 4, 2, 8]"),
    "v of another length": (lambda: hk.attention(Q, Q, Q[:, :3]), "v must be [2, 4, 2, 8], got [2, 3, 2, 8]"),
    "ids without a mask": (lambda: hk.attention(Q, Q, Q, q_frames=ids([0, 1])), "frame ids need a BlockCausal mask"),
    "counts of a wrong length": (
        lambda: hk.attention(Q, Q, Q, kv_counts=torch.ones(1, 3)), "kv_counts must be [2 or 1, 4], got [1, 3]"
    ),
    "counts with a mask": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, kv_counts=torch.ones(1, 4)), "kv_counts needs mask=None"
    ),
    "context without a mask": (
        lambda: hk.attention(Q, Q, Q, context=KVContext(Q, Q, ids([0, 1]))), "context needs a BlockCausal mask"
    ),
    "context of another shape": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, context=KVContext(Q, Q[:, :2], ids([0, 1]))),
        "context.v must be [2, 4, 2, 8], got [2, 2, 2, 8]",
    ),
    "ids of a context": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, context=KVContext(Q, Q, ids([0]))),
        "context.frames must be [2 or 1, 2], got [1, 1]",
    ),
    "broken frames": (
        lambda: hk.attention(Q[:, :3], Q, Q, mask=RULE), "q has 3 tokens, no multiple of frame_tokens 2"
    ),
    "ids of a wrong shape": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, q_frames=ids([0, 1, 2])), "q_frames must be [2 or 1, 2], got [1, 3]"
    ),
    "ids in one dimension": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, kv_frames=ids([0, 1])[0]), "kv_frames must be [2 or 1, 2], got [2]"
    ),
    "float ids": (
        lambda: hk.attention(Q, Q, Q, mask=RULE, kv_frames=torch.zeros(1, 2)),
        "kv_frames must be int32 or int64, got torch.float32",
    ),
    "windows of another batch": (
        lambda: hk.attention(Q, Q, Q, mask=BlockCausal(2, 2, (3, 4, 5))), "3 windows for a batch of 2 rows"
    ),
    "no tokens in a frame": (lambda: BlockCausal(0, 2), "frame_tokens must be at least 1, got 0"),
    "no frames in a block": (lambda: BlockCausal(2, 0), "frames_per_block must be at least 1, got 0"),
    "a negative sink": (lambda: BlockCausal(2, 2, sink_frames=-1), "sink_frames must be at least 0, got -1"),
    "a window below the block": (
        lambda: BlockCausal(2, 3, 4, 2), "window_frames must be at least sink_frames + frames_per_block = 5, got 4"
    ),
    "one window below the block": (lambda: BlockCausal(2, 3, [None, 2]), "frames_per_block = 3, got 2"),
    "a long first block": (lambda: BlockCausal(2, 3, first_block_frames=4), "first_block_frames must be 1 to 3, got 4"),
    "an empty first block": (lambda: BlockCausal(2, 3, first_block_frames=0), "must be 1 to 3, got 0"),
    "counts that are learned": (
        lambda: hk.attention(Q, Q, Q, kv_counts=LEARNED[0, 0, :4][None]), "kv_counts have no gradient; detach them"
    ),
    "levels that are learned": (
        lambda: hk.flow_step(LATENT, LATENT, LEARNED[0, :1, :1], LEVEL), "noise levels have no gradient; detach them"
    ),
    "8 bits that are learned": (lambda: hk.quantize_rows(LEARNED), f"quantize_rows: {INFERENCE}"),
    "a norm in 8 bits that is learned": (
        lambda: hk.ada_layer_norm_quantized(X, LEARNED[:1], LEARNED[:1]), f"ada_layer_norm_quantized: {INFERENCE}"
    ),
    "an integer layer that is learned": (
        lambda: hk.int8_linear(INT8, torch.ones(4), INT8, torch.ones(4), LEARNED[0, 0, :4]), f"int8_linear: {INFERENCE}"
    ),
    "one ring for keys and values": (lambda: append(), "k_cache and v_cache must be apart, got the same memory"),
    "a ring that is learned": (
        lambda: append(k=CACHE.clone().requires_grad_()), "has no gradient; use qk_norm_rope, or torch.no_grad()"
    ),
    "nothing to merge": (lambda: hk.merge_attention([], []), "got 0 outs and 0 lses; expected n and n >= 1"),
    "outs without lses": (lambda: hk.merge_attention([Q], []), "got 1 outs and 0 lses"),
    "parts of two dtypes": (
        lambda: hk.merge_attention([Q, Q.half()], [torch.zeros(2, 2, 4)] * 2),
        "every out must be [2, 4, 2, 8] torch.float32, got [2, 4, 2, 8] torch.float16",
    ),
    "an lse by tokens": (
        lambda: hk.merge_attention([Q], [torch.zeros(2, 4, 2)]), "every lse must be [2, 2, 4], got [2, 4, 2]"
    ),
    "qkv in two dimensions": (lambda: rope(torch.zeros(6, 24)), "qkv must be [B, T, 3 H D], got [6, 24]"),
    "heads that do not fit": (lambda: rope(heads=5), "width 24 of qkv is not 3 x 5 heads of an even size"),
    "heads of an odd size": (lambda: rope(heads=8), "width 24 of qkv is not 3 x 8 heads of an even size"),
    "no heads": (lambda: rope(heads=0), "is not 3 x 0 heads"),
    "a short weight": (lambda: rope(weight=torch.ones(4)), "q_weight must be [8], got [4]"),
    "frames that do not fill": (lambda: rope(frames=ids([0])), "frames must be [2 or 1, 6 / 3], got [1, 1]"),
    "frames as floats": (lambda: rope(frames=torch.zeros(1, 2)), "frames must be integers, got torch.float32"),
    "frames to append as floats": (lambda: append(frames=torch.zeros(1, 2)), "frames must be integers, got"),
    "frames as answers": (lambda: rope(frames=TWO.bool()), "frames must be integers, got torch.bool"),
    "slots as answers": (lambda: append(TWO.bool()), "slots must be integers, got torch.bool"),
    "complex slots": (lambda: append(TWO + 0j), "slots must be integers, got torch.complex64"),
    "rows as a number": (lambda: append(rows=3), "rows must be a torch.Tensor, got int"),
    "no number of heads": (lambda: rope(heads=None), "num_heads must be a whole number of at least 1, got None"),
    "heads in words": (lambda: rope(heads="2"), "num_heads must be a whole number of at least 1, got '2'"),
    "a grid in words": (
        lambda: hk.qk_norm_rope(QKV, WEIGHT, WEIGHT, TWO, num_heads=2, grid="13"), "grid must be (rows, columns)"
    ),
    "a schedule in words": (
        lambda: hk.attention(Q, Q, Q, schedule="fast"), "schedule must be an AttentionSchedule, or None, got str"
    ),
    "a schedule of other keys": (
        lambda: FITTED.require_fits(Q, Q[:, :2]), "is of (B, Tq, H, Tk) (2, 4, 2, 4), q and k have (2, 4, 2, 2)"
    ),
    "a schedule of the other kernel": (
        lambda: FITTED.require_fits(Q, Q), "schedule must be made with one_slot=False, got True"
    ),
    "slots of a wrong shape": (lambda: append(ids([0])), "slots must be [2 or 1, 2], got [1, 1]"),
    "rows of another batch": (
        lambda: append(ids([0, 1])[None], rows=ids([0])), "rows must be [1 or 2, 2], got [1, 1]"
    ),
    "rows as floats": (
        lambda: append(ids([0, 1])[None], rows=torch.zeros(1, 2)), "rows must be integers, got torch.float32"
    ),
    "slots of one place for two": (
        lambda: append(ids([0, 1])[None], rows=ids([0, 1], [1, 0])), "slots must be [2, 2 or 1, 2], got [1, 1, 2]"
    ),
    "slots without a place": (lambda: append(rows=ids([0, 1])), "slots must be [1, 2 or 1, 2], got [1, 2]"),
    "slots as floats": (lambda: append(torch.zeros(1, 2)), "slots must be integers, got torch.float32"),
    "a cache of half frames": (
        lambda: append(k=torch.zeros(2, 7, 2, 4)), "k_cache must be [2, n * 3, 2, 4], got [2, 7, 2, 4]"
    ),
    "a cache of another batch": (lambda: append(v=CACHE[:1]), "v_cache must be [2, n * 3, 2, 4], got [1, 6, 2, 4]"),
    "x in two dimensions": (lambda: hk.ada_layer_norm(X[0], X, X), "x must be [B, T, C], got [6, 8]"),
    "shift and scale apart": (
        lambda: hk.ada_layer_norm(X, X[:, :3], X[:, :2]), "scale must be [2, 3, 8] like shift, got [2, 2, 8]"
    ),
    "shifts that do not divide": (
        lambda: hk.ada_layer_norm(X, X[:, :4], X[:, :4]), "6 tokens are no multiple of 4 frames"
    ),
    "a long bias": (lambda: hk.layer_norm(X, torch.ones(8), torch.ones(9)), "bias must be [8], got [9]"),
    "an unbatched norm": (lambda: hk.layer_norm(X[0], torch.ones(8), torch.ones(8)), "x must be [B, T, C], got [6, 8]"),
    "y of another shape": (lambda: hk.gated_residual(X, X[:, :3], X), "must be [B, T, C], got [2, 6, 8], [2, 3, 8]"),
    "a narrow gate": (lambda: hk.gated_residual(X, X, X[..., :4]), "gate must be [2 or 1, F, 8], got [2, 6, 4]"),
    "gates that do not divide": (lambda: hk.gated_residual(X, X, X[:, :4]), "6 tokens are no multiple of 4 frames"),
    "a gate of other frames": (
        lambda: hk.gated_residual_ada_layer_norm(X, X, X[:, :2], X[:, :3], X[:, :3]),
        "shift must be [2 or 1, 2, 8] like gate, got [2, 3, 8]",
    ),
    "y of other tokens": (
        lambda: hk.gated_residual_ada_layer_norm(X, X[:, :3], *[X[:, :3]] * 3),
        "x and y must be [B, T, C], got [2, 6, 8], [2, 3, 8]",
    ),
    "shifts without a gate apart": (
        lambda: hk.gated_residual_ada_layer_norm(X, X, None, X[:, :2], X[:, :3]),
        "scale must be [2, 2, 8] like shift, got [2, 3, 8]",
    ),
    "y of other tokens, affine": (
        lambda: hk.gated_residual_layer_norm(X, X[:, :3], X[:, :3], WEIGHT, WEIGHT),
        "x and y must be [B, T, C], got [2, 6, 8], [2, 3, 8]",
    ),
    "a narrow gate before an affine norm": (
        lambda: hk.gated_residual_layer_norm(X, X, X[:, :3, :4], WEIGHT, WEIGHT),
        "gate must be [2 or 1, F, 8], got [2, 3, 4]",
    ),
    "a short bias after a gate": (
        lambda: hk.gated_residual_layer_norm(X, X, X[:, :3], WEIGHT, WEIGHT[:4]), "bias must be [8], got [4]"
    ),
    "an unbatched RMSNorm": (lambda: hk.rms_norm(X[0], WEIGHT), "x must be [B, T, C], got [6, 8]"),
    "a short weight of an RMSNorm": (lambda: hk.rms_norm(X, WEIGHT[:4]), "weight must be [8], got [4]"),
    "fused frames that do not divide": (
        lambda: hk.gated_residual_ada_layer_norm(X, X, *[X[:, :4]] * 3), "6 tokens are no multiple of 4 frames"
    ),
    "latents in four dimensions": (
        lambda: hk.flow_step(LATENT[0], LATENT[0], LEVEL, LEVEL), "x must be [B, F, C, H, W], got [3, 1, 4, 4]"
    ),
    "another velocity": (
        lambda: hk.flow_step(LATENT, LATENT[:, :1], LEVEL, LEVEL),
        "velocity must be [2, 3, 1, 4, 4], got [2, 1, 1, 4, 4]",
    ),
    "another noise": (
        lambda: hk.flow_step(LATENT, LATENT, LEVEL, LEVEL, LATENT[:1]),
        "noise must be [2, 3, 1, 4, 4], got [1, 3, 1, 4, 4]",
    ),
    "a sigma of a wrong shape": (
        lambda: hk.flow_step(LATENT, LATENT, torch.zeros(3), LEVEL), "sigma must be [2 or 1, 3 or 1], got [3]"
    ),
    "a next sigma of a wrong shape": (
        lambda: hk.flow_step(LATENT, LATENT, LEVEL, torch.zeros(1, 2)),
        "sigma_next must be [2 or 1, 3 or 1], got [1, 2]",
    ),
    "features in four dimensions": (
        lambda: hk.rms_silu_pad(CLIP[0], torch.ones(3)), "x must be [B, C, F >= 1, H, W], got [3, 1, 4, 4]"
    ),
    "features without a frame": (
        lambda: hk.rms_silu_pad(CLIP[:, :, :0], torch.ones(3)), "x must be [B, C, F >= 1, H, W], got [2, 3, 0, 4, 4]"
    ),
    "a weight with its image axes": (
        lambda: hk.rms_silu_pad(CLIP, torch.ones(3, 1, 1, 1)), "weight must be [3], got [3, 1, 1, 1]"
    ),
    "a cache of three frames": (
        lambda: hk.rms_silu_pad(CLIP, torch.ones(3), torch.zeros(2, 3, 3, 4, 4)),
        "cache must be [2, 3, 1 or 2, 4, 4] torch.float32, got [2, 3, 3, 4, 4] torch.float32",
    ),
    "a cache in another dtype": (
        lambda: hk.rms_silu_pad(CLIP, torch.ones(3), CLIP.half()),
        "cache must be [2, 3, 1 or 2, 4, 4] torch.float32, got [2, 3, 1, 4, 4] torch.float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what):
    call, message = BAD[what]
    line = refusal(call)
    assert message in line
    names = (
        "attention|attention_layout|merge_attention|BlockCausal|qk_norm_rope|qk_norm_rope_append|ada_layer_norm|layer_norm|"
        "gated_residual|gated_residual_ada_layer_norm|gated_residual_layer_norm|flow_step|rms_norm|rms_silu_pad|ring_advance|"
        "quantize_rows|int8_linear|ada_layer_norm_quantized"
    )
    assert re.match(f"({names}): ", line)


M, W, PIXELS = torch.zeros(2, 2, 8), torch.ones(8), torch.zeros(2, 8, 1, 4, 4)
POINTWISE: dict[str, Callable[..., object]] = {  # of the first tensor, the last one, and eps where there is one
    "ada_layer_norm": lambda x=X, last=M, eps=1e-6: hk.ada_layer_norm(x, M, last, eps=eps),
    "gated_residual": lambda x=X, last=M: hk.gated_residual(x, X, last),
    "gated_residual_ada_layer_norm": lambda x=X, last=M, eps=1e-6: hk.gated_residual_ada_layer_norm(
        x, X, M, M, last, eps=eps
    ),
    "gated_residual_layer_norm": lambda x=X, last=W, eps=1e-6: hk.gated_residual_layer_norm(x, X, M, W, last, eps=eps),
    "layer_norm": lambda x=X, last=W, eps=1e-6: hk.layer_norm(x, W, last, eps=eps),
    "rms_norm": lambda x=X, last=W, eps=1e-6: hk.rms_norm(x, last, eps=eps),
    "rms_silu_pad": lambda x=PIXELS, last=W, eps=1e-6: hk.rms_silu_pad(x, last, eps=eps),
    "flow_step": lambda x=LATENT, last=LEVEL: hk.flow_step(x, LATENT, LEVEL, last),
    "qk_norm_rope": lambda x=QKV, last=W, eps=1e-6: hk.qk_norm_rope(x, W, last, TWO, num_heads=2, grid=(1, 3), eps=eps),
}


@pytest.mark.parametrize("op", POINTWISE)
def test_what_is_no_float_is_refused_everywhere(op):
    """Integers came back as rounded integers, arrays and other devices as an error from inside."""
    call = POINTWISE[op]
    first = call.__defaults__[0]
    for wrong in (first.int(), first.to(torch.complex64), first.to(torch.float8_e4m3fn)):
        assert refusal(lambda wrong=wrong: call(wrong)).endswith(f"must be {FLOATS}, got {wrong.dtype}")
    assert "must be a dense tensor, got torch.sparse_coo" in refusal(lambda: call(first.to_sparse()))
    for wrong in (first.numpy(), None, first.tolist()):
        assert refusal(lambda wrong=wrong: call(wrong)).endswith(f"must be a torch.Tensor, got {type(wrong).__name__}")
    last = call.__defaults__[1]
    assert "must be on cpu like" in refusal(lambda: call(first, last.to("meta")))
    assert refusal(lambda: call(first, last.to(torch.int8))).endswith(f"must be {FLOATS}, got torch.int8")
    call()


def test_a_mask_of_numpy_s_numbers_or_tensors_is_the_same_mask():
    """One of tensors was equal to none, not even to itself after a copy, and could not be looked up."""
    plain = BlockCausal(4, 3, (6, 9), 1)
    for number in (np.int64, torch.tensor):
        for windows in (np.array([6, 9]), torch.tensor([6, 9]), [6, 9]):
            mask = BlockCausal(number(4), number(3), windows, number(1))
            assert mask == plain and hash(mask) == hash(plain) and repr(mask) == repr(plain)
        assert BlockCausal(4, 3, number(6)) == BlockCausal(4, 3, 6)


@pytest.mark.parametrize("op", [op for op, call in POINTWISE.items() if len(call.__defaults__) == 3])
@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf"), "1e-6", None, True, 1j, [1e-6]])
def test_eps_is_a_number(op, eps):
    """Below 0 it made NaN in silence."""
    call = POINTWISE[op]
    assert "eps must be a finite number of at least 0, got" in refusal(lambda: call(*call.__defaults__[:2], eps))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("hidden", ["no keys", "empty slots", "a query before the video"])
def test_where_nothing_is_visible_gradients_are_zero(impl, hidden):
    q, k, v = (torch.randn(2, 4, 2, 8, requires_grad=True) for _ in range(3))
    empty, both = ids([-1, -1]), ids([0, 1])
    if hidden == "no keys":
        out = hk.attention(q, k[:, :0], v[:, :0], impl=impl)
    else:
        slots = (both, empty) if hidden == "empty slots" else (ids([-9, -9]), both)
        out = hk.attention(q, k, v, mask=RULE, q_frames=slots[0], kv_frames=slots[1], impl=impl)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
