"""One video in four steps on 1 to 4 ranks, timed, beside what the simulator says of it. Started by torchrun.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m bench.rollout.four_step TARGET.json SETTING

Every strategy makes the same number of blocks with the same random weights, after a warm-up. What more ranks would take
than were started is projected from the tasks timed here. The VAE is in none of the times.

A row of the result (bench.studies.parallel reads it; seconds, null where the video is too short to have one):
    way          alone | pipeline | ulysses (heads shared) | replicas (every rank a video of its own; fps of all)
    split        steps of each rank of a pipeline. measured: false where the times are the simulator's
    first_block  from the start to the first finished block. interval: between two blocks in the steady state
    prompt       from a change of the prompt to the first block that shows it, at worst
    predicted    `seconds` as the simulator has it, from the tasks timed here
    fps_vae      as the simulator has it with a VAE of VAE_SECONDS a block on the last rank
"""

from __future__ import annotations

import argparse
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
from torch.distributed.device_mesh import DeviceMesh

from bench.lib.machine import environment
from hiar_model.config import ExecutionConfig, RolloutConfig, WanConfig
from hiar_model.distributed.pipeline import init_distributed
from hiar_model.models.transformer import HiARTransformer
from hiar_model.planning.measure_costs import measure_costs
from hiar_model.rollout import Rollout
from hiar_model.schedule.costs import CostCurve, Costs
from hiar_model.schedule.plan import Plan
from hiar_model.schedule.simulator import simulate
from hiar_model.schedule.stages import split_steps

VAE_SECONDS = 0.312  # of a block of 480x832 by the full Wan VAE: assumed; on an H200 the fused one takes 0.146
STEPS, FRAMES = 4, 3  # latent frames of a block
STRATEGIES = (("block_first", "alone", 1), ("stream", "alone", 1), *(("stream", "pipeline", n) for n in (2, 3, 4)))
ALL_RANKS = (("block_first", "ulysses"), ("stream", "ulysses"), ("block_first", "replicas"))


@dataclass(frozen=True)
class Workload:
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
    "cpu": Workload(
        WanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4, freq_dim=64, text_dim=32, text_len=16),
        *(32, 32, 9, (16,), "cpu", torch.float32, 0),
    ),
    "cuda": Workload(WanConfig.from_name("wan2.1-t2v-1.3b"), 60, 104, 21, (7, 27), "cuda", torch.bfloat16, 4),
}


def config_of(setting: Workload, order: str) -> RolloutConfig:
    return RolloutConfig(order=order, frames_per_block=FRAMES, window_frames=setting.window).with_options(steps=STEPS)


def plan_of(setting: Workload, order: str) -> Plan:
    return Plan.of(config_of(setting, order))


def run(
    setting: Workload, model: HiARTransformer, order: str, strategy: str, blocks: int, mesh: DeviceMesh | None,
    split: tuple[int, ...],
) -> dict[str, Any] | None:  # fmt: skip
    """Time one strategy on the ranks of a mesh of one axis (None: this one alone); its figures, on the last of them."""
    c, kind = setting.config, {"device": setting.device, "dtype": setting.dtype}
    prompt_embeds = torch.zeros(1, c.text_len, c.text_dim, **kind)
    prompt_embeds[0, :8] = 1
    begun: dict[int, float] = {}  # block -> when its first task began, on the first rank

    def prompt_of(block: int) -> torch.Tensor:
        begun.setdefault(block, time.perf_counter())
        return prompt_embeds

    cuda = setting.device == "cuda"
    shared = strategy in ("pipeline", "ulysses")
    execution = ExecutionConfig(
        cuda_graph=cuda, mesh=mesh if shared else None, steps_per_rank=split if strategy == "pipeline" else None
    )
    rollout = Rollout(
        model, prompt_of, config_of(setting, order), execution, num_latent_frames=FRAMES * blocks,
        latent_size=(setting.height, setting.width),
    )  # fmt: skip
    rollout.warm_up()
    begun.clear()
    group = None if mesh is None else mesh.get_group()
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


def simulated(setting: Workload, row: dict[str, Any], costs: Costs) -> dict[str, Any]:
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

    def middle(a: Any, b: Any) -> CostCurve:
        return CostCurve(tuple((k, (s + t) / 2) for (k, s), (_, t) in zip(a.points, b.points, strict=True)))

    return dataclasses.replace(one, denoise=middle(one.denoise, other.denoise), cache=middle(one.cache, other.cache))


def fps(setting: Workload, blocks: int, seconds: float) -> float | None:
    return (1 + setting.pixel_frames * (FRAMES * blocks - 1)) / seconds if setting.pixel_frames else None


def main(target: Path, name: str) -> None:
    setting = SETTINGS[name]
    torch.set_num_threads(1)
    world = init_distributed(setting.device)
    rank = dist.get_rank() if world > 1 else 0
    if setting.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})  # a rank is a core
    meshes = {  # of the first ranks, made by all of them
        (name, ranks): DeviceMesh(setting.device, list(range(ranks)), mesh_dim_names=(name,))
        for name, ranks in (*(("step", n) for n in range(2, world + 1)), *[("head", world)][: world - 1])
    }
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = HiARTransformer(setting.config).to(setting.dtype).eval().requires_grad_(False)
    prompt_embeds = torch.zeros(1, 8, setting.config.text_dim, device=setting.device, dtype=setting.dtype)
    how: dict[str, Any] = {"execution": ExecutionConfig(cuda_graph=setting.device == "cuda"), "repeats": 12}
    how |= {"num_latent_frames": FRAMES * max(setting.blocks), "latent_size": (setting.height, setting.width)}
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
                costs = [measure_costs(model, prompt_embeds, config_of(setting, "stream"), **how)]
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
                mesh = meshes.get(("head" if strategy == "ulysses" else "step", ranks))
                figures = [run(setting, model, order, strategy, blocks, mesh, split)]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="JSON of the result")
    parser.add_argument("setting", choices=SETTINGS)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("torchrun starts it, see --help")
    main(arguments.target, arguments.setting)
