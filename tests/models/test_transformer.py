"""The transformer against the published implementation, a float64 oracle, and itself; the schedule's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import naive
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from torch import Tensor

from hiar_kernels import qk_norm_rope
from hiar_kernels.attention import selection
from hiar_kernels.common.dispatch import prefer, taken
from hiar_model import load_transformer, save_transformer
from hiar_model.config import FlowSchedule, RolloutConfig, WanConfig, sigma_table
from hiar_model.models.transformer import HiARTransformer
from hiar_model.rollout.reference import forward_block

pytestmark = pytest.mark.cpu

GOLDEN = Path(__file__).parents[1] / "data" / "wan_tiny.safetensors"
TINY = WanConfig(
    dim=128, ffn_dim=256, num_heads=2, num_layers=3, freq_dim=64, text_dim=48, text_len=16,
    in_channels=4, out_channels=4,
)  # fmt: skip
SMALL = WanConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=8, text_dim=6, text_len=5,
    in_channels=3, out_channels=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def tiny(golden) -> HiARTransformer:
    model = HiARTransformer(TINY).eval().requires_grad_(False)
    model.load_state_dict({k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")})
    return model


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> HiARTransformer:
    """Random weights, none of them zero or one, so that every one of them matters."""
    torch.manual_seed(seed)
    model = HiARTransformer(SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 + (p if p.dim() == 1 else 0))
    return model.eval().to(dtype)


def inputs(frames: int = 8, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """latents [B, F, 3, 4, 6] (6 tokens a frame), timesteps [B, F] with a clean frame among them, text [B, 4, 6]."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, frames, 3, 4, 6, generator=g, dtype=torch.float64)
    timesteps = torch.rand(batch, frames, generator=g, dtype=torch.float64) * 1000
    timesteps[0, 0] = 0
    text = torch.randn(batch, 4, 6, generator=g, dtype=torch.float64)
    return latents.to(dtype), timesteps.to(dtype), text.to(dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}, allowed {tolerance:.3g}"


# The published implementation


def test_bidirectional_equals_the_published_one(golden, tiny):
    g = {k.removeprefix("bidirectional."): v for k, v in golden.items()}
    close(tiny(g["x"], g["t"], g["context"]), g["flow"], 2e-5)


def test_block_causal_equals_the_published_one(golden, tiny):
    g = {k.removeprefix("block_causal."): v for k, v in golden.items()}
    flow = tiny(g["x"], g["t_block"], g["context"], attention="block_causal", frames_per_block=3)
    close(flow, g["global.flow_t_block"], 2e-5)
    other = tiny(g["x"], g["t_block"], g["context"], attention="block_causal", frames_per_block=4)
    assert (other - flow).abs().max() > 3e-4  # the tolerance can tell one from the other


def test_rope_equals_the_published_one(golden):
    """A weight that undoes the norm of each token leaves the rotation alone: one row of the batch for each token."""
    q, turned = golden["bidirectional.rope.q"][0], golden["bidirectional.rope.q_roped"][0]
    norms = q.flatten(1).pow(2).mean(1).sqrt()
    for i in range(0, len(q), 41):  # tokens of all frames, rows and columns: 41 and 24 have no common divisor
        frame, slot = divmod(i, 24)
        qkv = torch.zeros(1, 24, 3 * 128)
        qkv[0, slot, :128] = q[i].flatten()
        weight = norms[i].expand(128)
        rotated, _, _ = qk_norm_rope(
            qkv, weight, weight, torch.tensor([[frame]], dtype=torch.int32), num_heads=2, grid=(4, 6), eps=1e-30
        )
        close(rotated[0, slot], turned[i], 2e-6)
    close(naive.rope(q.double(), range(12), 4, 6), turned, 2e-6)


