"""The Hopper attention kernel on the device: error budget, poisoned memory, captured graphs, shared schedules."""

import pytest
import torch
from budget import assert_within_budget
from refusals import refused

import hiar_kernels as hk
from hiar_kernels.attention import gluon

pytestmark = pytest.mark.gpu

CASES = {
    "no mask": (None, 300, 1000, 3),
    "one key": (None, 1, 1, 1),
    "ring, full, wrapped": (hk.BlockCausal(520, 3, 6), [[9, 10, 11]], [[9, 10, 11, 6, 7, 8]], 12),
    "ring, half empty": (hk.BlockCausal(1560, 3, 6), [[3, 4, 5]], [[3, 4, 5, -1, -1, -1, 0, 1, 2]], 2),
    "window and sink": (hk.BlockCausal(70, 3, 5, 1), [[9, 10, 11]], [[0, 10, 11, 7, 8, 9, 4]], 2),
    "slots of less than a block": (hk.BlockCausal(50, 2, 6), [[6, 7]], [[2, 3, 4, 5, 6, 7, -1, 0]], 1),
    "whole blocks only": (hk.BlockCausal(128, 1, 3), [[4]], [[2, 3, 4, -1]], 2),
    "two tasks in a row": (hk.BlockCausal(520, 3, 6), [[3, 4, 5, 6, 7, 8]], [[0, 1, 2, 3, 4, 5, 6, 7, 8]], 6),
    "items at different tasks": (
        hk.BlockCausal(300, 2, (2, 6, 4)),
        [[0, 1], [6, 7], [2, 3]],
        [[0, 1, -1, -1, -1, -1], [6, 7, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]],
        12,
    ),
    "a query that sees nothing": (hk.BlockCausal(64, 1, 2), [[0, 9]], [[0, -1, 4]], 2),
    "nothing visible at all": (hk.BlockCausal(64, 1, 2), [[9]], [[0, -1]], 2),
    "a causal video": (hk.BlockCausal(200, 3, 9, 1), None, None, 6),
}


@pytest.fixture(autouse=True)
def hopper():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    lacking = gluon.unavailable(torch.device("cuda"))
    if lacking is not None and torch.cuda.get_device_capability() == (9, 0):
        pytest.fail(lacking, pytrace=False)  # a Hopper GPU whose kernel cannot run hides nothing
    if lacking is not None:
        pytest.skip(lacking)


def build(name, dtype, seed=0):
    mask, queries, keys, heads = CASES[name]
    options, batch = {}, 2
    if mask is not None:
        options = {"mask": mask}
        batch = 1 if queries is None else len(queries)
        if queries is None:
            queries = keys = 15 * mask.frame_tokens
        else:
            options["q_frames"] = torch.tensor(queries, dtype=torch.int32, device="cuda")
            options["kv_frames"] = torch.tensor(keys, dtype=torch.int32, device="cuda")
            queries, keys = len(queries[0]) * mask.frame_tokens, len(keys[0]) * mask.frame_tokens
    g = torch.Generator(device="cuda").manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, 128, generator=g, device="cuda").to(dtype) for n in (queries, keys, keys))
    return q * 2, k, v, options


def poison(k, v, options):
    """NaN wherever no query may look."""
    if "kv_frames" in options:
        hidden = ~options["mask"].visible(options["q_frames"], options["kv_frames"], len(k)).any(1)
        hidden = hidden.repeat_interleave(options["mask"].frame_tokens, 1)
        k, v = (
            k.masked_fill(hidden[:, :, None, None], float("nan")),
            v.masked_fill(hidden[:, :, None, None], float("nan")),
        )
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
    """Frame ids change in place; the captured graph sees what they say."""
    mask = hk.BlockCausal(520, 3, 9)
    q, k, v, _ = build("ring, full, wrapped", torch.bfloat16)
    q_frames, kv_frames = (torch.zeros(1, n, dtype=torch.int32, device="cuda") for n in (3, k.shape[1] // 520))

    def call():
        return hk.attention(q, k, v, mask=mask, q_frames=q_frames, kv_frames=kv_frames, impl="gluon")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for block in range(2):
        q_frames.copy_(torch.arange(3 * block, 3 * block + 3)[None])
        slots = torch.arange(kv_frames.shape[1], dtype=torch.int32)[None]
        kv_frames.copy_(torch.where(slots < 3 * block + 3, slots, -1))
        graph.replay()
        again = call()
        torch.cuda.synchronize()
        assert torch.equal(out, again)


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
