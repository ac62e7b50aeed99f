"""A teacher's trajectories on disk: the same bytes from any ranks and after any interruption; damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import processes
import pytest
import torch
from altered import altered
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_model import MODEL, TINY

from hiar_model.io import atomic
from hiar_model.train.data import trajectories
from hiar_model.train.data.datasets import PromptData
from hiar_model.train.data.trajectories import TrajectoryStore, generate_trajectories, weights_sha256
from hiar_model.train.losses.teacher import ode_plan, ode_trajectory

pytestmark = pytest.mark.cpu

SHAPE = (3, 2, 2, 4)  # a clip: F, C, H, W
SMALL = {"count": 7, "shard_size": 2, "batch_size": 2, "steps": 4, "points": (0, 1, 3, -1)}
SHARDS = [f"shard-{n:05d}.safetensors" for n in range(4)]  # of 2, 2, 2 and 1 samples


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PromptData:
    folder = tmp_path_factory.mktemp("prompts")
    text = torch.randn(5, 3, TINY.text_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"text": text, "unconditional": torch.zeros_like(text[:1])}, folder / "prompts.safetensors")
    return PromptData(folder, SHAPE)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A finished store; tests do not write into it."""
    folder = tmp_path_factory.mktemp("whole")
    generate_trajectories(MODEL, data, folder, **SMALL)
    return folder


@pytest.fixture
def store(whole, tmp_path) -> Path:
    """A finished store to damage."""
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_stored(whole, data):
    """Every sample is the trajectory of its own key's noise and prompt, to the bit of float32."""
    store = TrajectoryStore(whole)
    assert len(store) == 7 and store.latent_shape == SHAPE
    assert store.sigmas == ode_plan(4, 8.0, (0, 1, 3, 4)).point_sigmas
    trajectory, text = store.batch(range(7))
    assert trajectory.shape == (7, 4, *SHAPE) and trajectory.dtype == torch.float32 and text.dtype == torch.bfloat16
    assert torch.equal(text, data.prompts(0, "trajectories", 0, range(7)))
    noise = trajectory[:, 0]
    assert len({float(x) for x in noise[:, 0, 0, 0, 0]}) == 7 and abs(float(noise.std()) - 1) < 0.1
    for first in range(0, 7, 2):
        rows = slice(first, first + 2)
        alone = ode_trajectory(MODEL, noise[rows], text[rows], data.unconditional(), steps=4, points=(0, 1, 3, -1))
        assert torch.equal(trajectory[rows], alone), "a chord divides by small differences: nothing may be rounded"


def test_the_manifest_tells_how_it_was_made(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["teacher"] == weights_sha256(MODEL) and manifest["dtype"] == "F32"
    expected = {"count": 7, "seed": 0, "steps": 4, "shift": 8.0, "guidance": 6.0, "points": [0, 1, 3, 4]}
    assert expected.items() <= manifest.items()
    assert manifest["latent_shape"] == list(SHAPE) and manifest["text_shape"] == [3, TINY.text_dim]
    assert [s["file"] for s in manifest["shards"]] == SHARDS and [s["samples"] for s in manifest["shards"]] == [
        2,
        2,
        2,
        1,
    ]
    for shard in manifest["shards"]:
        assert hashlib.sha256((whole / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_any_ranks_make_the_same_files(whole, data, tmp_path):
    progress = []
    for rank in (2, 0, 1):
        assert not (tmp_path / "manifest.json").exists(), "not before the last shard is there"
        generate_trajectories(
            MODEL, data, tmp_path, **SMALL, rank=rank, world_size=3, on_progress=lambda *p: progress.append(p)
        )
    assert contents(tmp_path) == contents(whole)
    assert progress == [(2, 2), (2, 3), (3, 3), (2, 2)]
    progress.clear()
    generate_trajectories(MODEL, data, tmp_path, **SMALL, on_progress=lambda *p: progress.append(p))
    assert progress == [(2, 7), (4, 7), (6, 7), (7, 7)], "what is there counts as done"


def test_the_seed_decides(whole, data, tmp_path):
    generate_trajectories(MODEL, data, tmp_path, **SMALL, seed=1)
    assert not torch.equal(TrajectoryStore(tmp_path).batch([0])[0], TrajectoryStore(whole).batch([0])[0])


def test_a_killed_run_goes_on(whole, data, tmp_path):
    """kill -9 within the third shard; the files are those of a run that was never killed."""
    code = (
        "import sys, time; from tiny_model import MODEL; from hiar_model.train.data.datasets import PromptData\n"
        "from hiar_model.train.data.trajectories import generate_trajectories\n"
        f"generate_trajectories(MODEL, PromptData(sys.argv[1], {SHAPE}), sys.argv[2], **{SMALL},\n"
        "                      on_progress=lambda done, in_all: done == 6 and time.sleep(1000))"
    )
    process = processes.Started(["-c", code, data.folder, tmp_path])
    end = time.monotonic() + processes.PATIENCE
    while not (tmp_path / "shard-00001.json").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ValueError, match="unfinished, 2 of 4 shards exist"):
        TrajectoryStore(tmp_path)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in SHARDS[:2]}
    generate_trajectories(MODEL, data, tmp_path, **SMALL)
    assert contents(tmp_path) == contents(whole)
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in SHARDS[:2]}, "good shards are kept"


