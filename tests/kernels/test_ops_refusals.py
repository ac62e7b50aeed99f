"""Bad input of every op is answered in one line that names the op, what is wrong and what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hiar_kernels as hk
from hiar_kernels import BlockCausal, KVContext

pytestmark = pytest.mark.cpu


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


Q = torch.zeros(2, 4, 2, 8)
X = torch.zeros(2, 6, 8)
LATENT = CLIP = torch.zeros(2, 3, 1, 4, 4)
RULE = BlockCausal(2, 2)
LEVEL = torch.zeros(1, 1)


QKV, WEIGHT, TWO, CACHE = torch.zeros(2, 6, 24), torch.ones(8), ids([0, 1]), torch.zeros(2, 6, 2, 4)


def rope(qkv=QKV, weight=WEIGHT, frames=TWO, heads=2):
    return hk.qk_norm_rope(qkv, weight, WEIGHT, frames, num_heads=heads, grid=(1, 3))


def append(slots=TWO, k=CACHE, v=CACHE, frames=TWO, rows=None):
    return hk.qk_norm_rope_append(QKV, WEIGHT, WEIGHT, frames, slots, k, v, num_heads=2, grid=(1, 3), rows=rows)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "q of three dimensions": (lambda: hk.attention(Q[0], Q, Q), "q must be [B, Tq, H, D], got [4, 2, 8]"),
    "k of another dtype": (lambda: hk.attention(Q, Q.half(), Q), "k must be torch.float32 like q, got torch.float16"),
    "v of another dtype": (lambda: hk.attention(Q, Q, Q.double()), "v must be torch.float32 like q, got torch.float64"),
    "k on another device": (lambda: hk.attention(Q, Q.to("meta"), Q), "k must be on cpu like q, got meta"),
    "integers": (lambda: hk.attention(*[Q.int()] * 3), "q must be floating point, got torch.int32"),
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
    "frames as floats": (lambda: rope(frames=torch.zeros(1, 2)), "frames must be integer ids, got torch.float32"),
    "frames to append as floats": (lambda: append(frames=torch.zeros(1, 2)), "frames must be integer ids"),
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
        "attention|merge_attention|BlockCausal|qk_norm_rope|qk_norm_rope_append|ada_layer_norm|layer_norm|"
        "gated_residual|gated_residual_ada_layer_norm|gated_residual_layer_norm|flow_step|rms_norm|rms_silu_pad"
    )
    assert re.match(f"({names}): ", line)
