"""The stages of distillation: what each loss is made of, who learns from it, what its videos are keyed by."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_stages import FRAMES, LATENT, MASK, SAMPLES, SEED, STEPS, VARIANTS, make, values, write_files

from hiar_model.common.keyed import KeyedGenerator, keyed_generator
from hiar_model.models.kv_cache import RingCache
from hiar_model.train import dmd_gradient, dmd_loss, trajectory_x0
from hiar_model.train.config.reading import make_recipe
from hiar_model.train.engine.self_rollout import SelfRollout
from hiar_model.train.engine.trainer import Trainer
from hiar_model.train.stages import distillation
from hiar_model.train.stages.base import UpdateStep, make_stage

pytestmark = pytest.mark.cpu

CRITIC, STUDENT = UpdateStep("critic", 1, "critic 1"), UpdateStep("student")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def double(stage):
    """Its networks in float64."""
    for network in (*stage.trained.values(), *stage.frozen.values()):
        network.double()
    return stage


def key(stage, *parts) -> KeyedGenerator:
    return keyed_generator(SEED, stage.recipe.stage, *parts)


def noisy(clean: torch.Tensor, generator: KeyedGenerator, shift: float) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(level, noise, latents) as the distribution matching draws them for a video."""
    u = 1 - float(generator.whole(1000, 1)) / 1000
    sigma = min(max(shift * u / (1 + (shift - 1) * u), 0.02), 0.98)
    sigma = float(torch.tensor(sigma, dtype=torch.float32))
    noise = generator.normals(*clean.shape[1:])[None].double()
    return sigma, noise, (1 - sigma) * clean + sigma * noise


def level(sigma: float) -> torch.Tensor:
    return torch.full((1, FRAMES), 1000 * sigma, dtype=torch.float64)


# What the losses are.


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_teacher(files, dropout):
    """mse(v, noise - x0) at its level, of clips with and without their prompts."""
    stage = double(make(files, "teacher", shift=2.0, text_dropout=dropout))
    data, expected, dropped = stage.sources.data, [], []
    for sample in range(8):
        latents, text, _ = data.clips(SEED, "teacher", 3, [sample])
        generator = key(stage, 3, sample, "flow")
        u, drop = generator.uniform(2).tolist()
        noise = generator.normals(*latents.shape[1:])[None]
        sigma = 2 * (1 - u) / (1 + (1 - u))
        dropped.append(drop < dropout)
        text = data.unconditional() if dropped[-1] else text
        velocity = stage.trained["teacher"]((1 - sigma) * latents + sigma * noise, level(sigma), text)
        expected.append((velocity - (noise - latents)).square().mean())
    loss, _ = stage.loss(UpdateStep("teacher"), 3, range(8))
    assert loss.item() == pytest.approx(sum(expected).item() / 8, rel=1e-5)
    assert any(dropped) == (dropout > 0) and all(dropped) == (dropout == 1)
    noise = keyed_generator(SEED, "sample", 1).normals(*data.latent_shape)
    assert torch.equal(stage._noise(1), noise), "of a sampled video"


@pytest.mark.parametrize(("clean", "context_noise"), [(0.0, 0.0), (0.5, 0.0), (0.5, 60.0), (1.0, 0.0)])
def test_ode_init(files, clean, context_noise):
    """Each block beside the blocks before it at the level of the next point, or at 0, all in one sequence; clean ones
    have the timestep at which a rollout caches finished blocks.
    """
    stage = double(make(files, "ode_init", clean=clean, rollout={"context_noise": context_noise}))
    student, sigmas = stage.trained["student"], stage.recipe.rollout.schedule.sigmas
    block, seen, expected = 2, set(), []
    for sample in range(6):
        (points,), text = stage.store.sample(SEED, "ode_init", 1, [sample])
        generator = key(stage, 1, sample, "levels")
        step = int(generator.whole(STEPS, 1))
        below = STEPS if float(generator.uniform()) < clean else step + 1
        seen.add(below - step)
        for first in range(0, FRAMES, block):
            latents = torch.cat([points[below][:first], points[step][first : first + block]])[None]
            before = context_noise if below == STEPS else 1000 * sigmas[below]
            times = torch.tensor([[before] * first + [1000 * sigmas[step]] * block], dtype=torch.float64)
            velocity = student(latents, times, text, "block_causal", **MASK)[:, first:]
            x0 = points[step][None, first : first + block] - sigmas[step] * velocity
            expected.append((x0 - points[-1][None, first : first + block]).square().mean())
    loss, _ = stage.loss(STUDENT, 1, range(6))
    assert loss.item() == pytest.approx(sum(expected).item() / len(expected), rel=1e-5)
    assert (max(seen) > 1) == (clean > 0)


