"""The losses of distillation against small computations by hand, in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_model import SIZE, TEXT, TINY, make_model

import hiar_model
from bench.studies.forward_kl_memory import measure
from hiar_model.train.losses.dmd import (
    critic_loss,
    distribution_matching,
    dmd_gradient,
    dmd_loss,
    draw_sigma,
    predict_x0,
)
from hiar_model.train.losses.forward_kl import draw_points, forward_kl_loss, trajectory_x0

pytestmark = pytest.mark.cpu

SHAPE = (2, 3, 2, 2, 4)  # [B, F, C, H, W]


def of(rows: list[list[float]]) -> torch.Tensor:
    """[B, F, 1, 1, 1] from numbers."""
    return torch.tensor(rows, dtype=torch.float64)[:, :, None, None, None]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Knows:
    """A "network" whose velocity is a function of its arguments; keeps the calls."""

    def __init__(self, velocity) -> None:
        self.velocity, self.calls = velocity, []

    def __call__(self, latents, timesteps, text, attention="bidirectional", **rule):
        self.calls.append((latents, timesteps, text, attention, rule))
        return self.velocity(latents, timesteps.reshape(len(latents), -1)[:, :1, None, None, None] / 1000, text)


# DMD.

X, FAKE, COND, UNCOND = (
    of([[1, 2], [0, -1]]),
    of([[0.5, 1], [1, 1]]),
    of([[2, 0], [0.5, 0.5]]),
    of([[1, 1], [0.5, 1.5]]),
)
# with guidance 3 the teacher says [[5, -3], [0.5, -2.5]]: 4.5 and 1 away from x in the mean
GRADIENT = of([[-1, 8 / 9], [0.5, 3.5]])


def test_dmd_gradient_by_hand():
    assert torch.allclose(dmd_gradient(X, FAKE, COND, UNCOND), GRADIENT, rtol=0, atol=1e-15)
    # without guidance: 1.5 and 1 away in the mean
    plain = of([[-1, 2 / 3], [0.5, 0.5]])
    assert torch.allclose(dmd_gradient(X, FAKE, COND, UNCOND, guidance=0.0), plain, rtol=0, atol=1e-15)


def test_dmd_gradient_is_wide_and_constant():
    low = [x.bfloat16().requires_grad_() for x in (X, FAKE, COND, UNCOND)]
    result = dmd_gradient(*low)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert torch.allclose(result.double(), GRADIENT, atol=1e-6)


def test_dmd_loss_by_hand():
    x = X.clone().requires_grad_()
    loss = dmd_loss(x, GRADIENT)
    assert float(loss.detach()) == pytest.approx(0.5 * (1 + 64 / 81 + 0.25 + 12.25) / 4, rel=1e-14)
    loss.backward()
    assert torch.allclose(x.grad, GRADIENT / 4, rtol=0, atol=1e-15)


def test_dmd_loss_counts_the_frames_of_its_mask():
    x = X.clone().requires_grad_()
    loss = dmd_loss(x, GRADIENT, torch.tensor([[True, False], [True, True]]))
    assert float(loss.detach()) == pytest.approx(0.5 * (1 + 0.25 + 12.25) / 3, rel=1e-14)
    loss.backward()
    assert torch.allclose(x.grad, of([[-1, 0], [0.5, 3.5]]) / 3, rtol=0, atol=1e-15)


def test_a_normaliser_of_zero_is_named():
    real = of([[5, -3], [0.5, -2.5]])
    with pytest.raises(FloatingPointError, match=r"normaliser .* positive, got 0\.0 in sample 1$"):
        dmd_gradient(torch.cat([X[:1], real[1:]]), FAKE, COND, UNCOND)
    with pytest.raises(FloatingPointError, match="nan in sample 0"):
        dmd_gradient(X * torch.tensor([float("nan"), 1]).view(-1, 1, 1, 1, 1), FAKE, COND, UNCOND)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dmd_gradient(X, FAKE[:1], COND, UNCOND), r"fake_x0 must be .* like x0 \[2, 2, 1, 1, 1\], got \[1, 2"),
        (lambda: dmd_gradient(X[0], X[0], X[0], X[0]), r"fake_x0 must be \[B, F, C, H, W\]"),
        (lambda: dmd_loss(X, GRADIENT[:, :1]), r"gradient must be \[2, 2, 1, 1, 1\] like x0, got \[2, 1"),
        (lambda: dmd_loss(X, GRADIENT, torch.ones(2)), r"mask must be \[B, F\] = \[2, 2\], got \[2\]"),
        (lambda: dmd_loss(X, GRADIENT, torch.zeros(2, 2)), "the mask leaves no frame"),
        (lambda: draw_sigma(1, 5.0, torch.Generator(), (0, 980)), r"0 < low <= high <= 1000, got \(0, 980\)"),
    ],
)
def test_dmd_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_levels_of_dmd_are_shifted_and_clamped():
    sigma = draw_sigma(20000, 5.0, torch.Generator().manual_seed(0))
    assert sigma.shape == (20000,) and sigma.dtype == torch.float32
    assert float(sigma.min()) == pytest.approx(0.02) and float(sigma.max()) == pytest.approx(0.98)
    # u = sigma / (a - (a - 1) sigma) undoes the shift: 0.98 stands for all u from 0.9074 on, 0.02 for those to 0.0041
    assert float((sigma > 0.9799).double().mean()) == pytest.approx(0.093, abs=0.01)
    assert float((sigma < 0.0201).double().mean()) == pytest.approx(0.004, abs=0.002)
    u = sigma.double() / (5 - 4 * sigma.double())
    inside = u[(sigma > 0.0201) & (sigma < 0.9799)]
    assert torch.allclose(inside * 1000, (inside * 1000).round(), atol=1e-2), "levels of the one table of training"
    for share in (0.25, 0.5, 0.75):
        assert float((u < share).double().mean()) == pytest.approx(share, abs=0.015)
    assert torch.equal(sigma, draw_sigma(20000, 5.0, torch.Generator().manual_seed(0)))


def test_x0_of_a_network():
    x, sigma, text = randn(*SHAPE), torch.tensor([0.25, 0.5], dtype=torch.float64), randn(2, 3, 6, seed=1)
    network = Knows(lambda latents, *_: torch.full_like(latents, 2.0))
    assert torch.allclose(predict_x0(network, x, sigma, text), x - torch.tensor([0.5, 1.0]).view(-1, 1, 1, 1, 1))
    latents, timesteps, prompt_embeds, attention, rule = network.calls[0]
    assert latents is x and prompt_embeds is text and attention == "bidirectional" and not rule
    assert torch.equal(timesteps, torch.tensor([250.0, 500.0], dtype=torch.float64))
    half = Knows(lambda latents, *_: torch.full_like(latents, 2.0, dtype=torch.bfloat16))
    assert predict_x0(half, x.bfloat16(), sigma, text).dtype == torch.float32


def gaussian(mean: float) -> Knows:
    """The exact velocity where the data are normal around a mean with deviation 1."""

    def velocity(x, sigma, _):
        x0 = mean + (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * (x - (1 - sigma) * mean)
        return (x - x0) / sigma

    return Knows(velocity)


def test_distribution_matching_by_hand():
    """One pixel of three networks whose results are known, and the arguments of each call."""
    x0, noise = of([[1.0]]).requires_grad_(), of([[-1.0]])
    sigma, text, empty = torch.tensor([0.5]).double(), torch.ones(1, 3, 6), torch.zeros(1, 3, 6)

    teacher = Knows(lambda x, _, text: torch.full_like(x, -4.0 if text.any() else -2.0))  # x0 = x + 2, or x + 1
    critic = Knows(lambda x, *_: torch.full_like(x, 1.0))  # x0 = x - 0.5
    result = distribution_matching(x0, text, empty, sigma, noise, teacher=teacher, critic=critic)
    # the noised video is 0; real = 2 + 3 (2 - 1) = 5, fake = -0.5, normaliser |1 - 5|
    assert result.normaliser.tolist() == [4.0]
    assert float(result.loss.detach()) == pytest.approx(0.5 * (5.5 / 4) ** 2, rel=1e-14)
    result.loss.backward()
    assert x0.grad.flatten().tolist() == [-5.5 / 4]
    calls = [*critic.calls, *teacher.calls]
    assert all(float(a[0]) == 0 and float(a[1]) == 500 and a[3] == "bidirectional" for a in calls)
    assert [float(a[2].sum()) for a in calls] == [18, 18, 0]
    options = {"teacher": teacher, "critic": critic, "guidance": 1.0}
    result = distribution_matching(x0, text, empty, sigma, noise, **options)  # real = 2 + 1 (2 - 1)
    assert result.normaliser.tolist() == [2.0]
    with pytest.raises(ValueError, match="the mask leaves no frame"):
        distribution_matching(x0, text, empty, sigma, noise, **options, mask=torch.zeros(1, 1))


def test_descent_on_the_loss_leads_to_the_teacher():
    """Where the critic knows the student's distribution, videos move towards that of the teacher, from both sides."""
    text, generator = torch.zeros(64, 1, 6), torch.Generator().manual_seed(0)
    for start in (-1.0, 5.0):
        x0 = (start + randn(64, 1, 1, 2, 2)).requires_grad_()
        for _ in range(40):
            sigma = draw_sigma(64, 1.0, generator).double()
            critic, noise = gaussian(float(x0.detach().mean())), randn(*x0.shape, seed=int(1000 * sigma[0]))
            result = distribution_matching(x0, text, text, sigma, noise, teacher=gaussian(2.0), critic=critic)
            (slope,) = torch.autograd.grad(result.loss * x0.numel(), x0)
            x0 = (x0.detach() - 0.2 * slope).requires_grad_()
        assert abs(float(x0.detach().mean()) - 2) < 0.5 < abs(start - 2)


