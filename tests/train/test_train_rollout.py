"""The self-rollout: its parallel forward is the exit step's own visits, values and gradients, in float64.

The oracle is hiar_model.rollout.reference, which knows no ring and no executor: visits one after another, of which
those of the exit step alone carry gradient and all cached keys are constants.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from processes import torchrun
from tiny_model import SIZE, TEXT, TINY, make_model, run

from hiar_model.config import FlowSchedule
from hiar_model.rollout import Rollout, reference
from hiar_model.rollout.noise import keyed_noise
from hiar_model.rollout.reference import forward_block
from hiar_model.train.engine.distributed import gathered
from hiar_model.train.engine.self_rollout import SelfRollout, Visited, draw_exit_step

pytestmark = pytest.mark.cpu

STEPS, FRAMES, SEED = 3, 12, 7
SCHEDULE = FlowSchedule.uniform(STEPS)
LATENT = (TINY.in_channels, *SIZE.values())
TEXTS = torch.cat([TEXT, TEXT.flip(1)]).double()  # two prompts
IDS = [3, 11]
CASES = {
    "matched": {},
    "ode": {"trajectory": "ode", "window_frames": 6},
    "window": {"window_frames": 4},
    "sink": {"window_frames": 6, "sink_frames": 2},
    "windows per step": {"window_frames": (3, 5, 9)},
    "pairs": {"window_frames": 7, "pairs": True},
    "blocks of 2, context noise": {"frames_per_block": 2, "window_frames": 5, "context_noise": 40.0},
    "clean": {"order": "block_first"},
    "clean, window, sink": {"order": "block_first", "window_frames": 7, "sink_frames": 1},
    "clean, windows per step": {"order": "block_first", "window_frames": (3, 6, 9)},
    "lent": {"order": "stream", "cache_source": "next_step"},
    "lent, windows per step": {"order": "wavefront", "cache_source": "next_step", "window_frames": (4, 6, 9)},
}
EACH_STEP = [(name, step) for name in CASES for step in range(STEPS)]


def student() -> torch.nn.Module:
    return make_model().double().requires_grad_(True)


def oracle(model, exit_step: int, **options) -> torch.Tensor:
    """x0 of the exit step by hiar_model.rollout.reference, with gradient in the visits of that step alone."""
    clean, block = options.get("order") == "block_first", options.get("frames_per_block", 3)
    schedule = FlowSchedule(SCHEDULE.steps[: exit_step + 1]) if clean else SCHEDULE
    models = [copy.deepcopy(model)] * len(schedule)
    models[exit_step] = model
    sigma, denoised = schedule.sigmas[exit_step], []

    def spy(network, latents, timesteps, *rest):
        if network is model and float(timesteps[0, 0]) == 1000 * sigma:
            denoised.append((latents, timesteps, *rest))
        return forward_block(network, latents, timesteps, *rest)

    same = ("window_frames", "sink_frames", "frames_per_block", "context_noise")
    with patch.object(reference, "forward_block", spy):
        reference.hierarchical_denoising(
            models,
            TEXTS,
            schedule,
            lambda step, n: torch.stack([keyed_noise(SEED, video, step, n, (block, *LATENT)) for video in IDS]),
            FRAMES // block,
            sampler=options.get("trajectory", "sde"),
            context="clean" if clean else {None: "matched"}.get(options.get("cache_source"), "next_step"),
            **{name: options[name] for name in same if name in options},
        )
    return torch.cat([x - sigma * forward_block(model, x, *rest)[0] for x, *rest in denoised], 1)


def self_rollout(model, exit_step: int, **options) -> tuple[SelfRollout, Visited]:
    made = SelfRollout(model, SCHEDULE, **options)
    return made, made.run(TEXTS, FRAMES, *SIZE.values(), exit_step, seed=SEED, video_ids=IDS)


@pytest.mark.parametrize(("name", "exit_step"), EACH_STEP)
def test_the_parallel_forward_is_the_exit_step(name, exit_step):
    """x0 to 1e-13, the gradient of every weight to 1e-12 of its largest number."""
    model, weights = student(), torch.randn(2, FRAMES, *LATENT, generator=torch.Generator().manual_seed(2)).double()
    expected = oracle(model, exit_step, **CASES[name])
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    made, visited = self_rollout(model, exit_step, **CASES[name])
    found = made.predict(visited, TEXTS)
    assert found.dtype == torch.float64 and float((found - expected).detach().abs().max()) < 1e-13
    (found * weights).sum().backward()
    for (key, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert float((p.grad - gradient).abs().max()) <= 1e-12 * float(gradient.abs().max()), key


@pytest.mark.parametrize("name", CASES)
def test_the_last_step_is_the_video(name):
    """What is trained at the last step is what the rollout makes, to the bit of its own arithmetic."""
    model, options = student(), CASES[name]
    with torch.no_grad():
        made = Rollout(model, TEXTS, SCHEDULE, num_frames=FRAMES, **SIZE, batch=2, seed=SEED, video_ids=IDS, **options)
        video = torch.cat([block.latents for block in made], 1)
        again, visited = self_rollout(model, STEPS - 1, **options)
        assert float((again.predict(visited, TEXTS) - video).abs().max()) < 1e-13


def test_an_early_exit_of_clean_context_is_a_rollout_with_fewer_steps():
    model, options = student(), CASES["clean, window, sink"]
    with torch.no_grad():
        made, visited = self_rollout(model, 1, **options)
        schedule = FlowSchedule(SCHEDULE.steps[:2])
        other = Rollout(model, TEXTS, schedule, num_frames=FRAMES, **SIZE, batch=2, seed=SEED, video_ids=IDS, **options)
        video = torch.cat([block.latents for block in other], 1)
        assert float((made.predict(visited, TEXTS) - video).abs().max()) < 1e-13


@pytest.mark.parametrize("name", ["matched", "clean", "lent"])
def test_which_visits_and_weights_get_gradient(name):
    """The walk makes exactly its visits, none with gradient; then one forward has it, and every weight."""
    model, blocks, forwards = student(), FRAMES // 3, []
    model.blocks[0].register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    for exit_step in range(STEPS):
        forwards.clear()
        model.zero_grad()
        made, visited = self_rollout(model, exit_step, **CASES[name])
        visits = {
            "matched": (exit_step + 1) * (2 * blocks - 1),  # nobody reads the last block's cache
            "clean": (exit_step + 2) * blocks - 1,
            "lent": (STEPS + 1) * blocks - 1,
        }
        assert forwards == [False] * visits[name]
        constants = [visited.inputs, *(x for kv in visited.contexts for x in (kv.k, kv.v))]
        assert not any(x.requires_grad for x in constants) and visited.inputs.shape == (2, FRAMES, *LATENT)
        made.predict(visited, TEXTS).square().mean().backward()
        assert forwards[visits[name] :] == [True]
        assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_is_kept_holds_every_frame_and_nothing_of_other_steps():
    for name, steps in (("window", range(STEPS)), ("lent, windows per step", range(STEPS))):
        for exit_step in steps:
            _, visited = self_rollout(student(), exit_step, **CASES[name])
            for kv in visited.contexts:
                assert kv.frames.tolist() == [list(range(FRAMES))] * 2
                assert kv.host_frames == [list(range(FRAMES))]
                assert kv.k.untyped_storage().nbytes() == kv.k.nbytes == 2 * FRAMES * 2 * TINY.dim * 8


def test_videos_do_not_depend_on_their_batch():
    model = student()
    with torch.no_grad():
        made, both = self_rollout(model, 1, window_frames=6)
        x0 = made.predict(both, TEXTS)
        for row in range(2):
            text = TEXTS[row : row + 1]
            alone = made.run(text, FRAMES, *SIZE.values(), 1, seed=SEED, video_ids=IDS[row : row + 1])
            assert torch.allclose(made.predict(alone, text), x0[row : row + 1], rtol=0, atol=1e-13)
        given = torch.randn(2, FRAMES, *LATENT, generator=torch.Generator().manual_seed(4)).double()
        other = made.run(TEXTS, FRAMES, *SIZE.values(), 0, noise=given)
        assert torch.equal(other.inputs, given)


def test_memory_of_the_graph_grows_with_the_video_not_with_its_square():
    """Bytes that autograd keeps, with a window: twice as many further frames take twice as many further bytes."""
    model, text = student(), TEXT.double()

    def saved(frames: int) -> int:
        made = SelfRollout(model, SCHEDULE, window_frames=6)
        visited, kept = made.run(text, frames, *SIZE.values(), 0), {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # alive, so that no address comes twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made.predict(visited, text)
        return sum(storage.nbytes() for storage in kept.values())

    short, middle, long = saved(12), saved(24), saved(48)
    assert (long - middle) / (middle - short) == pytest.approx(2, rel=0.01)


def test_under_autocast_rollout_and_forward_work_in_its_dtype():
    model = make_model().requires_grad_(True)
    made = SelfRollout(model, SCHEDULE, window_frames=6)
    exact = made.predict(made.run(TEXT, FRAMES, *SIZE.values(), 1), TEXT)
    with torch.autocast("cpu", torch.bfloat16):
        visited = made.run(TEXT, FRAMES, *SIZE.values(), 1)
        found = made.predict(visited, TEXT)
        found.square().mean().backward()
    assert visited.contexts[0].k.dtype == torch.bfloat16
    assert visited.inputs.dtype == found.dtype == torch.float32
    assert 0 < float((found - exact).detach().abs().max()) < 0.1 < float(exact.detach().abs().max())
    # casts that the walk left in autocast's cache have no gradient: they must not serve the forward
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        made.predict(visited, TEXT).square().mean().backward()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        assert gradient.dtype == torch.float32 and gradient.any() and torch.equal(gradient, p.grad)


def test_keeping_all_frames_changes_nothing_that_is_seen():
    model = make_model().double()
    made = [run(18, model=model, text=TEXT.double(), window_frames=5, keep_frames=keep) for keep in (False, True)]
    assert float((made[0] - made[1]).abs().max()) < 1e-12  # the order of keys in the ring differs
    with pytest.raises(ValueError, match="keep_frames=True needs num_frames"):
        run(None, order="stream", window_frames=6, keep_frames=True)


def test_denoise_visits_are_told_with_their_inputs():
    """In order, with what they take; in pairs and batches too."""
    noise = torch.randn(1, 9, *LATENT, generator=torch.Generator().manual_seed(5))
    for options in ({"order": "wavefront"}, {"order": "wavefront", "pairs": True}, {"order": "step_first"}):
        model, told = make_model(), {}
        made = Rollout(model, TEXT, SCHEDULE, num_frames=9, **SIZE, noise=noise, **options)
        made.executor.on_denoise = lambda visit, x, told=told: told.setdefault(visit, x.clone())
        video = torch.cat([block.latents for block in made], 1)
        assert {(v.step, v.block) for v in told} == {(s, n) for s in range(STEPS) for n in range(3)}
        assert all(v.kind == "denoise" for v in told)
        for visit, x in told.items():
            if visit.step == 0:
                assert torch.equal(x, noise[:, 3 * visit.block : 3 * visit.block + 3])
        assert torch.equal(video, run(9, STEPS, noise=noise, **options))


def test_exit_steps_are_drawn_evenly():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_exit_step(4, generator) for _ in range(4000)])
    assert drawn.bincount().tolist() == pytest.approx([1000] * 4, abs=100)
    one, other = (draw_exit_step(1000, torch.Generator().manual_seed(9)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_source": "next_step"}, "cache_source='next_step' is impossible with order='step_first'"),
        ({"order": "blockwise"}, "order='blockwise' is unknown: give one of step_first, stream"),
        (
            {"window_frames": (6, 6)},
            r"window_frames must be None, one number .* one per step \(3\), got \(6, 6\)",
        ),
        ({"window_frames": 3, "sink_frames": 1}, "window_frames must be a whole number of at least 4"),
        ({"order": "block_first", "pairs": True}, "pairs=True is impossible with order='block_first'"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(ValueError, match=words):
        SelfRollout(make_model(), SCHEDULE, **options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exit_step": 3}, "exit_step must be 0 to 2, got 3"),
        ({"exit_step": -1}, "exit_step must be 0 to 2, got -1"),
        ({"num_frames": 10}, "got 10, nearest 9 or 12"),
        ({"noise": torch.zeros(1, 9, *LATENT)}, r"noise must be \[1, 12, 2, 2, 4\], got \[1, 9"),
    ],
)
def test_refused_runs(given, words):
    whole = {"text": TEXT, "num_frames": 12, **SIZE, "exit_step": 0, **given}
    with pytest.raises(ValueError, match=words):
        SelfRollout(make_model(), SCHEDULE).run(**whole)


# Sharded over two processes (FSDP2, gloo).


def test_a_plain_model_is_left_as_it_is():
    model = make_model()
    before = list(model.parameters())
    inside = gathered(model, lambda: list(model.parameters()))
    assert all(p is q for p, q in zip(inside, before, strict=True))


def test_a_sharded_student_is_gathered_once_for_a_rollout(tmp_path):
    """Whatever the number of visits; the forward with gradient has it still, and afterwards it is sharded."""
    target, job = tmp_path / "found.json", Path(__file__).parents[1] / "helpers" / "self_rollout_job.py"
    done = torchrun(2, job, target)
    assert target.exists(), done.stderr[-3000:]
    found = json.loads(target.read_text())
    parts = TINY.num_layers + 1  # the blocks, and the rest
    gather, reduce = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"
    for name in ("matched", "clean"):
        assert found[name]["wrong"] == []
        for update in (0, 1):
            (none, nothing), (walk, rest) = found[name]["exchanged"][2 * update : 2 * update + 2]
            assert none == nothing == {}
            assert walk == {gather: parts}
            assert rest == {reduce: parts}
    assert found["dealt_out"] == []
