"""What tasks and transfers cost, for the simulator: in units, from the work in FLOP, or from measured times.

A task costs the more the more it sees, so its cost is a curve over visible latent frames. The simulator knows no other
property of a machine: whatever is not in a `Costs` (stragglers, launch gaps, clocks) is not in its result.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import WanConfig
from .plan import Plan, Row

BF16 = 2  # bytes


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}={value} is no time: give a number >= 0")


@dataclass(frozen=True)
class Curve:
    """Time of a task over the latent frames it sees, its own among them: straight between the points given.

    Left of the first and right of the last point the nearest line goes on; one point is a constant.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        points = tuple((float(frames), float(time)) for frames, time in self.points)
        object.__setattr__(self, "points", points)
        frames = [point[0] for point in points]
        if not points or frames != sorted(set(frames)) or not all(time >= 0 for _, time in points):
            raise ValueError(f"{list(points)} is no curve: give [visible frames, time >= 0] by rising frames")

    def __call__(self, frames: float) -> float:
        if len(self.points) == 1:
            return self.points[0][1]
        right = min(max(1, bisect_right(self.points, (frames, float("inf")))), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[right - 1 : right + 1]
        return y0 + (y1 - y0) * (frames - x0) / (x1 - x0)

    def scaled(self, factor: float, more: float = 0.0) -> Curve:
        """The curve times `factor`, plus `more`."""
        return Curve(tuple((frames, time * factor + more) for frames, time in self.points))


@dataclass(frozen=True)
class Message:
    """What one transfer takes: `busy` holds the link, `delay` passes on top of it; `nbytes` is only counted."""

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
            raise ValueError(f"bytes_per_second={self.bytes_per_second} of link {self.name} is not legal: give one > 0")
        _not_negative("latency", self.latency)

    def message(self, nbytes: float) -> Message:
        """The transfer of so many bytes."""
        return Message(nbytes, nbytes / self.bytes_per_second, self.latency)


# Nominal rates of one direction, and latencies of the usual order for a send between two processes.
LINKS = {
    "nvlink": Link("NVLink of an H200 (450 GB/s)", 450e9, 10e-6),
    "pcie": Link("PCIe 4.0 x16 (31.5 GB/s)", 31.5e9, 20e-6),
    "10gbe": Link("10 Gb/s Ethernet (1.25 GB/s)", 1.25e9, 50e-6),
}


@dataclass(frozen=True)
class Costs:
    """All that the simulator asks. Times are in any one unit: tasks for `unit_costs`, else seconds.

    denoise, cache   time of a task, one curve for every step or one per step
    pair             time of a fused forward over the sum of its two tasks
    batch            time per row over that of a row alone, by rows in one launch (1, 2, ...; the last goes on)
    decode           time to decode the pixels of one block
    latents, keys    transfer of a block's latents to another rank; of its lent keys and values, all layers
    source           where the figures are from, in words
    """

    denoise: Curve | tuple[Curve, ...]
    cache: Curve | tuple[Curve, ...]
    pair: float = 1.0
    batch: tuple[float, ...] = (1.0,)
    decode: float = 0.0
    latents: Message = Message()
    keys: Message = Message()
    source: str = ""

    def __post_init__(self) -> None:
        for name, value in (("pair", self.pair), ("decode", self.decode), *(("batch", b) for b in self.batch)):
            _not_negative(name, value)
        if not self.batch:
            raise ValueError("batch=() is not legal: give the time per row of 1, 2, ... rows in one launch")

    def curve(self, kind: str, step: int) -> Curve:
        """The curve of a kind of task at a step."""
        found = self.denoise if kind == "denoise" else self.cache
        return found if isinstance(found, Curve) else found[step]

    def row(self, plan: Plan, row: Row) -> float:
        """Time of one row run alone. Both tasks of a fused row see what each would see alone."""
        time = sum(self.curve(v.kind, v.step)(plan.visible_frames(v.step, v.block)) for v in row)
        return time * self.pair if len(row) == 2 else time

    def check(self, plan: Plan) -> None:
        """Refuse costs that do not fit the plan."""
        for name in ("denoise", "cache"):
            curves = getattr(self, name)
            if not isinstance(curves, Curve) and len(curves) != plan.steps:
                raise ValueError(f"{name} has {len(curves)} curves: give one, or one per step ({plan.steps})")


def unit_costs(
    denoise: float = 1.0, cache: float = 1.0, decode: float = 0.0, send_latent: float = 0.0, send_keys: float = 0.0
) -> Costs:
    """Every task the same, whatever it sees; transfers are pure delay."""
    times = {"denoise": denoise, "cache": cache, "decode": decode, "send_latent": send_latent, "send_keys": send_keys}
    for name, value in times.items():
        _not_negative(name, value)
    return Costs(
        Curve(((0, denoise),)),
        Curve(((0, cache),)),
        decode=decode,
        latents=Message(delay=send_latent),
        keys=Message(delay=send_keys),
        source=f"unit costs: denoise {denoise:g}, cache {cache:g}",
    )


@dataclass(frozen=True)
class Geometry:
    """The sizes of a block of video: latent height and width, latent frames per block. Defaults: 480x832, 3 frames."""

    height: int = 60
    width: int = 104
    frames_per_block: int = 3

    def frame_tokens(self, config: WanConfig) -> int:
        """Tokens of a latent frame."""
        rows, columns = config.grid(self.height, self.width)
        return rows * columns

    def latent_bytes(self, config: WanConfig, element: int = BF16) -> int:
        """Bytes of a block's latents, [frames, C, H, W]."""
        return self.frames_per_block * config.in_channels * self.height * self.width * element

    def key_bytes(self, config: WanConfig, element: int = BF16) -> int:
        """Bytes of a block's keys and values in all layers: the cache of one step grows by so much."""
        return 2 * config.num_layers * self.frames_per_block * self.frame_tokens(config) * config.dim * element


def task_flop(config: WanConfig, tokens: int, keys: float) -> float:
    """Work of one forward of `tokens` tokens over `keys` keys: matmuls and attention.

    Per layer: q, k, v, o 8Td^2; q and o of the cross-attention 4Td^2 (its keys are made once per prompt); feed-forward
    4Tdf; self-attention 4TKd; cross-attention 4T(text_len)d. Embeddings, head and pointwise work are left out.
    """
    d, f = config.dim, config.ffn_dim
    layer = 12 * tokens * d * d + 4 * tokens * d * f + 4 * tokens * (keys + config.text_len) * d
    return float(config.num_layers * layer)


def roofline(
    config: WanConfig, tflops: float, link: Link, decode: float = 0.0, geometry: Geometry | None = None
) -> Costs:
    """Costs in seconds as if every task ran at `tflops` TFLOP/s, whatever its shape: no measurement, a lower bound.

    A cache task counts as much as a denoise task, a fused row as both, a row of a batch as a row alone.
    """
    if not tflops > 0:
        raise ValueError(f"tflops={tflops} is not legal: give a number > 0")
    g = geometry or Geometry()
    frame, tokens = g.frame_tokens(config), g.frame_tokens(config) * g.frames_per_block
    line = Curve(tuple((k, task_flop(config, tokens, k * frame) / (tflops * 1e12)) for k in (0, g.frames_per_block)))
    source = f"roofline: FLOP of a task / {tflops:g} TFLOP/s (not measured)"
    return _with_link(Costs(line, line, decode=decode, source=source), config, g, link)


def measured(stage_times: str | Path | Mapping[str, Any], link: Link) -> tuple[WanConfig, Geometry, Costs]:
    """Costs from stage times measured on one device: a JSON file, or what it holds.

        {"model": "wan2.1-t2v-1.3b",              a name of WanConfig.from_name
         "device": "...", "revision": "...",      told in the source
         "height": 60, "width": 104, "frames_per_block": 3,
         "denoise_s": [[3, 0.02], [21, 0.06]],    [visible latent frames, seconds], rising; or one such list per step
         "cache_s": [[3, 0.02], [21, 0.06]],
         "pair": 0.97, "batch": [1, 0.95],        optional, see Costs
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
        _curves(values["denoise_s"]),
        _curves(values["cache_s"]),
        pair=values.get("pair", 1.0),
        batch=tuple(values.get("batch", (1.0,))),
        decode=values.get("decode_s", 0.0),
        source=f"stage times measured on {values['device']}, revision {values['revision']}",
    )
    return config, g, _with_link(costs, config, g, link)


def exchanged_bytes(config: WanConfig, geometry: Geometry, ranks: int) -> float:
    """Bytes that each of `ranks` ranks sends in one task under head parallelism (Ulysses).

    A rank holds tokens outside attention and heads inside it: q, k, v of [T/R, d] change over before each attention,
    the output changes back after it, and (R-1)/R of each goes to other ranks. 4 T d (R-1)/R^2 elements a layer. Cached
    keys stay where their heads are.
    """
    tokens = geometry.frame_tokens(config) * geometry.frames_per_block
    return 4 * tokens * config.dim * BF16 * config.num_layers * (ranks - 1) / ranks**2


def unequal_parts(config: WanConfig, geometry: Geometry, ranks: int) -> str | None:
    """Why so many ranks cannot share a task by heads; None where they can."""
    tokens = geometry.frame_tokens(config)
    for what, number in (("heads", config.num_heads), ("tokens of a frame", tokens)):
        if ranks < 1 or number % ranks:
            return f"the {number} {what} must fall into equal parts"
    return None


def head_parallel(costs: Costs, config: WanConfig, geometry: Geometry, ranks: int, link: Link) -> Costs:
    """Costs of a task shared by `ranks` ranks: its time / ranks, plus two exchanges a layer that nothing hides.

    Raises:
        ValueError: the ranks divide the heads or the tokens of a frame into unequal parts.
    """
    why = unequal_parts(config, geometry, ranks)
    if why:
        raise ValueError(f"ranks={ranks} is impossible: {why}")
    exchange = 0.0
    if ranks > 1:
        sent = exchanged_bytes(config, geometry, ranks)
        exchange = 2 * config.num_layers * link.latency + sent / link.bytes_per_second

    def share(curves: Curve | tuple[Curve, ...]) -> Curve | tuple[Curve, ...]:
        if isinstance(curves, Curve):
            return curves.scaled(1 / ranks, exchange)
        return tuple(curve.scaled(1 / ranks, exchange) for curve in curves)

    return replace(costs, denoise=share(costs.denoise), cache=share(costs.cache))


def _with_link(costs: Costs, config: WanConfig, geometry: Geometry, link: Link) -> Costs:
    latents, keys = link.message(geometry.latent_bytes(config)), link.message(geometry.key_bytes(config))
    return replace(costs, latents=latents, keys=keys)


def _curves(values: Sequence[Any]) -> Curve | tuple[Curve, ...]:
    """One curve, or one per step, from the lists of a JSON file."""
    if values and isinstance(values[0][0], Sequence):
        return tuple(Curve(tuple((x, y) for x, y in curve)) for curve in values)
    return Curve(tuple((x, y) for x, y in values))