def test_no_gradient_reaches_teacher_or_critic():
    teacher, critic = (make_model(seed).double().requires_grad_(True) for seed in (1, 2))
    x0, noise = randn(*SHAPE).requires_grad_(), randn(*SHAPE, seed=1)
    sigma, text = torch.tensor([0.3, 0.9]), TEXT.double().expand(2, -1, -1)
    result = distribution_matching(x0, text, torch.zeros_like(text[:1]), sigma, noise, teacher=teacher, critic=critic)
    result.loss.backward()
    assert x0.grad.abs().min() > 0
    assert all(p.grad is None for model in (teacher, critic) for p in model.parameters())
    assert not result.normaliser.requires_grad


def test_critic_loss_by_hand():
    x0 = of([[1.0, 3.0]]).requires_grad_()
    noise, sigma = of([[0.0, -1.0]]), torch.tensor([0.75], dtype=torch.float64)
    critic = Knows(lambda x, *_: torch.full_like(x, -2.0))
    # noise - x0 = [-1, -4]: errors -1 and 2
    assert float(critic_loss(critic, x0, TEXT, sigma, noise)) == pytest.approx(2.5, rel=1e-14)
    latents, timesteps, _, attention, _ = critic.calls[0]
    assert latents.flatten().tolist() == [0.25, 0.0] and set(timesteps.flatten().tolist()) == {750.0}
    assert attention == "bidirectional" and not latents.requires_grad


