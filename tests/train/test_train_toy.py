"""Teacher forcing of the toy model: levels, loss, weights, a short run through the stage and the trainer."""

from __future__ import annotations

import pytest
import torch
from train_job import losses, train

from hiar_model.config import FlowSchedule, RolloutConfig, wan
from hiar_model.models.registry import load_video_model
from hiar_model.toy.prompt import split_prompts, token_table
from hiar_model.train.config.reading import make_recipe
from hiar_model.train.config.recipe import LevelsRecipe
from hiar_model.train.losses.noise import add_noise
from hiar_model.train.stages.base import UpdateStep
from hiar_model.train.stages.teacher_forcing import (
    TeacherForcing,
    loss_weights,
    sample_levels,
    teacher_forcing_errors,
)

pytestmark = pytest.mark.cpu

SMALL = {
    "stage": "teacher_forcing", "updates": 6, "batch_size": 4, "num_latent_frames": 6, "log_every": 2,
    "rollout": {"window_frames": 6}, "first_block_weight": 2.5, "scale": {"threads": 1},
}  # fmt: skip
CPU = torch.device("cpu")


def test_levels_are_those_of_the_rollout():
    schedule, generator = FlowSchedule(shift=2.0), torch.Generator().manual_seed(0)
    target, context = sample_levels(LevelsRecipe(1.0, 0.0, 0.0), 500, schedule, generator)
    table = torch.tensor(schedule.sigmas)
    step = (target[:, None] == table).float().argmax(1)
    assert set(step.tolist()) == {0, 1, 2, 3}
    assert torch.equal(context, table[step + 1])
    assert torch.equal(sample_levels(LevelsRecipe(0.0, 1.0, 0.0), 9, schedule, generator)[1], torch.zeros(9))
    target, context = sample_levels(LevelsRecipe(0.0, 0.0, 1.0), 500, schedule, generator)
    assert bool((context <= target).all()) and bool((context >= 0).all()) and bool((target > 0).all())
    assert float(target.max()) <= 1
    target, context = sample_levels(LevelsRecipe(), 4000, schedule, generator)
    assert abs(float((context == 0).float().mean()) - (0.2 + 0.55 / 4 + 0.25 / 2)) < 0.03


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.2), (1.2, -0.2, 0.0)])
def test_shares_must_sum_to_one(shares):
    with pytest.raises(ValueError, match="sum to 1"):
        LevelsRecipe(*shares)


def test_errors_of_the_true_velocity_are_zero():
    """A "model" that knows the answer: checks noise, levels and timesteps of the loss in one."""
    x0, noise, other = torch.randn(3, 2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma, context_sigma = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0])

    class Oracle:
        wrong_first_block = 0.0

        def kv(self, latents, timesteps, text, mode, **rule):
            self.context, self.context_times, self.rule = latents, timesteps, rule
            return ["kv"]

        def __call__(self, latents, timesteps, text, mode, *, context, **rule):
            assert context == ["kv"] and mode == "block_causal" and rule == self.rule
            assert torch.equal(timesteps, 1000 * sigma[:, None].expand(-1, 6))
            eps = (latents - (1 - sigma.view(-1, 1, 1, 1, 1)) * x0) / sigma.view(-1, 1, 1, 1, 1)
            velocity = eps - x0
            velocity[:, :3] += self.wrong_first_block
            return velocity

    def errors(model, **options):
        options |= {"frames_per_block": 3}
        return teacher_forcing_errors(model, x0, None, sigma, context_sigma, noise, other, **options)

    model = Oracle()
    assert float(errors(model).max()) < 1e-10
    assert torch.equal(model.context[1], x0[1]), "clean context is not noised"
    torch.testing.assert_close(model.context[0], (x0[0] + other[0]) / 2)
    assert torch.equal(model.context_times, 1000 * context_sigma[:, None].expand(-1, 6))
    errors(model, context_timestep=60.0)
    assert model.context_times[:, 0].tolist() == [500, 60], "of clean context, as a rollout with context_noise has it"
    model.wrong_first_block = 2.0
    torch.testing.assert_close(errors(model), torch.tensor([[4.0] * 3 + [0.0] * 3] * 2))


