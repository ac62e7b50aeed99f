"""Runs of the stages of distillation: resumed in the middle, the models that come out, recipes that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from tiny_model import make_model
from tiny_stages import FRAMES, ROLLOUT, VARIANTS, make, values, weights, write_files
from train_job import losses, train

from hiar_model.cli import main
from hiar_model.config import WanConfig
from hiar_model.models.checkpoint import save_transformer
from hiar_model.models.registry import load_video_model
from hiar_model.train.engine.networks import make_network

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def interrupt(done, numbers):
    if done == 2:
        raise KeyboardInterrupt


def assert_equal_states(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


MUON = {"kind": "muon_adamw", "lr": 1e-3, "warmup": 0.5, "cooldown": 0.5}
HALF = {"precision": "bfloat16", "optimizer": MUON, "ema": {"decay": 0.9, "start": 1}}


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("hiar", {"critic_updates": 2}),
        ("hiar", {"critic_updates": 2, "shared_rollout": True, "forward_kl": {"first_k": 2}}),
        ("hiar", {"critic_updates": 1, **HALF}),
        ("teacher", HALF),
        ("ode_init", HALF),
        ("teacher_forcing", HALF),
    ],
    ids=["hiar", "shared rollout", "hiar in bfloat16", "teacher", "ode_init", "teacher_forcing"],
)
def test_resume(files, tmp_path, stage, more):
    """Four updates, or two, a new process' worth of objects, and two: the same losses, to the last digit. Every stage,
    both precisions, both kinds of optimisers, rates and averages that change on the way.
    """
    recipe = values(files, stage, scale={"threads": 1, "checkpoint_every": 2}, **more)
    uninterrupted = train(tmp_path / "whole", {**recipe, "scale": {"threads": 1}})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", recipe, interrupt)
    parts = train(tmp_path / "parts", recipe)
    rows = losses(tmp_path / "whole")
    assert [row["update"] for row in rows] == ["1", "2", "3", "4"] and losses(tmp_path / "parts") == rows
    for name in uninterrupted.stage.trained:
        assert len({row[f"{name}_loss"] for row in rows}) == 4
    for name, network in uninterrupted.stage.trained.items():
        for key, p in network.named_parameters():
            assert torch.equal(dict(parts.stage.trained[name].named_parameters())[key], p), key
        assert_equal_states(parts.optimizers[name].state_dict(), uninterrupted.optimizers[name].state_dict())
    assert_equal_states(parts.ema.weights, uninterrupted.ema.weights)


def same_weights(network, other, dtype=torch.float32) -> bool:
    """``network`` was read from what ``other`` was written to in ``dtype``."""
    read, written = network.state_dict(), other.state_dict()
    return read.keys() == written.keys() and all(torch.equal(read[k], v.to(dtype).float()) for k, v in written.items())


@pytest.mark.parametrize(
    ("variant", "order", "kv_source", "window"),
    [
        ("matched", "stream", "own", 4),
        ("clean", "block_first", "own", 4),
        ("shared", "stream", "next_step", 4),
        ("windows", "stream", "own", [3, 4, 6]),
    ],
)
def test_exported_students(files, tmp_path, capsys, variant, order, kv_source, window):
    """A model folder in the form that was trained; it makes the sheet's videos, and `hiar evaluate` takes it."""
    more = {"data": {"world": "varied"}, "forward_kl": {"weight": 0}, "sample_prompts": 2, **VARIANTS[variant]}
    stage = make(files, "hiar", **more)
    student = stage.trained["student"]
    sheet = stage.sample(1)
    assert sheet.shape == (2, 2 * FRAMES, 32, 32, 3) and sheet.dtype == "uint8"
    folder = stage.export(student, tmp_path / "model")
    written = json.loads((folder / "config.json").read_text())
    changes = {"order": order, "kv_source": kv_source, "window_frames": window}
    assert {**ROLLOUT, **changes}.items() <= written["rollout"].items()
    assert written["train_frames"] == FRAMES and written["world"]["texture"] > 0
    for read in (load_video_model(folder, "cpu", "float32").transformer, make_network("least", seed=9, weights=folder)):
        assert same_weights(read, student, torch.float16)
    options = [
        "--model",
        folder,
        "--prompts",
        "1",
        "--num-frames",
        "[6]",
        "--parts",
        "2",
        "--json",
        tmp_path / "a.json",
    ]
    assert main([str(word) for word in ["evaluate", "toy", *options]]) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (row["rollout"]["order"], row["num_frames"]) == (order, 6)


def test_a_student_of_a_world_without_prompted_speed(files, tmp_path):
    """Neither its training nor the exported model sees the speed."""
    stage = make(files, "hiar", data={"world": "free_speed"}, forward_kl={"weight": 0})
    model = load_video_model(stage.export(stage.trained["student"], tmp_path / "model"), "cpu", "float32")
    prompts = ["a red circle moving up slowly", "a red circle moving up fast"]
    for slow, fast in (map(model.encode_text, prompts), stage.sources.text_encoder.encode(prompts)):
        assert torch.equal(slow, fast)


def test_exported_teacher(files, tmp_path):
    stage = make(files, "teacher", data={}, sample_prompts=2, sample_steps=2)
    assert stage.sample(1).shape == (2, FRAMES, 32, 32, 3)
    path = stage.export(stage.trained["teacher"], tmp_path / "model")
    assert same_weights(make_network("least", seed=9, weights=path), stage.trained["teacher"])


