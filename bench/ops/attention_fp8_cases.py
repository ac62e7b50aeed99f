"""attention_fp8 with 8-bit queries over a ring as the model has it, and the variants of the Hopper kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hiar_kernels
from bench.lib.measure import Bench
from bench.ops.work import Op, Sizes, Work, ids
from hiar_kernels import BlockCausal
from hiar_kernels.attention import gluon as hopper
from hiar_kernels.attention_fp8.inputs import Float8Inputs
from hiar_kernels.common.float8 import pack_values, quantize_frames, quantize_last


def attend(bench: Bench, z: Sizes, queries: list[int], ring: list[int]) -> Work:
    """Queries of these frames over a ring of these; the schedule is made once, as a forward does for all its layers."""
    q = bench.normal(1, len(queries) * z.frame_tokens, z.heads, z.head_dim)
    keys, values = (bench.normal(1, len(ring), z.frame_tokens, z.heads, z.head_dim) for _ in "kv")
    q8, q_scales = quantize_last(q)
    (k, k_scales), (v, v_scales) = quantize_frames(keys), quantize_frames(values)
    arguments = (q8, k.flatten(1, 2).contiguous(), pack_values(v).contiguous(), k_scales, v_scales)
    mask = BlockCausal(z.frame_tokens, z.block, z.window)
    frames = {"q_frames": ids(bench, queries), "kv_frames": ids(bench, ring)}
    seen = float(mask.visible(*frames.values(), 1).sum())
    schedules: dict[str, Any] = {}

    def run(variant: str) -> Tensor:
        impl, _, name = variant.partition(" ")
        if impl != "gluon":
            out: Tensor = hiar_kernels.attention_fp8(*arguments, q_scales=q_scales, mask=mask, **frames, impl=impl)
            return out
        from hiar_kernels.attention_fp8 import gluon_fwd

        if "" not in schedules:
            shape = (*q8.shape[:3], arguments[1].shape[1])
            schedules[""] = hiar_kernels.attention_schedule(shape, mask, **frames, device=q8.device, one_slot=True)
        return gluon_fwd.launch(Float8Inputs(*arguments, q_scales, *frames.values(), mask), schedules[""], name)[0]

    return Work([], run, 4.0 * z.width * z.frame_tokens**2 * seen)


def task(bench: Bench, z: Sizes) -> Work:
    """Of a rollout: a block over its ring."""
    return attend(bench, z, list(range(z.window - z.block, z.window)), [*range(2, z.window), 0, 1])


def pair(bench: Bench, z: Sizes) -> Work:
    """The cache group of one block and the denoise group of the next, in one launch."""
    last = z.window + z.block
    return attend(bench, z, list(range(last - 2 * z.block, last)), list(range(last)))


def table(bench: Bench, absent: dict[str, str], own: tuple[str, ...]) -> list[Op]:
    """On a CPU the reference alone, at its small sizes."""
    variants = [x for x in own if x == "triton"] or ["reference"]
    if reason := hopper.unavailable(torch.device(bench.device)):
        absent["gluon for attention_fp8"] = reason
    else:
        from hiar_kernels.attention_fp8.gluon_fwd import VARIANTS

        variants += [f"gluon {name}".strip() for name in VARIANTS]
    return [Op(f"attention_fp8: {make.__name__}", make, "flop", False, tuple(variants)) for make in (task, pair)]
