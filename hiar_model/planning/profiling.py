"""`hiar profile`: where a rollout's time goes, against the machine's limits. `hiar warmup`: the cost of a cold start.

Weights are random, as speed does not depend on them. Every figure is measured in the run that prints it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from ..common.checks import whole
from ..config import WAN, ExecutionConfig, RolloutConfig, WanConfig
from ..models.kv_cache import RingCache
from ..models.transformer import HiARTransformer
from ..models.video_model import pick_device
from ..rollout import Rollout
from ..schedule.costs import task_flop
from ..version import package_version
from .fit import grid_size, refuse_size
from .free_memory import require_free
from .memory import weights_bytes

KINDS = ("attention", "matmul", "pointwise", "copy")
_ATTENTION = re.compile(r"attention|attn|fmha|flash|sdpa|softmax", re.IGNORECASE)
_MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|addmm|::mm|::bmm|::linear|matmul", re.IGNORECASE)
_COPY = re.compile(r"memcpy|memset|copy_|::to$|::cat$", re.IGNORECASE)
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = re.compile(r"^(cuda|cu)LaunchKernel|^cudaGraphLaunch|^cudaLaunchCooperativeKernel")
_PROFILED = "profiled blocks"

_ROLLOUT = RolloutConfig(order="stream", window_frames=WAN.window_frames)


@dataclass(frozen=True)
class Setting:
    """The rollout to measure.

    Attributes:
        model: a name of :meth:`WanConfig.from_name`. height, width: pixels; None: 480 x 832, or the model's only size.
        blocks: measured with a full window.
        rollout: what is computed. cuda_graph: whether forwards are captured. layers: of the network; None: all.
    """

    model: str = "wan2.1-t2v-1.3b"
    height: int | None = None
    width: int | None = None
    blocks: int = 2
    rollout: RolloutConfig = _ROLLOUT
    cuda_graph: bool = True
    dtype: str = "bfloat16"
    device: str = "cuda"
    layers: int | None = None

    @property
    def window(self) -> int:
        """The widest window, in latent frames."""
        return max(window or 0 for window in self.rollout.windows)

    def config(self) -> WanConfig:
        """The config of the network."""
        values = WanConfig.from_name(self.model).to_dict()
        if self.layers is not None:
            values["num_layers"] = whole("layers", self.layers, 1, most=values["num_layers"])
        return WanConfig.from_dict(values)

    def latent_size(self) -> tuple[int, int]:
        """(height, width) of a latent frame."""
        config = self.config()
        if (only := grid_size(config)) is not None:
            refuse_size(self.model, self.height, self.width)
            return only
        height, width = self.height or WAN.size[0], self.width or WAN.size[1]
        step = 2 * WAN.spatial_compression
        if height % step or width % step:
            raise ValueError(f"height and width must be multiples of {step}, got {height}x{width}")
        return height // WAN.spatial_compression, width // WAN.spatial_compression


@dataclass
class Start:
    """Seconds to build the model and to warm up, and how many kinds of forwards there are."""

    build: float
    warm_up: float
    kinds: int


@dataclass
class KindTime:
    """One kind of work, per task: seconds on the device, kernels, and the least seconds the machine allows."""

    name: str
    seconds: float
    kernels: float
    limit: float = 0.0
    why: str = ""


@dataclass
class Profile:
    """The result of :func:`profile`, per task unless stated otherwise."""

    setting: Setting
    device: str
    start: Start
    tasks: int
    seconds: float
    parts: list[KindTime]
    launches: float | None
    syncs: float | None
    peak_bytes: int | None
    frames_per_second: float
    limits: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A Markdown table, with a description of the run above it."""
        s, size = self.setting, "x".join(map(str, self.setting.latent_size()))
        lines = [
            f"{s.model}{f' ({s.layers} layers)' if s.layers else ''}, random weights, latents {size}, {s.dtype}, "
            f"window {s.rollout.window_frames}, order {s.rollout.order}"
            f"{', fused' if s.rollout.fuse_cache_denoise else ''}, {'CUDA graphs' if s.cuda_graph else 'eager'}, "
            f"{self.device}",
            f"limits measured in this run: matmul {self.limits['flop'] / 1e12:.4g} TFLOP/s, "
            f"copy {self.limits['bytes'] / 1e9:.4g} GB/s",
            f"cold start: weights {self.start.build:.1f} s, warm-up {self.start.warm_up:.1f} s for {self.start.kinds} "
            "kinds of forwards",
            f"{1e3 * self.seconds:.3f} ms a task over {self.tasks} tasks, {self.frames_per_second:.2f} pixel frames "
            "a second without the VAE",
        ]
        for name, value in (("kernel or graph launches", self.launches), ("host syncs", self.syncs)):
            lines.append(f"{name} a task: " + ("not counted on a CPU" if value is None else f"{value:.2f}"))
        peak = "not counted on a CPU" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f} GiB"
        lines += [f"peak memory: {peak}", "", "| part | ms a task | share | kernels | limit ms | of limit | limit is |"]
        lines.append("|---|---:|---:|---:|---:|---:|---|")
        for part in self.parts:
            limit = " | "
            if part.limit and part.seconds:
                limit = f"{1e3 * part.limit:.3f} | {part.limit / part.seconds:.0%}"
            lines.append(
                f"| {part.name} | {1e3 * part.seconds:.3f} | {part.seconds / self.seconds:.0%} | {part.kernels:.0f} "
                f"| {limit} | {part.why} |"
            )
        return lines


