# mypy: allow-incomplete-defs
"""The visibility rule on the device, shared by the forward and the backward kernels.

Let E be the frame after a query's block. Every pass over keys has one form: key frame j is seen when

    0 <= j < E - before  and  (j >= E - back  or  j < sink_end)

with three numbers for a batch row (:func:`limits`). Frames are classified as a whole for a whole tile, on scalars: runs
of neighbouring slots of one class are either left out, walked without a mask, or walked with one.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keys of a pass: all; visible by the mask; with a context: own keys, keys of earlier blocks.
EVERY = tl.constexpr(0)
SEEN = tl.constexpr(1)
OWN = tl.constexpr(2)
EARLIER = tl.constexpr(3)

# Classes of a frame slot for a tile.
NONE = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)

# Passes over the keys of a tile. One loop of tiles in each: two under one loop of runs cost registers.
COUNT = tl.constexpr(0)  # how many the tile sees, to split them
WHOLE = tl.constexpr(1)  # whole tiles that need no mask
REST = tl.constexpr(2)

_UNBOUNDED = tl.constexpr(1 << 30)
_LARGEST = tl.constexpr(2147483647)


@triton.jit
def limits(windows_ptr, row, frames_per_block, sink_frames, sink_end, KEYS: tl.constexpr):
    """(before, back, sink_end) of a pass over keys, for one batch row."""
    window = tl.load(windows_ptr + row)
    before = 0
    back = tl.where(window < 0, _UNBOUNDED, window - sink_frames)
    if KEYS == EARLIER:
        before += frames_per_block
    if KEYS == OWN:
        back = back * 0 + frames_per_block
        sink_end = sink_end * 0
    return before, back, sink_end


@triton.jit
def key_source(
    own, b, h, k_ptr, v_ptr, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, tokens, context_k_ptr,
    context_v_ptr, stride_ckb, stride_ckt, stride_ckh, stride_cvb, stride_cvt, stride_cvh, context_tokens,
    CONTEXT: tl.constexpr
):  # fmt: skip
    """Where the keys and values of one batch row and head lie: one's own, or the context's.

    Chosen at run time: one loop body serves both, which halves the code and its registers.
    """
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if CONTEXT:
        k_ptr = tl.where(own, k_ptr, context_k_ptr + b * stride_ckb + h * stride_ckh)
        v_ptr = tl.where(own, v_ptr, context_v_ptr + b * stride_cvb + h * stride_cvh)
        stride_kt = tl.where(own, stride_kt, stride_ckt)
        stride_vt = tl.where(own, stride_vt, stride_cvt)
        tokens = tl.where(own, tokens, context_tokens)
    return k_ptr, v_ptr, stride_kt, stride_vt, tokens


@triton.jit
def source_frames(own, b, frames_ptr, stride_kfb, context_frames_ptr, stride_cfb, CONTEXT: tl.constexpr):
    """Ids of the frames of those keys."""
    frames_ptr += b * stride_kfb
    if CONTEXT:
        frames_ptr = tl.where(own, frames_ptr, context_frames_ptr + b * stride_cfb)
    return frames_ptr


@triton.jit
def source_limits(own, windows_ptr, row, frames_per_block, sink_frames, sink_end, CONTEXT: tl.constexpr):
    """(before, back, sink_end) of those keys."""
    if CONTEXT:
        before, back, sinks = limits(windows_ptr, row, frames_per_block, sink_frames, sink_end, OWN)
        earlier = limits(windows_ptr, row, frames_per_block, sink_frames, sink_end, EARLIER)
        before = tl.where(own, before, earlier[0])
        back = tl.where(own, back, earlier[1])
        sinks = tl.where(own, sinks, earlier[2])
    else:
        before, back, sinks = limits(windows_ptr, row, frames_per_block, sink_frames, sink_end, SEEN)
    return before, back, sinks


@triton.jit
def block_end(frame, origin, frames_per_block):
    """The frame after the block of a frame; blocks are counted from origin, in both directions."""
    ahead = frame - origin
    behind = ahead < 0
    blocks = tl.where(behind, -1 - ahead, ahead) // frames_per_block
    return origin + tl.where(behind, -blocks, blocks + 1) * frames_per_block


@triton.jit
def frame_at(frames_ptr, slot, inside, first_frame):
    """Frame id of a slot; -1 where not inside. Without ids slots are the video from its first frame on."""
    if frames_ptr is None:
        frame = tl.where(inside, first_frame + slot, -1)
    else:
        frame = tl.load(frames_ptr + slot, mask=inside, other=-1).to(tl.int32)
    return frame


@triton.jit
def sees(frame, end, before, back, sink_end):
    """Does a query whose block ends before frame ``end`` see this key frame?"""
    return (frame >= 0) & (frame < end - before) & ((frame >= end - back) | (frame < sink_end))


@triton.jit
def query_ends(frames_ptr, t, q_mask, first_frame, frame_tokens, origin, frames_per_block):
    """Ends of the blocks of queries t, and the least and the greatest of those inside q_mask."""
    ends = block_end(frame_at(frames_ptr, t // frame_tokens, q_mask, first_frame), origin, frames_per_block)
    return ends, tl.min(tl.where(q_mask, ends, _LARGEST), 0), tl.max(tl.where(q_mask, ends, -_LARGEST), 0)


@triton.jit
def kind_of_keys(frame, ends, q_mask, least, greatest, before, back, sink_end):
    """Class of a key frame for a tile of queries."""
    full = (frame >= 0) & (frame < least - before) & ((frame >= greatest - back) | (frame < sink_end))
    any_visible = (frame >= 0) & (frame < greatest - before) & ((frame >= least - back) | (frame < sink_end))
    kind = tl.where(full, FULL, NONE)
    if any_visible & (kind == NONE):  # the bounds alone are not exact, and a slot that no query sees may hold NaN
        kind = tl.max(tl.where(q_mask & sees(frame, ends, before, back, sink_end), PARTIAL, NONE), 0)
    return kind


@triton.jit
def key_run(slot, slots, frames_ptr, first_frame, ends, q_mask, least, greatest, before, back, sink_end):
    """Class of the run of key slots that begins at ``slot``, and where it stops."""
    frame = frame_at(frames_ptr, slot, slot < slots, first_frame)
    kind = kind_of_keys(frame, ends, q_mask, least, greatest, before, back, sink_end)
    stop = slot + 1
    going = stop < slots
    while going:
        frame = frame_at(frames_ptr, stop, stop < slots, first_frame)
        same = kind_of_keys(frame, ends, q_mask, least, greatest, before, back, sink_end) == kind
        stop += same.to(tl.int32)
        going = same & (stop < slots)
    return kind, stop


@triton.jit
def _kind_of_queries(end, frames, inside, lowest, first, last, before, back, sink_end):
    """Class of query frames of one block for a tile of keys: lowest id, lowest and highest of those not empty."""
    full = (lowest >= 0) & (last < end - before) & ((lowest >= end - back) | (last < sink_end))
    any_visible = (last >= 0) & (first < end - before) & ((last >= end - back) | (first < sink_end))
    kind = tl.where(full, FULL, NONE)
    if any_visible & (kind == NONE):
        seen = tl.sum((inside & sees(frames, end, before, back, sink_end)).to(tl.int32), 0)
        every = tl.sum(inside.to(tl.int32), 0)
        kind = tl.where(seen == 0, NONE, tl.where(seen == every, FULL, PARTIAL))
    return kind


@triton.jit
def query_run(
    slot, slots, frames_ptr, first_frame, origin, frames_per_block, frames, inside, lowest, first, last, before, back,
    sink_end
):  # fmt: skip
    """Class of the run of query slots that begins at ``slot`` for a tile of keys, and where it stops."""
    end = block_end(frame_at(frames_ptr, slot, slot < slots, first_frame), origin, frames_per_block)
    kind = _kind_of_queries(end, frames, inside, lowest, first, last, before, back, sink_end)
    stop = slot + 1
    going = stop < slots
    while going:
        end = block_end(frame_at(frames_ptr, stop, stop < slots, first_frame), origin, frames_per_block)
        same = _kind_of_queries(end, frames, inside, lowest, first, last, before, back, sink_end) == kind
        stop += same.to(tl.int32)
        going = same & (stop < slots)
    return kind, stop


@triton.jit
def key_bounds(frames, inside):
    """(lowest id, lowest id that is not empty, highest id) of a tile of keys; lowest -1: there are empty ones."""
    lowest = tl.min(tl.where(inside, frames, _LARGEST), 0)
    first = tl.min(tl.where(frames >= 0, frames, _LARGEST), 0)
    return lowest, first, tl.max(frames, 0)


@triton.jit
def unmasked_until(lo, hi, kind, BLOCK: tl.constexpr):
    """Where the whole tiles of a run [lo, hi) that need no mask end."""
    return tl.where(kind == FULL, lo + (hi - lo) // BLOCK * BLOCK, lo)
