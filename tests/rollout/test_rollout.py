"""Every walk gives the result of hiar_model.rollout.reference; what it costs and keeps is as planned."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import make_rollout
from refusals import refused
from safetensors.torch import load_file
from tiny_model import MODEL, SHALLOW, SIZE, TEXT, TINY, difference, make_model, reference, run

from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.rollout import rollout
from hiar_model.rollout.noise import EXTERNAL, keyed_noise
from hiar_model.version import NOISE

pytestmark = pytest.mark.cpu

TOLERANCE = 1e-5


def test_step_first_agrees_with_the_published_implementation():
    golden = load_file(Path(__file__).parents[1] / "data" / "wan_tiny.safetensors")
    config = WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=3, freq_dim=64, text_dim=48, text_len=16,
                       in_channels=4, out_channels=4)  # fmt: skip
    model = HiARTransformer(config)
    model.load_state_dict({k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")})
    renoise = golden["step_first.renoise"]
    for options in ({}, {"order": "wavefront", "pairs": True}):
        made = rollout(
            model,
            golden["step_first.noise"],
            golden["step_first.context"],
            FlowSchedule(),
            renoise=lambda step, block: renoise[step, block],
            **options,
        )
        assert difference(made, golden["step_first.sde_global.output"]) < 2e-5


WALKS = list(itertools.product(("step_first", "stream", "wavefront"), (False, True)))


def assert_walks_agree(**options) -> None:
    """In float32 with the reference in float64."""
    expected = reference(**options)
    assert expected.abs().max() > 0.1
    for order, pairs in WALKS:
        assert difference(run(order=order, pairs=pairs, **options), expected) < TOLERANCE, (order, pairs)


def with_prefix(options: dict) -> dict:
    """The number of prefix frames as frames."""
    if "prefix" not in options:
        return options
    shape = (options.get("batch", 1), options["prefix"], TINY.in_channels, *SIZE.values())
    return {**options, "prefix": torch.randn(shape, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_walks_agree_for_any_number_of_steps(steps):
    few = {"num_frames": 9} if steps < 50 else {"num_frames": 6, "model": SHALLOW}
    assert_walks_agree(steps=steps, window_frames=5, **few)


@pytest.mark.parametrize(
    "options",
    [
        {"window_frames": 7},
        {"window_frames": 3},
        {"window_frames": (3, 4, 7, None)},
        {"window_frames": 6, "sink_frames": 1},
        {"window_frames": 8, "sink_frames": 5, "num_frames": 18},
        {"prefix": 3},
        {"prefix": 4, "window_frames": 5},
        {"prefix": 7, "window_frames": 6, "sink_frames": 2},
        {"batch": 2, "window_frames": 5},
        {"batch": 2, "prefix": 2, "window_frames": (3, 5, 3, 9)},
        {"num_frames": 3},
        {"num_frames": 6},
        {"trajectory": "ode"},
        {"frames_per_block": 2, "num_frames": 8, "window_frames": 5},
        {"frames_per_block": 1, "num_frames": 5, "window_frames": 3, "sink_frames": 1},
        {"context_noise": 100.0},
    ],
    ids=str,
)
def test_walks_agree(options):
    """Of two layers where options meet."""
    more = {"num_frames": 9 + options.get("prefix", 3), "model": MODEL if len(options) > 1 else SHALLOW}
    assert_walks_agree(**with_prefix({**more, **options}))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_walks_agree_for_any_legal_options(data):
    block = data.draw(st.integers(1, 3))
    sink = data.draw(st.integers(0, 2))
    steps = data.draw(st.integers(1, 4))
    window = st.one_of(st.none(), st.integers(sink + block, sink + 3 * block + 1))
    prefix = data.draw(st.integers(0, 4))
    prefix_frames = keyed_noise(0, 0, 0, 0, (prefix, TINY.in_channels, *SIZE.values()))[None] if prefix else None
    assert_walks_agree(
        steps=steps,
        frames_per_block=block,
        sink_frames=sink,
        prefix=prefix_frames,
        window_frames=data.draw(st.lists(window, min_size=steps, max_size=steps)),
        num_frames=prefix + block * data.draw(st.integers(1, 5)),
    )


def test_a_model_for_each_step():
    experts = [make_model(s) for s in range(4)]
    assert_walks_agree(model=experts)
    assert difference(run(model=experts), run()) > 0.1


@pytest.mark.parametrize("pairs", [False, True])
def test_windows_of_a_batch_where_attention_reads_frame_ids(pairs):
    options = {"num_frames": 12, "window_frames": (3, 4, 7, 6), "batch": 2, "model": SHALLOW}
    made = run(order="wavefront", pairs=pairs, attention_impl="reference", **options)
    assert difference(made, reference(**options)) < TOLERANCE


def test_block_first_is_another_result_and_shared_kv_too():
    matched = run()
    for options in ({"order": "block_first"}, {"order": "stream", "cache_source": "next_step"}):
        other = run(**options)
        assert difference(other[:, :3], matched[:, :3]) < TOLERANCE, "the first block has no context"
        assert difference(other, matched) > 1e-2


OTHER_CONTEXTS = [
    {"num_frames": 15},
    {"num_frames": 15, "window_frames": (4, 7, 5, 6), "batch": 2},
    {"num_frames": 16, "window_frames": (5, 7, 6, 8), "sink_frames": 2, "prefix": 4, "context_noise": 50.0},
]


@pytest.mark.parametrize("options", OTHER_CONTEXTS, ids=str)
def test_shared_kv_in_both_orders(options):
    options = with_prefix({**options, "cache_source": "next_step"})
    expected = reference(**options)
    for order in ("stream", "wavefront"):
        assert difference(run(order=order, **options), expected) < TOLERANCE, order


@pytest.mark.parametrize("options", OTHER_CONTEXTS, ids=str)
def test_block_first(options):
    options = with_prefix({**options, "order": "block_first"})
    assert difference(run(**options), reference(**options)) < TOLERANCE


def test_shared_kv_is_that_of_the_next_steps_task():
    """With one step there is nothing to lend: both sources agree."""
    assert difference(run(steps=1, order="stream", cache_source="next_step"), run(steps=1)) < TOLERANCE


def test_step_first_equals_one_teacher_forced_forward():
    """Training sees exactly the contexts of a step-first pass: a context copy one level down, a target copy."""
    schedule, frames = FlowSchedule.uniform(2), 9
    x0 = [keyed_noise(0, 0, -1, n, (3, 2, 2, 4))[None] for n in range(3)]
    first = torch.cat(x0, 1)
    context: dict[int, torch.Tensor] = {}
    inner = make_rollout(MODEL, TEXT, schedule, num_frames=frames, **SIZE)
    original = inner._executor._put

    def spy(level, block, latents):
        if level == 1:
            context[block] = latents
        original(level, block, latents)

    inner._executor._put = spy
    list(inner)
    noisy = torch.cat([context[n] for n in range(3)], 1)
    t = [torch.full((1, frames), s) for s in schedule.timesteps]
    kv = MODEL.kv(noisy, t[1], TEXT)
    velocity = MODEL(first, t[0], TEXT, "block_causal", context=kv)
    sigma, following = schedule.sigmas[:2]
    noise = torch.cat([keyed_noise(0, 0, 0, n, (3, 2, 2, 4))[None] for n in range(3)], 1)
    expected = (1 - following) * (first - sigma * velocity) + following * noise
    assert difference(expected, noisy) < TOLERANCE


def test_frame_one_million_equals_frame_zero():
    options = {"num_frames": 12, "window_frames": 7, "sink_frames": 1}
    assert difference(run(first_frame=1_000_000, **options), reference(**options)) < TOLERANCE


def test_first_blocks_of_a_longer_run_equal_a_shorter_run():
    for order in ("step_first", "stream", "wavefront", "block_first"):
        long, short = (run(order=order, num_frames=n, window_frames=5) for n in (15, 9))
        assert difference(long[:, :9], short) < TOLERANCE


def test_noise_belongs_to_the_video_not_to_the_batch():
    together = run(batch=2, video_ids=[5, 9])
    assert difference(together[1:], reference(video_ids=[9])) < TOLERANCE
    assert difference(together[1:], reference(video_ids=[5])) > 0.1
    assert torch.equal(keyed_noise(3, 1, 2, 0, (2, 2)), keyed_noise(3, 1, 2, 0, (2, 2)))
    keys = itertools.product((0, 1), (0, 1), (-1, 0), (0, 1))
    assert len({float(keyed_noise(*key, (1,))) for key in keys}) == 16


@pytest.mark.parametrize("trajectory", ["sde", "ode"])
def test_noise_as_a_tensor_is_of_the_frames_behind_the_prefix(trajectory):
    options = {"prefix": torch.ones(1, 4, TINY.in_channels, *SIZE.values()), "trajectory": trajectory}
    noise = torch.cat([keyed_noise(0, 0, -1, n, (3, 2, 2, 4)) for n in (2, 3)])[None]
    made = make_rollout(SHALLOW, TEXT, FlowSchedule.uniform(2), num_frames=10, noise=noise, **SIZE, **options)
    assert made.blocks_done == 2, "before the first block, those of the prefix"
    before = noise.clone()
    latents = torch.cat([block.latents for block in made], 1)
    assert torch.equal(noise, before), "it is the caller's"
    assert torch.equal(latents, run(num_frames=10, steps=2, model=SHALLOW, **options))
    # where no noise of this version is in it, any version goes on with its state
    assert made.state_dict()["noise"] == {"sde": NOISE, "ode": EXTERNAL}[trajectory]


def test_text_of_each_block():
    other = keyed_noise(0, 0, 0, 0, (1, 4, TINY.text_dim))
    text = lambda block: TEXT if block < 2 else other  # noqa: E731
    expected = reference(text=text)
    assert difference(expected[:, :6], run()[:, :6]) < TOLERANCE
    assert difference(expected[:, 6:], run()[:, 6:]) > 1e-2
    for order in ("step_first", "wavefront"):
        assert difference(run(text=text, order=order), expected) < TOLERANCE
    both = run(text=text, order="wavefront", batch=2)  # prompts of several blocks in one forward, each for two videos
    assert difference(both[:1], expected) < TOLERANCE
    with pytest.raises(ValueError, match="one prompt for all blocks"):
        run(text=text, pairs=True)


@pytest.mark.parametrize("order", ["step_first", "stream", "wavefront", "block_first"])
@pytest.mark.parametrize("after", [1, 2])
def test_save_load_go_on_equals_one_run_bit_for_bit(order, after):
    def start():
        return make_rollout(MODEL, TEXT, FlowSchedule.uniform(3), num_frames=12, window_frames=5, order=order, **SIZE)

    whole = torch.cat([b.latents for b in start()], 1)
    first = start()
    blocks = list(itertools.islice(first, after))
    state = first.state_dict()
    list(first)  # going on must not touch the saved state
    saved = {name: x.clone() for name, x in state["latents"].items()}
    second = start()
    second.load_state_dict(state)
    resumed = torch.cat([b.latents for b in [*blocks, *second]], 1)
    assert torch.equal(resumed, whole)
    assert all(torch.equal(state["latents"][name], x) for name, x in saved.items()), "others may go on from there too"
    assert not second._executor.latents
    with pytest.raises(ValueError, match="state of a different rollout"):
        make_rollout(MODEL, TEXT, FlowSchedule.uniform(3), num_frames=9, order=order, **SIZE).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "forwards", "launches"),
    [
        ({"order": "step_first"}, 2 * 4 * 5 - 4, 36),
        ({"order": "stream"}, 36, 4 * 5 + 4),
        ({"order": "wavefront"}, 36, 2 * 5 + 4 - 2),
        ({"order": "wavefront", "pairs": True}, 36, 4 + 4 + 3),  # 8 diagonals; the lone denoise(s, 0) run apart
        ({"order": "block_first"}, 5 * 5 - 1, 24),
        ({"order": "stream", "cache_source": "next_step"}, 5 * 5 - 1, 24),
        ({"order": "stream", "window_frames": 3}, 4 * 5, 20),  # nobody reads a cache
    ],
)
def test_forwards_are_as_planned(options, forwards, launches):
    made = make_rollout(MODEL, TEXT, FlowSchedule.uniform(4), num_frames=15, **SIZE, **options)
    seen = []
    made.on_task = lambda done, total: seen.append((done, total))
    assert [b.first_frame for b in made] == [0, 3, 6, 9, 12]
    counters = made._executor.counters
    assert counters.denoise + counters.cache == made.forwards_total == forwards
    assert seen[-1] == (forwards, forwards)
    assert counters.launches == launches
    assert not made._executor.latents, "latents in flight must all be consumed"


def test_a_cache_visit_skips_what_nobody_reads(monkeypatch):
    """The head never runs for a cache task, nor the last layer beyond its keys; the prompt's keys are made once."""
    made = make_rollout(MODEL, TEXT, FlowSchedule.uniform(2), num_frames=6, order="stream", **SIZE)
    calls = {"head": 0, "ffn": 0, "text": 0}
    handles = [
        MODEL.head.register_forward_hook(lambda *_: calls.__setitem__("head", calls["head"] + 1)),
        MODEL.blocks[-1].ffn.register_forward_hook(lambda *_: calls.__setitem__("ffn", calls["ffn"] + 1)),
        MODEL.text_embedding.register_forward_hook(lambda *_: calls.__setitem__("text", calls["text"] + 1)),
    ]
    list(made)
    for handle in handles:
        handle.remove()
    assert calls == {"head": 4, "ffn": 4, "text": 1}


