"""The pipeline: bit parity with one process, faults that end a job in time, resumed runs.

Real processes (torchrun, gloo) run pipeline_job.py, all cases in one job.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_toy
import torch
from made_runs import make_rollout
from processes import PATIENCE, Started, start_torchrun, torchrun
from processes import run as run_python
from refusals import refused
from small_toy import BLOCK, PROMPT
from tiny_model import MODEL, SIZE, TEXT, run

from hiar_model.cli import main
from hiar_model.config import FlowSchedule, RolloutConfig
from hiar_model.planning.measure_costs import measure_costs
from hiar_model.rollout import Rollout
from hiar_model.rollout.engine import FinishedBlock
from hiar_model.rollout.noise import KeyedNoise
from hiar_model.rollout.run_folder import RunFolder
from hiar_model.schedule.costs import unit_costs
from hiar_model.schedule.plan import Plan, check, rank_order
from hiar_model.schedule.stages import RankSteps, faster_fusion, split_steps

pytestmark = pytest.mark.cpu

JOB = Path(__file__).parents[1] / "helpers" / "pipeline_job.py"


# What rank 1 does, and what is said of it.
FAULTS = {
    "kill": r"rank 1 \(step 1\) died at step 1 of block 4",
    "stop": r"rank 1 \(step 1\) sent no heartbeat for ([3-9]|\d\d+) s at step 1 of block 4",
    "hang": r"rank 1 \(step 1\) hangs for ([3-9]|\d\d+) s at step 1 of block 4",
}


# On several processes


@pytest.fixture(scope="module")
def doomed():
    """The jobs of FAULTS, each with the time of its end: begun first, since they wait more than they work."""
    jobs = {how: start_torchrun(3, JOB, how) for how in FAULTS}
    with ThreadPoolExecutor(len(jobs)) as threads:
        yield {how: threads.submit(lambda job=job: (job.done(), time.time())) for how, job in jobs.items()}


@pytest.fixture(scope="module")
def cases(doomed, tmp_path_factory):
    """The results of each of four ranks, and stderr."""
    target = tmp_path_factory.mktemp("job") / "results.json"
    done = torchrun(4, JOB, "cases", target)
    assert target.exists(), done.stderr[-3000:]
    return json.loads(target.read_text()), done.stderr


def test_pipelines_give_the_bits_of_one_process(cases):
    assert [rank["parity"] for rank in cases[0]] == [[]] * 4


def test_splits_a_decoder_rank_captured_tasks_and_own_weights(cases):
    assert [rank["splits"] for rank in cases[0]] == [[]] * 4


def test_steps_and_heads_on_one_mesh(cases):
    assert [rank["step and head"] for rank in cases[0]] == [[]] * 4


def test_states_of_all_ranks_resume_bit_for_bit(cases):
    for rank in cases[0][:3]:
        # blocks 0 to 4 were saved: the newest state that needs no later block is that of block 4
        assert rank["resumed"]["at"] == 4 and rank["resumed"]["same"]
        assert rank["resumed"]["left"] == 5
        assert rank["resumed"]["states"][-2:] == [4, 6]


def test_rollout_returns_latents_on_the_last_rank_alone(cases):
    assert [rank["rollout"] for rank in cases[0]] == [None, [1, 6, 2, 2, 4], None, None]


def test_an_endless_pipeline_takes_constant_memory_and_can_be_left(cases):
    first, last = (rank["endless"] for rank in cases[0][:2])
    assert first == {"taken": 0}
    assert last == {"taken": 40, "same": True, "sizes": 1}


def test_latents_are_sent_before_the_cache_task_and_received_a_block_ahead(cases):
    first, second = (rank["traced"] for rank in cases[0][:2])
    none = "posted none"
    assert first == [
        f"denoise 0 {none}", "send 0", f"cache 0 {none}",
        f"denoise 1 {none}", "send 1", f"cache 1 {none}",
        f"denoise 2 {none}", "send 2",
    ]  # fmt: skip
    assert second == ["denoise 0 posted 1", "cache 0 posted 1", "denoise 1 posted 2", "cache 1 posted 2",
                      f"denoise 2 {none}"]  # fmt: skip


def test_a_failing_rank_is_reported_once_and_known_to_all(cases):
    results, stderr = cases
    position = "at step 1 of block 2"
    expected = [
        f"rank 1 (step 1) failed {position}: FloatingPointError: latents are not finite from step 1 of block 2 on: "
        "the noise of its step",
        f"rank 1 (step 1) is out of memory {position}: MemoryError: no more",
        f"rank 1 (step 1) failed {position}: ZeroDivisionError: division by zero",
    ]
    assert [line for line in stderr.splitlines() if line.startswith("hiar: ")] == [f"hiar: {line}" for line in expected]
    for rank in (0, 2):
        assert results[rank]["failing"] == [f"PipelineFault: {line}" for line in expected]
    assert results[1]["failing"] == [line.partition(": ")[2] for line in expected]


@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_ends_the_job_in_time(how, doomed):
    done, ended = doomed[how].result()
    assert done.returncode
    reported = [line for line in done.stderr.splitlines() if line.startswith("hiar: ")]
    assert len(reported) == 1 and re.match(f"hiar: {FAULTS[how]}", reported[0]), done.stderr[-3000:]
    fault = float(re.search(rf"{how} at ([\d.]+)", done.stdout)[1])
    assert ended - fault < PATIENCE / 2, "gloo's own limit is half an hour"


def test_processes_end_without_their_launcher(tmp_path):
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    done = torchrun(3, JOB, "orphan", tmp_path / "held")
    assert done.returncode == -signal.SIGKILL
    closed, *_ = select.select([held], [], [], PATIENCE)  # by the end of the last process
    ended = time.time()
    assert closed and not os.read(held, 1)
    os.close(held)
    fault = float(re.search(r"orphan at ([\d.]+)", done.stdout)[1])
    assert ended - fault < PATIENCE / 2


# The command, whose first rank stops before its third state, says who it is, and waits to be killed.
HELD = """
import os, time
from hiar_model.cli import main
from hiar_model.rollout.run_folder import RunFolder
boundary = RunFolder.boundary
def held(folder, rollout, block):
    if folder.rank == 0 and block == 6:
        print(os.getpid(), flush=True)
        time.sleep(1000)
    boundary(folder, rollout, block)
