"""What the Hopper kernel of attention_fp8 does, written out in torch: its tables, its tiles as the copies bring them,
the order of its blocks and of the numbers inside an operand. The kernel itself runs on a GPU only.
"""

import pytest
import torch
from budget import assert_within_budget
from eight_bits import Ring, exactly, queries

import hiar_kernels as hk
from hiar_kernels.attention.schedule import BLOCK_KEYS, TILE_QUERIES
from hiar_kernels.common.float8 import E4M3, quantize_last

pytestmark = pytest.mark.interpreter

TAIL = 32
WIDTH = 32
LN2 = 0.6931471805599453
# tokens of a frame, frames of a block
CASES = {
    "a short tail": (140, 2),
    "a tail of 32": (160, 1),
    "a long tail": (200, 1),
    "whole blocks only": (128, 2),
    "less than a block": (50, 2),
    "less than a group": (5, 1),
}


def setting(name: str, device: torch.device) -> tuple[int, dict]:
    """Two items at different tasks, a window with a sink, an empty slot (2), one not visible yet (3 of item 1)."""
    tokens, frames_per_block = CASES[name]
    ids = {"q_frames": [[4, 5], [2, 3]], "kv_frames": [[0, 4, -1, 3, 5, 1], [0, 2, -1, 9, 3, 1]]}
    tensors = {key: torch.tensor(x, dtype=torch.int32, device=device) for key, x in ids.items()}
    return tokens, {"mask": hk.BlockCausal(tokens, frames_per_block, (5, 4), 1), **tensors}


def tile(x: torch.Tensor, first: int) -> torch.Tensor:
    """BLOCK_KEYS of x [n, ...] from ``first`` on as the copy engine brings them: zeros outside of x."""
    out = x.new_zeros(BLOCK_KEYS, *x.shape[1:])
    lo, hi = max(first, 0), min(first + BLOCK_KEYS, len(x))
    if hi > lo:
        out[lo - first : hi - first] = x[lo:hi]
    return out


