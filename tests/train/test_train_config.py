"""Recipes: what ships, what is refused and how."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from refusals import refused

from hiar_model import HiARTransformer, WanConfig
from hiar_model.config import RolloutConfig, sigma_table
from hiar_model.train.config.reading import differences, field_types, load_recipe, make_recipe, shipped_recipes
from hiar_model.train.config.recipe import (
    RECIPES,
    CausalRecipe,
    HiARRecipe,
    NetworkRecipe,
    OdeInitRecipe,
    OdePairsRecipe,
    Recipe,
    TeacherForcingRecipe,
)
from hiar_model.train.stages import sources

pytestmark = pytest.mark.cpu


def test_what_ships():
    wan = {f"wan-1.3b/{name}" for name in ("prompts", "ode_pairs", "ode_init", "hiar")}
    assert set(shipped_recipes()) >= {f"toy/{name}" for name in RECIPES if name != "prompts"} | wan


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe) and type(recipe) is RECIPES[recipe.stage]
    assert recipe.stage in name.rpartition("/")[2]
    assert make_recipe(recipe.to_dict()) == recipe, "what a checkpoint keeps is the whole recipe"
    assert getattr(recipe, "log_every", 1) == 1, "an update takes seconds or minutes: losses come with each"
    if isinstance(recipe, NetworkRecipe):
        assert recipe.model.startswith("wan2.1-t2v-1.3b" if name.startswith("wan") else "toy")


@pytest.mark.parametrize("name", ["wan-1.3b/ode_pairs", "wan-1.3b/ode_init", "wan-1.3b/hiar"])
def test_networks_of_wan_recipes_have_their_published_size(name):
    recipe = load_recipe(name, {"data.folder": "prompts"})
    with torch.device("meta"):
        student = HiARTransformer(WanConfig.from_name(recipe.model))
        teacher = HiARTransformer(WanConfig.from_name(getattr(recipe, "teacher_model", recipe.model)))
    assert sum(p.numel() for p in student.parameters()) == 1_418_996_800
    assert sum(p.numel() for p in teacher.parameters()) in (1_418_996_800, 14_288_491_584)
    assert recipe.data.latent_size is not None
    assert student.config.grid(*recipe.data.latent_size) == (30, 52)  # 1560 tokens a frame of 480x832


def test_a_small_critic_under_a_large_teacher():
    other = {"teacher_model": "wan2.1-t2v-14b", "critic_model": "wan2.1-t2v-1.3b", "critic_init": "checkpoints/1.3B"}
    recipe = load_recipe("wan-1.3b/hiar", other)
    assert isinstance(recipe, HiARRecipe)
    assert (recipe.teacher_model, recipe.critic_model) == ("wan2.1-t2v-14b", "wan2.1-t2v-1.3b")


def test_the_published_hyperparameters():
    hiar, pairs, init = (load_recipe(f"wan-1.3b/{name}") for name in ("hiar", "ode_pairs", "ode_init"))
    assert isinstance(hiar, HiARRecipe) and isinstance(pairs, OdePairsRecipe) and isinstance(init, OdeInitRecipe)
    assert (hiar.batch_size, hiar.num_latent_frames, hiar.critic_updates) == (64, 21, 5)
    assert hiar.rollout == RolloutConfig((1000, 750, 500, 250), 5.0, "stream", 3, 21) and hiar.guidance == 3
    for optimizer, rate in ((hiar.optimizer, 2e-6), (hiar.critic_optimizer, 3e-7)):
        assert (optimizer.kind, optimizer.lr, optimizer.betas) == ("adamw", rate, (0.0, 0.999))
        assert (optimizer.warmup, optimizer.cooldown) == (0, 0)
    kl = hiar.forward_kl
    assert (kl.weight, kl.first_k, kl.attention) == (0.1, 1, "bidirectional")
    assert (hiar.ema.decay, hiar.ema.start, hiar.ema.ramp) == (0.99, 200, False)
    assert (pairs.steps, pairs.shift, pairs.guidance, pairs.points) == (48, 8.0, 6.0, (0, 12, 24, 36, -1))
    # the student's initial stage has its levels where the trajectories have their points
    assert init.rollout.schedule.sigmas[:-1] == pytest.approx([sigma_table(48, 8.0)[i] for i in (0, 12, 24, 36)])


def test_overrides_and_files(tmp_path):
    recipe = load_recipe(
        "toy/teacher_forcing",
        {"updates": 7, "optimizer.lr": 1, "levels.clean": 0.2, "rollout.window_frames": None, "scale.max_minutes": 2},
    )
    assert isinstance(recipe, TeacherForcingRecipe)
    assert (recipe.updates, recipe.optimizer.lr, recipe.scale.max_minutes) == (7, 1.0, 2.0)
    assert recipe.rollout.window_frames is None
    path = tmp_path / "mine.yaml"
    path.write_text("stage: hiar\nrollout: {steps: [1000, 500], window_frames: [6, null]}\noptimizer: {lr: 2e-6}\n")
    mine = load_recipe(str(path), {"critic_optimizer.betas": [0, 0.9], "data.folder": "x", "data.latent_size": [4, 4]})
    assert isinstance(mine, HiARRecipe)
    assert mine.rollout == RolloutConfig((1000, 500), 1.0, "stream", window_frames=(6, None)), "the rest are defaults"
    assert mine.optimizer.lr == 2e-6, "YAML reads 2e-6 as a string"
    assert mine.optimizer_of("critic").betas == (0.0, 0.9) and mine.optimizer_of("student").lr == 2e-6


def test_the_shipped_model_s_recipe():
    recipe = load_recipe("toy/teacher_forcing")
    assert isinstance(recipe, TeacherForcingRecipe)
    assert (recipe.updates, recipe.batch_size, recipe.num_latent_frames) == (3200, 16, 12)
    assert recipe.rollout == RolloutConfig(shift=1.0, order="stream", window_frames=12)
    assert (recipe.first_block_weight, recipe.data.from_start) == (3.0, 0.5)
    assert (recipe.ema.decay, recipe.optimizer.kind, recipe.optimizer.lr) == (0.998, "muon_adamw", 2e-3)


REFUSED = {
    "unknown": ("toy/hiar", {"update": 1}, "unknown key update; did you mean updates?"),
    "unknown in a section": ("toy/hiar", {"optimizer.lrr": 1}, "unknown key optimizer.lrr; did you mean optimizer.lr?"),
    "of a section": ("toy/hiar", {"betas": [0, 1]}, "unknown key betas; did you mean optimizer.betas?"),
    "of before 0.2": ("toy/hiar", {"window_frames": 6}, "did you mean rollout.window_frames?"),
    "a section's letter": ("toy/hiar", {"critic_optimiser.lr": 1}, "unknown key .*; did you mean critic_opt"),
    "another stage's": ("toy/teacher", {"critic_updates": 1}, "unknown key critic_updates"),
    "far": ("toy/teacher", {"zzz": 1}, "unknown key zzz; legal: precision, "),
    "stage": ("toy/hiar", {"stage": "hair"}, "stage must be one of .*hiar, got 'hair'; did you mean hiar?"),
    "section": ("toy/hiar", {"forward_kl": 3}, "forward_kl must be a section with keys, got 3"),
    "no section": ("toy/hiar", {"rollout": None}, "rollout must be a section with keys, got None"),
    "inside a value": ("toy/hiar", {"updates.more": 3}, "unknown key updates.more; did you mean updates?"),
    "whole number": ("toy/hiar", {"seed": "x"}, "seed must be a whole number, got 'x'"),
    "no whole number": ("toy/hiar", {"updates": 1.5}, "updates must be a whole number, got 1.5"),
    "a truth": ("toy/hiar", {"updates": True}, "updates must be a whole number, got True"),
    "null": ("toy/hiar", {"updates": None}, "updates must be a whole number, got None"),
    "number": ("toy/hiar", {"optimizer.lr": "few"}, "optimizer.lr must be a number, got 'few'"),
    "time": ("toy/hiar", {"optimizer.lr": "1:30"}, "optimizer.lr must be a number, got '1:30'"),
    "time of updates": ("toy/hiar", {"updates": "1:30"}, "updates must be a whole number, got '1:30'"),
    "word": ("toy/hiar", {"rollout.order": "stepfirst"}, "rollout.order .* one of .*, got 'stepfirst'; .* step_first?"),
    "list": ("toy/hiar", {"rollout.steps": 1000}, r"rollout.steps must be \[a number, ...\], got 1000"),
    "two": ("toy/hiar", {"optimizer.betas": [0.9]}, r"optimizer.betas must be \[a number, a number\], got \[0.9\]"),
    "window": ("toy/hiar", {"rollout.window_frames": "all"}, r"window_frames must be .*whole number or .*, got .all."),
    "windows": ("toy/hiar", {"rollout.window_frames": [6, 12]}, r"rollout.window_frames must .* step \(4\).*6, 12"),
    "narrow": ("toy/hiar", {"rollout.window_frames": 5, "rollout.sink_frames": 3}, "rollout.window_f.* at least 6"),
    "one window": (
        "toy/hiar", {"rollout.order": "block_first", "rollout.window_frames": [3, 6, 9, 12]},
        "rollout.window_frames must be one number here, got",
    ),
    "clips, windows": ("toy/ode_init", {"rollout.window_frames": [3, 6, 9, 12]}, "rollout.window_frames must be one"),
    "clips, shared keys": ("toy/teacher_forcing", {"rollout.kv_source": "next_step"}, "rollout.kv_source must be own"),
    "shared keys": (
        "toy/hiar", {"rollout.order": "block_first", "rollout.kv_source": "next_step"},
        "rollout.kv_source='next_step' is impossible with order='block_first'",
    ),
    "first frame": ("toy/hiar", {"rollout.first_frame": 3}, "rollout.first_frame must be 0 in training, got 3"),
    "blocks": ("toy/hiar", {"num_latent_frames": 7}, "multiple of rollout.frames_per_block 3 .*, got 7"),
    "one block": ("toy/hiar", {"num_latent_frames": 3}, "at least two blocks, got 3"),
    "schedule": ("toy/hiar", {"rollout.steps": [500, 750]}, "rollout.*steps must fall within"),
    "model": ("toy/hiar", {"model": "wan"}, "model must be one of wan2.1-t2v-1.3b, .*, got 'wan'"),
    "teacher": ("toy/hiar", {"teacher_model": "wan"}, "teacher_model must be one of .*, got 'wan'"),
    "critic": ("toy/hiar", {"critic_model": "wan"}, "critic_model must be one of .*, got 'wan'"),
    "another critic": ("toy/hiar", {"critic_model": "wan2.1-t2v-1.3b"}, "critic_init must be given"),
    "precision": ("toy/hiar", {"precision": "float8"}, "precision must be .*'bfloat16', 'float32'.*, got 'float8'"),
    "none": ("toy/hiar", {"updates": 0}, "updates must be a whole number from 1 to 99999999, got 0"),
    "rate": ("toy/hiar", {"optimizer.lr": 0.0}, "optimizer.lr must be a number above 0, got 0.0"),
    "betas": ("toy/hiar", {"optimizer.betas": [0.9, 1.0]}, "optimizer.betas must be in 0..1 without 1"),
    "share": ("toy/hiar", {"data.from_start": 1.5}, "data.from_start must be in 0..1, got 1.5"),
    "an average that stays": ("toy/hiar", {"ema.decay": 1.0}, "ema.decay must be in 0..1 without 1, got 1.0"),
    "a rate without a peak": (
        "toy/hiar", {"optimizer.warmup": 0.7, "optimizer.cooldown": 0.4},
        "optimizer.warmup and cooldown must sum to at most 1, got 0.7 and 0.4",
    ),
    "levels": ("toy/teacher_forcing", {"levels.clean": 0.5}, "levels.matched, clean and continuous must .* sum to 1"),
    "minutes": ("toy/hiar", {"scale.max_minutes": 0}, "scale.max_minutes must be a number above 0, got 0.0"),
    "weight": ("toy/hiar", {"forward_kl.weight": -1}, "forward_kl.weight must be a number of at least 0, got -1"),
    "many updates": ("toy/hiar", {"updates": 10**8}, "updates must be a whole number from 1 to 99999999, got 10"),
    "a batch": ("toy/hiar", {"batch_size": 10**9}, "batch_size must be a whole number from 1 to 65536, got 10"),
    "sheets": ("toy/hiar", {"sample_prompts": 10**9}, "sample_prompts must be a whole number from 1 to 65536, got 10"),
    "a clip": ("toy/hiar", {"num_latent_frames": 3 * 10**8}, "num_latent_frames must be .* from 1 to 100000, got 3"),
    "threads": ("toy/hiar", {"scale.threads": 10**6}, r"scale.threads must be .* from 0 to \d+, got 1000000"),
    "levels, no number": ("toy/teacher_forcing", {"levels.clean": math.nan}, "levels.matched, clean .* sum to 1, got"),
    "first block": ("toy/teacher_forcing", {"first_block_weight": math.nan}, "first_block_weight must be .* above 0"),
    "floor": ("toy/teacher", {"data.codec_floor": -1}, "data.codec_floor must be a number from 0 to 1, got -1"),
    "a size": ("toy/hiar", {"data.folder": "x", "data.latent_size": [0, 4]}, "data.latent_size .* at least 1, got"),
    "a shift": ("toy/teacher", {"shift": -1.0}, "shift must be a number above 0, got -1.0"),
    "guidance": ("toy/teacher", {"guidance": math.nan}, "guidance must be a finite number, got nan"),
    "of the ODE": ("toy/ode_pairs", {"guidance": math.inf}, "guidance must be a finite number, got inf"),
    "of the ODE, shift": ("toy/ode_pairs", {"shift": 0.0}, "shift must be a number above 0, got 0.0"),
    "of DMD": ("toy/hiar", {"dmd_shift": 0.0}, "dmd_shift must be a number above 0, got 0.0"),
    "of DMD, guidance": ("toy/hiar", {"guidance": math.nan}, "guidance must be a finite number, got nan"),
    "vae": ("toy/hiar", {"data.vae": "x"}, "data.vae is for data.folder"),
    "folder alone": ("toy/hiar", {"data.folder": "x"}, "data.folder and latent_size go together"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(name, overrides, message):
    with refused(message.replace("?", r"\?")):
        load_recipe(name, overrides)


@pytest.mark.parametrize(
    ("text", "message"), [
    ("[1]", "must be a mapping"), ("a: [", "is not YAML"), ("", "stage must be one of"),
    ("stage: hiar\nema: {decay: 0.5}\nema.decay: 0.6", "recipe: the key ema.decay stands twice"),
])  # fmt: skip
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with refused(message):
        load_recipe(str(path))


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match="no recipe 'toy': neither a file nor one of .*toy/hiar, .*wan-1.3b/ode_pairs"):
        load_recipe("toy")


def test_scale_and_reports_decide_nothing_that_is_learnt():
    ours = load_recipe("toy/hiar").to_dict()
    more = {"scale.micro_batch": 2, "scale.checkpoint_every": 3, "log_every": 7, "sample_every": 0, "sample_prompts": 1}
    assert differences(ours, load_recipe("toy/hiar", {**more, "seed": 1}).to_dict()) == [("seed", 0, 1)]
    theirs = {**ours, "ema": {**ours["ema"], "decay": 0.5}, "more": 1}
    assert differences(ours, theirs) == [("ema.decay", 0.95, 0.5), ("more", None, 1)]


def test_every_key_is_a_field():
    """No section is forgotten: every field can be set by its key."""
    keys = [key for key, _ in field_types(HiARRecipe)]
    assert len(keys) == len(set(keys)) and "forward_kl.first_k" in keys and "scale.shard" in keys
    assert {key.partition(".")[0] for key in keys} == {f.name for f in dataclasses.fields(HiARRecipe)}
    assert issubclass(HiARRecipe, CausalRecipe)


def test_more_held_out_prompts_than_there_are():
    recipe = load_recipe("toy/teacher", {"data.held_out_prompts": 9999})
    with refused(r"recipe: data.held_out_prompts: held_out must be in 0\.\.\d+, got 9999"):
        sources.Sources(recipe, torch.device("cpu"))