def test_critic_loss_teaches_the_critic_alone():
    critic, x0 = make_model().double().requires_grad_(True), randn(*SHAPE).requires_grad_()
    critic_loss(critic, x0, TEXT.double().expand(2, -1, -1), torch.tensor([0.3, 0.9]), randn(*SHAPE, seed=1)).backward()
    assert x0.grad is None
    assert [name for name, p in critic.named_parameters() if p.grad is None or not p.grad.any()] == []


# Forward KL.

SIGMAS = (1.0, 0.96, 0.8888888888888888, 0.7272727272727273, 0.0)  # points 0, 12, 24, 36, -1 of 48 at shift 8


def trajectory(videos: int = 2) -> torch.Tensor:
    """[B, P, F, C, H, W]: no straight lines."""
    return randn(videos, len(SIGMAS), *SHAPE[1:], seed=3)


def test_chord_by_hand():
    # from 3 at 0.8 to 2 at 0.3 the slope is 2, so at noise level 0 it is 3 - 0.8 * 2
    result = trajectory_x0(of([[3.0]]), of([[2.0]]), 0.8, 0.3)
    assert float(result) == pytest.approx(1.4, rel=1e-14)
    each = trajectory_x0(of([[3.0], [3.0]]), of([[2.0], [2.0]]), torch.tensor([0.8, 1.0]), torch.tensor([0.3, 0.75]))
    assert each.flatten().tolist() == pytest.approx([1.4, -1.0], rel=1e-6)
    assert trajectory_x0(of([[3.0]]).bfloat16(), of([[2.0]]).bfloat16(), 0.8, 0.3).dtype == torch.float32
    assert hiar_model.train.trajectory_x0 is trajectory_x0