def operand(p: torch.Tensor) -> torch.Tensor:
    """P [rows, keys] as the kernel hands it to P V: inside of 16 keys in another order, in e4m3."""
    rows, keys = p.shape
    return p.reshape(rows, keys // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(rows, keys).to(E4M3).float()


def walk(s, q, q_scales, ring: Ring, scale: float):
    """(out, lse), not merged, and the partial results by slot; float32."""
    k, v, k_scales, v_scales = ring.arguments
    (b, length, heads, d), tokens = q.shape, s.frame_tokens
    out, lse = torch.full(q.shape, torch.nan), torch.full((b, heads, length), torch.nan)
    part_out = torch.full((2 * s.ctas, TILE_QUERIES, d), torch.nan)
    part_lse = torch.full((2 * s.ctas, TILE_QUERIES), torch.nan)
    for c in range(s.ctas):
        for segment in s.segments[c, : s.segment_counts[c]].tolist():
            number, lo, hi, place, masked = segment[:5]
            bh, qt = divmod(number, s.q_tiles)
            i, h = divmod(bh, heads)
            rows = slice(qt * TILE_QUERIES, min(length, (qt + 1) * TILE_QUERIES))
            n = rows.stop - rows.start
            row_scale = q_scales[i, rows, h] * (scale * 1.4426950408889634)
            m, total, acc = torch.full((n,), -torch.inf), torch.zeros(n), torch.zeros(n, d)
            for j in range(lo, hi):
                start, stop, frame, partial = s.blocks[i, qt, j].tolist()
                slot, empty = start // tokens, stop <= start
                row = -BLOCK_KEYS if empty else start - slot * tokens
                keys = tile(k[i, slot * tokens : (slot + 1) * tokens, h].view(torch.uint8), row).view(E4M3).float()
                values = tile(v[i, slot, h].view(torch.uint8).T, row).view(E4M3).float()
                k_scale, v_scale = (1.0 if empty else x[i, slot, h] for x in (k_scales, v_scales))
                width = BLOCK_KEYS
                if j < masked:
                    width = TAIL if stop - start <= TAIL else BLOCK_KEYS
                else:
                    assert stop - start == BLOCK_KEYS and frame == slot, "a whole block that does not name its slot"
                assert empty or slot == (stop - 1) // tokens, "a block that leaves its slot"
                scores = q[i, rows, h].float() @ keys[:width].T * (row_scale * k_scale)[:, None]
                if partial:
                    end, low = s.limits[i, qt, :, :n]
                    seen = (frame < end) & ((frame >= low) | (frame < s.sink_end))
                    scores = scores.masked_fill(~seen[:, None], -torch.inf)
                scores[:, stop - start :] = -torch.inf
                m_new = torch.maximum(m, scores.amax(1) - 8)
                base = m_new.where(m_new != -torch.inf, 0)
                p, alpha = torch.exp2(scores - base[:, None]), torch.exp2(m - base)
                total = total * alpha + p.sum(1)
                acc = acc * alpha[:, None] + operand(p) @ values[:width] * v_scale
                m = m_new
            safe = total.where(total > 0, 1)
            result, logs = acc / safe[:, None], (m + safe.log2()).where(total > 0, -torch.inf)
            if place < 0:
                assert lse[i, h, rows].isnan().all(), "a tile is written twice"
                out[i, rows, h], lse[i, h, rows] = result, logs * LN2
            else:
                part_out[place, :n], part_lse[place, :n] = result, logs
    return out, lse, part_out, part_lse


@pytest.mark.parametrize("ctas", [1, 7])
@pytest.mark.parametrize("name", CASES)
def test_the_walk_is_attention(name, ctas, device):
    from hiar_kernels.attention.triton_schedule import merge_cuts

    tokens, ids = setting(name, device)
    ring = Ring.random(2, 6, tokens, 2, WIDTH)
    q, q_scales = quantize_last(queries(2, 2 * tokens, 2, WIDTH))
    s = hk.attention_schedule((2, 2 * tokens, 2, 6 * tokens), **ids, device=device, ctas=ctas, one_slot=True)
    tables = {key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in vars(s).items()}
    parts = walk(type(s)(**tables), q, q_scales, ring.without(2, tokens), WIDTH**-0.5)
    out, lse, part_out, part_lse = (x.to(device) for x in parts)
    merge_cuts(s, out, lse, part_out, part_lse)
    on_cpu = {key: x if key == "mask" else x.cpu() for key, x in ids.items()}
    eager = hk.attention_fp8(q, *ring.arguments, q_scales=q_scales, out_dtype=torch.float32, **on_cpu)
    assert_within_budget(out.cpu(), eager, exactly(q, ring, q_scales, **on_cpu), name)
    wide = q.double() * q_scales.double()[..., None]
    _, exact_lse = hk.reference.attention_with_lse(wide, *(x.nan_to_num(0) for x in ring.exact), **on_cpu)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, atol=1e-5, rtol=1e-5)


def test_nothing_visible(device):
    """A block without keys, whose scales are not read: out 0, logsumexp -inf."""
    ids = {
        key: torch.tensor(x, dtype=torch.int32, device=device)
        for key, x in (("q_frames", [[9]]), ("kv_frames", [[-1]]))
    }
    s = hk.attention_schedule((1, 64, 2, 64), hk.BlockCausal(64, 1, 2), **ids, device=device, ctas=3, one_slot=True)
    tables = {key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in vars(s).items()}
    q, q_scales = quantize_last(queries(1, 64, 2, WIDTH))
    out, lse, *_ = walk(type(s)(**tables), q, q_scales, Ring.random(1, 1, 64, 2, WIDTH).without(0, 64), 1.0)
    assert not out.any() and bool((lse == -torch.inf).all())


def test_a_visit_of_wan(device):
    """21 frames of 1560 keys: 12 whole blocks and one of 24 keys each, shared by 132 CTAs to one block."""
    mask = hk.BlockCausal(1560, 3, 21)
    frames = ([30, 31, 32], [*range(21, 33), *range(12, 21)])
    ids = [torch.tensor([x], dtype=torch.int32, device=device) for x in frames]
    s = hk.attention_schedule((1, 4680, 12, 32760), mask, *ids, device=device, ctas=132, one_slot=True)
    assert (s.counts.cpu() == torch.tensor([21, 273])).all()
    blocks = [sum(r[2] - r[1] for r in s.segments[c, : s.segment_counts[c]].tolist()) for c in range(132)]
    assert sum(blocks) == 37 * 12 * 273 and max(blocks) - min(blocks) <= 1
