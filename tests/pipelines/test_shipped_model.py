"""The model inside the package keeps what was prompted, and its card speaks of these weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import hiar_model
from hiar_model.evaluation.evaluate import evaluate_toy
from hiar_model.toy.prompt import split_prompts

pytestmark = pytest.mark.cpu

FOLDER = Path(hiar_model.__file__).parent / "toy" / "weights"


@pytest.fixture(scope="module")
def model():
    return hiar_model.load_video_model("toy", "cpu")


@pytest.mark.parametrize("order", ["step_first", "block_first"])
def test_prompts_are_kept_beyond_the_training_length(model, order):
    """A sample of `hiar evaluate toy`, at three times the training length."""
    frames, rollout = 3 * model.train_frames, model.rollout.with_order(order)
    (row,) = evaluate_toy(model, split_prompts()[1][:12], num_frames=[frames], rollouts=[rollout], seed=7)
    assert row.whole.colour >= 0.97
    assert row.whole.valid >= 0.93
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


def test_card_and_size(model):
    assert (FOLDER / "model.safetensors").stat().st_size < 16e6
    card = (FOLDER / "README.md").read_text()
    assert model.weights_sha256[:16] in card
    parameters = sum(p.numel() for p in model.transformer.parameters())
    assert f"{parameters:,} parameters" in card
