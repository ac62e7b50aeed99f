"""`hiar profile`: where a rollout's time goes, beside the machine's limits. `hiar warmup`: what a cold start costs.

Weights are random: speed does not depend on them. Every figure is measured in the run that prints it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from ..config import WAN, ExecutionConfig, RolloutConfig, WanConfig
from ..models.transformer import HiARTransformer
from ..rollout import Rollout
from ..schedule.costs import task_flop
from ..version import package_version

KINDS = ("attention", "matmul", "pointwise", "copy")
_ATTENTION = re.compile(r"attention|attn|fmha|flash|sdpa|softmax", re.IGNORECASE)
_MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|addmm|::mm|::bmm|::linear|matmul", re.IGNORECASE)
_COPY = re.compile(r"memcpy|memset|copy_|::to$|::cat$", re.IGNORECASE)
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = re.compile(r"^(cuda|cu)LaunchKernel|^cudaGraphLaunch|^cudaLaunchCooperativeKernel")
_WATCHED = "the watched blocks"


_ROLLOUT = RolloutConfig(order="stream", window_frames=WAN.window_frames)


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        model: a name of :meth:`WanConfig.from_name`. height, width: pixels; None: 480 x 832, or the model's one size.
        blocks: measured, once the window is full.
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
        """Of the network that is run."""
        values = WanConfig.from_name(self.model).to_dict()
        return WanConfig.from_dict(values if self.layers is None else {**values, "num_layers": self.layers})

    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent frame; Wan's VAE makes 8 x 8 pixels one."""
        config = self.config()
        if config.position_grid is not None:
            if (self.height, self.width) != (None, None):
                raise ValueError(f"{self.model} has one size: give no height and no width")
            rows, columns = (n * p for n, p in zip(config.position_grid, config.patch_size[1:], strict=True))
            return rows, columns
        height, width = self.height or WAN.size[0], self.width or WAN.size[1]
        step = 2 * WAN.spatial_compression
        if height % step or width % step:
            raise ValueError(f"height and width must be multiples of {step}, got {height}x{width}")
        return height // WAN.spatial_compression, width // WAN.spatial_compression


@dataclass
class Start:
    """Seconds from nothing to the first task that runs at full speed."""

    build: float
    warm_up: float
    kinds: int


@dataclass
class Part:
    """One kind of work, per task: seconds on the device, kernels, and the seconds that the machine's limit allows."""

    name: str
    seconds: float
    kernels: float
    limit: float = 0.0
    why: str = ""


@dataclass
class Profile:
    """What :func:`profile` found, per task where not said otherwise."""

    setting: Setting
    device: str
    start: Start
    tasks: int
    seconds: float
    parts: list[Part]
    launches: float | None
    syncs: float | None
    peak_bytes: int | None
    frames_per_second: float
    limits: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """As a Markdown table with what was run above it."""
        s, size = self.setting, "x".join(map(str, self.setting.latent_size()))
        rows = [
            f"{s.model}{f' ({s.layers} layers)' if s.layers else ''}, random weights, latents {size}, {s.dtype}, "
            f"window {s.rollout.window_frames}, order {s.rollout.order}"
            f"{', fused' if s.rollout.fuse_cache_denoise else ''}, {'CUDA graphs' if s.cuda_graph else 'eager'}, "
            f"{self.device}",
            f"limits measured in this run: matmul {self.limits['flop'] / 1e12:.4g} TFLOP/s, "
            f"copy {self.limits['bytes'] / 1e9:.4g} GB/s",
            f"cold start: weights {self.start.build:.1f} s, warm-up {self.start.warm_up:.1f} s for {self.start.kinds} "
            "kinds of launches",
            f"{1e3 * self.seconds:.3f} ms a task over {self.tasks} tasks, {self.frames_per_second:.2f} pixel frames "
            "a second without the VAE",
        ]
        for name, value in (("kernel or graph launches", self.launches), ("host syncs", self.syncs)):
            rows.append(f"{name} a task: " + ("not counted on a CPU" if value is None else f"{value:.2f}"))
        peak = "not counted on a CPU" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f} GiB"
        rows += [f"peak memory: {peak}", "", "| part | ms a task | share | kernels | limit ms | of limit | limit is |"]
        rows.append("|---|---:|---:|---:|---:|---:|---|")
        for part in self.parts:
            limit = " | "
            if part.limit and part.seconds:
                limit = f"{1e3 * part.limit:.3f} | {part.limit / part.seconds:.0%}"
            rows.append(
                f"| {part.name} | {1e3 * part.seconds:.3f} | {part.seconds / self.seconds:.0%} | {part.kernels:.0f} "
                f"| {limit} | {part.why} |"
            )
        return rows


