"""Teacher forcing of the toy model: levels, loss, recipe, resume."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from hiar_model.schedule import FlowSchedule
from hiar_model.train.recipe import ToyRecipe, load_recipe
from hiar_model.train.teacher_forcing import LevelMixture, add_noise, loss_weights, teacher_forcing_loss
from hiar_model.train.trainer import ToyTrainer, rate_factor

pytestmark = pytest.mark.cpu

SMALL = ToyRecipe(iterations=6, batch_size=2, num_frames=6, window_frames=6, log_every=2, checkpoint_every=3, threads=1)


def losses(folder) -> list[list[str]]:
    with (folder / "loss.csv").open() as f:
        return list(csv.reader(f))


def test_levels_are_those_of_the_rollout():
    schedule, generator = FlowSchedule(shift=2.0), torch.Generator().manual_seed(0)
    target, context = LevelMixture(1.0, 0.0, 0.0).sample(500, schedule, generator)
    table = torch.tensor(schedule.sigmas)
    step = (target[:, None] == table).float().argmax(1)
    assert set(step.tolist()) == {0, 1, 2, 3}
    assert torch.equal(context, table[step + 1])
    assert torch.equal(LevelMixture(0.0, 1.0, 0.0).sample(9, schedule, generator)[1], torch.zeros(9))
    target, context = LevelMixture(0.0, 0.0, 1.0).sample(500, schedule, generator)
    assert bool((context <= target).all()) and bool((context >= 0).all()) and bool((target > 0).all())
    assert float(target.max()) <= 1
    target, context = LevelMixture().sample(4000, schedule, generator)
    assert abs(float((context == 0).float().mean()) - (0.2 + 0.55 / 4 + 0.25 / 2)) < 0.03


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.2), (1.2, -0.2, 0.0)])
def test_shares_must_sum_to_one(shares):
    with pytest.raises(ValueError, match="sum to 1"):
        LevelMixture(*shares)


def test_loss_of_the_true_velocity_is_zero():
    """A "model" that knows the answer: checks noise, levels, timesteps and weights of the loss in one."""
    x0 = torch.randn(2, 6, 3, 4, 4)
    sigma, context_sigma = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0])

    class Oracle:
        wrong_first_block = 0.0

        def kv(self, latents, timesteps, text, mode, **rule):
            self.context, self.context_times, self.rule = latents, timesteps, rule
            return ["kv"]

        def __call__(self, latents, timesteps, text, mode, *, context, **rule):
            assert context == ["kv"] and mode == "block_causal" and rule == self.rule
            assert torch.equal(timesteps, 1000 * sigma[:, None].expand(-1, 6))
            noise = (latents - (1 - sigma.view(-1, 1, 1, 1, 1)) * x0) / sigma.view(-1, 1, 1, 1, 1)
            velocity = noise - x0
            velocity[:, :3] += self.wrong_first_block
            return velocity

    def loss(model, weight=None):
        return float(
            teacher_forcing_loss(
                model,
                x0,
                None,
                sigma,
                context_sigma,
                torch.Generator().manual_seed(0),
                frames_per_block=3,
                weight=weight,
            )
        )

    model = Oracle()
    assert loss(model) < 1e-10
    assert torch.equal(model.context[1], x0[1]), "clean context is not noised"
    assert torch.equal(model.context_times, 1000 * context_sigma[:, None].expand(-1, 6))
    model.wrong_first_block = 2.0
    assert loss(model) == pytest.approx(2.0)
    assert loss(model, loss_weights(2, 6, [False, False], 3)) < 1e-10
    assert loss(model, loss_weights(2, 6, [True, False], 3)) == pytest.approx(4.0 * 3 / 9)


def test_weights_of_the_first_block():
    weight = loss_weights(2, 6, [True, False], 3, first_block=2.5)
    assert weight.tolist() == [[2.5] * 3 + [1.0] * 3, [0.0] * 3 + [1.0] * 3]


def test_add_noise():
    x0, noise = torch.randn(2, 1, 1, 2, 2), torch.randn(2, 1, 1, 2, 2)
    mixed = add_noise(x0, torch.tensor([0.0, 1.0]), noise)
    assert torch.equal(mixed[0], x0[0]) and torch.equal(mixed[1], noise[1])


def test_rate_rises_stays_and_falls():
    assert rate_factor(0.0, 0.1, 0.5) < 0.01
    assert rate_factor(0.05, 0.1, 0.5) == pytest.approx(0.5, abs=0.01)
    assert rate_factor(0.3, 0.1, 0.5) == 1
    assert rate_factor(0.75, 0.1, 0.5) == 0.5
    assert rate_factor(1.0, 0.1, 0.5) == 0


def test_training_lowers_the_loss(tmp_path):
    trainer = ToyTrainer(replace(SMALL, iterations=40, batch_size=4, log_every=10), tmp_path)
    trainer.run()
    rows = [float(row[1]) for row in losses(tmp_path)[1:]]
    assert len(rows) == 4
    assert rows[-1] < 0.85 * rows[0], rows  # 1.83 -> 1.43; predicting nothing costs 2


def test_resume_equals_one_run_to_the_bit(tmp_path):
    whole = ToyTrainer(SMALL, tmp_path / "whole")
    whole.run()
    first = ToyTrainer(SMALL, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        first.run(lambda iteration, loss: (_ for _ in ()).throw(KeyboardInterrupt) if iteration == 5 else None)
    second = ToyTrainer(SMALL, tmp_path / "parts")
    assert second.iteration == 3
    second.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name, value in whole.average.items():
        assert torch.equal(value, second.average[name]), name


def test_a_killed_run_goes_on(tmp_path):
    recipe = replace(SMALL, iterations=400, log_every=1, checkpoint_every=2)
    code = (
        "import sys; from hiar_model.train.trainer import ToyTrainer\n"
        "from hiar_model.train.recipe import LevelMixture, OptimizerRecipe, ToyRecipe\n"
        f"ToyTrainer({recipe!r}, sys.argv[1]).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trainer = ToyTrainer(recipe, tmp_path)
    assert 2 <= trainer.iteration < 400 and trainer.iteration % 2 == 0
    assert [int(row[0]) for row in losses(tmp_path)[1:]] == list(range(1, trainer.iteration + 1))


def test_another_recipe_may_not_use_the_folder(tmp_path):
    ToyTrainer(SMALL, tmp_path).run()
    with pytest.raises(ValueError, match="a run with another seed, shift"):
        ToyTrainer(replace(SMALL, seed=1, shift=3.0), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = ToyTrainer(SMALL, tmp_path)
    with torch.no_grad():
        trainer.model.patch_embedding.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at iteration 0"):
        trainer.run()


def test_held_out_prompts_are_never_trained_on(tmp_path):
    from hiar_model.toy.prompt import split_prompts, token_table

    trainer = ToyTrainer(SMALL, tmp_path)
    trained = {tuple(row) for row in trainer.pool.tolist()}
    held_out = {tuple(row) for row in token_table(split_prompts(SMALL.held_out_prompts)[1]).tolist()}
    assert len(held_out) == 64 and not trained & held_out


def test_recipe_by_name_with_overrides(tmp_path):
    recipe = load_recipe("toy", {"iterations": 7, "optimizer.matrix_lr": 1, "levels.clean": 0.2, "window_frames": None})
    assert (recipe.iterations, recipe.optimizer.matrix_lr, recipe.window_frames) == (7, 1.0, None)
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\nsteps: [1000, 500]\n")
    assert load_recipe(str(path)).schedule == FlowSchedule((1000, 500), 2.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"iteration": 1}, "unknown key iteration; did you mean iterations?"),
        ({"optimizer.matrix": 1.0}, "unknown key optimizer.matrix; did you mean optimizer.matrix_lr?"),
        ({"levels": 3}, "levels. must be a mapping"),
        ({"seed": "x"}, "seed must be int, got 'x'"),
        ({"num_frames": 7}, "multiple of frames_per_block 3 and at least two blocks, got 7"),
        ({"num_frames": 3}, "at least two blocks, got 3"),
        ({"precision": "float8"}, "bfloat16 or float32"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"from_start": 2.0}, "from_start must be in 0..1"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        load_recipe("toy", overrides)
    assert "\n" not in str(error.value)


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match="neither a file nor one of toy"):
        load_recipe("toys")
