"""The 8-bit Hopper attention kernel on the device: error budget, poisoned slots, captured graphs, its variants."""

import pytest
import torch
from budget import assert_within_budget
from eight_bits import Ring, exactly, queries
from on_hopper import IN_8_BITS as CASES
from on_hopper import assert_one_graph_serves_every_block, frames, hopper  # noqa: F401
from refusals import refused

import hiar_kernels as hk
from hiar_kernels.attention_fp8.inputs import Float8Inputs
from hiar_kernels.common.float8 import bits, quantize_last

pytestmark = pytest.mark.gpu

E4M3 = "float8_e4m3fn"
VARIANTS = ("", "3 stages", "wide tails", "polynomial", "polynomial 3 stages")


def build(name):
    """(q, its scales, the ring, options) on the device, and the slots that nobody sees.

    All but the kernel is computed there too, in float64: on a CPU one of the larger cases takes minutes.
    """
    mask, q_ids, k_ids, heads = CASES[name]
    q_frames, kv_frames = frames(q_ids, k_ids)
    batch, tokens = len(q_frames), mask.frame_tokens
    ring = Ring.random(batch, kv_frames.shape[1], tokens, heads, 128).to(torch.device("cuda"))
    q, q_scales = quantize_last(queries(batch, q_frames.shape[1] * tokens, heads, 128) / 2)
    hidden = ~mask.visible(q_frames, kv_frames, batch).any(1)
    options = {"mask": mask, "q_frames": q_frames, "kv_frames": kv_frames}
    return q.cuda(), q_scales.cuda(), ring, options, hidden


def poisoned(ring, hidden, tokens):
    """NaN in slots that nobody sees, scales too."""
    k, v, k_scales, v_scales = (x.clone() for x in ring.arguments)
    for x, where in ((k, hidden.repeat_interleave(tokens, 1)), (v, hidden)):
        x.view(torch.uint8)[where] = 0x7F  # NaN of e4m3
    k_scales[hidden], v_scales[hidden] = torch.nan, torch.nan
    return [k, v, k_scales, v_scales]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name or "pinned")
@pytest.mark.parametrize("name", ["less than a group", "whole blocks only", "half empty", "two tasks in a row"])
def test_variants_and_the_logsumexp(name, variant):
    from hiar_kernels.attention_fp8 import gluon_fwd

    assert set(gluon_fwd.VARIANTS) == set(VARIANTS)
    q, q_scales, ring, options, _ = build(name)
    ids = options["q_frames"], options["kv_frames"]
    call = Float8Inputs(q, *ring.arguments, q_scales, *ids, options["mask"], None, torch.float32)
    shape = (*q.shape[:3], ring.k.shape[1])
    schedule = hk.attention_schedule(shape, **options, device="cuda", one_slot=True)
    out, lse = gluon_fwd.launch(call, schedule, variant)
    torch.cuda.synchronize()  # a fault is the kernel's, not that of what comes next
    eager = hk.attention_fp8(
        q, *ring.arguments, q_scales=q_scales, **options, out_dtype=torch.float32, impl="reference"
    )  # fmt: skip
    assert_within_budget(out, eager, exactly(q, ring, q_scales, **options), variant)
    wide = q.double() * q_scales.double()[..., None]
    _, exact = hk.reference.attention_with_lse(wide, *(x.cuda() for x in ring.exact), **options)
    torch.testing.assert_close(lse.double(), exact, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("scale", [None, -0.05, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_error_budget(name, scale):
    q, q_scales, ring, options, hidden = build(name)
    arguments = poisoned(ring, hidden, options["mask"].frame_tokens)
    more = {"q_scales": q_scales, **options, "scale": scale, "out_dtype": torch.float32}
    out = hk.attention_fp8(q, *arguments, **more, impl="gluon")
    eager = hk.attention_fp8(q, *ring.arguments, **more, impl="reference")
    assert_within_budget(out, eager, exactly(q, ring, q_scales, scale=scale, **options), name)


def test_a_ring_with_room_and_the_same_bits_every_time():
    """Views of rings with more slots than are used, as a cache has them; one schedule for all layers."""
    q, q_scales, ring, options, _ = build("items at different tasks")
    more = {"q_scales": q_scales, **options, "impl": "gluon"}
    first = hk.attention_fp8(q, *ring.arguments, **more)
    views = []
    for x, unit in zip(ring.arguments, (options["mask"].frame_tokens, 1, 1, 1), strict=True):
        room = torch.full((x.shape[0], 2 * unit, *x.shape[2:]), torch.nan, device="cuda").to(x.dtype)
        views.append(torch.cat([bits(x), bits(room)], 1).view(x.dtype)[:, : x.shape[1]])
    schedule = hk.attention_schedule((*q.shape[:3], ring.k.shape[1]), **options, device="cuda", one_slot=True)
    for _ in range(50):
        assert torch.equal(hk.attention_fp8(q, *views, **more, schedule=schedule), first)


def test_one_graph_serves_every_block():
    q, scales, ring, _, _ = build("half empty")

    def call(q_frames, kv_frames):
        ids = {"mask": hk.BlockCausal(520, 3, 9), "q_frames": q_frames, "kv_frames": kv_frames}
        return hk.attention_fp8(q, *ring.arguments, q_scales=scales, **ids, impl="gluon")

    assert_one_graph_serves_every_block(call, ring.k.shape[1] // 520)


def test_a_rollout_makes_one_schedule_for_all_layers(monkeypatch):
    """The kernel over the ring of a rollout, beside Triton's over the same."""
    from hiar_model import ExecutionConfig, HiARTransformer, Rollout, RolloutConfig, WanConfig
    from hiar_model.models import cached_attention

    torch.manual_seed(0)
    sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 3, "text_dim": 8, "text_len": 4}
    wan = WanConfig(**sizes, in_channels=4, out_channels=4)
    model, text = HiARTransformer(wan).to("cuda", torch.bfloat16), torch.randn(1, 4, 8).to("cuda", torch.bfloat16)
    made, make = [], cached_attention.attention_schedule
    monkeypatch.setattr(
        cached_attention, "attention_schedule", lambda *args, **more: made.append(1) or make(*args, **more)
    )

    def latents(impl):
        execution = ExecutionConfig(kv_dtype=E4M3, attention_dtype=E4M3, attention_impl=impl)
        config = RolloutConfig(order="stream", window_frames=6)
        rollout = Rollout(model, text, config, execution, num_latent_frames=9, latent_size=(16, 16))
        with hk.taken() as ran:
            result = torch.cat([block.latents for block in rollout], 1)
        assert {taken for op, taken in ran if op == "attention_fp8"} == {impl}
        return result

    expected = latents("triton")
    assert not made
    actual = latents("gluon")
    assert made and (actual - expected).norm() < 0.02 * expected.norm()


def test_refusals_are_one_line():
    q, q_scales, ring, options, _ = build("whole blocks only")
    with refused("takes q in 8 bits, beside q_scales, of head_dim 128"):
        hk.attention_fp8(q.float(), *ring.arguments, **options, impl="gluon")
    schedule = hk.attention_schedule((*q.shape[:3], ring.k.shape[1]), **options, device="cuda")
    with refused("schedule must be made with one_slot=True"):
        hk.attention_fp8(q, *ring.arguments, q_scales=q_scales, **options, schedule=schedule, impl="gluon")
