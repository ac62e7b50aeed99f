"""Training on two processes (gloo, FSDP2): the losses of one process, states that change hands, what is refused.

All cases of two processes run in one start of torchrun: train_job.py.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
from train_job import PULL, losses, recipe, start, stop_after, train

from hiar_model.models.checkpoint import save_transformer
from hiar_model.train.config.reading import make_recipe
from hiar_model.train.engine.distributed import DistContext
from hiar_model.train.engine.networks import make_network
from hiar_model.train.stages.base import make_stage

pytestmark = pytest.mark.cpu

ADAMW = {"kind": "adamw", "lr": 1e-3, "warmup": 0.0, "cooldown": 0.0}
MUON = {"kind": "muon_adamw", "lr": 0.01, "warmup": 0.0, "cooldown": 0.0}
SHARED = {
    "model": "tiny", "num_latent_frames": 6, "rollout": {"window_frames": 6}, "precision": "float32", "log_every": 1,
}  # fmt: skip
TINY = ["batch_size=2", "num_latent_frames=6", "rollout.window_frames=6", "precision=float32", "scale.threads=1"]
METRICS = ("critic_loss", "student_loss", "critic_gradient_norm", "student_gradient_norm")


def hiar(folder: Path, **values) -> dict:
    """A recipe of the real stage, for 2 updates, with a teacher and trajectories in the folder."""
    kl = {"trajectories": str(folder / "pairs")}
    return {
        **SHARED, "stage": "hiar", "teacher": str(folder / "teacher.safetensors"), "teacher_model": "tiny",
        "updates": 2, "batch_size": 4, "critic_updates": 2, "optimizer": ADAMW, "critic_optimizer": ADAMW,
        "forward_kl": kl, "ema": {"decay": 0.9, "start": 1}, "sample_every": 2, "sample_prompts": 2, **values,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all runs: on one process first, then two go on with some of them and have their own."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = make_network("tiny", seed=7)
    torch.nn.init.normal_(teacher.head.head.weight, std=0.2)
    save_transformer(teacher, folder / "teacher.safetensors")
    pairs = {"stage": "ode_pairs", "teacher": str(folder / "teacher.safetensors"), "teacher_model": "tiny", "count": 4}
    pairs |= {"model": "tiny", "num_latent_frames": 6, "precision": "float32", "steps": 8, "points": [0, 2, 4, 6, -1]}
    stage = make_stage(make_recipe(pairs), torch.device("cpu"))
    stage.produce(folder / "pairs", 0, 1, lambda done, total: None)

    train(folder / "hiar one", hiar(folder))
    at_the_end = {"checkpoint_every": 6, "threads": 1}
    train(folder / "pull one", recipe(scale=at_the_end))
    train(folder / "teacher forcing one", forcing())
    train(folder / "muon one", recipe(optimizer=MUON, scale=at_the_end))
    with pytest.raises(KeyboardInterrupt):
        train(folder / "one to two", recipe(), stop_after(3))
    shutil.copytree(folder / "one to two", folder / "goes on apart 0")
    scales = {"shard": 1}, {"micro_batch": 1, "activation_checkpointing": True}
    wrong = ("batch_size", 3), ("scale", {"shard": 3}), ("seed", -1)
    cases = [
        {"name": "hiar two", "recipe": hiar(folder)},
        {"name": "one to two", "recipe": recipe(), "stop": 4},
        {"name": "pull two", "recipe": recipe(scale={"checkpoint_every": 2}), "stop": 3},
        {"name": "ended two", "recipe": recipe(), "signal": [1, 2]},
        {"name": "muon two", "recipe": recipe(optimizer=MUON), "stop": 3},
        *({"name": f"teacher forcing {i}", "recipe": forcing(scale=scale)} for i, scale in enumerate(scales)),
        {"name": "apart", "recipe": recipe(), "apart": True},
        {"name": "goes on apart", "recipe": recipe(), "apart": True},
        *({"name": f"wrong {key}", "recipe": recipe(**{key: value})} for key, value in wrong),
    ]
    done = start(folder, cases, ranks=2)
    assert (folder / "results.json").exists(), done.stderr[-3000:]
    return folder, json.loads((folder / "results.json").read_text()), done.stderr


def forcing(**values) -> dict:
    return {**SHARED, "stage": "teacher_forcing", "updates": 2, "batch_size": 4, "optimizer": ADAMW, **values}


def close(ours: list[dict[str, str]], theirs: list[dict[str, str]], names=METRICS) -> None:
    assert [row["update"] for row in ours] == [row["update"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-4), (name, a["update"])


def test_hiar_has_the_losses_of_one_process(runs):
    folder, results, _ = runs
    assert [rank["hiar two"]["error"] for rank in results] == ["", ""]
    ours = losses(folder / "hiar two")
    assert len(ours) == 2
    close(ours, losses(folder / "hiar one"), (*METRICS, "student_dmd_normaliser", "student_forward_kl"))
    close(ours[1:], losses(folder / "hiar one")[1:], ("sample_motion", "sample_saturation"))
    states = (folder / f"hiar {number}/states/update_00000002/about.json" for number in ("one", "two"))
    one, two = (json.loads(about.read_text())["inputs"] for about in states)
    assert one == two, "hashes of sharded weights are those of plain ones"
    assert one.keys() == {"teacher", "init", "critic_init", "forward_kl.trajectories"}


@pytest.mark.parametrize("scale", [0, 1])
def test_copies_accumulation_and_recomputation_change_no_loss(runs, scale):
    """Two whole copies of the weights; a shard each, samples one by one, blocks recomputed."""
    folder, results, _ = runs
    assert [rank[f"teacher forcing {scale}"]["error"] for rank in results] == ["", ""]
    names = ("student_loss", "student_gradient_norm")
    close(losses(folder / f"teacher forcing {scale}"), losses(folder / "teacher forcing one"), names)
    assert train(folder / f"teacher forcing {scale}", forcing()).update == 2  # its sums are those of whole tensors


def test_a_state_of_one_process_is_read_by_two(runs):
    folder, results, _ = runs
    assert [rank["one to two"]["error"] for rank in results] == ["stopped", "stopped"]
    close(losses(folder / "one to two"), losses(folder / "pull one")[:4])


def test_a_state_of_two_processes_is_read_by_one(runs):
    folder, results, _ = runs
    assert [rank["pull two"]["error"] for rank in results] == ["stopped", "stopped"]
    about = json.loads((folder / "pull two" / "states" / "update_00000002" / "about.json").read_text())
    assert (about["update"], about["ranks"]) == (2, 2)
    trainer = train(folder / "pull two", recipe())
    assert trainer.update == 6
    close(losses(folder / "pull two"), losses(folder / "pull one"))
    # and on to two and back: this state came from one, to two, to one
    close(losses(folder / "one to two"), losses(folder / "pull one")[:4])
    assert train(folder / "one to two", recipe()).update == 6
    close(losses(folder / "one to two"), losses(folder / "pull one"))


def test_a_signal_to_one_of_two_ends_both_after_the_same_update(runs):
    """The second alone got it, after update 2: a state of the third, from which the run goes on as ever."""
    folder, results, _ = runs
    assert [(rank["ended two"]["error"], rank["ended two"]["update"]) for rank in results] == [("ended", 3)] * 2
    assert [state.name for state in (folder / "ended two/states").iterdir()] == ["update_00000003"]
    train(folder / "ended two", recipe())
    close(losses(folder / "ended two"), losses(folder / "pull one"))


def test_the_model_is_written_whole_by_the_first_rank(runs):
    folder, results, _ = runs
    first, second = (rank["hiar two"]["exported"] for rank in results)
    assert first == str(folder / "hiar two" / "model") and second is None
    assert sorted(p.name for p in Path(first).iterdir()) == ["config.json", "model.safetensors"]


def test_muon_of_shards(runs):
    """Three updates on two processes, the others on one, from the state after two."""
    folder, results, _ = runs
    assert [rank["muon two"]["error"] for rank in results] == ["stopped", "stopped"]
    train(folder / "muon two", recipe(optimizer=MUON))
    close(losses(folder / "muon two"), losses(folder / "muon one"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("batch_size", "ValueError: recipe: batch_size must be a multiple of the 2 processes, got 3"),
        ("scale", "ValueError: recipe: scale.shard must divide the 2 processes, got 3"),
    ],
)
def test_every_rank_refuses(runs, case, message):
    for rank in runs[1]:
        assert rank[f"wrong {case}"]["error"].startswith(message)


def test_processes_that_share_no_disk_are_refused(runs):
    """No state without the shards of one of them, and no run that goes on with one of them alone."""
    folder, results, _ = runs
    for rank in results:
        error = rank["apart"]["error"]
        assert "__1_0.distcp of another process is not there: all must see the same file system" in error
        error = rank["goes on apart"]["error"]
        assert "rank 0 sees update_00000002, rank 1 no state; all processes must share its file system" in error
    assert (
        not list((folder / "apart 0/states").iterdir()) and (folder / "goes on apart 0/states/update_00000002").is_dir()
    )


def test_a_sample_of_another_rank_is_named_by_all(runs):
    """Sample 1 is the second rank's; with this seed it is not finite."""
    for rank in runs[1]:
        error = rank["wrong seed"]["error"]
        assert error.startswith("FloatingPointError: ") and "is nan in samples [1, 3] of the batch" in error
        assert "update 0, step critic 0; last good state: none" in error


