"""The predicted memory of a rollout is what a rollout takes: counted tensor by tensor on a CPU, by torch on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ids import brief
from made_runs import changed, make_request

from hiar_model.config import WanConfig
from hiar_model.models import quantized_linear
from hiar_model.models.quantized_linear import quantize_layers
from hiar_model.models.transformer import HiARTransformer
from hiar_model.planning.fit import fit_query
from hiar_model.planning.memory import WORKSPACE, ComponentMemory, LiveBytes, Memory, Request, predict
from hiar_model.rollout.batched_forward import BatchedForward, GraphKey
from hiar_model.rollout.footprint import forwards

pytestmark = pytest.mark.cpu

E4M3 = torch.float8_e4m3fn
CONFIG = WanConfig(dim=64, ffn_dim=160, num_heads=2, num_layers=3, freq_dim=16, text_dim=24, text_len=40)
NARROW = replace(CONFIG, dim=16, ffn_dim=16, num_heads=1, num_layers=1)  # latents are the most of it
REQUEST = make_request(CONFIG, 8, 12, 15, steps=3, window_frames=9, dtype=torch.float32, device="cpu")


def taken(request: Request) -> int:
    """The most bytes of tensors that were alive while a video was made, its weights among them."""
    with LiveBytes() as live:
        model = HiARTransformer(request.config).to(request.dtype).eval().requires_grad_(False)
        if request.linear_dtype is not None:
            quantize_layers(model, request.linear_dtype)
        live.restart()
        text = torch.randn(1, request.config.text_len, request.config.text_dim, dtype=request.dtype)
        for _ in request.make(model, text):
            pass
    return live.peak


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "stream", "dtype": torch.bfloat16},
        {"order": "wavefront", "fuse_cache_denoise": True},
        {"order": "block_first", "window_frames": 6, "sink_frames": 3},
        {"order": "stream", "kv_source": "next_step", "window_frames": (3, 6, 12)},
        {"order": "stream", "kv_dtype": E4M3},
        {"order": "stream", "kv_dtype": E4M3, "attention_dtype": E4M3},
        {"order": "stream", "kv_dtype": E4M3, "linear_dtype": E4M3},
        {"order": "stream", "linear_dtype": torch.int8},
        {"order": "wavefront", "kv_dtype": torch.bfloat16, "batch": 2},
        {"window_frames": None, "batch": 3, "kv_dtype": E4M3},
        {"num_frames": 30, "window_frames": 3, "steps": 1, "dtype": torch.float64},
        {"num_frames": 60, "window_frames": 3, "config": NARROW},
        {"config": replace(CONFIG, num_layers=9), "fuse_cache_denoise": True},
    ],
    ids=brief,
)
def test_a_rollout_takes_what_was_predicted(options):
    request = changed(REQUEST, **options)
    memory, found = predict(request), taken(request)
    assert abs(memory.total / found - 1) < 0.1, (memory, found)
    # of the parts, too, none could be left out: every one that counts is larger than what is allowed
    assert memory.total == memory.transformer + memory.caches + memory.scratch + memory.prompt + memory.latents + (
        memory.activations
    )
    assert min(memory.caches, memory.activations) > 0.1 * abs(memory.total - found)


def test_large_layers_in_8_bits_keep_nothing_in_float32(monkeypatch):
    monkeypatch.setattr(quantized_linear, "SMALL", 0)
    request = changed(REQUEST, linear_dtype=E4M3, dtype=torch.bfloat16)
    memory, found = predict(request), taken(request)
    assert abs(memory.total / found - 1) < 0.1, (memory, found)
    full, numbers = predict(replace(request, linear_dtype=None)).transformer, 3 * 64 * (4 * 64 + 2 * 160)
    assert full - memory.transformer > 0.9 * numbers  # one byte of two, but for scales


@pytest.mark.parametrize("order", ["step_first", "stream", "wavefront"])
def test_of_forwards_that_differ_in_what_they_see_the_fullest_is_counted(order):
    def visible(forward: BatchedForward) -> tuple[GraphKey, int]:
        groups = [group for row in forward.attend.layout.rows for group in row]
        most = max(sum(b - a for a, b in (*group.context, *group.own)) for group in groups)
        return replace(forward.key, caches=(0, 0, 0), layout=None), most

    config, request = replace(NARROW, in_channels=2, out_channels=2), changed(REQUEST, order=order, num_frames=18)
    model, text = HiARTransformer(config).eval().requires_grad_(False), torch.ones(1, 3, config.text_dim)
    counted = [visible(forward) for forward in forwards(request.make(model, text), False)]
    every = request.make(model, text)._executor.prepared(0)
    fullest: dict[GraphKey, int] = {}
    for key, slots in map(visible, every):
        key = replace(key, model=counted[0][0].model)
        fullest[key] = max(slots, fullest.get(key, 0))
    assert {key: max(slots for one, slots in counted if one == key) for key in fullest} == fullest
    assert max(fullest.values()) == 9 and len(counted) < 2 * len(fullest)


@pytest.mark.parametrize("order", ["step_first", "stream"])
def test_what_captured_visits_take_beside_eager_ones(order):
    """The prompt's keys once more, in a place of their own; on a GPU a second workspace of cuBLAS and the pool."""
    eager = changed(REQUEST, order=order, device="cuda")
    one, other = predict(eager), predict(changed(eager, cuda_graph=True))
    keys = 3 * 2 * 48 * 64 * 4  # layers, keys and values, tokens (40 in tiles of 16), width, float32
    assert keys <= other.prompt - one.prompt <= 1.05 * keys
    assert (one.workspaces, other.workspaces) == (WORKSPACE, 2 * WORKSPACE)
    assert predict(changed(eager, device="cpu")).workspaces == 0
    assert one.activations == other.activations
    assert other.task - one.task == other.prompt - one.prompt + WORKSPACE
    decoding = ComponentMemory(resident=5, peak=1 << 30)
    one, other = (replace(memory, vae=decoding) for memory in (one, other))
    assert other.decoding - one.decoding == other.prompt - one.prompt + WORKSPACE + one.activations


