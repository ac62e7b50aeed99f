"""Exact resume: kill -9 at any moment, full disks, wrong folders."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import processes
import pytest
import torch
from altered import altered
from refusals import refused
from torch.distributed.checkpoint import FileSystemWriter, filesystem, save
from train_job import command, losses, recipe, start, stop_after, train

from hiar_model.cli.main import main
from hiar_model.io import atomic
from hiar_model.train.engine import snapshots
from hiar_model.train.engine.snapshots import ABOUT, CONTENTS, Snapshots
from hiar_model.train.engine.trainer import run_folder_held

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its losses, its weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = train(folder, recipe())
    return losses(folder), everything(trainer)


def everything(trainer) -> dict[str, torch.Tensor]:
    """Every tensor of a state, and the averages once more, whether the state has them or not."""
    averages = {f"averaged/{name}": value for name, value in trainer.ema.weights.items()}
    tensors = {name: value for name, value in flat(trainer._state_dict()).items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in {**tensors, **averages}.items()}


def flat(state, prefix: str = "") -> dict:
    if not isinstance(state, dict):
        return {prefix: state}
    parts = [flat(part, f"{prefix}/{name}".strip("/")) for name, part in state.items()]
    return {key: value for part in parts for key, value in part.items()}


def same(folder, whole):
    """The run in the folder ended as the uninterrupted one, to the bit."""
    rows, tensors = whole
    assert losses(folder) == rows
    resumed = everything(train(folder, recipe()))
    assert resumed.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(resumed[name], value), name


def states(folder) -> list[str]:
    return sorted(p.name for p in (folder / "states").iterdir())


def test_the_uninterrupted_run_is_one(whole):
    rows, tensors = whole
    assert [row["update"] for row in rows] == [str(i) for i in range(1, 7)]
    assert len({row["student_loss"] for row in rows}) == 6
    kinds = {name.rpartition("head.head.weight")[0] for name in tensors if "head.head.weight" in name}
    assert kinds == {"averaged/", "average/"} | {
        f"{network}/{part}/" for network in ("critic", "student") for part in ("weights", "optimizer/state")
    }
    some = "head.head.weight"
    assert not torch.equal(tensors[f"student/weights/{some}"], tensors[f"average/{some}"])
    assert tensors[f"student/optimizer/state/{some}/step"] == 6
    assert tensors[f"critic/optimizer/state/{some}/step"] == 12


def test_killed_at_random_moments(tmp_path, whole):
    """kill -9 from outside, twice, each a random while after a random update; then to the end."""
    folder, moments = tmp_path / "run", random.Random(time.time_ns())
    reached = 0
    for _ in range(2):
        process = processes.Started(command(folder, recipe()))
        last = reached + moments.randint(1, 2)
        for line in process.lines():
            if int(line.removeprefix("update ")) >= last:
                break
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.wait()
        newest = Snapshots(folder / "states").newest()
        reached = 0 if newest is None else int(newest.name.removeprefix("update_"))
    done = start(folder, recipe())
    assert done.returncode == 0, done.stderr[-2000:]
    same(folder, whole)


# Syncs of loss.csv, once: the file, its folder. Of one state: loss.csv, tensors, their list, about.json, the folder;
# then the rename, and the folder above.
@pytest.mark.parametrize(("sync", "last"), [(10, 2), (12, 2), (13, 2), (14, 4)])
def test_killed_while_a_state_is_written(tmp_path, whole, sync, last):
    folder = tmp_path / "run"
    done = start(folder, recipe(), sync)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    newest = Snapshots(folder / "states").newest()
    assert newest is not None and newest.name == f"update_{last:08d}"
    assert len(states(folder)) == 2, "the one before is still there, whole or under its temporary name"
    train(folder, recipe())
    assert states(folder) == ["update_00000006"]
    same(folder, whole)


def test_killed_before_the_first_state(tmp_path, whole):
    folder = tmp_path / "run"
    assert start(folder, recipe(), 4).returncode == -signal.SIGKILL
    assert Snapshots(folder / "states").newest() is None and losses(folder)
    train(folder, recipe())
    same(folder, whole)


def test_rows_that_wait_for_the_log_are_kept(tmp_path):
    """States fall between rows of the log: the row's mean is over what was before and after."""
    every = recipe(log_every=3, updates=7)
    train(tmp_path / "whole", {**every, "scale": {"threads": 1}})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", every, stop_after(5))
    assert [row["update"] for row in losses(tmp_path / "parts")] == ["3"]
    train(tmp_path / "parts", every)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [row["update"] for row in losses(tmp_path / "whole")] == ["3", "6", "7"]


