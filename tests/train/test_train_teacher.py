"""The teacher: its loss by hand, its ODE against closed forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_model import MODEL, TINY

from hiar_model.models.transformer import HiARTransformer
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.prompt import split_prompts, token_table
from hiar_model.toy.text import ToyTextEncoder
from hiar_model.toy.world import ToyWorld
from hiar_model.train.data.datasets import ToyData
from hiar_model.train.losses.teacher import drop_prompts, flow_draws, flow_matching_loss, ode_plan, ode_trajectory

pytestmark = pytest.mark.cpu

SHAPE = (3, 2, 2, 4)  # a clip: F, C, H, W
DESIGN_SIGMAS = (1, 0.96, 0.888889, 0.727273, 0)  # of the published points 0, 12, 24, 36, -1 of 48


# Flow matching.


def test_loss_by_hand():
    """Two clips of two frames of one pixel, a network v = 2 x + t / 100 + text: every number written out."""
    x0 = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64).view(2, 2, 1, 1, 1)
    noise = torch.tensor([[0.5, -1.0], [2.0, 4.0]], dtype=torch.float64).view(2, 2, 1, 1, 1)
    sigma = torch.tensor([0.25, 0.5], dtype=torch.float64)
    text = torch.tensor([10.0, -3.0], dtype=torch.float64).view(2, 1, 1)

    def network(latents, timesteps, text, attention):
        assert attention == "bidirectional"
        return 2 * latents + (timesteps / 100).view(2, 2, 1, 1, 1) + text.view(2, 1, 1, 1, 1)

    # x_t: .75 + .125 = .875, 1.5 - .25 = 1.25; 1.5 + 1 = 2.5, -.5 + 2 = 1.5
    # v: 1.75 + 2.5 + 10 = 14.25, 2.5 + 12.5 = 15; 5 + 5 - 3 = 7, 3 + 2 = 5
    # noise - x0: -.5, -3; -1, 5. errors: 14.75, 18; 8, 0
    squares = [14.75**2, 18.0**2, 8.0**2, 0.0]
    assert float(flow_matching_loss(network, x0, text, sigma, noise)) == pytest.approx(sum(squares) / 4, rel=1e-15)
    weight = torch.tensor([[0.0, 1.0], [3.0, 0.5]])
    weighed = flow_matching_loss(network, x0, text, sigma, noise, weight)
    assert float(weighed) == pytest.approx((squares[1] + 3 * squares[2]) / 4.5, rel=1e-15)


def test_loss_of_a_transformer_and_its_gradient():
    """All frames see all frames, and every weight learns."""
    model = HiARTransformer(TINY).double()
    model.load_state_dict(MODEL.state_dict())
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, *SHAPE, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 3, TINY.text_dim, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64)
    loss = flow_matching_loss(model, x0, text, sigma, noise)
    loss.backward()
    s = sigma.view(-1, 1, 1, 1, 1)
    velocity = model((1 - s) * x0 + s * noise, 1000 * sigma, text)
    assert loss.item() == pytest.approx(((velocity - noise + x0) ** 2).mean().item(), rel=1e-12)
    assert loss.dtype == torch.float64
    assert not [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]


def test_a_teacher_learns_the_toy_world():
    sizes = {"dim": 64, "ffn_dim": 128, "num_layers": 1, "in_channels": 16, "out_channels": 16}
    config = dataclasses.replace(TINY, **sizes, text_dim=32, text_len=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HiARTransformer(config)
    codec, pool = ToyCodec.fit(frames=200), token_table(split_prompts()[0])
    data = ToyData(ToyWorld(), codec, ToyTextEncoder(32), pool, num_frames=1)

    def loss(stage: str, update: int, batch: int) -> torch.Tensor:
        clips = data.clips(0, stage, update, range(batch))
        draws = flow_draws(0, stage, update, range(batch), data.latent_shape)
        text = drop_prompts(clips.prompt_embeds, data.unconditional(), draws.dropped)
        return flow_matching_loss(model, clips.latents, text, draws.sigma, draws.noise)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with torch.no_grad():
        before = float(loss("held out", 0, 64))
    for update in range(40):
        optimizer.zero_grad()
        loss("teacher", update, 8).backward()
        optimizer.step()
    with torch.no_grad():
        after = float(loss("held out", 0, 64))
    assert before > 1.9 and after < 1.75, (before, after)  # 2.39 -> 1.54; predicting nothing costs 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": torch.ones(2, 3)}, r"sigma must be \[2\], got \[2, 3\]"),
        ({"noise": torch.ones(2, 1, 2, 2, 4)}, r"noise must be \[2, 3, 2, 2, 4\], got \[2, 1, 2, 2, 4\]"),
        ({"weight": torch.ones(2)}, r"weight must be \[2, 3\], got \[2\]"),
        ({"weight": torch.zeros(2, 3)}, "weight must not be 0 for all frames"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    x = torch.ones(2, *SHAPE)
    legal = {"x0": x, "prompt_embeds": torch.ones(2, 3, 6), "sigma": torch.ones(2), "noise": x}
    with pytest.raises(ValueError, match=message):
        flow_matching_loss(lambda latents, *_, **__: latents, **{**legal, **change})


def test_draws_belong_to_their_rows():
    whole = flow_draws(1, "teacher", 4, range(8), SHAPE)
    assert whole.noise.shape == (8, *SHAPE) and whole.sigma.shape == whole.dropped.shape == (8,)
    for actual, expected in zip(flow_draws(1, "teacher", 4, [6, 1], SHAPE), whole):
        assert torch.equal(actual, expected[[6, 1]])
    for other in ((2, "teacher", 4), (1, "critic", 4), (1, "teacher", 5)):
        assert not torch.equal(flow_draws(*other, range(8), SHAPE).sigma, whole.sigma)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_are_uniform_then_shifted(shift):
    draws = flow_draws(0, "teacher", 0, range(4000), (1,), shift=shift)
    assert float(draws.sigma.min()) > 0 and float(draws.sigma.max()) <= 1
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):  # the share below a shifted level is the level
        below = draws.sigma <= shift * level / (1 + (shift - 1) * level)
        assert abs(float(below.float().mean()) - level) < 0.03
    assert abs(float(draws.noise.mean())) < 0.06 and abs(float(draws.noise.std()) - 1) < 0.04
    low = draws.sigma < draws.sigma.median()
    for half in (low, ~low):  # dropped whatever the level
        assert abs(float(draws.dropped[half].float().mean()) - 0.1) < 0.025


def test_dropout_replaces_whole_prompts():
    text, empty = torch.randn(3, 2, 4), torch.randn(1, 2, 4)
    mixed = drop_prompts(text, empty, torch.tensor([False, True, False]))
    assert torch.equal(mixed[[0, 2]], text[[0, 2]]) and torch.equal(mixed[1], empty[0])
    assert bool(flow_draws(0, "x", 0, range(50), (1,), text_dropout=1.0).dropped.all())
    assert not bool(flow_draws(0, "x", 0, range(50), (1,), text_dropout=0.0).dropped.any())


@pytest.mark.parametrize(("option", "value"), [("text_dropout", 1.1), ("shift", 0.0)])
def test_bad_draws_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value}"):
        flow_draws(0, "x", 0, [0], SHAPE, **{option: value})


# The ODE.


class Gaussian:
    """Velocity of data that is normal around a mean that the prompt tells. Its ODE leads from noise z to mean + std z,
    by way of (1 - sigma) mean + sqrt((1 - sigma)^2 std^2 + sigma^2) z."""

    def __init__(self, std: float) -> None:
        self.std, self.calls = std, []

    def __call__(self, latents, timesteps, text, attention):
        assert attention == "bidirectional" and timesteps.shape == latents.shape[:2]
        self.calls.append((latents, timesteps, text))
        sigma = (timesteps / 1000).view(*timesteps.shape, 1, 1, 1)
        mean = text[:, 0, 0].double().view(-1, 1, 1, 1, 1)
        centred = latents.double() - (1 - sigma) * mean
        slope = (sigma - (1 - sigma) * self.std**2) / ((1 - sigma) ** 2 * self.std**2 + sigma**2)
        return slope * centred - mean

    def exact(self, noise, mean, sigma):
        return (1 - sigma) * mean + ((1 - sigma) ** 2 * self.std**2 + sigma**2) ** 0.5 * noise


def prompts(*means: float) -> torch.Tensor:
    return torch.tensor(means).view(-1, 1, 1)


NOISE = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))


def test_levels_of_the_published_points():
    plan = ode_plan()
    assert plan.point_sigmas == pytest.approx(DESIGN_SIGMAS, abs=5e-7)
    assert len(plan.sigmas) == 49 and plan.points == (0, 12, 24, 36, 48)
    assert plan.sigmas[0] == 1 and plan.sigmas[-1] == 0 and list(plan.sigmas) == sorted(plan.sigmas, reverse=True)


def test_a_straight_way_is_followed_exactly():
    """Data that is one point: the ODE is a line, on which Euler makes no error, and every point lies."""
    teacher = Gaussian(0.0)
    actual = ode_trajectory(teacher, NOISE, prompts(2.0, -1.0), prompts(0.5), guidance=1.0)
    assert actual.shape == (2, 5, *SHAPE) and actual.dtype == torch.float32
    mean = prompts(2.0, -1.0)[..., None, None]
    for point, sigma in zip(actual.unbind(1), DESIGN_SIGMAS):
        assert torch.allclose(point, (1 - sigma) * mean + sigma * NOISE, atol=1e-5)
    assert torch.equal(actual[:, 0], NOISE)
    assert len(teacher.calls) == 48 and len(teacher.calls[0][0]) == 2, "no guidance, no second half"


def test_the_ode_converges_to_its_exact_solution():
    teacher, mean = Gaussian(0.7), torch.tensor([1.5, -2.0]).view(2, 1, 1, 1, 1)
    errors = {}
    for steps in (48, 480):
        points = [i * steps // 48 for i in (0, 12, 24, 36, 48)]
        actual = ode_trajectory(
            teacher, NOISE, prompts(1.5, -2.0), prompts(0.0), steps=steps, guidance=1.0, points=points
        )
        exact = torch.stack([teacher.exact(NOISE, mean, s) for s in ode_plan(steps, 8.0, points).point_sigmas], 1)
        errors[steps] = float((actual - exact).abs().max())
    assert errors[480] < 0.03 and 8 < errors[48] / errors[480] < 12, errors  # first order


def test_guidance_leads_away_from_the_empty_prompt():
    """The velocity is linear in the mean: guided, it is that of uncond + 6 (cond - uncond)."""
    teacher = Gaussian(0.7)
    guided = ode_trajectory(teacher, NOISE, prompts(1.0, -0.5), prompts(0.2))
    plain = ode_trajectory(Gaussian(0.7), NOISE, prompts(0.2 + 6 * 0.8, 0.2 - 6 * 0.7), prompts(9.0), guidance=1.0)
    assert torch.allclose(guided, plain, atol=2e-4)
    latents, timesteps, text = teacher.calls[12]
    assert len(latents) == 4 and torch.equal(latents[:2], latents[2:]), "both halves in one batch"
    assert text.flatten().tolist() == pytest.approx([1.0, -0.5, 0.2, 0.2])
    assert timesteps.unique().tolist() == pytest.approx([960.0], rel=1e-12)


def test_states_stay_wide_beside_narrow_weights():
    """A bfloat16 network: its velocity is rounded, the states are not."""

    def network(latents, timesteps, text, attention):
        assert latents.dtype == torch.float32
        return -latents.bfloat16()

    actual = ode_trajectory(network, NOISE.bfloat16(), prompts(0.0, 0.0), prompts(0.0))
    assert actual.dtype == torch.float32 and not torch.equal(actual[:, -1], actual[:, -1].bfloat16().float())


def test_no_step_is_made_behind_the_last_point():
    teacher = Gaussian(0.0)
    actual = ode_trajectory(teacher, NOISE, prompts(1.0, 1.0), prompts(0.0), points=(12, 24))
    assert len(teacher.calls) == 24 and actual.shape[1] == 2
    whole = ode_trajectory(teacher, NOISE, prompts(1.0, 1.0), prompts(0.0))
    assert torch.equal(actual, whole[:, 1:3])


@pytest.mark.parametrize("points", [(0,), (0, 49), (0, 12, 12), (12, 0), (-50, 0), ()])
def test_points_that_are_none_are_refused(points):
    with pytest.raises(ValueError, match=r"points must be at least two, rising within 0\.\.48"):
        ode_plan(points=points)


@pytest.mark.parametrize(("steps", "shift"), [(0, 8.0), (48, 0.0)])
def test_an_ode_without_steps_is_refused(steps, shift):
    with pytest.raises(ValueError, match="at least 1 step and a positive shift"):
        ode_plan(steps, shift)