def test_nothing_is_kept_of_meta_tensors():
    """A real rollout of the same shapes, after the prediction, works and gives the same as before it."""

    def made() -> torch.Tensor:
        torch.manual_seed(0)
        model = HiARTransformer(request.config).eval().requires_grad_(False)
        return torch.cat([block.latents for block in request.make(model, torch.ones(1, 3, 24))], 1)

    request = changed(REQUEST, order="wavefront", fuse_cache_denoise=True, num_frames=9, text_tokens=3)
    before = made()
    predict(changed(request, device="cuda"))
    predict(request)
    assert torch.equal(made(), before)


def test_live_bytes():
    with LiveBytes() as live:
        x = torch.zeros(100)
        view = x[10:].view(9, 10)
        assert live.now == live.peak == 400
        y = x + 1  # 400 more, at the end of the statement gone again
        del y
        assert (live.now, live.peak) == (400, 800)
        x.add_(1)
        assert live.restart() == 400 == live.peak
        del x
        assert live.now == 400, "a view keeps the whole"
        del view
    assert live.now == 0


def test_the_caches_are_those_of_the_engine():
    """Wan 1.3B at 480x832, by hand: 1560 tokens a frame of 1536 numbers, 30 layers, keys and values."""
    frame = 1560 * 1536 * 30 * 2
    wan = make_request(WanConfig.from_name("wan2.1-t2v-1.3b"), 60, 104, 21, window_frames=21)
    ids = 4 * 21
    memory = predict(wan)
    assert memory.caches == 2 * 21 * frame + ids and memory.rings == 1 and memory.scratch == 0
    assert memory.transformer == 2 * 1_418_996_800
    narrow = predict(changed(wan, order="stream", kv_dtype=E4M3))
    scales = 4 * 21 * 12 * 4 * 2 * 30
    places = 4 * 21 * 8 * 1536 * 30  # 1560 keys of a frame have 1568 places for their values
    assert narrow.caches == 4 * (21 * frame + ids) + scales + places and narrow.rings == 4
    assert narrow.caches / 2**30 == pytest.approx(11.276, abs=0.001)  # of 22.5 GiB in bfloat16
    assert narrow.scratch == 0
    ring = 1560 * 1536 * 2  # of a frame's tokens, bfloat16
    assert memory.activations > 3 * ring * 8960 / 1536, "the feed-forward's hidden width alone"