def test_a_full_disk_leaves_the_last_good_state(tmp_path, whole, monkeypatch):
    folder, calls = tmp_path / "run", []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)

    with monkeypatch.context() as patch:
        for module in (atomic, snapshots, filesystem):
            patch.setattr(module, "os", altered(os, fsync=full))
        with pytest.raises(OSError, match="update_00000004 cannot be written: No space left on device") as error:
            train(folder, recipe())
    assert str(error.value).endswith("the last good one is " + str(folder / "states" / "update_00000002"))
    assert states(folder) == ["update_00000002"]
    train(folder, recipe())
    same(folder, whole)


def test_a_file_that_may_not_grow(tmp_path):
    """The kernel refuses to write on in the middle of the tensors: no patched function."""
    code = (
        "import resource, signal, sys, train_job; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "def small(done, numbers):\n"
        "    if done == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "train_job.train(Path(sys.argv[1]), train_job.recipe(), small)\n"
    )
    done = processes.run(["-c", code, tmp_path / "run"])
    assert "update_00000004 cannot be written: " in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("update_00000002")
    assert states(tmp_path / "run") == ["update_00000002"]


def test_another_recipe_may_not_use_the_folder(run):
    changes = r"seed \(0, now 1\), updates \(2, now 6\), optimizer.lr \(0.003, now 0.001\)"
    with refused(f"a run with another {changes}; choose another --out"):
        train(run, recipe(seed=1, optimizer={"kind": "adamw", "lr": 1e-3, "warmup": 0.0}))
    scale = {"checkpoint_every": 1, "threads": 1, "micro_batch": 1, "activation_checkpointing": True}
    assert train(run, recipe(updates=2, scale=scale)).update == 2


def test_what_is_reported_may_change(tmp_path, whole):
    """Fewer rows, of the same numbers."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe(), stop_after(3))
    train(tmp_path, recipe(log_every=6, sample_prompts=1))
    assert [row["update"] for row in losses(tmp_path)] == ["1", "2", "6"]
    assert losses(tmp_path)[:2] == whole[0][:2]


CONSTANT = {"kind": "adamw", "lr": 3e-3, "warmup": 0.0, "cooldown": 0.0}


def test_a_finished_run_goes_on_for_more_updates(tmp_path):
    """With constant rates, to the bit as a run that was as long from the start; with others it is refused."""

    def constant(**values):
        return recipe(optimizer=CONSTANT, critic_optimizer=CONSTANT, **values)

    at_once, twice = train(tmp_path / "once", constant(updates=4)), tmp_path / "twice"
    train(twice, constant(updates=2))
    longer = train(twice, constant(updates=4))
    assert losses(twice) == losses(tmp_path / "once")
    expected, tensors = everything(at_once), everything(longer)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    with refused(r"another updates \(4, now 3\)"):
        train(twice, constant(updates=3))
    with refused(r"updates \(4, now 5\), critic_optimizer.cooldown \(0.0, now 0.4\)"):
        train(twice, recipe(optimizer=CONSTANT, updates=5))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [("toy/ode_pairs", "loss.csv", "holds a run"), ("toy/teacher_forcing", "settings.json", "holds shards of prompts")],
)
def test_a_folder_of_the_other_kind_is_refused(tmp_path, capsys, name, file, message):
    """Shards among the files of a run, or a run among shards, would mix two outputs."""
    (tmp_path / file).touch()
    assert main(["train", name, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} {message}" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == [file]


def test_a_state_of_an_older_version_is_refused(run):
    """Its recipe spelled the options of the rollout one by one."""
    file = run / "states" / "update_00000002" / ABOUT
    about = json.loads(file.read_text())
    about["recipe"] |= about["recipe"].pop("rollout")
    file.write_text(json.dumps(about))
    with refused("update_00000002 .* another version, .* order, .*rollout"):
        train(run, recipe(updates=2))


def test_a_state_of_other_noise_is_refused(run):
    """A state of before the scheme was named: going on would draw other batches than it began with."""
    file = run / "states" / "update_00000002" / ABOUT
    about = json.loads(file.read_text())
    assert about.pop("noise") == "philox-128"
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="update_00000002: its noise is 'torch-32', this version draws 'philox-128'"):
        train(run, recipe(updates=2))


@pytest.mark.parametrize("damage", ["about", "tensors", "list"])
def test_a_damaged_state_is_named(run, damage):
    state = run / "states" / "update_00000002"
    file = {"about": state / ABOUT, "tensors": state / "__0_0.distcp", "list": state / ".metadata"}[damage]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with refused("update_00000002.* cannot be read: .*; delete .* to go on without it"):
        train(run, recipe(updates=2))


def test_a_changed_bit_among_the_tensors_of_a_state_is_noticed(tmp_path, ended):
    """torch reads each of them without a look at its zip's own sums."""
    shutil.copytree(ended, tmp_path / "run")
    state = tmp_path / "run/states/update_00000002"
    about, file = json.loads((state / ABOUT).read_text()), state / "__0_0.distcp"
    weights = train(ended, recipe(updates=2)).ema.weights["head.head.weight"]
    content = file.read_bytes()
    place = content.index(weights.numpy().tobytes()) + 5
    file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    with refused("update_00000002 cannot be read: it is damaged: average.head.head.weight is not what was written"):
        train(tmp_path / "run", recipe(updates=2))
    del about["sums"]  # as in older states
    (state / ABOUT).write_text(json.dumps(about))
    train(tmp_path / "run", recipe(updates=2))