def test_the_chord_of_a_straight_line_is_its_end():
    x0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    points = [(1 - s) * x0 + s * noise for s in SIGMAS]
    for i in range(4):
        result = trajectory_x0(points[i], points[i + 1], SIGMAS[i], SIGMAS[i + 1])
        assert torch.allclose(result, x0, rtol=0, atol=1e-13)
    assert torch.allclose(trajectory_x0(trajectory()[:, 3], trajectory()[:, 4], SIGMAS[3], 0.0), trajectory()[:, 4])


def test_forward_kl_by_hand():
    """A student that always answers 0.5 is at x - 0.5 sigma, the chord at x - sigma slope."""
    points = torch.stack([of([[3.0], [1.0]]), of([[2.0], [4.0]]), of([[7.0], [5.0]])], 1)  # [B, P, F, 1, 1, 1]
    student = Knows(lambda x, *_: torch.full_like(x, 0.5))
    loss = forward_kl_loss(student, points, (1.0, 0.5, 0.0), TEXT)
    # slopes of the first chords are 2 and -6: x0 errors 1.5 and -6.5
    assert float(loss) == pytest.approx((1.5**2 + 6.5**2) / 2, rel=1e-14)
    latents, timesteps, text, attention, _ = student.calls[0]
    assert torch.equal(latents, points[:, 0]) and timesteps.tolist() == [1000.0, 1000.0] and text is TEXT
    assert attention == "bidirectional"
    # the second chord of the second video: slope -2 at sigma 0.5, an error of 0.5 * -2.5
    loss = forward_kl_loss(student, points, (1.0, 0.5, 0.0), TEXT, first_k=2, index=torch.tensor([0, 1]))
    assert float(loss) == pytest.approx((1.5**2 + 1.25**2) / 2, rel=1e-14)
    assert student.calls[1][1].tolist() == [1000.0, 500.0]


def test_forward_kl_of_a_model_in_both_modes():
    """Against the formula, with the model's own forward; every weight gets gradient."""
    student, points, text = make_model().double().requires_grad_(True), trajectory(), TEXT.double().expand(2, -1, -1)
    rule = {"frames_per_block": 1, "window_frames": 2, "sink_frames": 1}
    target = (points[:, 1] * 0.8888888888888888 - points[:, 2] * 0.96) / (0.8888888888888888 - 0.96)
    losses = []
    for attention, mask in (("bidirectional", {}), ("block_causal", rule)):
        velocity = student(points[:, 1], torch.full((2,), 960.0), text, attention, **mask)
        expected = (points[:, 1] - 0.96 * velocity - target).pow(2).mean()
        options = {"index": torch.tensor([1, 1]), "first_k": 2, "attention": attention, **mask}
        loss = forward_kl_loss(student, points, SIGMAS, text, **options)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        losses.append(float(loss.detach()))
        student.zero_grad()
        loss.backward()
        assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert losses[0] != losses[1]