def draw_profile(result: Profile, picture: str | Path) -> None:
    """Draw the milliseconds of a task by kind of work, each beside the least that this machine allows, into a .png."""
    from ..io.plot import Bar, Bars, save_plot

    bars = [
        Bar(part.name, 1e3 * part.seconds, 1e3 * part.limit, f"{part.seconds / result.seconds:.0%}")
        for part in result.parts
    ]
    s = result.setting
    title = f"{s.model}, {s.dtype}, {result.device}: {1e3 * result.seconds:.4g} ms a task"
    panel = Bars(title, bars, "ms", "least that the machine's FLOP/s and bytes/s allow")
    save_plot([panel], picture)


def build(setting: Setting) -> tuple[Rollout, float]:
    """An endless rollout with random weights and a random prompt, and the seconds to build it."""
    device, dtype = pick_device(setting.device), getattr(torch, setting.dtype)
    begun = _now(device)
    config, size = setting.config(), setting.latent_size()
    # step_first cannot be endless: fill the window, then the blocks to measure
    frames = setting.rollout.frames_per_block
    full = -(-(setting.window or 0) // frames) + setting.blocks
    length = frames * full if setting.rollout.order == "step_first" else None
    tokens, sizes = math.prod(config.grid(*size)), [setting.window or setting.rollout.frames_per_block]
    least = weights_bytes(config, dtype) + RingCache.memory_bytes(config, sizes, 1, tokens, dtype)
    require_free(least, device, f"{setting.model} in {setting.dtype}, its weights and one window of keys and values,")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            model = HiARTransformer(config).eval().requires_grad_(False)
            prompt_embeds = torch.randn(1, config.text_len, config.text_dim)
    finally:
        torch.set_default_dtype(before)
    rollout = Rollout(
        model, prompt_embeds, setting.rollout, ExecutionConfig(cuda_graph=setting.cuda_graph), latent_size=size,
        num_latent_frames=length,
    )  # fmt: skip
    return rollout, _now(device) - begun


def warm_up(setting: Setting) -> tuple[Rollout, Start]:
    """Build a rollout and run each of its kinds of forwards once."""
    rollout, seconds = build(setting)
    begun = _now(rollout.device)
    kinds = rollout.warm_up()
    return rollout, Start(seconds, _now(rollout.device) - begun, kinds)


def profile(setting: Setting) -> Profile:
    """Fill the window, then time ``setting.blocks`` blocks, and run as many again under torch's profiler.

    Raises:
        ValueError: order step_first, which has no steady state: all its blocks finish at the end.
    """
    if setting.rollout.order == "step_first":
        raise ValueError("order must have a steady state (stream, wavefront or block_first), got step_first")
    rollout, start = warm_up(setting)
    device, cuda = rollout.device, rollout.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    blocks = iter(rollout)
    for block in blocks:
        if block.first_frame + rollout.plan.frames_per_block >= setting.window:
            break
    begun, before = _now(device), rollout.forwards_done
    for _ in range(setting.blocks):
        next(blocks)
    seconds, tasks = _now(device) - begun, rollout.forwards_done - before
    # again under the profiler, whose overhead must not be in the timing above
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    before = rollout.forwards_done
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(_PROFILED):
            for _ in range(setting.blocks):
                next(blocks)
        _now(device)
    return _report(setting, rollout, start, profiler, seconds, tasks, rollout.forwards_done - before)


def _report(
    setting: Setting, rollout: Rollout, start: Start, profiler: Any, seconds: float, tasks: int, profiled: int
) -> Profile:
    device = rollout.device
    cuda = device.type == "cuda"
    config, plan = setting.config(), rollout.plan
    peak = torch.cuda.max_memory_allocated(device) if cuda else None  # before machine_limits, which allocates 2.5 GB
    limits = machine_limits(device, getattr(torch, setting.dtype))
    tokens = rollout.cache.frame_tokens * plan.frames_per_block
    keys = rollout.cache.frame_tokens * setting.window
    attention = 4.0 * tokens * (keys + config.text_len) * config.dim * config.num_layers
    matmul = task_flop(config, tokens, keys) - attention
    moved = pointwise_bytes(config, tokens, getattr(torch, setting.dtype).itemsize)
    why = {
        "attention": (attention / limits["flop"], f"{attention / 1e12:.4g} TFLOP"),
        "matmul": (matmul / limits["flop"], f"{matmul / 1e12:.4g} TFLOP"),
        "pointwise": (moved / limits["bytes"], f"{moved / 1e9:.4g} GB"),
    }
    spent, kernels, busy = _spent(profiler, cuda)
    parts = [KindTime(k, spent[k] / profiled, kernels[k] / profiled, *why.get(k, (0.0, ""))) for k in KINDS]
    parts.append(KindTime("idle", max(0.0, seconds / tasks - busy / profiled), 0))
    names = calls_within(profiler.events(), _PROFILED) if cuda else []
    return Profile(
        setting,
        torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        start,
        tasks,
        seconds / tasks,
        parts,
        sum(bool(LAUNCHES.match(name)) for name in names) / profiled if cuda else None,
        sum(name in SYNCS for name in names) / profiled if cuda else None,
        peak,
        WAN.temporal_compression * plan.frames_per_block * setting.blocks / seconds,
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


def _spent(profiler: Any, cuda: bool) -> tuple[dict[str, float], dict[str, int], float]:
    """Seconds and kernels by kind, and the seconds that the device was busy."""
    seconds, kernels = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    spans: list[tuple[float, float]] = []
    for event in profiler.events():
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
            start = _now(device)
            run()
            seconds.append(_now(device) - start)
        rates[name] = work / median(seconds)
    return rates


def stage_times(setting: Setting) -> dict[str, Any]:
    """Seconds of a denoise and of a cache task against the frames it sees, for the pipeline simulator.

    Returns:
        JSON for :func:`hiar_model.schedule.costs.measured`; medians over the steps.
    """
    plain = replace(setting.rollout, order="step_first", fuse_cache_denoise=False)
    rollout, _ = warm_up(replace(setting, rollout=plain))
    plan, device = rollout.plan, rollout.device
    seconds: dict[str, dict[int, list[float]]] = {"denoise": {}, "cache": {}}
    for group in rollout.groups():
        task = group[0][0]
        start = _now(device)
        rollout.step()
        seen = plan.visible_frames(task.step, task.block)
        seconds[task.kind].setdefault(seen, []).append(_now(device) - start)
    medians = {kind: [[seen, median(times)] for seen, times in sorted(of.items())] for kind, of in seconds.items()}
    height, width = setting.latent_size()
    return {
        "model": setting.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "revision": package_version(),
        "height": height,
        "width": width,
        "frames_per_block": plan.frames_per_block,
        "denoise_s": medians["denoise"],
        "cache_s": medians["cache"],
    }


def _now(device: torch.device) -> float:
    """time.perf_counter() after a device synchronisation."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