def test_streaming_with_four_rings_in_8_bits_fits_24_gb():
    """All of it: weights, four rings of 21 frames, a task, the VAE and its decoding; the prompt's encoder is gone."""
    needed = {}
    for kv_dtype in (None, "float8_e4m3fn"):
        query = fit_query("wan2.1-t2v-1.3b", order="stream", cuda_graph=True, kv_dtype=kv_dtype, offload=("text",))
        assert (query.request.height, query.request.width, query.request.rollout.windows) == (60, 104, (21,) * 4)
        needed[kv_dtype] = query.memory()
    narrow, whole = needed["float8_e4m3fn"], needed[None]
    assert narrow.rings == whole.rings == 4 and narrow.vae.weights
    assert narrow.total < 24e9 < whole.total


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"steps": 1, "order": "stream"}, 2 + 2),  # what the task reads and makes, which its cache task reads
        ({"steps": 3, "order": "stream"}, 3 + 2),  # those of three levels wait for their cache tasks
        ({"steps": 3, "order": "stream", "batch": 2}, 2 * (3 + 2)),
        ({"steps": 1, "order": "stream", "num_frames": 3}, 2 + 2),
        ({"steps": 2, "order": "step_first"}, 5 + 1 + 2),  # all blocks wait for the second step
    ],
    ids=brief,
)
def test_latents_in_flight(options, blocks):
    """And the block that was handed over, and the one that is being drawn; of a video of five blocks."""
    request = changed(REQUEST, **options)
    assert predict(request).latents == blocks * 3 * CONFIG.in_channels * 8 * 12 * 4


def test_phases():
    memory = Memory(
        transformer=10, caches=30, rings=2, scratch=3, prompt=4, latents=5, activations=7,
        text_encoder=ComponentMemory(20, 0, 3), vae=ComponentMemory(2, 6, 9), workspaces=1,
    )  # fmt: skip
    resident = 10 + 30 + 3 + 4 + 5 + 20 + 2 + 6 + 1
    assert (memory.resident, memory.task, memory.decoding) == (resident, resident + 7, resident + 9)
    assert (memory.encoding, memory.total, memory.when) == (36, resident + 9, "decoding")
    light = replace(memory, offload=("text", "vae"))
    assert (light.encoding, light.total, light.when) == (34, 60, "a task")
    assert replace(light, caches=0).when == "encoding the prompt"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": "sideways"}, "order"),
        ({"window_frames": 2}, r"window_frames must be .* 3 .*got 2"),
        ({"num_frames": 10}, "nearest 9 or 12"),
        ({"num_frames": None, "order": "stream", "window_frames": None}, "window_frames must be a number for an end"),
        ({"kv_dtype": torch.int8}, "kv_dtype must be one of .*float8_e4m3fn"),
        ({"height": 9}, "multiples of the patch 2x2, got 9x12"),
    ],
    ids=brief,
)
def test_what_a_rollout_refuses_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        predict(changed(REQUEST, **options))


def test_devices_and_offloads():
    with pytest.raises(ValueError, match="device must be one of cuda, cpu, got 'tpu'"):
        changed(REQUEST, device="tpu")
    with pytest.raises(ValueError, match="offload must be one of text, vae, got 'weights'"):
        predict(REQUEST, offload=("weights",))
