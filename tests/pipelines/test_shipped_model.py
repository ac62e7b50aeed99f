"""The models inside the package keep what was prompted, and their cards speak of these weights."""

from __future__ import annotations

import pytest
import torch

import hiar_model
from hiar_model.cli import main
from hiar_model.config import SHIPPED, WanConfig
from hiar_model.evaluation.evaluate import evaluate_toy
from hiar_model.models.registry import model_folder
from hiar_model.toy.prompt import split_prompts
from hiar_model.toy.world import WORLDS

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def models():
    return {name: hiar_model.load_video_model(name, "cpu") for name in SHIPPED}


# Not scenes in block_first: there it drifts, which is what it is for.
@pytest.mark.parametrize(("name", "order"), [("toy", "step_first"), ("toy", "block_first"), ("scenes", "step_first")])
def test_prompts_are_kept_beyond_the_training_length(models, name, order):
    """A sample of `hiar evaluate toy`, at three times the training length."""
    model = models[name]
    frames, rollout = 3 * model.train_frames, model.rollout.with_order(order)
    (row,) = evaluate_toy(model, split_prompts()[1][:8], num_frames=[frames], rollouts=[rollout], seed=7)
    assert row.whole.colour >= 0.97
    assert row.whole.valid >= (0.93 if name == "toy" else 0.85)
    assert row.whole.direction >= 0.93
    assert 0.85 <= row.whole.speed_ratio <= 1.15


def test_orders_of_the_matched_graph_make_one_video():
    videos = [
        hiar_model.generate("a large cyan plus moving up slowly", num_frames=12, order=order, device="cpu").frames
        for order in ("step_first", "stream", "wavefront")
    ]
    for other in videos[1:]:
        assert abs(other.astype(int) - videos[0]).max() <= 1  # rounding to eight bits


def test_seeds_make_different_videos_of_one_prompt():
    a, b = (hiar_model.generate("a red circle moving right", num_frames=6, seed=s, device="cpu").frames for s in (0, 1))
    assert abs(a.astype(int) - b).max() > 8


@pytest.mark.parametrize("name", SHIPPED)
def test_card_and_size(models, name):
    model, folder = models[name], model_folder(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16e6
    card = (folder / "README.md").read_text()
    assert model.weights_sha256[:16] in card
    parameters = sum(p.numel() for p in model.transformer.parameters())
    assert f"{parameters:,} parameters" in card


def test_scenes_is_of_its_world_and_loads_wherever_toy_does(models, tmp_path):
    """By name: its network alone, a conversion, the doctor, a video; a prompt means in it what it means in toy's."""
    assert models["scenes"].world == WORLDS["scenes"] and models["toy"].world == WORLDS["plain"]
    network = models["scenes"].transformer
    state = hiar_model.load_transformer("scenes").state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert network.config == WanConfig.from_name("scenes")
    assert main(["convert", "scenes", str(tmp_path / "w.safetensors"), "--to", "native"]) == 0
    prompt = "a large cyan plus moving up slowly"
    assert torch.equal(*(model.encode_text(prompt) for model in models.values()))
    assert hiar_model.generate(prompt, model="scenes", num_frames=6, device="cpu").frames.shape == (6, 32, 32, 3)


def test_the_doctor_knows_every_shipped_model(capsys):
    assert main(["doctor", "--model", "scenes"]) == 0
    assert "scenes" in capsys.readouterr().out
