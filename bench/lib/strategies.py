"""Strategies for one video on one or several GPUs, which the tables of bench/studies/parallel.py compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hiar_model.config import WAN, WanConfig
from hiar_model.schedule.costs import (
    LINKS,
    Costs,
    Geometry,
    Link,
    exchanged_bytes,
    head_parallel,
    measured,
    roofline,
    uneven_heads,
)
from hiar_model.schedule.plan import Plan
from hiar_model.schedule.simulator import Timeline, simulate

WINDOW = WAN.window_frames
NARROW = (6, 9, 12, 21)  # a window for each of four steps
MODELS = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")
TFLOPS = 790.0
# A block of 480x832 on an H200, fused VAE: bench/results/nvidia-h200/2026-11-27-6a287b229b/vae.md
VAE_MS = 145.5


@dataclass(frozen=True)
class Machine:
    """The model and hardware of a table."""

    name: str
    config: WanConfig
    geometry: Geometry
    link: Link
    costs: Costs

    def assumptions(self) -> list[str]:
        """Markdown lines with everything that the figures assume."""
        g = self.geometry
        block = g.frame_tokens(self.config) * g.frames_per_block
        return [
            f"- {self.name}, latents {g.height}x{g.width}, one video, blocks of {g.frames_per_block} latent frames "
            f"({block} tokens), window {WINDOW}",
            f"- {self.costs.source}; VAE decode of a block {1000 * self.costs.decode:g} ms",
            f"- link: {self.link.name}, latency {1e6 * self.link.latency:g} us; sends overlap with other work",
        ]


def machines(
    stage_times: str | Path | None = None, tflops: float = TFLOPS, vae_ms: float = VAE_MS, links: Iterable[str] = LINKS
) -> list[Machine]:
    """A machine per link from measured stage times, or, without them, per model and link from the roofline."""
    result = []
    for name in links:
        link = LINKS[name]
        if stage_times is not None:
            config, geometry, costs = measured(stage_times, link)
            costs = costs if costs.decode else replace(costs, decode=vae_ms / 1000)
            result.append(Machine(f"{_model(stage_times)}, timed", config, geometry, link, costs))
            continue
        for model in MODELS:
            config = WanConfig.from_name(model)
            costs = roofline(config, tflops, link, decode=vae_ms / 1000)
            result.append(Machine(model, config, Geometry(), link, costs))
    return result


def _model(stage_times: str | Path) -> str:
    return str(json.loads(Path(stage_times).read_text(encoding="utf-8"))["model"])


def plan_of(
    order: str, steps: int, *, frames_per_block: int = 3, windows: Sequence[int] = (), **options: object
) -> Plan:
    """A plan with the window that the tables assume."""
    return Plan(steps, order, frames_per_block, window_frames=tuple(windows) or (WINDOW,) * steps, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Strategy:
    """How to use the GPUs of a machine. `split`: see `simulate`; `exchanged`: bytes per block, all GPUs."""

    name: str
    gpus: int
    plan: Plan
    costs: Costs
    split: int | tuple[int, ...] = 1
    videos: int = 1
    batch: bool = False
    exchanged: float = 0.0

    def run(self, blocks: int, vae: str = "none") -> Timeline:
        """Simulate it. A pipeline has at most one block more in flight than ranks; a VAE on it changes the split."""
        ranks = len(self.split) if isinstance(self.split, tuple) else self.split
        limit = ranks + 1 if self.plan.order == "stream" else None
        split = ranks if vae == "last" else self.split
        return simulate(self.plan, blocks, split, self.costs, vae=vae, batch=self.batch, in_flight=limit)


def strategies(machine: Machine, steps: int = 4, gpus: int = 4) -> list[Strategy]:
    """The baselines and pipelines that the tables compare, the one-GPU baseline first."""
    config, g, costs = machine.config, machine.geometry, machine.costs

    def plan(order: str, **options: object) -> Plan:
        return plan_of(order, steps, frames_per_block=g.frames_per_block, **options)  # type: ignore[arg-type]

    def ulysses(order: str, tasks: int) -> list[Strategy]:
        if uneven_heads(config, g, gpus):
            return []
        parallel = head_parallel(costs, config, g, gpus, machine.link)
        sent = tasks * gpus * exchanged_bytes(config, g, gpus)
        return [Strategy(f"{order}, Ulysses over {gpus}", gpus, plan(order), parallel, exchanged=sent)]

    def even(ranks: int) -> Strategy:
        split = tuple(len(range(rank, steps, ranks)) for rank in range(ranks))  # the first ranks take the remainder
        uneven = f" ({'+'.join(map(str, split))} steps)" if len(set(split)) > 1 else ""
        return Strategy(f"pipeline of {ranks}{uneven}", ranks, plan("stream"), costs, split)

    shared_kv = plan("stream", kv_source="next_step")
    result = [
        Strategy("block_first", 1, plan("block_first"), costs),
        Strategy(f"block_first, {gpus} replicas", gpus, plan("block_first"), costs, videos=gpus),
        *ulysses("block_first", steps + 1),
        Strategy("step_first", 1, plan("step_first"), costs),
        Strategy("stream", 1, plan("stream"), costs),
        Strategy("wavefront, diagonals as batches", 1, plan("wavefront"), costs, batch=True),
        *ulysses("stream", 2 * steps),
        *(even(ranks) for ranks in range(2, gpus + 1)),
        Strategy(f"pipeline of {gpus}, fused", gpus, plan("stream", fuse_cache_denoise=True), costs, gpus),
        Strategy("stream, shared KV*", 1, shared_kv, costs),
        *(Strategy(f"pipeline of {ranks}, shared KV*", ranks, shared_kv, costs, ranks) for ranks in range(2, gpus)),
    ]
    if steps == len(NARROW):
        narrow, name = plan("stream", windows=NARROW), f"windows {', '.join(map(str, NARROW))}*"
        result += [Strategy(f"pipeline of {ranks}, {name}", ranks, narrow, costs, ranks) for ranks in (2, gpus)]
    return result