RunFolder.boundary = held
raise SystemExit(main())
"""


def test_a_killed_generation_is_resumed(tmp_path):
    model = small_toy.write_model(tmp_path / "model")
    command = ["generate", PROMPT, "-o", "made/", "--model", str(model), "--seed", "3",
               "--num-frames", str(10 * BLOCK), "--nproc", "2", "--checkpoint-every", "2", "--timeout",
               "10"]  # fmt: skip
    started = Started(["-c", HELD, *command], cwd=tmp_path)
    folder, held = tmp_path / "made.blocks", int(next(started.lines()))
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob("state_000002_*"))) < 2:  # of each rank
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(held, signal.SIGKILL)
    ended = started.done()
    assert ended.returncode == 1
    stderr = ended.stderr
    assert re.fullmatch(
        r"hiar: rank \d \(step \d\) died at step \d of block \d+.*; \d+ finished blocks .* made\.blocks.*--resume.*\n",
        stderr,
    ), stderr
    assert not (tmp_path / "made").exists() and (folder / "run.json").exists()
    assert not [p for p in tmp_path.iterdir() if ".partial" in p.name]
    states = [set(re.findall(r"state_(\d+)", " ".join(p.name for p in folder.glob(f"*rank_{r}.*")))) for r in (0, 1)]
    common = int(max(states[0] & states[1]))
    assert 2 <= common < 10

    done = run_python(["-m", "hiar_model", *command, "--resume"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"made: {10 * BLOCK} frames") and not folder.exists()
    from hiar_model import generate

    video = generate(PROMPT, model=model, num_frames=10 * BLOCK, seed=3, device="cpu")
    video.save(tmp_path / "whole")
    for frame in (tmp_path / "whole").glob("*.png"):
        assert frame.read_bytes() == (tmp_path / "made" / frame.name).read_bytes(), frame.name


# In one process


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_toy.write_model(tmp_path_factory.mktemp("models") / "small"))


def test_parity_is_verified_and_can_fail(model, capsys, monkeypatch):
    assert main(["verify-parity", "--nproc", "1", "--model", model]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"4 blocks of .* on 1 processes \(2 steps\) and on one \(cpu, float32, 1 threads\): the same bits", out
    )
    narrow = [f"--{name}-dtype=float8_e4m3fn" for name in ("kv", "attention", "linear")]
    assert main(["verify-parity", "--nproc", "1", "--model", model, *narrow]) == 0
    assert "the same bits" in capsys.readouterr().out
    keyed, calls = KeyedNoise.__call__, []
    monkeypatch.setattr(KeyedNoise, "__call__", lambda *key: keyed(*key) + 1e-4 * len(calls.append(0) or calls))
    assert main(["verify-parity", "--nproc", "1", "--model", model]) == 1
    assert re.match(r"hiar: latents differ by [\d.e-]+, tolerance is 0\n", capsys.readouterr().err)
    assert main(["verify-parity", "--nproc", "1", "--model", model, "--tolerance", "1"]) == 0
    assert "largest difference 0.0" in capsys.readouterr().out


def test_a_generation_on_one_process_saves_its_blocks(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = ["generate", PROMPT, "-o", "a/", "--model", model, "--checkpoint-every", "1"]
    save = RunFolder.save_block

    def interrupted(self, finished):
        save(self, finished)
        if finished.block == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_block", interrupted)
        assert main([*request, "--parallel", "pipeline"]) == 130
    assert len(list(Path("a.blocks").glob("block_*"))) == 3 and not Path("a").exists()
    assert main([*request, "--parallel", "pipeline", "--resume"]) == 0
    assert main([*request[:3], "b/", *request[4:6]]) == 0
    capsys.readouterr()
    for frame in Path("b").glob("*.png"):
        assert frame.read_bytes() == Path("a", frame.name).read_bytes()
    assert not Path("a.blocks").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume has no effect without a pipeline: give --nproc 2 or more, or --parallel pipeline"),
        (["--nproc", "0"], "--nproc must be a whole number from 1 to"),
        (["--parallel", "pipeline", "--steps-per-rank", "[1,1]"], "a number for each of 1 ranks"),
        (["--parallel", "warp"], "--parallel must be one of pipeline, ulysses, got 'warp'"),
    ],
)
def test_bad_requests(model, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "-o", "a/", "--model", model, *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"window_frames": 7, "pairs": True}, {"order": "block_first"}], ids=str)
def test_one_rank_is_a_pipeline_too(options):
    assert torch.equal(run(executor="pipeline", **options), run(**options))


def test_stages_share_all_tasks():
    plan = Plan(4, "stream", 3, prefix_frames=4, window_frames=(9,) * 4)
    for split in ((4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)):
        stages = [RankSteps(plan, split, rank) for rank in range(len(split))]
        groups = [list(stage.groups(6)) for stage in stages]
        every = [(item,) for group in plan.groups(6) for item in rank_order(group)]
        assert sorted(group for own in groups for group in own) == sorted(every)
        assert [stage.sends for stage in stages] == [True] * (len(split) - 1) + [False]
        for stage, own in zip(stages, groups, strict=True):
            assert {item[-1].step for group in own for item in group} == set(stage.steps)
            blocks = [group[0][-1].block for group in own]
            assert blocks == sorted(blocks), "a state saved between two blocks has whole blocks"
        check(plan, every, 6)
    receiver = RankSteps(plan, (2, 2, 0), 2)
    assert [group[0][0] for group in receiver.groups(6)] == [("denoise", 3, n) for n in range(2, 6)]
    assert receiver.name == "rank 2 (takes finished blocks)"


def test_steps_are_split_by_their_costs():
    plan = Plan(8, "stream", 3, window_frames=(6,) * 4 + (21,) * 4)
    assert split_steps(plan, None, 2) == (4, 4)
    split = split_steps(plan, None, 2, measured_like(6, 1.0, 21, 4.0))
    assert sum(split) == 8 and split[0] > split[1]
    with pytest.raises(ValueError, match="ranks must be 1 to 8, the number of steps, got 9"):
        split_steps(plan, 7, 9)


def measured_like(low: int, low_cost: float, high: int, high_cost: float):
    from dataclasses import replace

    from hiar_model.schedule.costs import CostCurve

    line = CostCurve(((low, low_cost), (high, high_cost)))
    return replace(unit_costs(), denoise=line, cache=line)


def test_measured_costs_are_of_each_window():
    config = RolloutConfig((1000, 500), order="stream", window_frames=(9, 15))
    costs = measure_costs(MODEL, TEXT, config, num_latent_frames=30, latent_size=tuple(SIZE.values()))
    assert [frames for frames, _ in costs.denoise.points] == [6, 9, 15]
    assert all(0 < seconds < 5 for _, seconds in (*costs.denoise.points, *costs.cache.points))
    assert "measured on the CPU" in costs.source


def test_fusion_where_it_is_faster():
    """On one rank a fused item need only be cheaper than its tasks; on later ranks a block waits for the whole item."""
    from dataclasses import replace

    plan, costs = Plan(4, "stream", 3, window_frames=(9,) * 4), unit_costs()
    assert faster_fusion(plan, 27, 1, replace(costs, fused=0.97)).fuse_cache_denoise
    assert not faster_fusion(plan, 27, 1, replace(costs, fused=1.03)).fuse_cache_denoise
    assert not faster_fusion(
        plan, 7, 4, replace(costs, fused=0.97)
    ).fuse_cache_denoise  # 2N + 2S - 3 against 2N + S - 2
    assert faster_fusion(plan, 7, (1, 1, 1, 1), replace(costs, fused=0.7)).fuse_cache_denoise
    config = RolloutConfig(order="stream", window_frames=9)
    sizes = {"num_latent_frames": 30, "latent_size": tuple(SIZE.values())}
    measured = measure_costs(MODEL, TEXT, config, fused=True, **sizes)
    assert 0.1 < measured.fused < 10 and measured.fused != 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "pipeline-graph"}, "needs a CUDA device"),
        ({"steps_per_rank": (1, 1)}, r"steps_per_rank must have a number for each of 1 ranks, got \[1, 1\]"),
        ({"steps_per_rank": (3,)}, r"steps_per_rank must be numbers >= 1 that sum to 4, .*got \[3\]"),
        (
            {"dedicated_decoder_rank": True, "steps_per_rank": None},
            "a pipeline of 4 steps must have 1 to 4 ranks, and one more that decodes, got 1",
        ),
        ({"parallel": "ulysses"}, "needs a mesh"),
        (
            {"model": [MODEL, None, MODEL, MODEL]},
            r"step 1 is None, expected weights of all steps of this rank, \[0, 1, 2, 3\]",
        ),
        ({"model": [None] * 4}, "one network, or one for each of the 4 steps"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with refused(message):
        run(**{"executor": "pipeline", **options})


@pytest.mark.parametrize(
    ("plan", "split", "message"),
    [
        (Plan(4, "stream", 3), (2, 1), "must be numbers >= 1 that sum to 4"),
        (Plan(4, "stream", 3), (4, -1, 1), "must be numbers >= 1 that sum to 4"),
        (Plan(4, "stream", 3), (0, 4), "must be numbers >= 1 that sum to 4"),
        (Plan(4, "block_first", 3), (2, 2), "steps share one cache"),
        (Plan(4, "stream", 3, kv_source="next_step"), (2, 2), "keys are not sent"),
    ],
)
def test_illegal_stages(plan, split, message):
    with pytest.raises(ValueError, match=message):
        RankSteps(plan, split, 0)


def test_a_run_folder_saves_and_refuses(tmp_path):
    about = {"seed": 1, "windows": (3, 4)}
    RunFolder(tmp_path / "run", about)
    RunFolder(tmp_path / "run", {"seed": 7})  # nothing was saved yet: nothing to lose
    folder = RunFolder(tmp_path / "run", about)
    folder.save_block(FinishedBlock(3, 9, torch.ones(1, 3, 2, 2, 2)))
    assert folder.blocks() == [3] and folder.load_block(3).first_frame == 9
    with pytest.raises(ValueError, match="holds an unfinished run: go on with it"):
        RunFolder(tmp_path / "run", about)
    with pytest.raises(ValueError, match="of another run: seed was 1, now it is 2"):
        RunFolder(tmp_path / "run", {**about, "seed": 2}, resume=True)
    with pytest.raises(ValueError, match=r"of another run: windows was \[3, 4\], now it is None"):
        RunFolder(tmp_path / "run", {"seed": 1}, resume=True)
    with pytest.raises(ValueError, match="run: its noise is 'torch-32', this version draws 'philox-128'"):
        RunFolder(tmp_path / "run", {**about, "noise": "philox-128"}, resume=True)
    with pytest.raises(ValueError, match="checkpoint_every must be a whole number"):
        RunFolder(tmp_path / "run", about, resume=True, every=-1)
    assert RunFolder(tmp_path / "run", about, resume=True).resume(fresh()) == 0
    (tmp_path / "run" / "block_000003.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot read .*block_000003"):
        folder.load_block(3)


def fresh() -> Rollout:
    return make_rollout(MODEL, TEXT, FlowSchedule.uniform(2), num_frames=9, executor="pipeline", **SIZE)


def test_a_prefix_is_no_finished_block():
    """Of which the message about a fault tells."""
    options = {"num_frames": 9, "prefix": torch.zeros(1, 6, 2, 2, 4), "executor": "pipeline", **SIZE}
    rollout = make_rollout(MODEL, TEXT, FlowSchedule.uniform(2), **options)
    rollout.pipeline.watchdog = watchdog = SimpleNamespace(warmed_up=False, finished=0)
    rollout.pipeline.done(2)
    assert (watchdog.warmed_up, watchdog.finished) == (True, 1)


def test_states_stay_until_every_rank_has_newer_ones(tmp_path):
    folder, rollout = RunFolder(tmp_path / "run", {}, every=2), fresh()
    folder.ranks = 2
    for block in range(1, 9):
        folder.boundary(rollout, block)
    assert folder.states() == [2, 4, 6, 8]
    for of_the_other, states in ((4, [2, 4, 6, 8, 10]), (8, [6, 8, 10])):
        (folder.folder / f"state_{of_the_other:06d}_rank_1.safetensors").touch()
        folder.boundary(rollout, 10)
        assert folder.states() == states
    none = RunFolder(tmp_path / "none", {}, every=0)
    none.boundary(rollout, 1)
    assert none.states() == []


def test_one_process_resumes_too(tmp_path):
    whole = [block.latents for block in fresh()]
    first, folder = fresh(), RunFolder(tmp_path / "run", {}, every=1)
    first.on_boundary = lambda n: folder.boundary(first, n)
    for block in first:
        folder.save_block(block)
    assert folder.states() == [1, 2]
    again = fresh()
    assert folder.resume(again) == 2
    rest = [block.latents for block in again]
    assert len(rest) == 1 and np.array_equal(rest[0].numpy(), whole[2].numpy())
    (tmp_path / "run" / "notes.txt").write_text("a person's own")
    folder.remove()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    (tmp_path / "run" / "notes.txt").unlink()
    folder.remove()
    assert not (tmp_path / "run").exists()