def test_points_are_drawn_from_the_first_k():
    drawn = draw_points(3000, 3, torch.Generator().manual_seed(0))
    assert drawn.bincount().tolist() == pytest.approx([1000] * 3, abs=80)
    student = Knows(lambda x, *_: torch.zeros_like(x))
    many = trajectory(1).expand(60, -1, -1, -1, -1, -1)
    forward_kl_loss(student, many, SIGMAS, TEXT, first_k=3, generator=torch.Generator().manual_seed(0))
    assert {round(t / 1000, 6) for t in student.calls[0][1].tolist()} == {1.0, 0.96, 0.888889}
    forward_kl_loss(student, many, SIGMAS, TEXT)
    assert set(student.calls[1][1].tolist()) == {1000.0}


def test_memory_of_forward_kl_is_linear_in_the_length():
    """What autograd keeps, by the benchmark's own measure, whose control is not linear."""
    kept_bytes = {impl: [measure(n, impl, "cpu")["kept_bytes"] for n in (8, 16, 32)] for impl in ("auto", "reference")}
    growth = {impl: (long - middle) / (middle - short) for impl, (short, middle, long) in kept_bytes.items()}
    assert growth["auto"] == pytest.approx(2, rel=0.01)
    assert growth["reference"] > 2.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trajectory": trajectory()[:, 0]}, r"trajectory must be \[B, P >= 2, F, C, H, W\], got \[2, 3, 2, 2, 4\]"),
        ({"sigmas": SIGMAS[:4]}, r"sigmas must be 5 falling numbers, got \[1.0, 0.96"),
        ({"sigmas": SIGMAS[::-1]}, "sigmas must be 5 falling numbers"),
        ({"first_k": 5}, "first_k must be 1 to 4, got 5"),
        ({"first_k": 0}, "first_k must be 1 to 4, got 0"),
        ({"first_k": 2}, "first_k=2 needs an index for each video, or a generator"),
        ({"attention": "causal"}, "attention must be one of bidirectional, block_causal, got 'causal'"),
        ({"index": torch.tensor([0, 1])}, r"index must be 2 numbers in 0..0, got \[0, 1\]"),
        ({"index": torch.tensor([0])}, r"index must be 2 numbers in 0..0, got \[0\]"),
    ],
)
def test_forward_kl_refuses(change, words):
    arguments = {"trajectory": trajectory(), "sigmas": SIGMAS, "prompt_embeds": TEXT, **change}
    with pytest.raises(ValueError, match=words):
        forward_kl_loss(Knows(lambda x, *_: x), **arguments)


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ((0.5, 0.5), "must be two different numbers, or 2 each"),
        ((torch.ones(3), torch.zeros(3)), "or 2 each, got"),
        ((torch.ones(2), 0.5), "or 2 each, got"),
    ],
)
def test_chord_refuses(sigmas, words):
    x = randn(*SHAPE)
    with pytest.raises(ValueError, match=words):
        trajectory_x0(x, x, *sigmas)
    with pytest.raises(ValueError, match=r"next_point must be \[2, 3, 2, 2, 4\] like point, got \[1, "):
        trajectory_x0(x, x[:1], 0.8, 0.5)


def test_public_names():
    assert hiar_model.train.dmd_gradient is dmd_gradient and hiar_model.train.dmd_loss is dmd_loss
    assert {"dmd_gradient", "dmd_loss", "trajectory_x0"} <= set(dir(hiar_model.train))
    assert TINY.in_channels == SHAPE[2] and list(SIZE.values()) == list(SHAPE[3:])
    with pytest.raises(AttributeError, match="has no attribute 'dmd_los'"):
        _ = hiar_model.train.dmd_los