def videos(stage, update: int, draw: int, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The video of a sample, alone, with gradient, and its prompt_embeds."""
    r, name, data = stage.recipe, f"hiar {draw}", stage.sources.data
    prompt_embeds = data.prompts(SEED, name, update, [sample])
    exit_step = int(keyed_generator(SEED, name, update, "exit").whole(STEPS))
    rollout, number = SelfRollout(stage.trained["student"], r.rollout), (64 * update + draw) * 65536 + sample
    batch = rollout.run(prompt_embeds, FRAMES, LATENT[1:], exit_step, seed=SEED, video_ids=[number])
    return rollout.predict(batch, prompt_embeds), prompt_embeds


def hiar_loss(stage, step: UpdateStep, update: int, sample: int, draw: int) -> dict[str, torch.Tensor]:
    """The loss of one sample and its parts."""
    r, kl, data = stage.recipe, stage.recipe.forward_kl, stage.sources.data
    student, critic, teacher = stage.trained["student"], stage.trained["critic"], stage.frozen["teacher"]
    x0, text = videos(stage, update, draw, sample)
    clean = x0.detach()
    sigma, noise, x = noisy(clean, key(stage, update, str(step), sample, "noise"), r.dmd_shift or r.rollout.shift)
    fake = critic(x, level(sigma), text)
    if step.network == "critic":
        return {"loss": (fake - (noise - clean)).square().mean()}
    real, free = (x - sigma * teacher(x, level(sigma), t) for t in (text, data.unconditional()))
    dmd = dmd_loss(x0, dmd_gradient(clean, x - sigma * fake.detach(), real, free, r.guidance))
    normaliser = (clean - real - r.guidance * (real - free)).abs().mean()
    parts = {"loss": dmd, "dmd": dmd, "dmd_normaliser": normaliser}
    if kl.weight:
        (points,), text = stage.store.sample(SEED, "hiar", update, [sample])
        i, sigmas = int(key(stage, update, sample, "point").whole(kl.first_k)), stage.store.sigmas
        here, there = points[i][None].double(), points[i + 1][None].double()
        mask = {**MASK, "window_frames": r.rollout.windows[0]} if kl.attention == "block_causal" else {}
        guess = here - sigmas[i] * student(here, level(sigmas[i]), text, kl.attention, **mask)
        parts["forward_kl"] = (guess - trajectory_x0(here, there, sigmas[i], sigmas[i + 1])).square().mean()
        parts["loss"] = dmd + kl.weight * parts["forward_kl"]
    return parts


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"shared_rollout": True},
        {"dmd_shift": 4.0, "guidance": 1.0, "forward_kl": {"first_k": 3, "weight": 0.5}},
        {"forward_kl": {"first_k": 2, "attention": "block_causal"}, **VARIANTS["windows"]},
        {"forward_kl": {"weight": 0}, **VARIANTS["clean"]},
        {"shared_rollout": True, **VARIANTS["shared"]},
    ],
    ids=["matched", "shared", "shift, guidance, points", "windows, causal", "clean, no forward KL", "shared keys"],
)
@pytest.mark.parametrize("step", [CRITIC, STUDENT], ids=str)
def test_hiar(files, step, more):
    """Value, metrics and gradient are the means over samples, each made alone from its keys."""
    stage = double(make(files, "hiar", **more))
    update, network = 4, stage.trained[step.network]
    draw = 0 if stage.recipe.shared_rollout else {"critic 1": 1, "student 0": 5}[str(step)]
    parts = [hiar_loss(stage, step, update, sample, draw) for sample in SAMPLES]
    expected = {name: sum(part[name] for part in parts) / len(SAMPLES) for name in parts[0]}
    loss, metrics = stage.loss(step, update, SAMPLES)
    for name, number in {"loss": loss, **metrics}.items():
        assert torch.as_tensor(number).item() == pytest.approx(expected.pop(name).item(), rel=1e-6), name
    assert not expected
    mean = sum(part["loss"] for part in parts) / len(SAMPLES)
    by_hand = torch.autograd.grad(mean, list(network.parameters()))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    for a, b in zip(gradients, by_hand, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


NETWORKS = [("teacher", "teacher", {}), ("ode_init", "student", {})]
NETWORKS += [
    ("hiar", step, {"shared_rollout": shared, "forward_kl": {"first_k": 2}})
    for step in ("critic", "student")
    for shared in (False, True)
]


@pytest.mark.parametrize(("name", "network", "more"), NETWORKS)
def test_samples_are_independent(files, name, network, more):
    """The mean over all samples is put together from any parts, and so is every metric."""
    stage = double(make(files, name, **more))
    whole, metrics = stage.loss(UpdateStep(network), 2, SAMPLES)
    for parts in ([[0], [1, 2]], [[2], [0], [1]]):
        losses = [stage.loss(UpdateStep(network), 2, samples) for samples in parts]
        shares = [len(samples) / len(SAMPLES) for samples in parts]
        assert sum(s * loss.item() for s, (loss, _) in zip(shares, losses, strict=True)) == pytest.approx(whole.item())
        for key, value in metrics.items():
            mean = sum(share * float(numbers[key]) for share, (_, numbers) in zip(shares, losses, strict=True))
            assert mean == pytest.approx(float(value)), key


# Who learns.


@pytest.mark.parametrize("variant", [*VARIANTS, "autocast"])
@pytest.mark.parametrize("step", [UpdateStep("critic"), STUDENT], ids=str)
def test_who_gets_gradient(files, step, variant):
    """Every weight of the network of the step; none of another. Under autocast too, whose cache of narrow weights was
    filled without gradient by the rollout.
    """
    stage = make(files, "hiar", **VARIANTS.get(variant, {}))
    with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
        loss = stage.loss(step, 0, SAMPLES)[0]
    loss.backward()
    for name, network in {**stage.trained, **stage.frozen}.items():
        missing = [p for p, value in network.named_parameters() if value.grad is None or not value.grad.any()]
        some = [p for p, value in network.named_parameters() if value.grad is not None]
        assert (missing if name == step.network else some) == [], name
    assert not any(p.requires_grad for p in stage.frozen["teacher"].parameters())


def student_gradient(files, **kl) -> torch.Tensor:
    stage = double(make(files, "hiar", forward_kl=kl))
    stage.loss(STUDENT, 0, SAMPLES)[0].backward()
    return torch.cat([p.grad.flatten() for p in stage.trained["student"].parameters()])


def test_forward_kl_is_felt_by_its_weight(files):
    without, small, large = (student_gradient(files, weight=weight) for weight in (0, 0.1, 0.5))
    assert float((small - without).norm()) > 0.01 * float(without.norm())
    assert torch.allclose(large - without, 5 * (small - without), rtol=0, atol=1e-6 * float(large.abs().max()))
    causal = student_gradient(files, weight=0.1, attention="block_causal")
    assert float((causal - small).norm()) > 0.01 * float((small - without).norm())


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_forward_kl_touches_no_cache(files, monkeypatch, attention):
    """Beside the rollout's one forward a single one more of the student, without context and without a ring."""
    rings, forwards, create = [], [], RingCache.__init__
    monkeypatch.setattr(RingCache, "__init__", lambda *a, **k: (rings.append(1), create(*a, **k))[1])
    for weight in (0, 0.1):
        stage = make(files, "hiar", forward_kl={"weight": weight, "attention": attention})
        student = stage.trained["student"]
        student.register_forward_pre_hook(lambda _, a, k: forwards.append((a[3], "context" in k)), with_kwargs=True)
        monkeypatch.setattr(student, "kv", None)
        stage.loss(STUDENT, 0, SAMPLES)
    assert len(rings) == 2
    assert forwards == [("block_causal", True), ("block_causal", True), (attention, False)]


# Update steps, and what their videos are keyed by.


def test_update_steps():
    def names(stage, update=0):
        return [(str(step), step.network) for step in stage.update_steps(update)]

    for kind, network in ((distillation.Teacher, "teacher"), (distillation.OdeInit, "student")):
        assert names(object.__new__(kind)) == [(f"{network} 0", network)]
    hiar = object.__new__(distillation.HiAR)
    hiar.recipe = make_recipe({"stage": "hiar", "model": "least"})
    critics = [(f"critic {i}", "critic") for i in range(5)]
    assert names(hiar) == names(hiar, 9) == [*critics, ("student 0", "student")]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_how_many_rollouts_an_update_makes(files, tmp_path, monkeypatch, shared, micro_batch):
    """One for each step, or one in all; for each part of the batch that is computed at once."""
    runs, run = [], SelfRollout.run
    monkeypatch.setattr(SelfRollout, "run", lambda *a, **k: (runs.append(k["video_ids"]), run(*a, **k))[1])
    scale = {"threads": 1, "micro_batch": micro_batch}
    recipe = make_recipe(values(files, "hiar", shared_rollout=shared, updates=2, critic_updates=3, scale=scale))
    Trainer(recipe, make_stage(recipe, torch.device("cpu")), tmp_path, say=lambda line: None).run()
    parts = 1 if micro_batch is None else 2
    assert len(runs) == 2 * parts * (1 if shared else 4)
    assert {len(videos) for videos in runs} == ({3} if parts == 1 else {1, 2})


class Requested(Exception):
    """Instead of a rollout: its exit step and video ids."""


@pytest.fixture
def requested(monkeypatch):
    """(exit step, video ids) of a step's rollout, which is not made."""

    def refuse(self, prompt_embeds, num_latent_frames, latent_size, exit_step, *, seed, video_ids):
        raise Requested(exit_step, video_ids)

    monkeypatch.setattr(SelfRollout, "run", refuse)

    def request(stage, step, update, samples=SAMPLES):
        with pytest.raises(Requested) as error:
            stage.loss(step, update, samples)
        return error.value.args

    return request


@pytest.mark.parametrize("shared", [False, True])
def test_exit_steps(files, requested, shared):
    """One for all samples and ranks, evenly over the updates; with shared videos one for all steps of an update."""
    stage = make(files, "hiar", shared_rollout=shared)
    counts = Counter(requested(stage, STUDENT, update, [0])[0] for update in range(450))
    assert sorted(counts) == [0, 1, 2] and min(counts.values()) > 120
    assert len({requested(stage, STUDENT, 7, samples)[0] for samples in ([0], [1, 2], range(60000, 60004))}) == 1
    per_update = [{requested(stage, step, update)[0] for step in stage.update_steps(update)} for update in range(20)]
    assert (max(map(len, per_update)) == 1) == shared


def test_no_video_comes_twice(files, requested):
    """Over updates, steps and samples, up to the largest numbers of both that are allowed."""
    stage, ids = make(files, "hiar"), []
    for update in range(12):
        for step in stage.update_steps(update):
            ids += requested(stage, step, update, range(9))[1]
    assert len(set(ids)) == len(ids) == 12 * 6 * 9

    widest, ids, samples = make(files, "hiar", critic_updates=63, batch_size=65536), [], [0, 65535]
    samples += [2**i for i in range(16)]
    for update in (0, 1, 10**6):
        for step in widest.update_steps(update):
            ids += requested(widest, step, update, samples)[1]
    assert len(set(ids)) == len(ids) == 3 * 64 * len(samples) and max(ids) < 2**63


@pytest.mark.parametrize("shared", [False, True])
def test_noise_of_the_steps(files, monkeypatch, shared):
    """Steps differ in level and noise, even over the same videos; samples too."""
    calls, loss = [], distillation.critic_loss

    def keep(model, x0, prompt_embeds, sigma, noise):
        calls.append((x0, sigma, noise))
        return loss(model, x0, prompt_embeds, sigma, noise)

    monkeypatch.setattr(distillation, "critic_loss", keep)
    stage = make(files, "hiar", shared_rollout=shared)
    for step in stage.update_steps(0)[:3]:
        stage.loss(step, 0, SAMPLES)
    x0, sigma, noise = (torch.cat(part) for part in zip(*calls, strict=True))
    samples = len(calls) * len(SAMPLES)
    assert len(sigma.unique()) == len(noise.flatten(1).unique(dim=0)) == samples
    assert len(x0.flatten(1).unique(dim=0)) == (len(SAMPLES) if shared else samples)


@pytest.mark.parametrize("shared", [False, True])
def test_keys_of_a_rollout_are_freed_before_the_critic_runs(files, monkeypatch, shared):
    """They take the most memory of all, and only steps that share the rollout need them again."""
    keys, alive, run, loss = [], [], SelfRollout.run, distillation.critic_loss

    def run_and_watch(self, *arguments, **options):
        batch = run(self, *arguments, **options)
        keys.extend(weakref.ref(context.k) for context in batch.contexts)
        return batch

    def count(*arguments):
        alive.append(sum(key() is not None for key in keys))
        assert not arguments[1].requires_grad, "a graph would hold them too"
        return loss(*arguments)

    monkeypatch.setattr(SelfRollout, "run", run_and_watch)
    monkeypatch.setattr(distillation, "critic_loss", count)
    stage = make(files, "hiar", shared_rollout=shared)
    for step in stage.update_steps(0)[:2]:
        stage.loss(step, 0, SAMPLES)
    assert alive == ([1, 1] if shared else [0, 0]) and len(keys) == (1 if shared else 2)
    stage.loss(STUDENT, 0, SAMPLES)[0].backward()
    assert not any(key() is not None for key in keys), "nothing stays after an update"
