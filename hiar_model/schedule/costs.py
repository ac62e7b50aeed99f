"""Costs of tasks and transfers for the simulator: unit costs, a roofline from FLOP counts, or measured times.

The cost of a task is a function of the latent frames it sees. `Costs` is all that the simulator knows of a machine:
stragglers, launch gaps and clock changes are not modelled.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..config import WanConfig
from .plan import BatchItem, Plan

BF16 = 2  # bytes


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be a time of at least 0, got {value}")


@dataclass(frozen=True)
class CostCurve:
    """Time of a task by the latent frames it sees, its own included: linear interpolation between points.

    Beyond the first and last point the nearest segment is extended; a single point is a constant.

    Args:
        points: (visible latent frames, time), frames rising.

    Example:
        >>> CostCurve(((3, 1.0), (21, 4.0)))(12)
        2.5
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        points = tuple((float(frames), float(time)) for frames, time in self.points)
        object.__setattr__(self, "points", points)
        frames = [point[0] for point in points]
        if not points or frames != sorted(set(frames)) or not all(time >= 0 for _, time in points):
            raise ValueError(f"a cost curve needs [visible frames, time >= 0] by rising frames, got {list(points)}")

    def __call__(self, frames: float) -> float:
        if len(self.points) == 1:
            return self.points[0][1]
        right = min(max(1, bisect_right(self.points, (frames, float("inf")))), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[right - 1 : right + 1]
        return y0 + (y1 - y0) * (frames - x0) / (x1 - x0)

    def scaled(self, factor: float, more: float = 0.0) -> CostCurve:
        """This curve times `factor`, plus `more`."""
        return CostCurve(tuple((frames, time * factor + more) for frames, time in self.points))


@dataclass(frozen=True)
class Message:
    """One transfer: it occupies the link for `busy` and arrives `delay` later; `nbytes` is only counted."""

    nbytes: float = 0.0
    busy: float = 0.0
    delay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("nbytes", "busy", "delay"):
            _not_negative(name, getattr(self, name))


@dataclass(frozen=True)
class Link:
    """A link between two ranks: bytes per second in one direction, seconds of latency."""

    name: str
    bytes_per_second: float
    latency: float

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise ValueError(f"link {self.name}: bytes_per_second must be above 0, got {self.bytes_per_second}")
        _not_negative("latency", self.latency)

    def message(self, nbytes: float) -> Message:
        """The transfer of `nbytes` bytes."""
        return Message(nbytes, nbytes / self.bytes_per_second, self.latency)


# Nominal bandwidths in one direction; latencies are typical of a send between two processes.
LINKS = {
    "nvlink": Link("NVLink of an H200 (450 GB/s)", 450e9, 10e-6),
    "pcie": Link("PCIe 4.0 x16 (31.5 GB/s)", 31.5e9, 20e-6),
    "10gbe": Link("10 Gb/s Ethernet (1.25 GB/s)", 1.25e9, 50e-6),
}


@dataclass(frozen=True)
class Costs:
    """The costs of tasks and transfers, in one unit of time: a task for `unit_costs`, else seconds.

    Args:
        denoise, cache: time of a task, one curve for all steps or one for each.
        fused: time of a fused cache and denoise task divided by the sum of the two.
        batch: time per item of a batch of 1, 2, ... items, divided by that of an item alone; the last holds beyond.
        decode: time to decode the pixels of one block.
        latents, keys: transfer of a block's latents to another rank; of its shared keys and values, all layers.
        source: where the figures come from.
    """

    denoise: CostCurve | tuple[CostCurve, ...]
    cache: CostCurve | tuple[CostCurve, ...]
    fused: float = 1.0
    batch: tuple[float, ...] = (1.0,)
    decode: float = 0.0
    latents: Message = Message()
    keys: Message = Message()
    source: str = ""

    def __post_init__(self) -> None:
        for name, value in (("fused", self.fused), ("decode", self.decode), *(("batch", b) for b in self.batch)):
            _not_negative(name, value)
        if not self.batch:
            raise ValueError("batch must be the relative time per item of batches of 1, 2, ... items, got ()")

    def curve(self, kind: str, step: int) -> CostCurve:
        """The cost of a kind of task ("denoise" or "cache") at a step."""
        curves = self.denoise if kind == "denoise" else self.cache
        return curves if isinstance(curves, CostCurve) else curves[step]

    def item(self, plan: Plan, item: BatchItem) -> float:
        """Time of one batch item run alone."""
        time = sum(self.curve(task.kind, task.step)(plan.visible_frames(task.step, task.block)) for task in item)
        return time * self.fused if len(item) == 2 else time

    def check(self, plan: Plan) -> None:
        """ValueError unless there is one curve for all steps of the plan, or one for each."""
        for name in ("denoise", "cache"):
            curves = getattr(self, name)
            if not isinstance(curves, CostCurve) and len(curves) != plan.steps:
                raise ValueError(f"{name} must have one cost curve, or one per step ({plan.steps}), got {len(curves)}")


def unit_costs(
    denoise: float = 1.0, cache: float = 1.0, decode: float = 0.0, send_latent: float = 0.0, send_keys: float = 0.0
) -> Costs:
    """The same time for every task of a kind, whatever it sees; transfers are pure delay."""
    times = {"denoise": denoise, "cache": cache, "decode": decode, "send_latent": send_latent, "send_keys": send_keys}
    for name, value in times.items():
        _not_negative(name, value)
    return Costs(
        CostCurve(((0, denoise),)),
        CostCurve(((0, cache),)),
        decode=decode,
        latents=Message(delay=send_latent),
        keys=Message(delay=send_keys),
        source=f"unit costs: denoise {denoise:g}, cache {cache:g}",
    )


@dataclass(frozen=True)
class Geometry:
    """Size of a block: height and width of the latents, latent frames. Defaults: 480x832 pixels, 3 latent frames."""

    height: int = 60
    width: int = 104
    frames_per_block: int = 3

    def frame_tokens(self, config: WanConfig) -> int:
        """Tokens of a latent frame."""
        return prod(config.grid(self.height, self.width))

    def latent_bytes(self, config: WanConfig, element: int = BF16) -> int:
        """Bytes of a block's latents [frames, C, H, W]; `element`: bytes of a number."""
        return self.frames_per_block * config.in_channels * self.height * self.width * element

    def key_bytes(self, config: WanConfig, element: int = BF16) -> int:
        """Bytes of a block's keys and values of one step, all layers; `element`: bytes of a number."""
        return 2 * config.num_layers * self.frames_per_block * self.frame_tokens(config) * config.dim * element


def task_flop(config: WanConfig, tokens: int, keys: float) -> float:
    """FLOP of the matmuls and attention of one forward of `tokens` tokens over `keys` keys.

    Per layer: q, k, v, o 8Td^2; q and o of the cross-attention 4Td^2 (its keys are computed once per prompt);
    feed-forward 4Tdf; self-attention 4TKd; cross-attention 4T(text_len)d. Embeddings, head and pointwise work are left
    out.
    """
    d, f = config.dim, config.ffn_dim
    layer = 12 * tokens * d * d + 4 * tokens * d * f + 4 * tokens * (keys + config.text_len) * d
    return float(config.num_layers * layer)


def roofline(
    config: WanConfig, tflops: float, link: Link, decode: float = 0.0, geometry: Geometry | None = None
) -> Costs:
    """Costs in seconds if every task ran at `tflops` TFLOP/s, whatever its shape: a lower bound, not a measurement.

    A cache task costs as much as a denoise task; fusing and batching save nothing.
    """
    if not tflops > 0:
        raise ValueError(f"tflops must be above 0, got {tflops}")
    g = geometry or Geometry()
    frame, tokens = g.frame_tokens(config), g.frame_tokens(config) * g.frames_per_block
    seconds = [(k, task_flop(config, tokens, k * frame) / (tflops * 1e12)) for k in (0, g.frames_per_block)]
    line = CostCurve(tuple(seconds))
    source = f"roofline: FLOP of a task / {tflops:g} TFLOP/s (not measured)"
    return _with_link(Costs(line, line, decode=decode, source=source), config, g, link)


def measured(stage_times: str | Path | Mapping[str, Any], link: Link) -> tuple[WanConfig, Geometry, Costs]:
    """Costs in seconds from stage times of one device: a JSON file (bench/studies/stage_times.py) or its contents.

        {"model": "wan2.1-t2v-1.3b",              a name of WanConfig.from_name
         "device": "...", "revision": "...",      shown in `Costs.source`
         "height": 60, "width": 104, "frames_per_block": 3,
         "denoise_s": [[3, 0.02], [21, 0.06]],    [visible latent frames, seconds], rising; or one such list per step
         "cache_s": [[3, 0.02], [21, 0.06]],
         "pair": 0.97, "batch": [1, 0.95],        optional: `fused` and `batch` of Costs
         "decode_s": 0.3}                         optional, per block

    Raises:
        ValueError: a key is missing or unknown.
    """
    values = stage_times if isinstance(stage_times, Mapping) else json.loads(Path(stage_times).read_text())
    needed = {"model", "device", "revision", "height", "width", "frames_per_block", "denoise_s", "cache_s"}
    legal = needed | {"pair", "batch", "decode_s"}
    for name, keys in (("missing", needed - set(values)), ("unknown", set(values) - legal)):
        if keys:
            raise ValueError(f"stage times: {', '.join(sorted(keys))} {name}; legal: {', '.join(sorted(legal))}")
    config = WanConfig.from_name(values["model"])
    g = Geometry(values["height"], values["width"], values["frames_per_block"])
    costs = Costs(
        _cost_curves(values["denoise_s"]),
        _cost_curves(values["cache_s"]),
        fused=values.get("pair", 1.0),
        batch=tuple(values.get("batch", (1.0,))),
        decode=values.get("decode_s", 0.0),
        source=f"stage times measured on {values['device']}, revision {values['revision']}",
    )
    return config, g, _with_link(costs, config, g, link)


def exchanged_bytes(config: WanConfig, geometry: Geometry, ranks: int) -> float:
    """Bytes that each of `ranks` ranks sends in one task under head parallelism (Ulysses).

    A rank has T/R tokens outside attention and H/R heads inside it. It exchanges q, k, v [T/R, d] before each attention
    and the output after it, and (R-1)/R of each goes to other ranks: 4 T d (R-1)/R^2 elements a layer.
    """
    tokens = geometry.frame_tokens(config) * geometry.frames_per_block
    return 4 * tokens * config.dim * BF16 * config.num_layers * (ranks - 1) / ranks**2


def uneven_heads(config: WanConfig, geometry: Geometry, ranks: int) -> str | None:
    """Why this many ranks cannot share a task by heads; None where they can."""
    tokens = geometry.frame_tokens(config)
    for what, number in (("heads", config.num_heads), ("tokens of a frame", tokens)):
        if ranks < 1 or number % ranks:
            return f"{number} {what} cannot be divided evenly"
    return None


def head_parallel(costs: Costs, config: WanConfig, geometry: Geometry, ranks: int, link: Link) -> Costs:
    """Costs of tasks shared by `ranks` ranks: time / ranks, plus two exchanges a layer that do not overlap with it.

    Raises:
        ValueError: the heads or the tokens of a frame are not a multiple of `ranks`.
    """
    if reason := uneven_heads(config, geometry, ranks):
        raise ValueError(f"ranks={ranks} is impossible: {reason}")
    exchange = 0.0
    if ranks > 1:
        sent = exchanged_bytes(config, geometry, ranks)
        exchange = 2 * config.num_layers * link.latency + sent / link.bytes_per_second

    def share(curves: CostCurve | tuple[CostCurve, ...]) -> CostCurve | tuple[CostCurve, ...]:
        if isinstance(curves, CostCurve):
            return curves.scaled(1 / ranks, exchange)
        return tuple(curve.scaled(1 / ranks, exchange) for curve in curves)

    return replace(costs, denoise=share(costs.denoise), cache=share(costs.cache))


def _with_link(costs: Costs, config: WanConfig, geometry: Geometry, link: Link) -> Costs:
    latents, keys = link.message(geometry.latent_bytes(config)), link.message(geometry.key_bytes(config))
    return replace(costs, latents=latents, keys=keys)


def _cost_curves(values: Sequence[Any]) -> CostCurve | tuple[CostCurve, ...]:
    """One curve, or one per step, from the lists of a JSON file."""
    if values and isinstance(values[0][0], Sequence):
        return tuple(CostCurve(tuple((x, y) for x, y in curve)) for curve in values)
    return CostCurve(tuple((x, y) for x, y in values))