def build(setting: Setting) -> tuple[Rollout, float]:
    """An endless rollout of random weights and a random prompt, and the seconds that it took."""
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {setting.device!r}: torch {torch.__version__} finds no CUDA device; legal here: cpu")
    begun = _now(device)
    config, (height, width) = setting.config(), setting.latent_size()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            model = HiARTransformer(config).eval().requires_grad_(False)
            text = torch.randn(1, config.text_len, config.text_dim)
    finally:
        torch.set_default_dtype(before)
    # step_first makes no endless video: until the window is full, and then the blocks to measure
    frames = setting.rollout.frames_per_block
    full = -(-(setting.window or 0) // frames) + setting.blocks
    rollout = Rollout(
        model, text, setting.rollout, ExecutionConfig(cuda_graph=setting.cuda_graph),
        num_latent_frames=frames * full if setting.rollout.order == "step_first" else None, latent_size=(height, width),
    )  # fmt: skip
    return rollout, _now(device) - begun


def warm_up(setting: Setting) -> tuple[Rollout, Start]:
    """Build a rollout and run each of its kinds of launches once."""
    rollout, seconds = build(setting)
    begun = _now(rollout.device)
    kinds = rollout.warm_up()
    return rollout, Start(seconds, _now(rollout.device) - begun, kinds)


def profile(setting: Setting) -> Profile:
    """Run until the window is full, then ``setting.blocks`` blocks with a clock, and as many under torch's profiler.

    Raises:
        ValueError: order step_first, which has no steady state: its blocks are finished all at the end.
    """
    if setting.rollout.order == "step_first":
        raise ValueError("profile needs an order with a steady state: stream, wavefront or block_first, got step_first")
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
    # again under the profiler, whose own cost must not be in the figures above
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    before = rollout.forwards_done
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(_WATCHED):
            for _ in range(setting.blocks):
                next(blocks)
        _now(device)
    return _report(setting, rollout, start, profiler, seconds, tasks, rollout.forwards_done - before)


def _report(
    setting: Setting, rollout: Rollout, start: Start, profiler: Any, seconds: float, tasks: int, watched: int
) -> Profile:
    device = rollout.device
    cuda = device.type == "cuda"
    config, plan = setting.config(), rollout.plan
    peak = torch.cuda.max_memory_allocated(device) if cuda else None  # before the limits, whose copies take 2.5 GB
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
    parts = [Part(name, spent[name] / watched, kernels[name] / watched, *why.get(name, (0.0, ""))) for name in KINDS]
    parts.append(Part("idle", max(0.0, seconds / tasks - busy / watched), 0))
    names = calls_within(profiler.events(), _WATCHED) if cuda else []
    return Profile(
        setting,
        torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        start,
        tasks,
        seconds / tasks,
        parts,
        sum(bool(LAUNCHES.match(name)) for name in names) / watched if cuda else None,
        sum(name in SYNCS for name in names) / watched if cuda else None,
        peak,
        WAN.temporal_compression * plan.frames_per_block * setting.blocks / seconds,
        limits,
    )


def calls_within(events: Sequence[Any], name: str) -> list[str]:
    """Names of a profiler's events on the host that began within the one of such a name (``record_function``): the
    waits that measuring needs, before it and after it, are none of the rollout's.
    """
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    span = next(event.time_range for event in host if event.name == name)
    within = [event for event in host if span.start <= event.time_range.start <= span.end]
    return [event.name for event in sorted(within, key=lambda event: event.time_range.start)]


def kind_of(name: str) -> str:
    """attention, matmul, copy or pointwise, by the name of a kernel or of torch's operation."""
    for kind, pattern in (("copy", _COPY), ("attention", _ATTENTION), ("matmul", _MATMUL)):
        if pattern.search(name):
            return kind
    return "pointwise"


def _spent(profiler: Any, cuda: bool) -> tuple[dict[str, float], dict[str, int], float]:
    """Seconds and kernels by kind, and the seconds in which the device had something to do."""
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
    """Length of a union of intervals."""
    total, reach = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reach))
        reach = max(reach, stop)
    return total


def pointwise_bytes(config: WanConfig, tokens: int, element: int) -> float:
    """Bytes that the pointwise work of one forward moves at least, each op of this package reading and writing once.

    In widths of the network a token and layer: three residuals with the norm that follows 4 each, qk_norm_rope_append
    6, rms_norm of the cross-attention's q 2; GELU two hidden widths.
    """
    widths = 3 * 4 + 6 + 2 + 2 * config.ffn_dim / config.dim
    return config.num_layers * widths * tokens * config.dim * element


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matmul and bytes/s of a large copy, medians of several; small ones on a CPU."""
    cuda = device.type == "cuda"
    n, size = (8192, 1 << 30) if cuda else (512, 1 << 25)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {}
    for name, work, run in (("flop", 2.0 * n**3, lambda: a @ b), ("bytes", 2.0 * size, lambda: y.copy_(x))):
        run()
        taken = []
        for _ in range(7):
            begun = _now(device)
            run()
            taken.append(_now(device) - begun)
        found[name] = work / median(taken)
    return found


def stage_times(setting: Setting) -> dict[str, Any]:
    """Seconds of a denoise and of a cache task over the frames that it sees, for the pipeline simulator.

    Returns:
        What :func:`hiar_model.schedule.costs.measured` reads; medians over the steps.
    """
    plain = replace(setting.rollout, order="step_first", fuse_cache_denoise=False)
    rollout, _ = warm_up(replace(setting, rollout=plain))
    plan, device = rollout.plan, rollout.device
    taken: dict[str, dict[int, list[float]]] = {"denoise": {}, "cache": {}}
    for group in rollout.groups():
        task = group[0][0]
        begun = _now(device)
        rollout.step()
        seen = plan.visible_frames(task.step, task.block)
        taken[task.kind].setdefault(seen, []).append(_now(device) - begun)
    curves = {kind: [[seen, median(times)] for seen, times in sorted(found.items())] for kind, found in taken.items()}
    height, width = setting.latent_size()
    return {
        "model": setting.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "revision": package_version(),
        "height": height,
        "width": width,
        "frames_per_block": plan.frames_per_block,
        "denoise_s": curves["denoise"],
        "cache_s": curves["cache"],
    }


def _now(device: torch.device) -> float:
    """The clock, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
