"""The job of test_pipeline.py under torchrun: pipelines of 1 to 4 of its processes, compared with one process.

torchrun --nproc-per-node 4 tests/helpers/pipeline_job.py cases RESULT.json      all cases; the results of each rank
torchrun --nproc-per-node 3 tests/helpers/pipeline_job.py stop | kill | hang     rank 1 does that inside a task;
torchrun --nproc-per-node 3 tests/helpers/pipeline_job.py orphan PIPE        it kills torchrun; all hold PIPE open
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
from made_runs import make_rollout
from tiny_model import MODEL, SHALLOW, SIZE, TEXT, TINY, make_model
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
EIGHT_BITS = dict.fromkeys(("kv_dtype", "attention_dtype", "linear_dtype"), "float8_e4m3fn")
# steps, options; each runs on 2 to 4 ranks (of one, test_pipeline.py makes sure), at most one per step
PARITY = [
    (1, {"num_frames": 9}),
    (2, {"num_frames": 12, "window_frames": 5}),
    (2, {"num_frames": 12, "window_frames": 6, "sink_frames": 1, "pairs": True}),
    (
        2,
        {
            "num_frames": 12,
            "window_frames": 5,
            "cache_dtype": torch.float8_e4m3fn,
            "attention_dtype": "float8_e4m3fn",
            "linear_dtype": "float8_e4m3fn",
        },
    ),
    (4, {"num_frames": 15}),
    (4, {"num_frames": 18, "window_frames": 8, "sink_frames": 2}),
    (4, {"num_frames": 16, "window_frames": 7, "sink_frames": 1, "prefix": PREFIX}),
    (4, {"num_frames": 16, "window_frames": 7, "prefix": PREFIX, "pairs": True}),
    (4, {"num_frames": 12, "window_frames": (3, 5, 6, 9)}),
    (4, {"num_frames": 3, "trajectory": "ode"}),
    (4, {"num_frames": 9, "batch": 2, "video_ids": [5, 9], "first_frame": 1000}),
    (8, {"num_frames": 6, "window_frames": 4}),
    (2, {"num_frames": 12, "window_frames": 5, **EIGHT_BITS}),
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


def latents(run: Rollout) -> torch.Tensor | None:
    blocks = [block.latents for block in run]
    return torch.cat(blocks, 1) if blocks else None


def single(steps: int, **options) -> torch.Tensor:
    """Latents of one process without a pipeline; the first rank computes them for all."""
    result: list = [None]
    if dist.get_rank() == 0:
        order = "stream" if isinstance(options.get("window_frames"), tuple) else "step_first"
        result = [latents(make(steps, executor="eager", order=order, **options))]
    dist.broadcast_object_list(result)
    return result[0]


def parity(groups) -> list[str]:
    """The configurations whose latents do not have the same bits; every rank must complete all."""
    wrong = []
    for steps, options in PARITY:
        options = {"model": SHALLOW, **options}  # layers are not divided: the other cases have two
        expected = single(steps, **options)
        for ranks in range(min(2, steps), min(RANKS, steps) + 1):
            if dist.get_rank() >= ranks:
                continue
            run = make(steps, groups[ranks], **options)
            result = latents(run)
            last = dist.get_rank() == ranks - 1
            caches = run._executor.cache.k[0].shape[0]
            if (result is not None) != last or (last and not torch.equal(result, expected)):
                wrong.append(f"{steps} steps on {ranks}: {options}")
            if caches != run.pipeline.stage.split[dist.get_rank()] or run._executor.latents:
                wrong.append(f"{steps} steps on {ranks} have {caches} caches, {len(run._executor.latents)} latents")
    return wrong


def splits(groups) -> list[str]:
    """Explicit splits, a rank without steps, measured costs, captured tasks, weights of own steps only."""
    wrong, rank = [], dist.get_rank()
    base = {"num_frames": 9, "window_frames": 6}
    experts = [make_model(s) for s in range(4)]
    with hiar_kernels.prefer("reference"):
        expected, expected_experts = single(4, **base), single(4, model=experts, **base)
    for name, ranks, options, expected_split in [
        ("explicit", 2, {"steps_per_rank": (1, 3)}, (1, 3)),
        ("decoder rank", 3, {"dedicated_decoder_rank": True}, (2, 2, 0)),
        ("costs", 2, {"costs": replace(unit_costs(), fused=0.9)}, (2, 2)),
        ("captured", 2, {"executor": "pipeline-recorded"}, (2, 2)),
        ("experts", 2, {"model": [m if s // 2 == rank else None for s, m in enumerate(experts)]}, (2, 2)),
    ]:
        if rank >= ranks:
            continue
        with hiar_kernels.prefer("reference"):
            run = make(4, groups[ranks], **base, **options)
            result = latents(run)
        split = run.pipeline.stage.split
        if split != expected_split:
            wrong.append(f"{name}: split {split}")
        if rank == ranks - 1 and not torch.equal(result, expected_experts if name == "experts" else expected):
            wrong.append(f"{name}: another result")
    return wrong


def step_and_head() -> list[str]:
    """A mesh of (step, head): two ranks of steps, each of two ranks that share every task."""
    mesh = make_mesh(step=2, head=2)
    options = {"num_frames": 12, "window_frames": 6}
    expected = single(4, **options)
    run = make(4, mesh=mesh, **options)
    result, last = latents(run), dist.get_rank() >= 2
    wrong = [] if (result is not None) == last else ["blocks on the wrong ranks"]
    if last and not torch.allclose(result, expected, atol=1e-5, rtol=0):
        wrong.append("another result")
    if run._executor.cache.k[0].shape[0] != 2 or run._executor.cache.k[0].shape[3] != 1:
        wrong.append("a rank has caches of other steps or heads")
    return wrong


def resumed(groups, folder: Path) -> dict:
    """New rollouts resume from states that all ranks saved on the way."""
    rank, group = dist.get_rank(), groups[3]
    options = {"num_frames": 24, "window_frames": 7, "pairs": True}
    expected = single(4, **options)
    if rank >= 3:
        return {}

    def start(resume: bool):
        run = make(4, group, **options)
        saved = RunFolder(folder, {"of": "tests"}, resume=resume, every=2, group=group)
        run.on_boundary = lambda n: saved.boundary(run, n)
        return run, saved

    run, saved = start(False)
    for block in list(run)[:5]:  # as if the run had ended in block 5
        saved.save_block(block)
    dist.barrier(group=group)
    states = saved.states()
    again, saved = start(True)
    at = saved.resume(again)
    rest = [block.latents for block in again]
    same = True
    if rank == 2:
        before = [saved.load_block(n).latents for n in range(at)]
        same = torch.equal(torch.cat([*before, *rest], 1), expected)
    return {"states": states, "at": at, "same": same, "left": len(saved.blocks())}


def traced(group) -> list[str]:
    """The tasks and sends of two ranks, in order, and the receives posted when a task starts."""
    run, events = make(2, group, num_frames=9), []
    forward, send = run._executor._forward, run.pipeline.send

    def traced_forward(items, inputs):
        posted = ",".join(map(str, sorted(run.pipeline.links.posted))) or "none"
        events.append(f"{items[0][-1].kind} {items[0][-1].block} posted {posted}")
        return forward(items, inputs)

    def traced_send(block, latents):
        events.append(f"send {block}")
        send(block, latents)

    run._executor._forward, run.pipeline.send = traced_forward, traced_send
    latents(run)
    return events


def endless(group) -> dict:
    """A changing prompt, a consumer that stops, constant memory."""
    rank = dist.get_rank()
    text = lambda block: TEXT if block < 6 else OTHER  # noqa: E731
    run = make(2, group, num_frames=None, window_frames=6, text=text)
    taken, sizes = [], set()
    for block in run:
        taken.append(block.latents)
        executor = run._executor
        if block.block >= 8:
            buffers = sum(map(len, executor.free_buffers.values()))
            sizes.add((len(executor.latents), buffers, len(run.pipeline.links.posted)))
        if block.block == 39:
            break
    if rank == 0:
        return {"taken": len(taken)}
    expected = latents(make(2, executor="eager", order="stream", num_frames=120, window_frames=6, text=text))
    return {"taken": len(taken), "same": torch.equal(torch.cat(taken, 1), expected), "sizes": len(sizes)}


def failing(group, error: Exception | float) -> str:
    """Rank 1 of 3 fails at step 1 of block 2: the exception of each rank."""

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
    separate = [dist.new_group([0, 1, 2]) for _ in range(3)]  # the links of a failed job cannot be used again
    pair = dist.new_group([0, 1])
    rank = dist.get_rank()
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    results = {"parity": parity(groups), "splits": splits(groups), "resumed": resumed(groups, Path(folder[0]) / "run")}
    video = rollout(MODEL, None, TEXT, FlowSchedule.uniform(2), num_frames=6, executor="pipeline",
                    mesh=DeviceMesh.from_group(pair, "cpu", mesh_dim_names=("step",)),
                    **SIZE) if rank < 2 else None  # fmt: skip
    results["rollout"] = None if video is None else list(video.shape)
    results["endless"] = endless(dist.new_group([0, 1])) if rank < 2 else dist.new_group([0, 1]) and None
    errors = (float("nan"), MemoryError("no more"), ZeroDivisionError("division by zero"))
    results["failing"] = (
        [failing(group, error) for group, error in zip(separate, errors, strict=True)] if rank < 3 else []
    )
    results["step and head"] = step_and_head()
    results["traced"] = traced(pair) if rank < 2 else []
    everyone: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if rank == 0:
        target.write_text(json.dumps(everyone))
    dist.barrier()


def doomed(how: str) -> None:
    """Rank 1 is killed, stopped, hangs or kills the launcher at step 1 of block 4."""

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
        os.close(2)  # stderr is gone too
    for _ in make(3, dist.group.WORLD, num_frames=None, window_frames=6, renoise=renoise, timeout=4):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "orphan":
        os.open(sys.argv[2], os.O_WRONLY)
    init_distributed()
    if sys.argv[1] == "cases":
        cases(Path(sys.argv[2]))
        sys.stdout.flush()
        os._exit(0)
    doomed(sys.argv[1])
