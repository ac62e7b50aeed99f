"""A run that goes on where something has changed: it is the same to the bit, or refused, or it says what differs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest
import tiny_stages
import torch
from altered import altered
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_model import make_model
from torch.distributed.checkpoint import filesystem
from train_job import losses, make_trainer, recipe, stop_after, train

from hiar_model.cli.main import main
from hiar_model.config import WanConfig
from hiar_model.io import atomic
from hiar_model.models.checkpoint import save_transformer
from hiar_model.train.config.reading import differences, make_recipe
from hiar_model.train.engine import metrics, snapshots
from hiar_model.train.engine.metrics import MetricsLogger
from hiar_model.train.engine.resume import without_lost_weights
from hiar_model.train.engine.snapshots import ABOUT, CONTENTS, Snapshots
from hiar_model.train.engine.trainer import Trainer
from hiar_model.train.stages.base import make_stage

pytestmark = pytest.mark.cpu

STATE, CPU = "states/update_00000002", torch.device("cpu")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """Files of a stage hiar, a run of one update beside them, and the losses of one of two."""
    files = tiny_stages.write_files(tmp_path_factory.mktemp("files"))
    train(files / "run", hiar(files, updates=1))
    return files, losses(train(files / "two", hiar(files, updates=2)).folder)


@pytest.fixture
def files(distilled, tmp_path):
    """A copy of the files and the run: all paths are others."""
    return shutil.copytree(distilled[0], tmp_path / "files")


def hiar(files, **more) -> dict:
    return tiny_stages.values(files, "hiar", **more)


def said(folder, values) -> list[str]:
    """What a run says that goes on to its end."""
    trainer, lines = make_trainer(folder, values), []
    trainer.say = lines.append
    trainer.run()
    return lines


def change_about(folder, **values) -> None:
    file = folder / STATE / ABOUT
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# What the recipe names


def test_files_that_have_moved_are_the_same(distilled, files):
    assert said(files / "run", hiar(files, updates=2)) == []
    assert losses(files / "run") == distilled[1]


def other_teacher(files) -> None:
    save_transformer(make_model(9, WanConfig.from_name("least")), files / "teacher.safetensors")


def one_more_shard(files) -> None:
    shutil.copy(files / "clips/a.safetensors", files / "clips/b.safetensors")


def other_trajectories(files) -> None:
    manifest = json.loads((files / "pairs/manifest.json").read_text())
    (files / "pairs/manifest.json").write_text(json.dumps({**manifest, "seed": 77}))


@pytest.mark.parametrize(("key", "change"), [
    ("teacher", other_teacher), ("data.folder", one_more_shard), ("forward_kl.trajectories", other_trajectories),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.* has been made .* than this recipe's")
def test_another_content_is_refused(files, key, change):
    moved = shutil.copytree(files / "run", files / "moved")
    train(files / "run", hiar(files, updates=2))
    change(files)
    with refused(rf"moved holds a run with another {key} \(.*, now {files}/.* of another content\); choose another --"):
        train(moved, hiar(files, updates=2))
    state = files / "run/states/update_00000002"
    advice = "put back what was there, or choose another --out"
    with refused(f"the content of {key} {files}/.* has changed since {state} was saved .*, now .*: {advice}"):
        train(files / "run", hiar(files, updates=3))
    assert state.is_dir() and len(losses(files / "run")) == 2


def test_initial_weights_matter_only_at_the_start(distilled, files):
    """Another file of that name changes nothing; another name must be of the same content."""
    shutil.copy(files / "student.safetensors", files / "same.safetensors")
    for name in ("student", "critic"):
        save_transformer(make_model(9, WanConfig.from_name("least")), files / f"{name}.safetensors")
    other = {"init": str(files / "critic.safetensors")}
    with refused(r"another init \(.*student.safetensors, now .*critic.safetensors of another content\), critic_init"):
        train(files / "run", hiar(files, updates=2, **other))
    with refused(r"another init \(.*student.safetensors, now None\), critic_init"):
        train(files / "run", hiar(files, updates=2, init=None))
    names = {"init": str(files / "same.safetensors"), "critic_init": str(distilled[0] / "critic.safetensors")}
    train(files / "run", hiar(files, updates=2, **names))
    assert losses(files / "run") == distilled[1]
    about = json.loads((files / "run/states/update_00000002" / ABOUT).read_text())
    before = json.loads((distilled[0] / "run/states/update_00000001" / ABOUT).read_text())
    assert about["inputs"] == before["inputs"], "those that the run began with"


def test_initial_weights_that_have_gone_are_not_needed_behind_a_state(distilled, files):
    gone = {"init": "gone/student.safetensors", "critic_init": "gone/critic.safetensors"}
    file = files / "run/states/update_00000001" / ABOUT
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "recipe": {**about["recipe"], **gone}}))
    parsed = make_recipe(hiar(files, updates=2, **gone))
    assert without_lost_weights(parsed, files / "new") is parsed, "a run that begins needs them"
    needed = without_lost_weights(parsed, files / "run")
    assert needed.init is None and needed.critic_init is None
    # One that ships; a critic of another size than the teacher; what is read in every update.
    others = dataclasses.replace(parsed, init="toy", critic_model="toy", teacher="gone/teacher.safetensors")
    assert without_lost_weights(others, files / "run") == others
    with refused("init .* now gone/other.safetensors, which is not there"):
        Trainer(dataclasses.replace(parsed, init="gone/other.safetensors"), make_stage(needed, CPU), files / "run")
    Trainer(parsed, make_stage(needed, CPU), files / "run", say=lambda line: None).run()
    assert losses(files / "run") == distilled[1]


def test_a_shard_that_is_left_out_is_said(files):
    shard = files / "pairs/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="shard-00001.* left out with its 2 samples"):
        lines = said(files / "run", hiar(files, updates=2, forward_kl={"skip_corrupt": True}))
    assert len(lines) == 1 and "shards of forward_kl.trajectories (2 of" in lines[0] and ", now 1 of" in lines[0]


def test_clips_with_the_same_prompts_are_other_data(files):
    stage = tiny_stages.make(files, "teacher")
    file = files / "clips/a.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "latents": tensors["latents"] + 1}, file)
    assert stage.inputs().content.keys() == {"data.folder"}
    assert stage.inputs() != tiny_stages.make(files, "hiar").inputs()
    assert stage.sources.data.fingerprint == tiny_stages.make(files, "teacher").sources.data.fingerprint
    changed = stage.sources.data.fingerprint
    save_file(tensors, file)
    assert stage.sources.data.fingerprint != changed


def test_another_execution_is_said(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", recipe(), stop_after(2))
    others = {"processes": 2, "scale.micro_batch": 2, "torch": "1.0"}
    for folder in (run, tmp_path / "stopped"):
        change_about(folder, execution=others)
    assert said(run, recipe(updates=2)) == [], "nothing is left to train"
    (line,) = said(tmp_path / "stopped", recipe())
    assert line.startswith("from here on losses are not to the bit those of an uninterrupted run; changed: ")
    assert "processes (2, now 1), scale.micro_batch (2, now 4), torch (1.0, now 2" in line
    change_about(run, execution=3)
    with refused("execution is no mapping"):
        make_trainer(run, recipe(updates=2))


def test_a_recipe_of_another_version_is_no_other_recipe(run):
    about = json.loads((run / STATE / ABOUT).read_text())
    del about["recipe"]["data"]["mark_continuing"], about["recipe"]["scale"]["model_every"]
    change_about(run, recipe=about["recipe"])
    with refused(r"was saved by another version, with other recipe keys \(data.mark_continuing\)"):
        make_trainer(run, recipe(updates=2))


def test_what_is_shown_of_a_run_and_what_it_skips_may_change():
    """The VAE of samples, or the guidance of a teacher's; that of a student's training may not."""
    base = {"data.folder": "clips", "data.latent_size": [4, 4]}
    shown = {"data.vae": "wan", "sample_every": 3, "guidance": 5.0}
    for stage, differ in (("teacher", []), ("hiar", ["guidance"])):
        ours, theirs = (make_recipe({"stage": stage, **base, **more}).to_dict() for more in (shown, {}))
        assert [key for key, *_ in differences(ours, theirs)] == differ
    skips = {"skip_corrupt": True}, {}
    assert not differences(*(make_recipe({"stage": "ode_init", **more}).to_dict() for more in skips))


def test_more_updates_under_a_cooldown_say_what_is_legal(run):
    with refused(r"updates \(2, now 6\); .* \(updates: others only where warmup and cooldown are 0\)"):
        make_trainer(run, recipe())


def test_another_recipe_is_refused_before_weights_are_read(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["model=least", "teacher=missing.safetensors", "teacher_model=least", "optimizer.lr=7"]
    assert main(["train", "toy/hiar", *words, "--out", str(run)]) == 2
    assert "optimizer.lr (0.003, now 7" in capsys.readouterr().err


# Losses and states that do not belong together


@pytest.mark.parametrize(("content", "last"), [(None, 0), (-12, 1), (9, 0)])
def test_losses_that_are_missing_are_said(run, ended, content, last):
    """loss.csv was not copied with the state, or only its beginning: the row that was cut would be a wrong one."""
    table = run / "loss.csv"
    text = table.read_bytes()
    table.unlink()
    if content is not None:
        table.write_bytes(text[:content])
    (line,) = said(run, recipe(updates=2))
    assert line == f"{table} lacks rows: it ends at update {last}, the state has seen rows up to update 2"
    assert said(ended, recipe(updates=2)) == []
    logger = MetricsLogger(run, 2, {}, lambda line: None)
    logger.scalars(3, dict.fromkeys(list(losses(ended)[0])[1:], 1.0))
    assert [row["update"] for row in losses(run)] == [*map(str, range(1, last + 1)), "3"]
    assert None not in losses(run)[-1].values()


def test_a_finished_run_without_its_states_does_not_begin_again(run, capsys):
    """Somebody has deleted them, for they are large, and gives the command once more."""
    shutil.rmtree(run / "states")
    few = {"checkpoint_every": 1}
    with refused(f"{run} holds a run of 2 updates but no state in {run}/states, .*: copy .*, move {run}/loss.csv away"):
        make_trainer(run, recipe(scale=few))
    (line,) = said(shutil.copytree(run, run.with_name("killed early")), recipe(updates=1))
    assert "there is no state yet, so its 2 rows are dropped and come again" in line
    (run / "model").mkdir()
    (run / "model/weights.pt").touch()
    words = ["model=least", "teacher=missing.safetensors", "teacher_model=least"]
    assert main(["train", "toy/hiar", *words, "--out", str(run)]) == 2
    assert f"move {run}/loss.csv and {run}/model away, or choose another --out" in capsys.readouterr().err
    assert len(losses(run)) == 2


def test_a_model_of_an_update_is_there_before_the_state_of_that_update(tmp_path, monkeypatch):
    """Or what is killed between the two never writes it."""
    scale = {"checkpoint_every": 2, "model_every": 2, "threads": 1}
    trainer = make_trainer(tmp_path, recipe(scale=scale))

    def killed(folder, update, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Snapshots, "save", killed)
        trainer.run()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["update_00000002"]
    train(tmp_path, recipe(scale=scale))
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["update_00000002", "update_00000004"]


def test_rows_are_on_disk_before_the_state_behind_them(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(metrics, "sync", lambda path: order.append(path.name))
    save = Snapshots.save
    monkeypatch.setattr(Snapshots, "save", lambda *arguments: (order.append("state"), save(*arguments))[1])
    train(tmp_path, recipe(updates=2))
    assert order == ["loss.csv", "state"]


def test_tensorboard_has_every_update_of_a_killed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe(), stop_after(3))
    train(tmp_path, recipe())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("student/loss")] == [1, 2, 3, 4, 5, 6]
    assert [row["update"] for row in losses(tmp_path)] == ["1", "2", "3", "4", "5", "6"]


# What says nothing of a state


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_what_ends_the_reading_of_a_good_state_does_not_blame_it(run, monkeypatch, error):
    """It would be deleted."""

    def fails(*arguments, **options):
        raise error("CUDA out of memory")

    monkeypatch.setattr(snapshots._PlainPlanner, "finish_plan", fails)
    with pytest.raises(error):
        make_trainer(run, recipe(updates=2))


def test_ctrl_c_while_a_state_is_written_is_ctrl_c(run, tmp_path, monkeypatch):
    calls = []

    def interrupted(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise KeyboardInterrupt
        os.fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (atomic, snapshots, filesystem):
            patch.setattr(module, "os", altered(os, fsync=interrupted))
        train(tmp_path / "new", recipe())
    assert not list((tmp_path / "new/states").iterdir()), "it was the tensors' sync"


@pytest.mark.parametrize("name", [ABOUT, CONTENTS, "__0_0.distcp"])
def test_a_state_that_may_not_be_read_is_not_to_be_deleted(run, name, monkeypatch):
    file = run / STATE / name
    opened = type(file).open

    def forbidden(path, *arguments, **options):
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(type(file), "open", forbidden)
    with refused(f"Permission denied; {run / STATE} may be good: make it readable and run the same command again"):
        make_trainer(run, recipe(updates=2))


def test_a_file_of_a_state_that_was_not_copied_is_named(run):
    (run / STATE / CONTENTS).unlink()
    with refused(f"{STATE} cannot be read: No such file or directory: .metadata; delete .* to go on .*, or copy it ag"):
        make_trainer(run, recipe(updates=2))


def test_a_state_without_the_files_of_another_process_is_not_published(run, monkeypatch):
    """Of a machine that writes to a disk of its own."""
    save = snapshots.save

    def apart(*arguments, storage_writer, **options):
        save(*arguments, storage_writer=storage_writer, **options)
        (storage_writer.path / "__0_0.distcp").unlink()

    monkeypatch.setattr(snapshots, "save", apart)
    with refused("__0_0.distcp of another process is not there: all must see the same file .*; the last good", OSError):
        Snapshots(run / "states").save(3, {"x": torch.ones(2)}, {})
    assert [path.name for path in (run / "states").iterdir()] == ["update_00000002"]


def test_losses_that_somebody_has_edited_end_no_run_for_their_plot(tmp_path):
    lines = []
    logger = MetricsLogger(tmp_path, 0, {}, lines.append)
    logger.scalars(1, {"student_loss": 0.5})
    (tmp_path / "loss.csv").write_text("update;student_loss\n1;0,5\n")
    logger.close()
    assert lines == [f"no loss plot: {tmp_path}/loss.csv is no table of losses any more"]


def test_a_full_disk_under_a_sheet_ends_no_run(tmp_path, monkeypatch):
    lines = []

    def full(image, path):
        raise OSError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(metrics, "save_png", full)
    logger = MetricsLogger(tmp_path, 0, {}, lines.append)
    assert logger.sheet(3, np.zeros((2, 3, 8, 8, 3), np.uint8)) is None
    assert lines == [
        f"no sheet of samples: cannot write {tmp_path}/samples/update_00000003.png: No space left on device"
    ]
