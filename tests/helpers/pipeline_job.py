"""What test_pipeline.py runs under torchrun: pipelines of 1 to 4 of its processes, against one process.

torchrun --nproc-per-node 4 tests/helpers/pipeline_job.py cases RESULT.json      every case; what each rank found
torchrun --nproc-per-node 3 tests/helpers/pipeline_job.py stop | kill | hang     rank 1 does that inside a task;
                                                                             orphan: it kills torchrun
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from runs import make_rollout
from tiny_model import MODEL, SIZE, TEXT, TINY, make_model
from torch.distributed.device_mesh import DeviceMesh

import hiar_kernels
from hiar_model.config import FlowSchedule
from hiar_model.distributed import make_mesh
from hiar_model.distributed.pipeline import init_distributed
from hiar_model.distributed.watchdog import PipelineFault
from hiar_model.rollout import Rollout, rollout
from hiar_model.rollout.run_folder import RunFolder
from hiar_model.schedule.costs import unit_costs

RANKS = 4
PREFIX = torch.randn(1, 4, TINY.in_channels, *SIZE.values(), generator=torch.Generator().manual_seed(2))
OTHER = torch.randn(1, 4, TINY.text_dim, generator=torch.Generator().manual_seed(3))
# steps, options; each is run on 1 to 4 ranks, but not on more than there are steps
PARITY = [
    (1, {"num_frames": 9}),
    (2, {"num_frames": 12, "window_frames": 5}),
    (2, {"num_frames": 12, "window_frames": 6, "sink_frames": 1, "pairs": True}),
    (4, {"num_frames": 15}),
    (4, {"num_frames": 18, "window_frames": 8, "sink_frames": 2}),
    (4, {"num_frames": 16, "window_frames": 7, "sink_frames": 1, "prefix": PREFIX}),
    (4, {"num_frames": 16, "window_frames": 7, "prefix": PREFIX, "pairs": True}),
    (4, {"num_frames": 12, "window_frames": (3, 5, 6, 9)}),
    (4, {"num_frames": 3, "trajectory": "ode"}),
    (4, {"num_frames": 9, "batch": 2, "video_ids": [5, 9], "first_frame": 1000}),
    (8, {"num_frames": 6, "window_frames": 4}),
    (8, {"num_frames": 12, "frames_per_block": 2, "window_frames": 5, "pairs": True}),
]


def make(steps: int, group=None, **options) -> Rollout:
    text = options.pop("text", TEXT)
    executor = options.pop("executor", "pipeline")
    model = options.pop("model", MODEL)
    if group is not None and dist.get_world_size(group) > 1:
        options.setdefault("mesh", DeviceMesh.from_group(group, "cpu", mesh_dim_names=("step",)))
    elif "mesh" not in options and executor.startswith("pipeline"):
        options["steps_per_rank"] = (steps,)  # this process alone
    return make_rollout(
        model, text, FlowSchedule.uniform(steps), executor=executor, **{"timeout": 20, **SIZE, **options}
    )


def latents(made: Rollout) -> torch.Tensor | None:
    blocks = [block.latents for block in made]
    return torch.cat(blocks, 1) if blocks else None


def single(steps: int, **options) -> torch.Tensor:
    """In one process, without any pipeline; made by the first rank, for all."""
    found: list = [None]
    if dist.get_rank() == 0:
        order = "stream" if isinstance(options.get("window_frames"), tuple) else "step_first"
        found = [latents(make(steps, executor="eager", order=order, **options))]
    dist.broadcast_object_list(found)
    return found[0]


def parity(groups) -> list[str]:
    """Names of the configurations whose latents are not the same bits; every rank must come through all."""
    wrong = []
    for steps, options in PARITY:
        expected = single(steps, **options)
        for ranks in range(1, min(RANKS, steps) + 1):
            if dist.get_rank() >= ranks:
                continue
            made = make(steps, groups[ranks], **options)
            found = latents(made)
            last = dist.get_rank() == ranks - 1
            held = made._executor.cache.k[0].shape[0]
            if (found is not None) != last or (last and not torch.equal(found, expected)):
                wrong.append(f"{steps} steps on {ranks}: {options}")
            if held != made.pipeline.stage.split[dist.get_rank()] or made._executor.latents:
                wrong.append(f"{steps} steps on {ranks} hold {held} caches, {len(made._executor.latents)} latents")
    return wrong


def splits(groups) -> list[str]:
    """Given splits, a rank that only takes blocks, measured times, captured tasks, one's own weights alone."""
    wrong, rank = [], dist.get_rank()
    base = {"num_frames": 9, "window_frames": 6}
    experts = [make_model(s) for s in range(4)]
    with hiar_kernels.prefer("reference"):
        expected, expected_experts = single(4, **base), single(4, model=experts, **base)
    for name, ranks, options, wanted in [
        ("given", 2, {"steps_per_rank": (1, 3)}, (1, 3)),
        ("apart", 3, {"dedicated_decoder_rank": True}, (2, 2, 0)),
        ("costs", 2, {"costs": replace(unit_costs(), pair=0.9)}, (2, 2)),
        ("captured", 2, {"executor": "pipeline-recorded"}, (2, 2)),
        ("experts", 2, {"model": [m if s // 2 == rank else None for s, m in enumerate(experts)]}, (2, 2)),
    ]:
        if rank >= ranks:
            continue
        with hiar_kernels.prefer("reference"):
            made = make(4, groups[ranks], **base, **options)
            found = latents(made)
        split = made.pipeline.stage.split
        if (wanted is not None and split != wanted) or sum(split) != 4:
            wrong.append(f"{name}: split {split}")
        if rank == ranks - 1 and not torch.equal(found, expected_experts if name == "experts" else expected):
            wrong.append(f"{name}: another result")
    return wrong


def shared_visits() -> list[str]:
    """Two steps' ranks, each of two that share every task: a mesh of (step, head)."""
    mesh = make_mesh(step=2, head=2)
    options = {"num_frames": 12, "window_frames": 6}
    expected = single(4, **options)
    made = make(4, mesh=mesh, **options)
    found, last = latents(made), dist.get_rank() >= 2
    wrong = [] if (found is not None) == last else ["blocks on the wrong ranks"]
    if last and not torch.allclose(found, expected, atol=1e-5, rtol=0):
        wrong.append("another result")
    if made._executor.cache.k[0].shape[0] != 2 or made._executor.cache.k[0].shape[3] != 1:
        wrong.append("a rank holds other steps or heads")
    return wrong


def resumed(groups, folder: Path) -> dict:
    """States of all ranks, taken as they go, are gone on from by fresh rollouts."""
    rank, group = dist.get_rank(), groups[3]
    options = {"num_frames": 24, "window_frames": 7, "pairs": True}
    expected = single(4, **options)
    if rank >= 3:
        return {}

    def start(resume: bool):
        made = make(4, group, **options)
        kept = RunFolder(folder, {"of": "tests"}, resume=resume, every=2, group=group)
        made.on_boundary = lambda n: kept.boundary(made, n)
        return made, kept

    made, kept = start(False)
    whole = list(made)
    for block in whole[:5]:  # as if the run had ended in block 5
        kept.save_block(block)
    dist.barrier(group=group)
    states = kept.states()
    again, kept = start(True)
    at = kept.resume(again)
    rest = [block.latents for block in again]
    same = True
    if rank == 2:
        before = [kept.load_block(n).latents for n in range(at)]
        same = torch.equal(torch.cat([*before, *rest], 1), expected)
    return {"states": states, "at": at, "same": same, "left": len(kept.blocks())}


def traced(group) -> list[str]:
    """What two ranks do, in order: tasks, sends, and which receives are posted when a task begins."""
    made, events = make(2, group, num_frames=9), []
    launch, send, links = made._executor._launch, made.pipeline.send, made.pipeline.links

    def launched(rows, inputs):
        ahead = ",".join(str(n) for n in sorted(links.posted)) if links.posted else "none"
        events.append(f"{rows[0][-1].kind} {rows[0][-1].block} posted {ahead}")
        return launch(rows, inputs)

    def sent(block, latents):
        events.append(f"send {block}")
        send(block, latents)

    made._executor._launch, made.pipeline.send = launched, sent
    latents(made)
    return events


def endless(group) -> dict:
    """A prompt that changes, a consumer that has had enough, constant memory."""
    rank = dist.get_rank()
    text = lambda block: TEXT if block < 6 else OTHER  # noqa: E731
    made = make(2, group, num_frames=None, window_frames=6, text=text)
    taken, kept = [], set()
    for block in made:
        taken.append(block.latents)
        held = made._executor
        if block.block >= 8:
            kept.add((len(held.latents), sum(map(len, held.spare.values())), len(made.pipeline.links.posted)))
        if block.block == 39:
            break
    if rank == 0:
        return {"taken": len(taken)}
    expected = latents(make(2, executor="eager", order="stream", num_frames=120, window_frames=6, text=text))
    return {"taken": len(taken), "same": torch.equal(torch.cat(taken, 1), expected), "kept": len(kept)}


def failing(group, error: Exception | float) -> str:
    """Rank 1 of 3 fails at step 1 of block 2: what is raised on each."""

    def renoise(step: int, block: int) -> torch.Tensor:
        if (step, block) == (1, 2):
            if isinstance(error, Exception):
                raise error
            return torch.full((1, 3, 2, *SIZE.values()), error)
        return torch.zeros(1, 3, 2, *SIZE.values())

    try:
        latents(make(3, group, num_frames=12, renoise=renoise))
    except (PipelineFault, FloatingPointError, MemoryError, ZeroDivisionError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def cases(target: Path) -> None:
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(1, RANKS + 1)}
    apart = [dist.new_group([0, 1, 2]) for _ in range(3)]  # a failed job's links are not used again
    pair = dist.new_group([0, 1])
    rank = dist.get_rank()
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    found = {"parity": parity(groups), "splits": splits(groups), "resumed": resumed(groups, Path(folder[0]) / "run")}
    video = rollout(MODEL, None, TEXT, FlowSchedule.uniform(2), num_frames=6, executor="pipeline",
                    mesh=DeviceMesh.from_group(pair, "cpu", mesh_dim_names=("step",)),
                    **SIZE) if rank < 2 else None  # fmt: skip
    found["rollout"] = None if video is None else list(video.shape)
    found["endless"] = endless(dist.new_group([0, 1])) if rank < 2 else dist.new_group([0, 1]) and None
    errors = (float("nan"), MemoryError("no more"), ZeroDivisionError("division by zero"))
    found["failing"] = [failing(group, error) for group, error in zip(apart, errors, strict=True)] if rank < 3 else []
    found["shared"] = shared_visits()
    found["traced"] = traced(pair) if rank < 2 else []
    everyone: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if rank == 0:
        target.write_text(json.dumps(everyone))
    dist.barrier()


def doomed(how: str) -> None:
    """Rank 1 comes to grief at step 1 of block 4."""

    def renoise(step: int, block: int) -> torch.Tensor:
        if (step, block) == (1, 4):
            print(f"{how} at {time.time()}", flush=True)
            if how == "hang":
                time.sleep(1000)
            elif how == "orphan":
                os.kill(os.getppid(), signal.SIGKILL)
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        return torch.zeros(1, 3, 2, *SIZE.values())

    if how == "orphan":
        os.close(2)  # what is told cannot be heard either
    for _ in make(3, dist.group.WORLD, num_frames=None, window_frames=6, renoise=renoise, timeout=4):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    if sys.argv[1] == "cases":
        cases(Path(sys.argv[2]))
        sys.stdout.flush()
        os._exit(0)
    doomed(sys.argv[1])