@pytest.mark.parametrize("change, message", [
    ([], "it holds no recipe"), ({"recipe": 3}, "it holds no recipe"), ({"pending": [3]}, "pending is no list of metr"),
    ({"update": "2"}, "update is '2', the folder's name says 2"), ({"update": 1}, "update is 1, the folder's name say"),
    ({"recipe": {"stage": "ode_init"}}, "holds a run of the stage ode_init; choose another --out"),
])  # fmt: skip
def test_facts_that_are_none_of_a_state(run, change, message):
    file = run / "states/update_00000002" / ABOUT
    file.write_text(json.dumps({**json.loads(file.read_text()), **change} if change else change))
    with refused(message):
        train(run, recipe(updates=2))


class Call:
    """A pickle that makes a file when it is read."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


@pytest.mark.parametrize("part", ["contents", "data"])
def test_a_foreign_state_runs_no_code(tmp_path, part):
    state, made = tmp_path / "update_00000002", tmp_path / "made"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        save({"x": Call(made)}, storage_writer=FileSystemWriter(state), no_dist=True)
    if part == "contents":
        (state / CONTENTS).write_bytes(pickle.dumps(Call(made)))
    with refused("update_00000002 cannot be read: .* no state needs: do not trust it"):
        Snapshots(tmp_path).load(state, {"x": 0})
    assert not made.exists()


@pytest.mark.parametrize("content, message", [
    (b"\xff\xfe\x00\x01", "loss.csv cannot be read: 'utf-8' codec"),
    (b"step,loss\n1,3\n", "loss.csv is no table of losses, whose first column is update"),
])  # fmt: skip
def test_a_file_that_is_no_table_of_losses(tmp_path, content, message):
    (tmp_path / "loss.csv").write_bytes(content)
    with refused(message):
        train(tmp_path, recipe(updates=2))
    assert (tmp_path / "loss.csv").read_bytes() == content


def test_a_row_without_an_update_is_dropped(run, ended):
    with (run / "loss.csv").open("a") as file:
        file.write(",1,2\n")
    rows = len(losses(ended))
    train(run, recipe(updates=2))
    assert len(losses(run)) == rows


def test_folders_that_stay_empty_are_removed(tmp_path):
    with run_folder_held(tmp_path / "new" / "deep" / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_time_over(tmp_path, whole):
    """max_minutes: a state, then the end; the same folder goes on."""
    folder = tmp_path / "run"
    scale = {"checkpoint_every": 100, "threads": 1, "max_minutes": 1e-9}
    trainer = train(folder, recipe(scale=scale))
    assert trainer.update == 1 and states(folder) == ["update_00000001"]
    assert not trainer.run() and trainer.update == 2
    train(folder, recipe())
    same(folder, whole)


def test_what_a_person_put_among_the_states_stays(tmp_path):
    """A copy of a state, say, to go back to."""
    snapshots = Snapshots(tmp_path)
    for update in (1, 2):
        snapshots.save(update, {"x": torch.ones(2)}, {})
        (tmp_path / f"my copy of {update}").mkdir()
        (tmp_path / f".update_{update:08d}.partial").mkdir()
    state = snapshots.save(3, {"x": torch.ones(2)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my copy of 1", "my copy of 2", state.name]