def test_poisoned_rings_change_nothing():
    options = {"num_frames": 9, "order": "wavefront", "window_frames": 5, **SIZE}
    made = make_rollout(MODEL, TEXT, FlowSchedule.uniform(4), **options)
    for tensor in made._executor.cache.k + made._executor.cache.v:
        tensor.fill_(float("nan"))
    assert torch.equal(
        torch.cat([b.latents for b in made], 1), run(**{k: v for k, v in options.items() if k not in SIZE})
    )


def test_memory_of_an_endless_stream_is_flat():
    """300 frames (2,000 with all that is behind them: test_long_stream.py): rings as predicted, nothing else kept."""
    made = make_rollout(MODEL, TEXT, FlowSchedule.uniform(2), num_frames=None, order="stream", window_frames=7, **SIZE)
    cache = made._executor.cache
    before = [t.data_ptr() for t in cache.k]
    kept = set()
    for block in itertools.islice(made, 100):
        executor = made._executor
        kept.add((len(executor.latents), len(executor.prompt_cache.entries), len(executor.nan_guard.unchecked)))
    assert block.first_frame == 297
    assert len(kept) == 1
    assert [t.data_ptr() for t in cache.k] == before
    taken = sum(t.numel() * t.element_size() for t in [*cache.k, *cache.v, cache.frames])
    assert taken == cache.memory_bytes(TINY, cache.capacities, 1, cache.frame_tokens)
    assert cache.capacities == (7, 7)


