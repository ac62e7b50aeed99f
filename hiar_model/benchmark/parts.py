"""Where the time of a task goes, beside the least that the machine allows: `hiar bench --parts true`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..config import WanConfig
from ..models.transformer import HiARTransformer
from ..planning.measure_costs import now
from ..rollout import Rollout
from ..schedule.costs import task_flop

KINDS = ("attention", "matmul", "pointwise", "copy")
_ATTENTION = re.compile(r"attention|attn|fmha|flash|sdpa|softmax", re.IGNORECASE)
_MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|addmm|::mm|::bmm|::linear|matmul", re.IGNORECASE)
_COPY = re.compile(r"memcpy|memset|copy_|::to$|::cat$", re.IGNORECASE)
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = re.compile(r"^(cuda|cu)LaunchKernel|^cudaGraphLaunch|^cudaLaunchCooperativeKernel")
_PROFILED = "profiled blocks"


@dataclass
class KindTime:
    """One kind of work, per task: seconds on the device, kernels, and the least seconds the machine allows."""

    name: str
    seconds: float
    kernels: float
    limit: float = 0.0
    why: str = ""


@dataclass
class Parts:
    """Where the time of a task (one forward of one block) goes.

    Attributes:
        seconds: of a task. parts: by kind of work, and "idle".
        launches, syncs: kernel or graph launches, and waits of the host; None on a CPU.
        limits: what the machine did in this run: "flop" and "bytes" in a second, of a large matmul and a large copy.
    """

    seconds: float
    parts: list[KindTime]
    launches: float | None
    syncs: float | None
    limits: dict[str, float]


def trace(rollout: Rollout, blocks: Iterator[Any], count: int, seconds: float, network: HiARTransformer) -> Parts:
    """Run ``count`` blocks under torch's profiler.

    Args:
        blocks: the iterator over the rollout, with a full window. network: of the rollout.
        seconds: of a task without the profiler, whose overhead must not be in the timing.
    """
    device, cuda = rollout.device, rollout.device.type == "cuda"
    before = rollout.forwards_done
    # torch.profiler.profile is this one, and imports torch's compiler first: a second of a CPU.
    with torch.autograd.profiler.profile(use_device="cuda" if cuda else None) as profiler:
        with torch.profiler.record_function(_PROFILED):
            for _ in range(count):
                next(blocks)
        now(device)
    tasks = rollout.forwards_done - before
    config, dtype = network.config, network.patch_embedding.weight.dtype
    limits = machine_limits(device, dtype)
    per_frame, plan = rollout.cache.frame_tokens, rollout.plan
    tokens, keys = per_frame * plan.frames_per_block, per_frame * max(window or 0 for window in plan.window_frames)
    attention = 4.0 * tokens * (keys + config.text_len) * config.dim * config.num_layers
    matmul = task_flop(config, tokens, keys) - attention
    moved = pointwise_bytes(config, tokens, dtype.itemsize)
    why = {
        "attention": (attention / limits["flop"], f"{attention / 1e12:.4g} TFLOP"),
        "matmul": (matmul / limits["flop"], f"{matmul / 1e12:.4g} TFLOP"),
        "pointwise": (moved / limits["bytes"], f"{moved / 1e9:.4g} GB"),
    }
    events = profiler.function_events or []
    spent, kernels, busy = _spent(events, cuda)
    parts = [KindTime(k, spent[k] / tasks, kernels[k] / tasks, *why.get(k, (0.0, ""))) for k in KINDS]
    parts.append(KindTime("idle", max(0.0, seconds - busy / tasks), 0))
    names = calls_within(events, _PROFILED) if cuda else []
    return Parts(
        seconds,
        parts,
        sum(bool(LAUNCHES.match(name)) for name in names) / tasks if cuda else None,
        sum(name in SYNCS for name in names) / tasks if cuda else None,
        limits,
    )


def calls_within(events: Sequence[Any], name: str) -> list[str]:
    """Names of the profiler's host events that started within the ``record_function`` of this name. Leaves out the
    synchronisation before and after, which is the measurement's.
    """
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    span = next(event.time_range for event in host if event.name == name)
    within = [event for event in host if span.start <= event.time_range.start <= span.end]
    return [event.name for event in sorted(within, key=lambda event: event.time_range.start)]


def kind_of(name: str) -> str:
    """attention, matmul, copy or pointwise, from the name of a kernel or torch operation."""
    for kind, pattern in (("copy", _COPY), ("attention", _ATTENTION), ("matmul", _MATMUL)):
        if pattern.search(name):
            return kind
    return "pointwise"


def _spent(events: Sequence[Any], cuda: bool) -> tuple[dict[str, float], dict[str, int], float]:
    """Seconds and kernels by kind, and the seconds that the device was busy."""
    seconds, kernels = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    spans: list[tuple[float, float]] = []
    for event in events:
        if cuda:
            if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
                continue
            time_us = event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
        else:
            if not event.name.startswith(("aten::", "hiar::")):
                continue
            time_us = event.self_cpu_time_total
        kind = kind_of(event.name)
        seconds[kind] += time_us / 1e6
        kernels[kind] += 1
    return seconds, kernels, covered(spans) / 1e6 if cuda else sum(seconds.values())


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reach = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reach))
        reach = max(reach, stop)
    return total


def pointwise_bytes(config: WanConfig, tokens: int, element: int) -> float:
    """Least bytes that the pointwise work of one forward moves: each op of this package reads and writes once.

    In units of the model dimension, per token and layer: 4 for each of three residuals with the norm after it, 6 for
    qk_norm_rope_append, 2 for rms_norm of the cross-attention's q; GELU two hidden dimensions.
    """
    widths = 3 * 4 + 6 + 2 + 2 * config.ffn_dim / config.dim
    return config.num_layers * widths * tokens * config.dim * element


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matmul and bytes/s of a large copy, medians of 7; small sizes on a CPU."""
    cuda = device.type == "cuda"
    n, size = (8192, 1 << 30) if cuda else (512, 1 << 25)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    rates = {}
    for name, work, run in (("flop", 2.0 * n**3, lambda: a @ b), ("bytes", 2.0 * size, lambda: y.copy_(x))):
        run()
        seconds = []
        for _ in range(7):
            start = now(device)
            run()
            seconds.append(now(device) - start)
        rates[name] = work / median(seconds)
    return rates
