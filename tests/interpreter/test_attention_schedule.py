"""The work tables of the Hopper attention kernel: every visible key once, nothing else, evenly shared, merged exactly.

The kernel itself runs on a GPU only; here its walk over the tables is written out in torch.
"""

import pytest
import torch

from hiar_kernels import BlockCausal, attention_schedule, reference
from hiar_kernels.attention.schedule import BLOCK_KEYS, TILE_QUERIES, AttentionSchedule

pytestmark = pytest.mark.interpreter

# mask, frame ids of the queries, of the keys (-1 empty), heads
CASES = {
    "no mask": (None, 300, 1000, 3),
    "one key": (None, 1, 1, 1),
    "ring, full, wrapped": (BlockCausal(130, 3, 6), [[9, 10, 11]], [[9, 10, 11, 6, 7, 8]], 2),
    "ring, half empty": (BlockCausal(130, 3, 6), [[3, 4, 5]], [[3, 4, 5, -1, -1, -1, 0, 1, 2]], 2),
    "window and sink": (BlockCausal(70, 3, 5, 1), [[9, 10, 11]], [[0, 10, 11, 7, 8, 9, 4]], 2),
    "slots of less than a block": (BlockCausal(50, 2, 6), [[6, 7]], [[2, 3, 4, 5, 6, 7, -1, 0]], 1),
    "whole blocks only": (BlockCausal(128, 1, 3), [[4]], [[2, 3, 4, -1]], 2),
    "two tasks in a row": (BlockCausal(100, 3, 6), [[3, 4, 5, 6, 7, 8]], [[0, 1, 2, 3, 4, 5, 6, 7, 8]], 2),
    "items at different tasks": (
        BlockCausal(96, 2, (2, 6, 4)),
        [[0, 1], [6, 7], [2, 3]],
        [[0, 1, -1, -1, -1, -1], [6, 7, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]],
        2,
    ),
    "a query that sees nothing": (BlockCausal(64, 1, 2), [[0, 9]], [[0, -1, 4]], 2),
    "nothing visible at all": (BlockCausal(64, 1, 2), [[9]], [[0, -1]], 2),
    "training": (BlockCausal(60, 2), None, None, 1),
}


def inputs(name: str, device: torch.device) -> tuple[dict, tuple[int, int, int, int]]:
    mask, queries, keys, heads = CASES[name]
    if mask is None:
        return {"mask": None}, (2, queries, heads, keys)
    tokens = mask.frame_tokens
    if queries is None:
        return {"mask": mask}, (1, 7 * tokens, heads, 7 * tokens)
    ids = {"q_frames": queries, "kv_frames": keys}
    ids = {name: torch.tensor(x, dtype=torch.int32, device=device) for name, x in ids.items()}
    return {"mask": mask, **ids}, (len(queries), len(queries[0]) * tokens, heads, len(keys[0]) * tokens)