def test_non_finite_latents_name_step_and_block():
    broken = lambda step, block: torch.full((1, 3, 2, 2, 4), float("nan") if (step, block) == (1, 2) else 0.0)  # noqa: E731
    with pytest.raises(FloatingPointError, match="step 1 of block 2"):
        run(renoise=broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 10}, "got 10, nearest 9 or 12"),
        ({"num_frames": None, "window_frames": 6}, "order must be one of stream, .* got step_first"),
        ({"num_frames": None, "order": "stream"}, "window_frames must be a number for an endless video, got None"),
        ({"order": "zigzag"}, "step_first, stream, wavefront, block_first"),
        ({"trajectory": "x"}, "sde, ode"),
        ({"executor": "warp"}, "executor must be one of eager"),
        ({"window_frames": 2}, "window_frames"),
        ({"window_frames": (6, 6)}, "one per step"),
        ({"noise": torch.zeros(1, 6, 2, 2, 4)}, r"noise must be \[1, 9, 2, 2, 4\]"),
        ({"prefix": torch.zeros(1, 3, 4, 2, 4), "num_frames": 12}, "prefix must be"),
        ({"video_ids": [1, 2]}, "video_ids"),
        ({"model": [MODEL]}, "one for each of the 4 steps"),
        ({"cache_source": "next_step"}, "use stream or wavefront"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with refused(message):
        run(**options)