def test_a_critic_of_another_size(files, tmp_path):
    """Both networks are trained, the small one beside a large critic."""
    path = tmp_path / "critic.safetensors"
    save_transformer(make_model(4, WanConfig.from_name("tiny")), path)
    recipe = values(files, "hiar", critic_model="tiny", critic_init=str(path), critic_updates=1)
    trainer = train(tmp_path / "run", recipe)
    networks = {**trainer.stage.trained, **trainer.stage.frozen}
    assert {name: len(n.blocks) for name, n in networks.items()} == {"critic": 2, "student": 1, "teacher": 1}
    assert not same_weights(make_network("tiny", seed=9, weights=path), networks["critic"])
    with pytest.raises(ValueError, match="teacher.safetensors has the size .*, the recipe's tiny is"):
        make(files, "hiar", critic_model="tiny", critic_init=str(files / "teacher.safetensors"))


def test_without_a_codec(files, tmp_path):
    """Of encoded prompts the weights come out, and no videos are shown."""
    for name, kind in (("teacher", "teacher"), ("student", "ode_init"), ("student", "hiar")):
        stage = make(files, kind)
        assert stage.sample(1) is None
        path = stage.export(stage.trained[name], tmp_path / kind)
        assert path == tmp_path / kind / f"{name}.safetensors"
        assert same_weights(make_network("least", seed=9, weights=path), stage.trained[name])


@pytest.mark.parametrize("stage", ["ode_init", "hiar"])
def test_a_corrupt_shard_is_left_out_only_on_request(files, tmp_path, stage):
    pairs = tmp_path / "pairs"
    shutil.copytree(files / "pairs", pairs)
    (pairs / "shard-00001.safetensors").write_bytes(b"torn")

    def open_stage(**more):
        more["trajectories"] = str(pairs)
        return make(files, stage, **more) if stage == "ode_init" else make(files, stage, forward_kl=more)

    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: .* leave it out with skip_corrupt"):
        open_stage()
    with pytest.warns(UserWarning, match=r"shard-00001\.safetensors: .*: left out with its 2 samples"):
        left = open_stage(skip_corrupt=True)
    assert len(left.store) == 2


@pytest.mark.parametrize("stage", ["ode_init", "hiar"])
def test_trajectories_of_other_data_are_said(files, tmp_path, stage, recwarn):
    """Other prompts may be meant, and another number of frames is; prompts of another width cannot be read."""
    make(files, stage)
    if stage == "hiar":
        make(files, stage, num_latent_frames=4)
    assert not [w for w in recwarn if "other data" in str(w.message)]

    def prompts(name: str, width: int) -> dict:
        (tmp_path / name).mkdir()
        text = torch.ones(2, 3, width)
        save_file({"text": text, "unconditional": text[:1].clone()}, tmp_path / name / "a.safetensors")
        return {"folder": str(tmp_path / name), "latent_size": [4, 4]}

    with pytest.warns(UserWarning, match="pairs has been made with other data than this recipe's"):
        make(files, stage, data=prompts("other", 32))
    with refused(r"pairs: its prompts are \[3, 32\], the recipe's \[3, 8\]"):
        make(files, stage, data=prompts("narrow", 8))


def test_trajectories_of_another_teacher_are_said(files, tmp_path, recwarn):
    make(files, "hiar")
    assert not [w for w in recwarn if "teacher" in str(w.message)]
    ours = rf"[0-9a-f]{{12}}, that of {weights(files, 'critic')} [0-9a-f]{{12}}$"
    with pytest.warns(UserWarning, match=f"pairs has been made by another teacher than this recipe's: .* is {ours}"):
        make(files, "hiar", teacher=weights(files, "critic"))


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        ("ode_pairs", {}, "recipe: teacher must be given"),
        ("ode_init", {"trajectories": ""}, "recipe: trajectories must be given"),
        ("ode_init", {"trajectories": "nowhere"}, "nowhere: .*expected manifest.json"),
        ("ode_init", {"rollout": {"shift": 1.0}}, "t = 1000, 857.143, 400, 0, .* steps at 1000, 750, 250, 0"),
        ("ode_init", {"rollout": {"steps": [1000, 750]}}, "the student's steps at 1000, 857.143, 0"),
        ("ode_init", {"num_latent_frames": 8}, r"its latents are \[6, 2, 4, 4\], .* must end in \[8, 2, 4, 4\]"),
        ("hiar", {"teacher": ""}, "recipe: teacher must be given"),
        ("hiar", {"forward_kl": {"trajectories": None}}, r"recipe: forward_kl\.trajectories must be given"),
        ("hiar", {"forward_kl": {"first_k": 4}}, r"forward_kl\.first_k must be below the 4 points of .*pairs, got 4"),
        ("hiar", {"data": {}, "num_latent_frames": 6}, r"its latents are \[6, 2, 4, 4\], .* must end in \[2, 8, 8\]"),
        ("hiar", {"critic_updates": 64}, "recipe: critic_updates must be at most 63, got 64"),
        ("hiar", {"batch_size": 65537}, "recipe: batch_size must be a whole number from 1 to 65536, got 65537"),
    ],
)  # fmt: skip
def test_refused(files, stage, more, words):
    with refused(words):
        make(files, stage, **more)