@pytest.mark.parametrize("moment", range(1, 10))
def test_a_stop_at_any_write_goes_on(whole, data, tmp_path, monkeypatch, moment):
    """The settings, each shard, its description, the manifest: stopped right before any of these is renamed."""
    left = moment

    def replace(source, target):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        os.replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", altered(os, replace=replace))
        with pytest.raises(KeyboardInterrupt):
            generate_trajectories(MODEL, data, tmp_path, **SMALL)
    generate_trajectories(MODEL, data, tmp_path, **SMALL)
    assert contents(tmp_path) == contents(whole)


def test_a_full_disk_leaves_whole_files_only(whole, data, tmp_path, monkeypatch):
    def full(descriptor):
        if list(tmp_path.glob(".shard-00002*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", altered(os, fsync=full))
        with pytest.raises(OSError, match=r"No space left.*run again to resume.*shard-00002\.safetensors") as error:
            generate_trajectories(MODEL, data, tmp_path, **SMALL)
    assert error.value.errno == errno.ENOSPC
    names = {"settings.json", "shard-00000.json", "shard-00001.json", *SHARDS[:2]}
    assert set(contents(tmp_path)) == names
    generate_trajectories(MODEL, data, tmp_path, **SMALL)
    assert contents(tmp_path) == contents(whole)


def test_a_teacher_that_breaks_is_told(data, tmp_path):
    with pytest.raises(FloatingPointError, match=r"samples \[0, 1\] \(shard-00000\) is not finite"):
        generate_trajectories(lambda x, *_, **__: x / 0, data, tmp_path, **SMALL, teacher_sha256="0")
    assert not list(tmp_path.glob("shard*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now it is 1; choose another folder"),
        ({"shift": 5.0, "guidance": 3}, r"shift was 8\.0, now it is 5\.0; guidance was 6\.0, now it is 3\.0"),
        ({"points": (0, 2, 3, -1)}, r"points was \[0, 1, 3, 4\], now it is \[0, 2, 3, 4\]"),
        ({"count": 8}, "count was 7, now it is 8"),
        ({"teacher_sha256": "another"}, "teacher was '.*', now it is 'another'"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0\.\.1, got 2"),
        ({"steps": 0}, "at least 1 step"),
        ({"points": (3, 1)}, r"rising within 0\.\.4"),
    ],
)
def test_another_request_is_refused_and_changes_nothing(whole, data, change, message):
    before = contents(whole)
    with refused(message):
        generate_trajectories(MODEL, data, whole, **{**SMALL, **change})
    assert contents(whole) == before


def test_shards_whose_settings_are_lost_are_not_taken_for_others(store, data):
    """With another seed the manifest would tell of a store that is half of one and half of the other."""
    (store / "settings.json").unlink()
    before = contents(store)
    with refused("holds shards of trajectories but no settings.json, .*: copy it there, or choose another folder"):
        generate_trajectories(MODEL, data, store, **{**SMALL, "seed": 1})
    assert contents(store) == before


def test_a_setting_that_this_version_has_not_is_refused(store, data):
    edit(store / "settings.json", solver="heun")
    with refused("made with other settings: solver was 'heun', now it is None"):
        generate_trajectories(MODEL, data, store, **SMALL)


def test_other_data_is_refused(whole, data, tmp_path):
    save_file({**load_file(data.files[0]), "more": torch.zeros(1)}, tmp_path / "prompts.safetensors")
    with pytest.raises(ValueError, match="data was '.*', now it is '.*'"):
        generate_trajectories(MODEL, PromptData(tmp_path, SHAPE), whole, **SMALL)


def test_another_precision_is_refused(whole, data):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="autocast was None, now it is 'bfloat16'"),
    ):
        generate_trajectories(MODEL, data, whole, **SMALL)


