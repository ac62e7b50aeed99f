"""Ways to make one video on one or several GPUs: what the tables of `hiar_model.schedule.report` compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import WAN, WanConfig
from .costs import LINKS, Costs, Geometry, Link, exchanged_bytes, head_parallel, measured, roofline, unequal_parts
from .plan import Plan
from .simulator import Timeline, simulate

WINDOW = WAN.window_frames
NARROW = (6, 9, 12, 21)  # windows per step, for four steps
MODELS = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")
TFLOPS = 790.0
# A block of 480x832, fused, on an H200: bench/results/nvidia-h200/2026-11-27-6a287b229b/vae.md
VAE_MS = 145.5


@dataclass(frozen=True)
class Machine:
    """What a table is computed for."""

    name: str
    config: WanConfig
    geometry: Geometry
    link: Link
    costs: Costs

    def assumptions(self) -> list[str]:
        """Lines that stand beside every figure."""
        g = self.geometry
        block = g.frame_tokens(self.config) * g.frames_per_block
        return [
            f"- {self.name}, latents {g.height}x{g.width}, one video, blocks of {g.frames_per_block} latent frames "
            f"({block} tokens), window {WINDOW}",
            f"- {self.costs.source}; VAE decode of a block {1000 * self.costs.decode:g} ms",
            f"- link: {self.link.name}, latency {1e6 * self.link.latency:g} us; sends run beside the work of the ranks",
        ]


def machines(
    stage_times: str | Path | None = None, tflops: float = TFLOPS, vae_ms: float = VAE_MS, links: Iterable[str] = LINKS
) -> list[Machine]:
    """One for each model and link: from measured stage times, else from the roofline of both models."""
    found = []
    for name in links:
        link = LINKS[name]
        if stage_times is not None:
            config, geometry, costs = measured(stage_times, link)
            costs = costs if costs.decode else replace(costs, decode=vae_ms / 1000)
            found.append(Machine(f"{_model(stage_times)}, timed", config, geometry, link, costs))
            continue
        for model in MODELS:
            config = WanConfig.from_name(model)
            costs = roofline(config, tflops, link, decode=vae_ms / 1000)
            found.append(Machine(model, config, Geometry(), link, costs))
    return found


def _model(stage_times: str | Path) -> str:
    return str(json.loads(Path(stage_times).read_text(encoding="utf-8"))["model"])


def plan_of(
    order: str, steps: int, *, frames_per_block: int = 3, windows: Sequence[int] = (), **options: object
) -> Plan:
    """A plan with the window of the tables."""
    return Plan(steps, order, frames_per_block, window_frames=tuple(windows) or (WINDOW,) * steps, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Way:
    """One way to use the GPUs of a machine. `split`: see `simulate`; `exchanged`: bytes per block, all GPUs."""

    name: str
    gpus: int
    plan: Plan
    costs: Costs
    split: int | tuple[int, ...] = 1
    videos: int = 1
    batch: bool = False
    exchanged: float = 0.0

    def run(self, blocks: int, vae: str = "none") -> Timeline:
        """Its timeline. A pipeline holds at most one block more than it has ranks; a VAE on it shifts the split."""
        ranks = len(self.split) if isinstance(self.split, tuple) else self.split
        limit = ranks + 1 if self.plan.order == "stream" else None
        split = ranks if vae == "last" else self.split
        return simulate(self.plan, blocks, split, self.costs, vae=vae, batch=self.batch, in_flight=limit)


def ways(machine: Machine, steps: int = 4, gpus: int = 4) -> list[Way]:
    """The baselines and pipelines that are compared, the one-GPU baseline first."""
    config, g, costs = machine.config, machine.geometry, machine.costs

    def plan(order: str, **options: object) -> Plan:
        return plan_of(order, steps, frames_per_block=g.frames_per_block, **options)  # type: ignore[arg-type]

    def shared(order: str, tasks: int) -> list[Way]:
        if unequal_parts(config, g, gpus):
            return []
        parallel = head_parallel(costs, config, g, gpus, machine.link)
        sent = tasks * gpus * exchanged_bytes(config, g, gpus)
        return [Way(f"{order}, Ulysses over {gpus}", gpus, plan(order), parallel, exchanged=sent)]

    def even(ranks: int) -> Way:
        split = tuple(len(range(rank, steps, ranks)) for rank in range(ranks))  # the first ranks take what is over
        uneven = f" ({'+'.join(map(str, split))} steps)" if len(set(split)) > 1 else ""
        return Way(f"pipeline of {ranks}{uneven}", ranks, plan("stream"), costs, split)

    lent = plan("stream", kv_source="next_step")
    found = [
        Way("block_first", 1, plan("block_first"), costs),
        Way(f"block_first, {gpus} replicas", gpus, plan("block_first"), costs, videos=gpus),
        *shared("block_first", steps + 1),
        Way("step_first", 1, plan("step_first"), costs),
        Way("stream", 1, plan("stream"), costs),
        Way("wavefront, diagonals as batches", 1, plan("wavefront"), costs, batch=True),
        *shared("stream", 2 * steps),
        *(even(ranks) for ranks in range(2, gpus + 1)),
        Way(f"pipeline of {gpus}, pairs", gpus, plan("stream", fuse_cache_denoise=True), costs, gpus),
        Way("stream, lent keys*", 1, lent, costs),
        *(Way(f"pipeline of {ranks}, lent keys*", ranks, lent, costs, ranks) for ranks in range(2, gpus)),
    ]
    if steps == len(NARROW):
        narrow, name = plan("stream", windows=NARROW), f"windows {', '.join(map(str, NARROW))}*"
        found += [Way(f"pipeline of {ranks}, {name}", ranks, narrow, costs, ranks) for ranks in (2, gpus)]
    return found