def load(x: torch.Tensor, start: int, stop: int, slot_tokens: int | None) -> torch.Tensor:
    """A block of keys as the copy engine brings it: all of it, zeros beyond the end of the slot or of x [T, D]."""
    end = len(x) if slot_tokens is None else (start // slot_tokens + 1) * slot_tokens
    block = x[start : min(start + BLOCK_KEYS, end)] if stop > start else x[:0]
    return torch.cat([block, block.new_zeros(BLOCK_KEYS - len(block), x.shape[1])])


def walk(s: AttentionSchedule, q, k, v, scale: float):
    """What the CTAs do, in float32: (out, lse), not merged, and the partial results by slot."""
    b, queries, heads, d = q.shape
    out, lse = torch.full_like(q, float("nan")), q.new_full((b, heads, queries), float("nan"))
    part_out = q.new_full((2 * s.ctas, TILE_QUERIES, d), float("nan"))
    part_lse = q.new_full((2 * s.ctas, TILE_QUERIES), float("nan"))
    shares = []
    for c in range(s.ctas):
        share = 0
        for segment in s.segments[c, : s.segment_counts[c]].tolist():
            tile, lo, hi, slot, masked = segment[:5]
            assert hi > lo, "a segment without a block"
            share += hi - lo
            bh, qt = divmod(tile, s.q_tiles)
            i, h = divmod(bh, heads)
            rows = slice(qt * TILE_QUERIES, min(queries, (qt + 1) * TILE_QUERIES))
            n = rows.stop - rows.start
            scores = []
            values = []
            for j in range(lo, hi):
                start, stop, frame, partial = s.blocks[i, qt, j].tolist()
                assert stop - start == BLOCK_KEYS or j < masked, "a short block outside of the masked ones"
                block = [load(x[i, :, h], start, stop, s.frame_tokens if j < masked else None) for x in (k, v)]
                score = q[i, rows, h] @ block[0].T * scale
                if partial:
                    end, low = s.limits[i, qt, :, :n]
                    seen = (frame < end) & ((frame >= low) | (frame < s.sink_end))
                    score = score.masked_fill(~seen[:, None], float("-inf"))
                score[:, stop - start :] = float("-inf")
                scores.append(score)
                values.append(block[1])
            scores = torch.cat(scores, 1)
            total = scores.logsumexp(1)
            p = (scores - total.nan_to_num(neginf=0.0)[:, None]).exp()
            result = p @ torch.cat(values)
            if slot < 0:
                assert lse[i, h, rows].isnan().all(), "a tile is written twice"
                out[i, rows, h], lse[i, h, rows] = result, total
            else:
                assert part_lse[slot].isnan().all(), "a slot is written twice"
                part_out[slot, :n], part_lse[slot, :n] = result, total / torch.log(torch.tensor(2.0))
        shares.append(share)
    return out, lse, part_out, part_lse, shares


@pytest.mark.parametrize("ctas", [1, 5, 40])
@pytest.mark.parametrize("name", CASES)
def test_every_visible_key_once(name, ctas, device):
    from hiar_kernels.attention.triton_schedule import merge_cuts

    options, shape = inputs(name, device)
    b, queries, heads, keys = shape
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, n, heads, 16, generator=g).to(device) for n in (queries, keys, keys))
    s = attention_schedule(shape, **options, device=device, ctas=ctas)
    s.require_fits(q, k)
    if options.get("kv_frames") is not None:  # what is in an empty slot must not matter
        empty = (options["kv_frames"] < 0).repeat_interleave(options["mask"].frame_tokens, 1)
        k[empty], v[empty] = float("nan"), float("nan")
    out, lse, part_out, part_lse, shares = walk(s, q, k, v, 0.25)
    merge_cuts(s, out, lse, part_out, part_lse)
    want, want_lse = reference.attention_with_lse(
        q.double(), k.double().nan_to_num(0), v.double().nan_to_num(0), **options, scale=0.25
    )
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-6, rtol=2e-6)
    # the last round is shared to one block; whole tiles differ by what they see
    rounds = (b * heads * s.q_tiles - s.cuts.shape[0]) // s.ctas
    rest = [share - sum(hi - lo for _, lo, hi, *_ in s.segments[c, :rounds].tolist()) for c, share in enumerate(shares)]
    assert max(rest) - min(rest) <= 1


def test_the_visit_of_wan(device):
    """q 4680 over 21 frames of 1560 keys, 12 heads, on 132 SMs: shared to one key block."""
    mask = BlockCausal(1560, 3, 21)
    ids = [
        torch.tensor([x], dtype=torch.int32, device=device) for x in ([30, 31, 32], [*range(21, 33), *range(12, 21)])
    ]
    s = attention_schedule((1, 4680, 12, 32760), mask, *ids, device=device, ctas=132)
    assert (s.counts == torch.tensor([1, 256], device=device)).all()
    blocks = [sum(r[2] - r[1] for r in s.segments[c, : s.segment_counts[c]].tolist()) for c in range(132)]
    assert sum(blocks) == 37 * 12 * 256
    assert set(blocks) == {861, 862}