def test_weights_of_the_first_block():
    weight = loss_weights([True, False], 6, 3, first_block=2.5)
    assert weight.tolist() == [[2.5] * 3 + [1.0] * 3, [0.0] * 3 + [1.0] * 3]


def test_add_noise():
    x0, noise = torch.randn(2, 1, 1, 2, 2), torch.randn(2, 1, 1, 2, 2)
    mixed = add_noise(x0, torch.tensor([0.0, 1.0]), noise)
    assert torch.equal(mixed[0], x0[0]) and torch.equal(mixed[1], noise[1])


@pytest.fixture(scope="module")
def stage():
    return TeacherForcing(make_recipe({**SMALL, "precision": "float32", "data": {"from_start": 0.25}}), CPU)


def test_the_loss_is_a_weighted_mean_of_rows(stage, monkeypatch):
    """Rows by hand: their errors, weights by where their clips begin, over what a clip weighs on average."""
    rows = list(range(4))
    begins = stage.sources.clips().clips(0, "teacher_forcing", 3, rows).from_start.tolist()
    assert len(set(begins)) == 2
    errors = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    chosen = []

    def known(model, x0, *tensors, context_timestep, **rule):
        assert context_timestep == 0 and rule == {"frames_per_block": 3, "window_frames": 6, "sink_frames": 0}
        return errors[chosen]

    monkeypatch.setattr("hiar_model.train.stages.teacher_forcing.teacher_forcing_errors", known)
    results = []
    for chosen in ([0, 1, 2, 3], [0, 1, 2], [3]):
        results.append(float(stage.loss(UpdateStep("student"), 3, chosen)[0]))
    average = 0.25 * (3 * 2.5 + 3) + 0.75 * 3
    by_hand = [(float(e[:3].sum()) * 2.5 * b + float(e[3:].sum())) / average for e, b in zip(errors, begins)]
    assert results == pytest.approx([sum(by_hand) / 4, sum(by_hand[:3]) / 3, by_hand[3]], rel=1e-5)


def test_samples_are_drawn_by_key(stage):
    """Alone or beside others, now or again: a sample is the same clip at the same levels with the same noise."""
    step = UpdateStep("student")
    whole = stage.loss(step, 2, [0, 1, 2, 3])[0]
    parts = stage.loss(step, 2, [0, 2])[0] + stage.loss(step, 2, [1, 3])[0]
    torch.testing.assert_close(whole, parts / 2)
    assert not torch.isclose(whole, stage.loss(step, 1, [0, 1, 2, 3])[0], rtol=1e-3)


def test_training_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(wan._PRESETS, "short", {**wan._PRESETS["toy"], "num_layers": 2})  # learns this as fast
    train(tmp_path, {**SMALL, "model": "short", "updates": 24, "log_every": 6})
    rows = [float(row["student_loss"]) for row in losses(tmp_path)]
    assert len(rows) == 4
    assert rows[-1] < 0.85 * rows[0], rows  # 0.77; of the same clips, without learning, 0.94


def test_samples_and_the_model(stage, tmp_path):
    frames = stage.sample(1)
    assert frames.shape == (4, 12, 32, 32, 3) and frames.dtype.name == "uint8"
    stage.export(stage.trained["student"], tmp_path / "model")
    model = load_video_model(tmp_path / "model", "cpu")
    assert (model.train_frames, model.rollout) == (6, RolloutConfig(shift=1.0, order="stream", window_frames=6))


def test_held_out_prompts_are_never_trained_on(stage):
    trained = {tuple(row) for row in stage.sources.data.pool.tolist()}
    held_out = {tuple(row) for row in token_table(split_prompts(stage.recipe.data.held_out_prompts)[1]).tolist()}
    assert len(held_out) == 64 and not trained & held_out
