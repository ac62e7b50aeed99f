"""One video in four steps on 1 to 4 ranks, timed, beside what the simulator says of it. Started by torchrun.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m bench.rollout.four_step TARGET.json SETTING

Every strategy makes the same number of blocks with the same random weights, after a warm-up. What more ranks would take
than were started is projected from the tasks timed here. The VAE is in none of the times.

A row of the result (hiar_model.schedule.report reads it; seconds, null where the video is too short to have one):
    way          alone | pipeline | ulysses (heads shared) | replicas (every rank a video of its own; fps of all)
    split        steps of each rank of a pipeline. measured: false where the times are the simulator's
    first_block  from the start to the first finished block. interval: between two blocks in the steady state
    prompt       from a change of the prompt to the first block that shows it, at worst
    predicted    `seconds` as the simulator has it, from the tasks timed here
    fps_vae      as the simulator has it with a VAE of VAE_SECONDS a block on the last rank
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.lib.machine import environment
from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.distributed.pipeline import join
from hiar_model.models.transformer import HiARTransformer
from hiar_model.planning.measure_costs import measure_costs
from hiar_model.rollout import PipelineOptions, Rollout
from hiar_model.schedule.costs import Costs, Curve
from hiar_model.schedule.plan import Plan
from hiar_model.schedule.simulator import simulate
from hiar_model.schedule.stages import split_steps

VAE_SECONDS = 0.312  # of a block of 480x832 by the full Wan VAE: assumed; on an H200 the fused one takes 0.146
STEPS, FRAMES = 4, 3  # latent frames of a block
STRATEGIES = (("block_first", "alone", 1), ("stream", "alone", 1), *(("stream", "pipeline", n) for n in (2, 3, 4)))
ALL_RANKS = (("block_first", "ulysses"), ("stream", "ulysses"), ("block_first", "replicas"))


@dataclass(frozen=True)
class Setting:
    """A model, the size of its latents, the window in latent frames, numbers of blocks."""

    config: WanConfig
    height: int
    width: int
    window: int
    blocks: tuple[int, ...]
    device: str
    dtype: torch.dtype
    pixel_frames: int  # per latent frame; 0: the frames mean nothing


SETTINGS = {
    # a task of at least 50 ms on one core
    "cpu": Setting(
        WanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4, freq_dim=64, text_dim=32, text_len=16),
        *(32, 32, 9, (16,), "cpu", torch.float32, 0),
    ),
    "cuda": Setting(WanConfig.from_name("wan2.1-t2v-1.3b"), 60, 104, 21, (7, 27), "cuda", torch.bfloat16, 4),
}


def plan_of(setting: Setting, order: str) -> Plan:
    return Plan(STEPS, order, FRAMES, window_frames=(setting.window,) * STEPS)


def run(
    setting: Setting, model: HiARTransformer, order: str, strategy: str, blocks: int, group: Any, split: tuple[int, ...]
) -> dict[str, Any] | None:
    """Time one strategy on the ranks of a group (None: this one alone); its figures, on the last of them."""
    text = torch.zeros(1, setting.config.text_len, setting.config.text_dim, device=setting.device, dtype=setting.dtype)
    text[0, :8] = 1
    begun: dict[int, float] = {}  # block -> when its first task began, on the first rank

    def text_of(block: int) -> torch.Tensor:
        begun.setdefault(block, time.perf_counter())
        return text

    cuda = setting.device == "cuda"
    options: dict[str, Any] = {"executor": "graph" if cuda else "eager"}
    if strategy == "ulysses":
        options["parallel"] = "ulysses"
    elif strategy == "pipeline":
        options["executor"] = "pipeline-graph" if cuda else "pipeline"
        options["pipeline"] = PipelineOptions(steps_per_rank=split, group=group)
    rollout = Rollout(
        model, text_of, FlowSchedule.uniform(STEPS), num_frames=FRAMES * blocks, height=setting.height,
        width=setting.width, order=order, window_frames=setting.window, **options,
    )  # fmt: skip
    rollout.warm_up()
    begun.clear()
    if group is not None:
        dist.barrier(group=group)
    start, ends = time.perf_counter(), []
    for _ in rollout:
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    message = [begun]
    if strategy == "pipeline":
        dist.broadcast_object_list(message, group=group, group_src=0)
    ranks = 1 if group is None else dist.get_world_size(group)
    if not ends or (strategy in ("ulysses", "replicas") and dist.get_rank() + 1 < ranks):
        return None
    margin = STEPS if len(split) > 1 else 1  # as the simulator takes the steady state
    steady = range(-(-setting.window // FRAMES) + margin, blocks - 1 - margin)
    videos = ranks if strategy == "replicas" else 1
    return {
        "seconds": ends[-1] - start,
        "first_block": ends[0] - start,
        "interval": (ends[steady.stop] - ends[steady.start]) / len(steady) if steady else None,
        "prompt": max(ends[n + 1] - message[0][n] for n in steady) if steady else None,
        "fps": fps(setting, blocks, (ends[-1] - start) / videos),
    }


def simulated(setting: Setting, row: dict[str, Any], costs: Costs) -> dict[str, Any]:
    """The simulator's figures beside those measured, or in their place."""
    plan, limit = plan_of(setting, row["order"]), None if row["measured"] else len(row["split"]) + 1
    timeline = simulate(plan, row["blocks"], row["split"], costs, in_flight=limit)
    slow = dataclasses.replace(costs, decode=VAE_SECONDS)
    with_vae = simulate(plan, row["blocks"], row["split"], slow, vae="last").time
    figures = {"predicted": timeline.time, "fps_vae": fps(setting, row["blocks"], with_vae)}
    if not row["measured"]:
        figures |= {"seconds": timeline.time, "first_block": timeline.first_block, "interval": timeline.steady_interval}
        figures |= {"prompt": timeline.prompt_delay, "fps": fps(setting, row["blocks"], timeline.time)}
    return figures