def test_the_command_on_two_processes_tells_a_mistake_once(tmp_path):
    words = ["train", "toy/teacher_forcing", "scale.threads=1", "batch_size=3", "--nproc", "2", "--device", "cpu"]
    done = processes.run(["-m", "hiar_model", *words], cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hiar: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr[-2000:]
    assert "batch_size must be a multiple of the 2 processes" in lines[0]


def test_a_signal_to_the_launcher_ends_its_processes_with_a_state(tmp_path):
    """Torch's launcher passes on what it gets, and waits."""
    words = ["train", "toy/teacher_forcing", "updates=1000000", "log_every=1", "sample_every=0", *TINY]
    words.append("optimizer.kind=adamw")  # torch's Muon takes a second for its first step over shards
    process = processes.Started(["-m", "hiar_model", *words, "--nproc", "2", "--device", "cpu"], cwd=tmp_path)
    run = tmp_path / "runs/toy/teacher_forcing"
    while not (run / "loss.csv").exists():
        assert process.poll() is None, process.said()
        signal.sigtimedwait([], 0.02)
    process.kill(signal.SIGTERM)
    done = process.done()
    (state,) = (run / "states").iterdir()
    update = len(losses(run))
    assert state.name == f"update_{update:08d}" and done.returncode == 130
    ended = f"after {update} of 1000000 updates; the same command resumes from {state.relative_to(tmp_path)}"
    assert done.stderr.count("stopping after this update, with a saved state") == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("hiar:")] == [f"hiar: interrupted; {ended}"]


def test_micro_batches_of_every_rank():
    assert DistContext(1, 2, torch.device("cpu")).micro_batches(8, 3) == [[1, 3, 5], [7]]
    assert DistContext(0, 1, torch.device("cpu")).micro_batches(3, None) == [[0, 1, 2]]
    assert recipe()["teacher"] == PULL
