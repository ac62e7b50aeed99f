"""`step_together`: every rollout makes the blocks that it makes alone, whatever the others do."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from refusals import refusal
from tiny_model import MODEL, SIZE, TEXT, make_model

from hiar_model import ExecutionConfig, Rollout, RolloutConfig, step_together
from hiar_model.models.transformer import HiARTransformer
from hiar_model.rollout.together import batches_with

pytestmark = pytest.mark.cpu

OTHER = torch.randn(1, 5, TEXT.shape[-1], generator=torch.Generator().manual_seed(2))
LATENT = tuple(SIZE.values())
CLOSE = 2e-5
"""Of latents of order one. A matrix product of more rows may add up in another order, which the tiny model, whose
weights are large, makes ten times of what it is in a step."""


def rollout(order="stream", text=TEXT, seed=0, frames=12, model=MODEL, execution=None, size=LATENT, **options):
    given = {name: options.pop(name) for name in ("prefix", "conditioning_frames", "noise") if name in options}
    config = RolloutConfig((1000, 750, 500, 250), order=order, **{"window_frames": 6, **options})
    return Rollout(model, text, config, execution, num_latent_frames=frames, latent_size=size, seed=seed, **given)


def finish(rollouts, blocks=None):
    """Step to the end; the latents of each, or its error."""
    made = [[] if blocks is None else list(of) for of in blocks or rollouts]
    going = dict(enumerate(rollouts))
    while going:
        for i, outcome in zip(list(going), step_together(list(going.values())), strict=True):
            if isinstance(outcome, list):
                made[i] += [block.latents for block in outcome]
                continue
            del going[i]
            if outcome is not None:
                made[i] = outcome
    return made


def alone(made):
    return [block.latents for block in made]


def same(a, b, tolerance=CLOSE):
    return len(a) == len(b) and all((x - y).abs().max() <= tolerance for x, y in zip(a, b, strict=True))


@pytest.fixture
def batches(monkeypatch):
    """How many forwards had how many samples."""
    counted, run = Counter(), HiARTransformer.run

    def counting(self, latents, *rest):
        counted[len(latents)] += 1
        return run(self, latents, *rest)

    monkeypatch.setattr(HiARTransformer, "run", counting)
    return counted


MIXED = [
    {},
    {"seed": 1, "text": OTHER},  # a longer prompt
    {"seed": 2, "frames": 6},  # ends before the others
    {"seed": 3, "order": "wavefront", "window_frames": 9, "sink_frames": 2},
    {"seed": 4, "order": "block_first", "window_frames": None},
    {"seed": 5, "kv_source": "next_step"},
    {"seed": 6, "order": "step_first"},
    {"seed": 7, "sampler": "ode"},
    {"seed": 8, "fuse_cache_denoise": True},
    {"seed": 9, "fuse_cache_denoise": True, "order": "wavefront", "window_frames": 9},
    {"seed": 10, "prefix": torch.ones(1, 4, 2, *LATENT)[:, :3], "frames": 12},
    {"seed": 11, "conditioning_frames": {4: torch.ones(1, 2, *LATENT)}},
    {"seed": 12, "text": lambda block: TEXT if block < 2 else OTHER},
    {"seed": 13, "text": lambda block: TEXT if block < 2 else OTHER, "on_prompt_change": "recache"},
]


def test_each_makes_what_it_makes_alone(batches):
    expected = [alone(rollout(**options)) for options in MIXED]
    apart = sum(batches.values())
    batches.clear()
    made = finish([rollout(**options) for options in MIXED])
    for options, one, other in zip(MIXED, made, expected, strict=True):
        assert same(one, other), options
    assert sum(batches.values()) < apart / 4 and max(batches) > len(MIXED)


@pytest.mark.parametrize("behind", [1, 3, 7])
def test_rollouts_at_different_blocks(behind, batches):
    """Any group of one beside any of the other: denoise tasks, and the cache tasks of four steps."""
    expected = [alone(rollout(seed=seed)) for seed in (0, 1)]
    first, second = rollout(seed=0), rollout(seed=1)
    made = [[]]
    for _ in range(behind):
        made[0] += [block.latents for block in first.step()]
    batches.clear()
    both = finish([first, second], [made[0], []])
    assert all(same(*pair) for pair in zip(both, expected, strict=True))
    assert batches[5], "a denoise task beside four cache tasks"


@pytest.mark.parametrize(
    "options",
    [
        {"execution": ExecutionConfig(kv_dtype="float8_e4m3fn")},
        {"execution": ExecutionConfig(kv_dtype="bfloat16"), "kv_source": "next_step"},
        {"execution": ExecutionConfig(on_nan="retry")},
    ],
    ids=["8 bits", "shared keys in 16 bits", "retry"],
)
def test_other_executions(options, batches):
    texts = (TEXT, OTHER)
    expected = [alone(rollout(seed=seed, text=text, **options)) for seed, text in enumerate(texts)]
    batches.clear()
    made = finish([rollout(seed=seed, text=text, **options) for seed, text in enumerate(texts)])
    assert set(batches) == ({2} if "kv_source" in options else {2, 8})
    # keys that are rounded to a few bits may fall to the other side: a step of 2^-4 or 2^-9 of a key
    coarse = {"float8_e4m3fn": 0.1, "bfloat16": 5e-3, None: CLOSE}[options["execution"].kv_dtype]
    assert all(same(*pair, coarse) for pair in zip(made, expected, strict=True))


def test_bfloat16_stays_in_its_budget():
    exact = [alone(rollout(seed=seed, model=make_model().double())) for seed in (0, 1)]
    half = make_model().bfloat16()
    rollouts = [rollout(seed=seed, model=half) for seed in (0, 1)]
    apart = [alone(each) for each in rollouts]
    levels = {forward.sigmas.dtype for each in rollouts for forward in each._executor.batched_forwards.values()}
    assert levels == {torch.float32}, "noise levels are not rounded"
    made = finish([rollout(seed=seed, model=half) for seed in (0, 1)])

    def error(of):
        pairs = [pair for x, y in zip(of, exact, strict=True) for pair in zip(x, y, strict=True)]
        return max(float((a.double() - b).abs().max()) for a, b in pairs)

    largest = max(float(x.abs().max()) for of in exact for x in of)
    assert error(made) <= 2 * error(apart) + torch.finfo(torch.bfloat16).eps * largest


def test_one_that_is_not_finite_ends_alone():
    def noise(step, block):
        x = torch.randn(1, 3, 2, *LATENT, generator=torch.Generator().manual_seed(8 * block + step))
        return x.fill_(math.nan) if (step, block) == (1, 2) else x

    expected = [alone(rollout(seed=seed, text=OTHER)) for seed in (0, 1)]
    first, bad, last = rollout(seed=0, text=OTHER), rollout(noise=noise), rollout(seed=1, text=OTHER)
    made = finish([first, bad, last])
    assert isinstance(made[1], FloatingPointError)
    assert str(made[1]).startswith("latents are not finite from step 1 of block 2 on: the noise of its step")
    assert same(made[0], expected[0]) and same(made[2], expected[1])


def test_on_an_accelerator_too_a_block_is_not_handed_over_before_it_is_known_to_be_finite():
    bad = rollout(frames=3, noise=lambda step, block: torch.full((1, 3, 2, *LATENT), math.nan if step == 1 else 1.0))
    bad._executor.nan_guard.device = torch.device("cuda")  # which it asks for its type alone
    made = finish([bad, rollout(frames=3)])
    assert isinstance(made[0], FloatingPointError) and len(made[1]) == 1


def test_a_forward_that_fails_ends_those_in_it(monkeypatch):
    class Broken(HiARTransformer):
        def run(self, *_):
            raise RuntimeError("out of memory")

    good, broken = rollout(), [rollout(model=make_model(1)) for _ in range(2)]
    broken[0]._executor.models[0].__class__ = Broken
    broken[1]._executor.models = broken[0]._executor.models
    broken[1]._executor.tables = broken[0]._executor.tables
    made = finish([broken[0], good, broken[1]])
    assert [str(one) for one in (made[0], made[2])] == ["out of memory"] * 2
    assert same(made[1], alone(rollout()))


def test_one_that_leaves_goes_on_alone():
    expected = [alone(rollout(seed=seed)) for seed in (0, 1)]
    both = rollout(seed=0), rollout(seed=1)
    made = [[], []]
    for _ in range(7):
        for of, outcome in zip(made, step_together(both), strict=True):
            of += [block.latents for block in outcome]
    for of, one in zip(made, both, strict=True):
        of += [block.latents for block in one]
    assert all(same(*pair) for pair in zip(made, expected, strict=True))


def test_saved_forked_and_taken_back_beside_another():
    expected, other = alone(rollout(seed=0)), alone(rollout(seed=1))
    forked = alone(rollout(seed=0, text=lambda block: TEXT if block < 2 else OTHER))
    first, second = rollout(seed=0), rollout(seed=1)
    made, beside, state = [], [], None
    for _ in range(5):
        second_only = step_together([second])[0]
        beside += [block.latents for block in second_only]
    while len(made) < 3:
        for of, outcome in zip((made, beside), step_together([first, second]), strict=True):
            of += [block.latents for block in outcome]
        if len(made) == 2 and state is None:
            state = first.state_dict()
    assert same(made, expected[:3])
    first.load_state_dict(state)  # back by a block
    fork = rollout(seed=0, text=OTHER)
    fork.load_state_dict(state)
    three = finish([first, second, fork], [made[:2], beside, made[:2]])
    assert same(three[0], expected) and same(three[1], other) and same(three[2], forked)
    assert not same(three[2], expected)


def test_blocks_that_are_ready_come_first():
    made, expected = rollout(), alone(rollout())
    blocks = iter(made)
    taken = [next(blocks).latents]
    while not (outcome := step_together([made])[0]):
        pass
    made.ready += outcome
    with pytest.raises(ValueError, match="block 1 is ready"):
        made.state_dict()
    state = None
    for block in blocks:
        taken.append(block.latents)
        state = state or made.state_dict()
        assert made.blocks_done == block.block + 1
    assert same(taken, expected)
    made.ready += outcome
    made.load_state_dict(state)
    assert not made.ready


def test_hooks_see_what_they_see_alone():
    def watched(made, seen):
        made.on_task = lambda *counts: seen.append(counts)
        made.on_denoise = lambda task, x: seen.append((task, x.clone()))
        made.on_denoised = lambda task, x: seen.append((task, x.mul_(0.5).clone()))
        return made

    def equal(a, b):
        return [x[0] for x in a] == [x[0] for x in b] and same(
            *([x[1] for x in one if isinstance(x[1], torch.Tensor)] for one in (a, b))
        )

    expected, seen = [[], []], [[], []]
    for seed in (0, 1):
        alone(watched(rollout(seed=seed), expected[seed]))
    finish([watched(rollout(seed=seed), seen[seed]) for seed in (0, 1)])
    assert all(len(one) > 40 and equal(one, other) for one, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize(
    "options", [{"size": (4, 4)}, {"frames_per_block": 2}, {"model": make_model(1)}, {"fuse_cache_denoise": True}]
)
def test_what_does_not_match_runs_alone(options, batches):
    one, other = rollout(), rollout(**options)
    assert batches_with(one, rollout(text=OTHER, order="wavefront", seed=1)) and not batches_with(one, other)
    if "fuse_cache_denoise" in options:
        return  # their blocks without cache tasks match
    expected = alone(rollout()), alone(rollout(**options))
    apart, joint = batches.copy(), batches
    joint.clear()
    made = finish([one, other])
    assert joint == apart
    assert all(torch.equal(a, b) for of in zip(made, expected, strict=True) for a, b in zip(*of, strict=True))


def test_captured_forwards_run_alone(batches):
    """A graph replays the memory of one rollout."""
    one, other, captured = rollout(), rollout(seed=1), []
    for made in (one, other):
        made._executor.capture = lambda body: captured.append(body()) or Replayed(body)
    assert not batches_with(one, other)
    made = finish([one, other])
    assert captured and set(batches) == {1, 4}
    assert all(same(a, alone(rollout(seed=seed))) for seed, a in enumerate(made))


class Replayed:
    def __init__(self, body):
        self.replay = body


def test_a_pipeline_is_refused():
    made = rollout()
    made.pipeline = object()
    assert "one process" in refusal(step_together, [made])
    assert step_together([]) == []


def test_what_is_no_list_of_rollouts_is_refused_before_any_work():
    one, other = rollout(seed=1), rollout(seed=2)
    assert (
        refusal(step_together, [one, other, one])
        == "rollouts must each stand there once, got rollouts[2] a second time"
    )
    assert refusal(step_together, one) == "rollouts must be a list of hiar_model.Rollout, got Rollout"
    assert refusal(step_together, [one, None]) == "rollouts[1] must be a hiar_model.Rollout, got NoneType"
    assert refusal(step_together, None) == "rollouts must be a list of hiar_model.Rollout, got NoneType"
    assert one.forwards_done == other.forwards_done == 0
    assert step_together(made for made in (one, other)) == [[], []] and one.forwards_done