def test_a_teacher_without_weights_must_be_named(data, tmp_path):
    with pytest.raises(ValueError, match="teacher_sha256 must be given"):
        generate_trajectories(lambda x, *_, **__: x, data, tmp_path, **SMALL)


def test_weights_are_told_apart():
    model = type(MODEL)(TINY)
    model.load_state_dict(MODEL.state_dict())
    assert weights_sha256(model) == weights_sha256(MODEL) != weights_sha256(model.bfloat16())
    model.float().head.head.bias.data[0] += 1e-3
    assert weights_sha256(model) != weights_sha256(MODEL)


# Damage.


def truncate(folder: Path) -> None:
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    blob = bytearray((folder / SHARDS[1]).read_bytes())
    blob[-5] ^= 16
    (folder / SHARDS[1]).write_bytes(blob)


def garble(folder: Path) -> None:
    """The header of the same number of bytes."""
    blob = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(b"\xff" * 8 + blob[8:])


def remove(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A shard that is as it was written, but was written wrong."""
    save_file(tensors, folder / SHARDS[1])
    blob = (folder / SHARDS[1]).read_bytes()
    description = {"size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    edit(folder / "shard-00001.json", **description)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1] |= description
    edit(folder / "manifest.json", **manifest)


def reshape(folder: Path) -> None:
    stored = load_file(folder / SHARDS[1])
    rewrite(folder, {**stored, "trajectory": stored["trajectory"][:, :, :2].contiguous()})


def narrow(folder: Path) -> None:
    stored = load_file(folder / SHARDS[1])
    rewrite(folder, {**stored, "trajectory": stored["trajectory"].half()})


def forget_text(folder: Path) -> None:
    rewrite(folder, {"trajectory": load_file(folder / SHARDS[1])["trajectory"]})


DAMAGE = [
    (truncate, r"has \d+ bytes, expected \d+"),
    (flip, "its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"),
    (garble, "cannot be read"),
    (remove, "is missing"),
    (reshape, r"trajectory is \[2, 4, 2, 2, 2, 4\] F32, expected \[2, 4, 3, 2, 2, 4\] F32"),
    (narrow, r"trajectory is \[2, 4, 3, 2, 2, 4\] F16, expected \[2, 4, 3, 2, 2, 4\] F32"),
    (forget_text, "key text is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_corrupt_shard_is_named_and_skipped_only_on_request(whole, store, damage, message):
    damage(store)
    with refused(rf"shard-00001\.safetensors: {message}") as error:
        TrajectoryStore(store)
    assert "skip_corrupt" in str(error.value)
    with pytest.warns(UserWarning, match=r"shard-00001\.safetensors: .*: left out with its 2 samples") as warned:
        left = TrajectoryStore(store, skip_corrupt=True)
    assert len(warned) == 1 and len(left) == 5
    for actual, expected in zip(left.batch(range(5)), TrajectoryStore(whole).batch([0, 1, 4, 5, 6])):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_corrupt_shard_is_made_again(whole, data, store, damage, message):
    damage(store)
    generate_trajectories(MODEL, data, store, **SMALL)
    assert contents(store) == contents(whole)


def test_what_is_left_of_other_runs_goes_away(whole, data, tmp_path):
    """Of a run of more ranks that was killed while it wrote; and a note that no longer can be read."""
    (tmp_path / ".shard-00002.safetensors.rank_5.partial").write_bytes(b"half")
    (tmp_path / "shard-00001.json").write_text("{")
    generate_trajectories(MODEL, data, tmp_path, **SMALL)
    assert contents(tmp_path) == contents(whole)


def test_a_quick_check_trusts_the_bytes(store):
    flip(store)
    assert len(TrajectoryStore(store, check="size")) == 7
    truncate(store)
    with pytest.raises(ValueError, match="expected"):
        TrajectoryStore(store, check="size")


def test_processes_share_the_check(store, monkeypatch):
    """Three of them hash each file once in all; what one finds every one says."""
    flip(store)
    hashed, said = Counter(), []
    check = trajectories._fault

    def counted(folder, shard, settings, hash_content=True):
        hashed[shard["file"]] += hash_content
        return check(folder, shard, settings, hash_content)

    def as_rank(rank: int, all_gather_object) -> None:
        for name, value in (("is_initialized", True), ("get_rank", rank), ("get_world_size", 3)):
            monkeypatch.setattr(trajectories.dist, name, lambda value=value: value)
        monkeypatch.setattr(trajectories.dist, "all_gather_object", all_gather_object)

    def keep(of_all, faults):
        said.append(faults)
        of_all[:] = [[None] * len(faults)] * 3

    monkeypatch.setattr(trajectories, "_fault", counted)
    for rank in range(3):
        as_rank(rank, keep)
        TrajectoryStore(store, together=True)
    assert set(hashed.values()) == {1} and len(hashed) == 4
    as_rank(0, lambda of_all, faults: of_all.__setitem__(slice(None), said))
    with refused(r"shard-00001\.safetensors: its sha256 is"):
        TrajectoryStore(store, together=True)


def test_a_shard_that_goes_bad_later_is_named(store):
    opened = TrajectoryStore(store)
    garble(store)
    opened.batch([0, 1, 6])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: cannot be read"):
        opened.batch([0, 3])


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_store_without_a_good_shard_is_refused(store):
    for name in SHARDS:
        (store / name).unlink()
    with pytest.raises(ValueError, match="every shard is corrupt"):
        TrajectoryStore(store, skip_corrupt=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: corrupt, or not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "expected a JSON object, got a list"),
        (lambda folder: edit(folder / "manifest.json", format="2"), "format must be hiar-trajectories-1, got '2'"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"format": "hiar-trajectories-1"}'),
            "key sigmas is missing",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "unfinished, 4 of 4 shards exist"),
    ],
)
def test_a_bad_manifest_is_refused(store, spoil, message):
    spoil(store)
    with pytest.raises(ValueError, match=message):
        TrajectoryStore(store)


def test_bad_requests_to_a_store_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="no trajectories; expected"):
        TrajectoryStore(tmp_path)
    with pytest.raises(ValueError, match="check must be one of sha256, size, got 'md5'"):
        TrajectoryStore(whole, check="md5")
    for index in (7, -1):
        with pytest.raises(ValueError, match=rf"no sample {index}, legal: 0\.\.6"):
            TrajectoryStore(whole).batch([0, index])


def test_samples_belong_to_their_rows(whole):
    store = TrajectoryStore(whole)
    drawn = store.sample(0, "hiar", 3, range(40))
    firsts = drawn[0].flatten(1)[:, 0]
    assert set(firsts.tolist()) == set(store.batch(range(7))[0].flatten(1)[:, 0].tolist()), "every sample is drawn"
    for actual, expected in zip(store.sample(0, "hiar", 3, [11, 2]), drawn):
        assert torch.equal(actual, expected[[11, 2]])
    assert not torch.equal(store.sample(0, "hiar", 4, range(40))[0], drawn[0])
