"""The Hopper attention kernel on the device: error budget, poisoned memory, captured graphs, shared schedules."""

import on_hopper
import pytest
import torch
from budget import assert_within_budget
from on_hopper import assert_one_graph_serves_every_block, frames, hopper  # noqa: F401
from refusals import refused

import hiar_kernels as hk

pytestmark = pytest.mark.gpu

CASES = {
    "no mask": (None, 300, 1000, 3),
    "one key": (None, 1, 1, 1),
    **on_hopper.CASES,
    "ring, full, wrapped": (hk.BlockCausal(520, 3, 6), [[9, 10, 11]], [[9, 10, 11, 6, 7, 8]], 12),
    "ring, half empty": (hk.BlockCausal(1560, 3, 6), [[3, 4, 5]], [[3, 4, 5, -1, -1, -1, 0, 1, 2]], 2),
    "a causal video": (hk.BlockCausal(200, 3, 9, 1), None, None, 6),
}


def build(name, dtype, seed=0):
    mask, queries, keys, heads = CASES[name]
    options, batch = {}, 2
    if mask is not None:
        options = {"mask": mask}
        batch = 1 if queries is None else len(queries)
        if queries is None:
            queries = keys = 15 * mask.frame_tokens
        else:
            options["q_frames"], options["kv_frames"] = frames(queries, keys)
            queries, keys = len(queries[0]) * mask.frame_tokens, len(keys[0]) * mask.frame_tokens
    g = torch.Generator(device="cuda").manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, 128, generator=g, device="cuda").to(dtype) for n in (queries, keys, keys))
    return q * 2, k, v, options


def poison(k, v, options):
    """NaN wherever no query may look."""
    if "kv_frames" in options:
        hidden = ~options["mask"].visible(options["q_frames"], options["kv_frames"], len(k)).any(1)
        hidden = hidden.repeat_interleave(options["mask"].frame_tokens, 1)
        k, v = (x.masked_fill(hidden[:, :, None, None], torch.nan) for x in (k, v))
    return k, v


@pytest.mark.parametrize("scale", [None, -0.05, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_budget(name, dtype, scale):
    q, k, v, options = build(name, dtype)
    hk_out, lse = hk.attention_with_lse(q, *poison(k, v, options), **options, scale=scale, impl="gluon")
    options |= {"scale": scale}
    exact, exact_lse = hk.reference.attention_with_lse(q.double(), k.double(), v.double(), **options)
    eager = hk.reference.attention(q, k, v, **options)
    assert_within_budget(hk_out, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)


def test_batch_items_of_a_ring_with_room(name="items at different tasks"):
    """Views of rings with more slots than are used, as a cache has them."""
    q, k, v, options = build(name, torch.bfloat16)
    wide = [torch.full((3, x.shape[1] + 600, *x.shape[2:]), float("nan"), dtype=x.dtype, device="cuda") for x in (k, v)]
    for ring, x in zip(wide, (k, v), strict=True):
        ring[:, : x.shape[1]] = x
    views = [ring[:, : k.shape[1]] for ring in wide]
    assert torch.equal(hk.attention(q, *views, **options, impl="gluon"), hk.attention(q, k, v, **options, impl="gluon"))


def test_the_same_bits_every_time_and_one_schedule_for_all_layers():
    q, k, v, options = build("ring, full, wrapped", torch.bfloat16)
    shape = (*q.shape[:3], k.shape[1])
    schedule = hk.attention_schedule(shape, **options, device="cuda")
    first = hk.attention(q, k, v, **options, impl="gluon")
    for _ in range(50):
        assert torch.equal(hk.attention(q, k, v, **options, schedule=schedule, impl="gluon"), first)


def test_one_graph_serves_every_block():
    mask = hk.BlockCausal(520, 3, 9)
    q, k, v, _ = build("ring, full, wrapped", torch.bfloat16)

    def call(q_frames, kv_frames):
        return hk.attention(q, k, v, mask=mask, q_frames=q_frames, kv_frames=kv_frames, impl="gluon")

    assert_one_graph_serves_every_block(call, k.shape[1] // 520)


def test_auto_takes_it_where_it_was_measured():
    q, k, v, options = build("ring, full, wrapped", torch.bfloat16)
    with hk.taken() as ran:
        hk.attention(q, k, v, **options)
    assert ("attention", "gluon") in ran


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "takes bfloat16 and float16 of head_dim 128"),
        (lambda q, k, v: (q[..., :64], k[..., :64], v[..., :64]), "takes bfloat16 and float16 of head_dim 128"),
        (lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), "heads side by side"),
    ],
)
def test_refusals_are_one_line(change, message):
    q, k, v, _ = build("no mask", torch.bfloat16)
    with refused(message):
        hk.attention(*change(q, k, v), impl="gluon")


def test_no_gradient():
    q, k, v, _ = build("no mask", torch.bfloat16)
    with pytest.raises(ValueError, match="impl='gluon' has no gradient"):
        hk.attention(q.requires_grad_(), k, v, impl="gluon")
