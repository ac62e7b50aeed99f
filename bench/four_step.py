"""One video in four steps on 1 to 4 ranks, timed, beside what the simulator says of it. Started by torchrun.

    python -m torch.distributed.run --standalone --nproc-per-node 4 bench/four_step.py TARGET.json SETTING

Every way makes the same number of blocks with the same random weights, after a warm-up. What more ranks would take than
were started is projected from the visits measured here. The VAE is in none of the times.
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

from hiar_model.config import WanConfig
from hiar_model.distributed.pipeline import join
from hiar_model.models.flow_schedule import FlowSchedule
from hiar_model.models.transformer import HiARTransformer
from hiar_model.planning.measure_costs import measure_costs
from hiar_model.rollout import PipelineOptions, Rollout
from hiar_model.schedule.costs import Costs, Curve
from hiar_model.schedule.plan import Plan
from hiar_model.schedule.simulator import Timeline, simulate
from hiar_model.schedule.stages import split_steps
from measure import environment

VAE_SECONDS = 0.312  # of a block of 480x832 by the full Wan VAE: assumed; on an H200 the fused one takes 0.146
STEPS, FRAMES = 4, 3  # latent frames of a block
WAYS = (
    ("block_first", "alone", 1),
    ("stream", "alone", 1),
    ("stream", "pipeline", 2),
    ("stream", "pipeline", 3),
    ("stream", "pipeline", 4),
)
TOGETHER = (
    ("block_first", "ulysses"),
    ("stream", "ulysses"),
    ("block_first", "replicas"),
)  # all processes that there are


@dataclass(frozen=True)
class Setting:
    """What is made: latents of a size by a model, window in latent frames, numbers of blocks."""

    config: WanConfig
    height: int
    width: int
    window: int
    blocks: tuple[int, ...]
    device: str
    dtype: torch.dtype
    pixel_frames: int  # per latent frame; 0: the frames mean nothing


SETTINGS = {
    # a visit of at least 50 ms on one core
    "cpu": Setting(
        WanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4, freq_dim=64, text_dim=32, text_len=16),
        *(32, 32, 9, (16,), "cpu", torch.float32, 0),
    ),
    "cuda": Setting(WanConfig.from_name("wan2.1-t2v-1.3b"), 60, 104, 21, (7, 27), "cuda", torch.bfloat16, 4),
}


@dataclass(frozen=True)
class Row:
    """One way to make a video. Times in seconds; None where the video is too short to have one.

    way          alone | pipeline | ulysses (heads shared) | replicas (every rank a video of its own; fps of all)
    split        steps of each rank of a pipeline. measured: False where the times are the simulator's
    first_block  from the start to the first finished block. interval: between two blocks in the steady state
    fps_vae      fps as the simulator has it with a VAE of VAE_SECONDS a block on the last rank; None: not asked
    prompt       from a change of the prompt to the first block that shows it, at worst
    predicted    `seconds` as the simulator has it, from the visits measured here; None: not asked
    """

    order: str
    way: str
    ranks: int
    split: tuple[int, ...]
    blocks: int
    measured: bool
    seconds: float
    first_block: float
    interval: float | None
    prompt: float | None
    predicted: float | None
    fps: float | None
    fps_vae: float | None = None


def weights(setting: Setting) -> HiARTransformer:
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = HiARTransformer(setting.config).to(setting.dtype)
    for p in model.parameters():
        p.data.normal_(std=0.02 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def plan_of(setting: Setting, order: str) -> Plan:
    return Plan(STEPS, order, FRAMES, window_frames=(setting.window,) * STEPS)


def run(
    setting: Setting,
    model: HiARTransformer,
    order: str,
    way: str,
    blocks: int,
    group: Any,
    split: tuple[int, ...],
) -> Row | None:
    """Time one way on the ranks of a group (None: this one alone); the row on the last of them."""
    ranks = 1 if group is None else dist.get_world_size(group)
    text = torch.zeros(1, setting.config.text_len, setting.config.text_dim, device=setting.device, dtype=setting.dtype)
    text[0, :8] = 1
    begun: dict[int, float] = {}  # block -> when its first visit began, on the first rank

    def text_of(block: int) -> torch.Tensor:
        begun.setdefault(block, time.perf_counter())
        return text

    cuda = setting.device == "cuda"
    if way == "pipeline":
        options: dict[str, Any] = {
            "executor": "pipeline-graph" if cuda else "pipeline",
            "pipeline": PipelineOptions(steps_per_rank=split, group=group),
        }
    else:
        options = {"executor": "graph" if cuda else "eager", "parallel": "ulysses" if way == "ulysses" else None}
    made = Rollout(
        model, text_of, FlowSchedule.uniform(STEPS), num_frames=FRAMES * blocks, height=setting.height,
        width=setting.width, order=order, window_frames=setting.window, **options,
    )  # fmt: skip
    made.warm_up()
    begun.clear()
    if group is not None:
        dist.barrier(group=group)
    start, ends = time.perf_counter(), []
    for _ in made:
        if setting.device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    told = [begun]
    if way == "pipeline":
        dist.broadcast_object_list(told, group=group, group_src=0)
    if not ends or (way in ("ulysses", "replicas") and dist.get_rank() + 1 < ranks):
        return None
    margin = STEPS if len(split) > 1 else 1  # as the simulator takes the steady state
    full = -(-setting.window // FRAMES)
    steady = range(full + margin, blocks - 1 - margin)
    interval = (ends[steady.stop] - ends[steady.start]) / len(steady) if steady else None
    prompt = max(ends[n + 1] - told[0][n] for n in steady) if steady else None
    seconds = ends[-1] - start
    rate = fps(setting, blocks, seconds)
    if way == "replicas" and rate is not None:
        rate *= ranks
    return Row(order, way, ranks, split, blocks, True, seconds, ends[0] - start, interval, prompt, None, rate)


def projected(setting: Setting, order: str, blocks: int, costs: Costs, split: tuple[int, ...]) -> Row:
    found: Timeline = simulate(plan_of(setting, order), blocks, split, costs, in_flight=len(split) + 1)
    rate = fps(setting, blocks, found.time)
    latency = (found.first_block, found.steady_interval, found.prompt_delay)
    return Row(
        order,
        "pipeline",
        len(split),
        split,
        blocks,
        False,
        found.time,
        *latency,
        found.time,
        rate,
        with_vae(setting, order, blocks, costs, split),
    )


def predicted(setting: Setting, row: Row, costs: Costs) -> Row:
    """What the simulator says beside what was measured."""
    time = simulate(plan_of(setting, row.order), row.blocks, row.split, costs).time
    seen = with_vae(setting, row.order, row.blocks, costs, row.split)
    return dataclasses.replace(row, predicted=time, fps_vae=seen)


def mean(one: Costs, other: Costs) -> Costs:
    """Of two measurements of the same visits."""

    def middle(a: Any, b: Any) -> Curve:
        return Curve(tuple((k, (s + t) / 2) for (k, s), (_, t) in zip(a.points, b.points, strict=True)))

    return dataclasses.replace(one, denoise=middle(one.denoise, other.denoise), cache=middle(one.cache, other.cache))


def with_vae(setting: Setting, order: str, blocks: int, costs: Costs, split: tuple[int, ...]) -> float | None:
    slow = dataclasses.replace(costs, decode=VAE_SECONDS)
    return fps(setting, blocks, simulate(plan_of(setting, order), blocks, split, slow, vae="last").time)


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
    model = weights(setting)
    text = torch.zeros(1, 8, setting.config.text_dim, device=setting.device, dtype=setting.dtype)
    executor = "graph" if setting.device == "cuda" else "eager"
    size = {"num_frames": FRAMES * max(setting.blocks), "height": setting.height, "width": setting.width}

    def measured(alone: bool) -> Costs:
        """By the first process; alone, or while the others do the same, as they will in a pipeline."""
        found: list[Any] = [None]
        if rank == 0 or not alone:
            found = [measure_costs(model, text, plan_of(setting, "stream"), executor=executor, repeats=12, **size)]
        if world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    begun = time.perf_counter()

    def say(what: str) -> None:
        if rank == 0:
            print(f"[{time.perf_counter() - begun:4.0f} s] {what}", file=sys.stderr, flush=True)

    def both() -> tuple[Costs, Costs]:
        found = measured(True)
        two = found, measured(False) if world > 1 else found
        say("visits timed")
        return two

    before = both()
    rows: list[Row] = []
    late: list[
        tuple[int, str, int, tuple[int, ...]]
    ] = []  # to be projected: where it belongs among the rows, what it is
    for blocks in setting.blocks:
        every_rank = [(order, way, world) for order, way in TOGETHER if world > 1]
        for order, way, ranks in (*WAYS, *every_rank):
            costs = before[way == "pipeline"]
            split = split_steps(plan_of(setting, order), blocks, ranks if way == "pipeline" else 1, costs)
            row = None
            if ranks > world:
                late.append((len(rows), order, blocks, split))
            elif rank < ranks:
                row = run(setting, model, order, way, blocks, groups.get(ranks), split)
            every: list[Any] = [row]
            if world > 1:
                every = [None] * world
                dist.all_gather_object(every, row)
            rows += filter(None, every)
            say(f"{order}, {way} on {ranks}, {blocks} blocks: {'to be projected' if ranks > world else 'done'}")
    # what a machine gives drifts: the times of its visits are those before and after the runs that they predict
    alone, together = (mean(*pair) for pair in zip(before, both(), strict=True))
    for i, row in enumerate(rows):
        if row.way in ("alone", "pipeline"):
            rows[i] = predicted(setting, row, together if row.way == "pipeline" else alone)
    for place, order, blocks, split in reversed(late):
        rows.insert(place, projected(setting, order, blocks, together, split))
    if rank == 0:
        about = {**environment(setting.device), "processes": world, "costs": alone.source, "visit_s": asdict(alone)}
        about["visit_s of all at once"] = asdict(together)
        target.write_text(json.dumps({"environment": about, "rows": [asdict(row) for row in rows]}, indent=1))
    sys.stdout.flush()
    if world > 1:
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