def mean(one: Costs, other: Costs) -> Costs:
    """Of two measurements of the same tasks."""

    def middle(a: Any, b: Any) -> Curve:
        return Curve(tuple((k, (s + t) / 2) for (k, s), (_, t) in zip(a.points, b.points, strict=True)))

    return dataclasses.replace(one, denoise=middle(one.denoise, other.denoise), cache=middle(one.cache, other.cache))


def fps(setting: Setting, blocks: int, seconds: float) -> float | None:
    return (1 + setting.pixel_frames * (FRAMES * blocks - 1)) / seconds if setting.pixel_frames else None


def main(target: Path, name: str) -> None:
    setting = SETTINGS[name]
    torch.set_num_threads(1)
    world = join(setting.device)
    rank = dist.get_rank() if world > 1 else 0
    if setting.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})  # a rank is a core
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(2, world + 1)}
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = HiARTransformer(setting.config).to(setting.dtype).eval().requires_grad_(False)
    text = torch.zeros(1, 8, setting.config.text_dim, device=setting.device, dtype=setting.dtype)
    executor = "graph" if setting.device == "cuda" else "eager"
    size = {"num_frames": FRAMES * max(setting.blocks), "height": setting.height, "width": setting.width}
    begun = time.perf_counter()

    def log(message: str) -> None:
        if rank == 0:
            print(f"[{time.perf_counter() - begun:4.0f} s] {message}", file=sys.stderr, flush=True)

    def task_times() -> tuple[Costs, Costs]:
        """Of the first process; alone, and while the others do the same, as they will in a pipeline."""
        both: list[Any] = []
        for alone in (True, False)[:world]:
            costs: list[Any] = [None]
            if rank == 0 or not alone:
                costs = [measure_costs(model, text, plan_of(setting, "stream"), executor=executor, repeats=12, **size)]
            if world > 1:
                dist.broadcast_object_list(costs)
            both += costs
        log("tasks timed")
        return both[0], both[-1]

    before = task_times()
    rows: list[dict[str, Any]] = []
    for blocks in setting.blocks:
        every_rank = [(order, strategy, world) for order, strategy in ALL_RANKS if world > 1]
        for order, strategy, ranks in (*STRATEGIES, *every_rank):
            costs = before[strategy == "pipeline"]
            split = split_steps(plan_of(setting, order), blocks, ranks if strategy == "pipeline" else 1, costs)
            figures: list[Any] = [None]
            if rank < ranks <= world:
                figures = [run(setting, model, order, strategy, blocks, groups.get(ranks), split)]
            if world > 1:
                mine, figures = figures[0], [None] * world
                dist.all_gather_object(figures, mine)
            row = {"order": order, "way": strategy, "ranks": ranks, "split": split, "blocks": blocks}
            row |= {"measured": ranks <= world, "predicted": None, "fps_vae": None}
            rows.append(row | next(filter(None, figures), {}))
            log(f"{order}, {strategy} on {ranks}, {blocks} blocks: {'done' if ranks <= world else 'to be projected'}")
    # a machine's speed drifts: tasks take the mean of the times before and after the runs that they predict
    alone, together = (mean(*pair) for pair in zip(before, task_times(), strict=True))
    for row in rows:
        if row["way"] in ("alone", "pipeline"):
            row |= simulated(setting, row, together if row["way"] == "pipeline" else alone)
    if rank == 0:
        about = {**environment(setting.device), "processes": world, "costs": alone.source, "visit_s": asdict(alone)}
        about["visit_s of all at once"] = asdict(together)
        target.write_text(json.dumps({"environment": about, "rows": rows}, indent=1))
    sys.stdout.flush()
    if world > 1:
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