def test_schedule_equals_the_published_one(golden):
    g = {k.removeprefix("schedule."): v.double() for k, v in golden.items()}

    def equal(actual, expected: Tensor) -> None:  # float32 tables
        torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), expected, rtol=1e-6, atol=1e-12)

    equal(sigma_table(1000, 5.0), g["shift5_1000.sigmas"])
    equal([1000 * s for s in sigma_table(1000, 5.0)], g["shift5_1000.timesteps"])
    schedule = FlowSchedule()
    equal(schedule.timesteps, g["shift5_1000.warped_step_list"])
    equal(schedule.sigmas[:-1], g["shift5_1000.warped_sigma"])
    teacher = [*sigma_table(48, 8.0), 0.0]
    equal([teacher[i] for i in (0, 12, 24, 36, -1)], g["shift8_48.teacher_sigmas"])


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 50])
def test_uniform_schedules(steps):
    schedule = FlowSchedule.uniform(steps)
    assert len(schedule) == steps == len(schedule.timesteps) == len(schedule.sigmas) - 1
    assert schedule.sigmas[0] == 1 and schedule.sigmas[-1] == 0
    assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:]))
    assert steps != 4 or schedule == FlowSchedule()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSchedule(shift=float("nan")), "shift must be a number above 0, got nan"),
        (lambda: FlowSchedule(shift=float("inf")), "shift must be a number above 0, got inf"),
        (lambda: FlowSchedule(shift="5"), "shift must be a number above 0, got '5'"),
        (lambda: FlowSchedule(("1000", "500")), "steps must fall within (0, 1000], got ['1000', '500']"),
        (lambda: FlowSchedule(5), "steps must fall within (0, 1000], got 5"),
        (lambda: FlowSchedule.uniform(1001), "number of steps must be a whole number from 1 to 1000, got 1001"),
        (lambda: FlowSchedule(()), "steps must fall within (0, 1000], got []"),
        (lambda: FlowSchedule((500, 750)), "must fall"),
        (lambda: FlowSchedule((1000, 0)), "must fall within (0, 1000]"),
        (lambda: FlowSchedule(shift=0.0), "shift must be a number above 0, got 0.0"),
        (lambda: FlowSchedule.uniform(0), "a whole number from 1 to 1000, got 0"),
        (lambda: WanConfig(24, 40, 5, 1), "dim must be num_heads (5) times an even number, got 24"),
        (lambda: WanConfig(24, 40, 2, 0), "num_layers must be positive, got 0"),
        (lambda: WanConfig(24, 40, 2, 1, eps="x"), "WanConfig: eps must be a number above 0, got 'x'"),
        (lambda: WanConfig(24, 40, 2, 1, eps=float("nan")), "WanConfig: eps must be a number above 0, got nan"),
        (lambda: WanConfig(24, 40, 2, 1, rope_theta=None), "WanConfig: rope_theta must be a number above 0, got None"),
        (lambda: WanConfig(24, 40, 2, 1, patch_size=(1, 2)), "patch_size must be 3 whole numbers, got (1, 2)"),
        (lambda: load_transformer("toy", dtype=torch.int8), "dtype must be None or a floating torch.dtype, such"),
        (lambda: load_transformer("toy", dtype="bf16"), "such as torch.bfloat16, got 'bf16'"),
        (lambda: load_transformer("toy", device="cuda:77"), "device 'cuda:77' cannot be used: "),
        (lambda: load_transformer("toy", device="gpu"), "device 'gpu' cannot be used: "),
        (lambda: load_transformer("/dev/null"), "/dev/null: it is a device, a pipe or a socket, no file"),
        (lambda: WanConfig(24, 40, 2, 1, patch_size=(2, 2, 2)), "patch_size[0] must be 1, got 2"),
        (lambda: WanConfig.from_name("wan"), "model must be one of wan2.1-t2v-1.3b, wan2.1-t2v-14b, toy"),
        (lambda: WanConfig.from_dict({"dim": 4, "heads": 2}), "unknown heads; known: dim, eps"),
        (lambda: WanConfig.from_dict([1]), "WanConfig: options must be a mapping, got list"),
        (lambda: RolloutConfig.from_dict([1]), "RolloutConfig: options must be a mapping, got list"),
        (lambda: RolloutConfig.from_dict({1: 2}), "RolloutConfig: unknown 1; known: steps"),
        (lambda: save_transformer("toy", "x.safetensors"), "model must be a HiARTransformer, got str"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with refused(re.escape(message)):
        make()


# Sizes and keys


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("wan2.1-t2v-1.3b", 1_418_996_800, 825), ("wan2.1-t2v-14b", 14_288_491_584, 1095)],
)
def test_published_sizes(name, parameters, tensors):
    with torch.device("meta"):
        model = HiARTransformer(WanConfig.from_name(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    assert WanConfig.from_dict(model.config.to_dict()) == model.config


def test_state_dict_keeps_the_published_keys(golden, tiny):
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    state = tiny.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert not any("qkv" in key for key in state)
    parameters = dict(tiny.named_parameters())
    parts = [weights[f"blocks.1.self_attn.{c}.weight"] for c in "qkv"]
    assert torch.equal(parameters["blocks.1.self_attn.qkv.weight"], torch.cat(parts))  # fused, in this order
    before = {key: value.clone() for key, value in state.items()}
    HiARTransformer(TINY).load_state_dict(state)
    assert state.keys() == before.keys()  # loading leaves the caller's dict as it was


def test_a_partial_qkv_is_named():
    state = small().state_dict()
    del state["blocks.0.self_attn.k.bias"]
    with pytest.raises(RuntimeError, match=r"blocks\.0\.self_attn\.qkv\.bias"):
        small().load_state_dict(state)


# The float64 oracle

MODES = {
    "bidirectional": (None, {}),
    "block_causal": ({"block": 3}, {}),
    "windowed": ({"block": 3, "window": 5, "sink": 1}, {"window_frames": 5, "sink_frames": 1}),
    "single frames": ({"block": 1, "window": 3}, {"frames_per_block": 1, "window_frames": 3}),
}


def oracle(model: HiARTransformer, rule: dict[str, int] | None, latents: Tensor, timesteps: Tensor, text: Tensor):
    """Velocity of all frames, block after block by hiar_model.rollout.reference."""
    frames = latents.shape[1]
    block = frames if rule is None else rule["block"]
    velocities, earlier = [], []
    for first in range(0, frames, block):
        own = range(first, min(first + block, frames))
        visible = [j for j in range(own.stop) if rule is None or naive.sees(first, j, **rule)]
        velocity, kv = forward_block(model, latents[:, own], timesteps[:, own], text, own, earlier, visible)
        velocities.append(velocity)
        earlier.append(kv)
    return torch.cat(velocities, 1)


@pytest.mark.parametrize("mode", MODES)
def test_forward_and_gradients_equal_the_oracle(mode):
    """In float64 the model *is* the oracle (1e-14 apart); in float32 it differs by rounding.

    A gradient sums some hundred float32 terms over two layers, each off by a few of its 6e-8, and so comes out 2e-6 of
    the tensor's largest entry away. 1e-5 leaves a margin of five; a wrong mask or a lost term is 1e-2 and more.
    """
    rule, options = MODES[mode]
    exact = small(dtype=torch.float64)
    latents, timesteps, text = inputs()
    probe = torch.randn(2, 8, 2, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    oracle_in = latents.clone().requires_grad_()
    expected = oracle(exact, rule, oracle_in, timesteps, text)
    (expected * probe).sum().backward()
    gradients = {key: value.grad for key, value in exact.named_parameters()} | {"latents": oracle_in.grad}

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = small(dtype=dtype)
        x = latents.to(dtype).clone().requires_grad_()
        kind = "bidirectional" if rule is None else "block_causal"
        out = model(x, timesteps, text.to(dtype), kind, **options)
        assert out.dtype == dtype
        close(out, expected.detach(), tolerance * expected.abs().max().item())
        (out * probe.to(dtype)).sum().backward()
        actual = {key: value.grad for key, value in model.named_parameters()} | {"latents": x.grad}
        assert actual.keys() == gradients.keys()
        for key, gradient in gradients.items():
            error = (actual[key].double() - gradient).abs().max() / gradient.abs().max()
            assert error <= tolerance, f"{key} {dtype}: {error:.3g}"


def test_first_frame_is_a_matter_of_names():
    """RoPE is relative: a video that begins at frame 1,000,000 gives what it gives at frame 0."""
    latents, timesteps, text = inputs(dtype=torch.float32)
    options = {"attention": "block_causal", "window_frames": 5, "sink_frames": 1}
    with torch.no_grad():
        near = small()(latents, timesteps, text, **options)
        far = small()(latents, timesteps, text, first_frame=1_000_000, **options)
        shuffled = small()(latents[:, [1, 0, *range(2, 8)]], timesteps, text, first_frame=1_000_000, **options)
    close(far, near, 1e-5)
    assert (shuffled - near).abs().max() > 1e-3


def test_padding_is_one_key_with_a_count(tiny, golden):
    x, t, text = (golden[f"bidirectional.{name}"] for name in ("x", "t", "context"))
    padded = torch.cat([text, torch.zeros(1, 16 - text.shape[1], 48)], 1)
    kv = tiny.cross_attention_kv(text)
    assert kv.layers[0][0].shape == (1, 12, 2, 64) and kv.counts.tolist() == [[1.0] * 11 + [5.0]]
    close(tiny(x, t, text), tiny(x, t, padded), 5e-6)  # float32: 2e-6 by the order of summation
    exact = HiARTransformer(TINY).requires_grad_(False).double()
    exact.load_state_dict(tiny.state_dict())
    x, t, text, padded = (y.double() for y in (x, t, text, padded))
    out = exact(x, t, text)
    close(out, exact(x, t, padded), 1e-13)
    close(exact(x, t, text[:, :0]), exact(x, t, torch.zeros(1, 16, 48)), 1e-13)
    assert (exact(x, t, torch.cat([text, text[:, :5]], 1)) - out).abs().max() > 1e-3  # padding takes part


@pytest.mark.parametrize(("length", "width"), [(17, 48), (4, 47)])
def test_prompt_embeds_of_a_wrong_size_are_refused(tiny, golden, length, width):
    with pytest.raises(ValueError, match=rf"prompt_embeds must be \[B, at most 16, 48\], got \[1, {length}, {width}\]"):
        tiny(golden["bidirectional.x"], golden["bidirectional.t"], torch.zeros(1, length, width))


def test_other_bad_calls_are_refused(tiny, golden):
    x, t, text = (golden[f"bidirectional.{name}"] for name in ("x", "t", "context"))
    with pytest.raises(ValueError, match="attention must be one of bidirectional, block_causal, got 'causal'"):
        tiny(x, t, text, "causal")
    with pytest.raises(ValueError, match="multiples of the patch 2x2, got 7x12"):
        tiny(x[..., :7, :], t, text)


# Keys of earlier blocks


@pytest.mark.parametrize("first", [0, 1_000_000])
@pytest.mark.parametrize(
    "window", [{}, {"window_frames": 5}, {"window_frames": 5, "sink_frames": 1}, {"window_frames": 7, "sink_frames": 4}]
)
def test_context_equals_the_joint_forward(window, first):
    """Matched noise: earlier blocks at the next level, the last one at its own: one forward, or kv() and a forward."""
    latents, timesteps, text = inputs(frames=12)
    model = small(dtype=torch.float64).requires_grad_(False)
    rule = {"attention": "block_causal", **window}
    joint = model(latents, timesteps, text, first_frame=first, **rule)
    earlier = model.kv(latents[:, :9], timesteps[:, :9], text, first_frame=first, **rule)
    assert len(earlier) == SMALL.num_layers and earlier[0].k.shape == (2, 54, 2, 12)
    last = model(
        latents[:, 9:], timesteps[:, 9:], text, first_frame=first + 9, video_start=first, context=earlier, **rule
    )
    close(last, joint[:, 9:], 1e-11)


def test_context_of_the_same_frames_is_teacher_forcing():
    """Each block sees the context copy of the earlier ones and itself, as if denoised after their cache tasks."""
    latents, timesteps, text = inputs(frames=6)
    model = small(dtype=torch.float64).requires_grad_(False)
    clean, clean_t = inputs(frames=6, seed=9)[:2]
    context = model.kv(clean, clean_t, text)
    together = model(latents, timesteps, text, "block_causal", context=context)
    for n in range(2):
        x = torch.cat([clean[:, : 3 * n], latents[:, 3 * n : 3 * n + 3]], 1)
        t = torch.cat([clean_t[:, : 3 * n], timesteps[:, 3 * n : 3 * n + 3]], 1)
        close(together[:, 3 * n : 3 * n + 3], model(x, t, text, "block_causal")[:, 3 * n :], 1e-11)


def test_gradients_reach_the_context():
    latents, timesteps, text = inputs(frames=6)
    model = small(dtype=torch.float64)
    context = model.kv(latents, timesteps, text)
    expected = [context[0].k, context[1].v]
    out = model(latents, timesteps, text, "block_causal", context=context)
    for gradient in torch.autograd.grad(out[:, 3:].sum(), expected):
        assert gradient[:, :18].abs().max() > 0 and gradient[:, 18:].abs().max() == 0  # the last block has no reader


def test_training_runs_what_was_measured(monkeypatch):
    """On an H200 it would take the library in groups where that won, since the layout is known to every layer."""
    choose, chosen = selection.choose, []

    def also_there(call, layout, return_lse):
        shape = selection.shape_class(call)
        options = {"counts": False, "return_lse": return_lse, "trains": call.needs_grad}
        if call.mask is not None:
            known = layout is not None
            chosen.append(
                (shape, selection.decide(90, shape, layout_known=known, runs=lambda impl: True, **options).impl)
            )
        return choose(call, layout, return_lse)

    monkeypatch.setattr(selection, "choose", also_there)
    latents, timesteps, text = inputs(frames=6)
    model = small(dtype=torch.float64)
    model(latents, timesteps, text, "block_causal", window_frames=4).sum().backward()
    assert chosen == [("block_causal", "sdpa")] * SMALL.num_layers
    chosen.clear()
    model(latents, timesteps, text, "block_causal", context=model.kv(latents, timesteps, text)).sum().backward()
    before_the_last = SMALL.num_layers - 1  # which leaves its keys only
    assert chosen[:before_the_last] == [("block_causal", "sdpa")] * before_the_last
    assert chosen[before_the_last:] == [("constant_context", "triton")] * SMALL.num_layers


def test_layouts_change_no_gradient():
    """Every weight's, by the library in groups with the layout told, and by the oracle without."""
    latents, timesteps, text = inputs(frames=7)
    grads: list[list[Tensor]] = []
    for impl in ("sdpa", "reference"):
        model = small(dtype=torch.float64)
        rule = {"attention": "block_causal", "frames_per_block": 2, "window_frames": 4, "sink_frames": 1}
        with prefer(impl), taken() as ran:
            context = model.kv(latents, timesteps, text, **rule)
            out = model(latents, timesteps, text, context=context, **rule) + model(latents, timesteps, text, **rule)
        assert ("attention", impl) in ran
        grads.append(list(torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected, 1e-11 * float(expected.abs().max()))


def test_low_precision_is_close(tiny, golden):
    """bfloat16 weights and activations: the velocity is of order 1, each of three layers rounds to 8 bits."""
    x, t, text = (golden[f"bidirectional.{name}"] for name in ("x", "t", "context"))
    narrow = HiARTransformer(TINY).requires_grad_(False)
    narrow.load_state_dict(tiny.state_dict())
    out = narrow.to(torch.bfloat16)(x, t, text)
    assert out.dtype == torch.bfloat16
    error = (out.float() - golden["bidirectional.flow"]).pow(2).mean().sqrt() / golden["bidirectional.flow"].std()
    assert error < 0.03
