"""The self-rollout: its parallel forward is the exit step's own tasks, values and gradients, in float64.

The oracle is hiar_model.rollout.reference, which has no ring and no executor: tasks one after another, of which those
of the exit step alone carry gradient and all cached keys are constants.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from processes import torchrun
from tiny_model import SIZE, TEXT, TINY, make_model

from hiar_model.config import ExecutionConfig, FlowSchedule, RolloutConfig
from hiar_model.rollout import Rollout, reference
from hiar_model.rollout.noise import keyed_noise
from hiar_model.rollout.reference import forward_block
from hiar_model.train.engine.distributed import unsharded
from hiar_model.train.engine.self_rollout import ExitStepBatch, SelfRollout, draw_exit_step

pytestmark = pytest.mark.cpu

STEPS, FRAMES, SEED = 3, 12, 7
SCHEDULE = FlowSchedule.uniform(STEPS)
LATENT = (TINY.in_channels, *SIZE.values())
TEXTS = torch.cat([TEXT, TEXT.flip(1)]).double()  # two prompts
IDS = [3, 11]
LATENT_SIZE = (SIZE["height"], SIZE["width"])
CASES = {
    "matched": {},
    "ode": {"sampler": "ode", "window_frames": 6},
    "window": {"window_frames": 4},
    "sink": {"window_frames": 6, "sink_frames": 2},
    "windows per step": {"window_frames": (3, 5, 9)},
    "fused": {"window_frames": 7, "fuse_cache_denoise": True},
    "blocks of 2, context noise": {"frames_per_block": 2, "window_frames": 5, "context_noise": 40.0},
    "clean": {"order": "block_first"},
    "clean, window, sink": {"order": "block_first", "window_frames": 7, "sink_frames": 1},
    "clean, windows per step": {"order": "block_first", "window_frames": (3, 6, 9)},
    "shared keys": {"order": "stream", "kv_source": "next_step"},
    "shared keys, windows per step": {"order": "wavefront", "kv_source": "next_step", "window_frames": (4, 6, 9)},
}
EACH_STEP = [(name, step) for name in CASES for step in range(STEPS)]


def student() -> torch.nn.Module:
    return make_model().double().requires_grad_(True)


def config(**options) -> RolloutConfig:
    return RolloutConfig(SCHEDULE.steps, SCHEDULE.shift, **options)


def video(model, prompt_embeds, options: RolloutConfig, num_latent_frames=FRAMES, **more) -> torch.Tensor:
    rollout = Rollout(
        model, prompt_embeds, options, num_latent_frames=num_latent_frames, latent_size=LATENT_SIZE, **more
    )
    return torch.cat([block.latents for block in rollout], 1)


def oracle(model, exit_step: int, options: RolloutConfig) -> torch.Tensor:
    """x0 of the exit step by hiar_model.rollout.reference, with gradient in the tasks of that step alone."""
    clean, shape = options.order == "block_first", (options.frames_per_block, *LATENT)
    schedule = FlowSchedule(SCHEDULE.steps[: exit_step + 1]) if clean else SCHEDULE
    models = [copy.deepcopy(model)] * len(schedule)
    models[exit_step] = model
    sigma, denoised = schedule.sigmas[exit_step], []

    def spy(network, latents, timesteps, *rest):
        if network is model and float(timesteps[0, 0]) == 1000 * sigma:
            denoised.append((latents, timesteps, *rest))
        return forward_block(network, latents, timesteps, *rest)

    with patch.object(reference, "forward_block", spy):
        reference.hierarchical_denoising(
            models,
            TEXTS,
            schedule,
            lambda step, n: torch.stack([keyed_noise(SEED, video, step, n, shape) for video in IDS]),
            FRAMES // options.frames_per_block,
            sampler=options.sampler,
            context="clean" if clean else "matched" if options.kv_source == "own" else "next_step",
            window_frames=options.window_frames,
            sink_frames=options.sink_frames,
            frames_per_block=options.frames_per_block,
            context_noise=options.context_noise,
        )
    return torch.cat([x - sigma * forward_block(model, x, *rest)[0] for x, *rest in denoised], 1)


def self_rollout(model, exit_step: int, **options) -> tuple[SelfRollout, ExitStepBatch]:
    student = SelfRollout(model, config(**options))
    return student, student.run(TEXTS, FRAMES, LATENT_SIZE, exit_step, seed=SEED, video_ids=IDS)


@pytest.mark.parametrize(("name", "exit_step"), EACH_STEP)
def test_the_parallel_forward_is_the_exit_step(name, exit_step):
    """x0 to 1e-13, the gradient of every weight to 1e-12 of its largest number."""
    model, weights = student(), torch.randn(2, FRAMES, *LATENT, generator=torch.Generator().manual_seed(2)).double()
    expected = oracle(model, exit_step, config(**CASES[name]))
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    rollout, batch = self_rollout(model, exit_step, **CASES[name])
    x0 = rollout.predict(batch, TEXTS)
    assert x0.dtype == torch.float64 and float((x0 - expected).detach().abs().max()) < 1e-13
    (x0 * weights).sum().backward()
    for (key, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert float((p.grad - gradient).abs().max()) <= 1e-12 * float(gradient.abs().max()), key


@pytest.mark.parametrize("name", CASES)
def test_the_last_step_is_the_video(name):
    """What is trained at the last step is what the rollout makes, to the rounding of its own arithmetic."""
    model, options = student(), CASES[name]
    with torch.no_grad():
        expected = video(model, TEXTS, config(**options), seed=SEED, video_ids=IDS)
        rollout, batch = self_rollout(model, STEPS - 1, **options)
        assert float((rollout.predict(batch, TEXTS) - expected).abs().max()) < 1e-13


def test_an_early_exit_of_clean_context_is_a_rollout_with_fewer_steps():
    model, options = student(), CASES["clean, window, sink"]
    with torch.no_grad():
        rollout, batch = self_rollout(model, 1, **options)
        fewer = RolloutConfig(SCHEDULE.steps[:2], SCHEDULE.shift, **options)
        expected = video(model, TEXTS, fewer, seed=SEED, video_ids=IDS)
        assert float((rollout.predict(batch, TEXTS) - expected).abs().max()) < 1e-13


@pytest.mark.parametrize("name", ["matched", "clean", "shared keys"])
def test_which_tasks_and_weights_get_gradient(name):
    """The rollout runs exactly its tasks, none with gradient; then one forward has it, for every weight."""
    model, blocks, forwards = student(), FRAMES // 3, []
    model.blocks[0].register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    for exit_step in range(STEPS):
        forwards.clear()
        model.zero_grad()
        rollout, batch = self_rollout(model, exit_step, **CASES[name])
        tasks = {
            "matched": (exit_step + 1) * (2 * blocks - 1),  # nobody reads the last block's cache
            "clean": (exit_step + 2) * blocks - 1,
            "shared keys": (STEPS + 1) * blocks - 1,
        }
        assert forwards == [False] * tasks[name]
        constants = [batch.inputs, *(x for kv in batch.contexts for x in (kv.k, kv.v))]
        assert not any(x.requires_grad for x in constants) and batch.inputs.shape == (2, FRAMES, *LATENT)
        rollout.predict(batch, TEXTS).square().mean().backward()
        assert forwards[tasks[name] :] == [True]
        assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["window", "shared keys, windows per step"])
def test_contexts_hold_every_frame_and_nothing_of_other_steps(name):
    for exit_step in range(STEPS):
        _, batch = self_rollout(student(), exit_step, **CASES[name])
        for kv in batch.contexts:
            assert kv.frames.tolist() == [list(range(FRAMES))] * 2
            assert kv.host_frames == [list(range(FRAMES))]
            assert kv.k.untyped_storage().nbytes() == kv.k.nbytes == 2 * FRAMES * 2 * TINY.dim * 8


def test_videos_do_not_depend_on_their_batch():
    model = student()
    with torch.no_grad():
        rollout, both = self_rollout(model, 1, window_frames=6)
        x0 = rollout.predict(both, TEXTS)
        for i in range(2):
            prompt_embeds = TEXTS[i : i + 1]
            alone = rollout.run(prompt_embeds, FRAMES, LATENT_SIZE, 1, seed=SEED, video_ids=IDS[i : i + 1])
            assert torch.allclose(rollout.predict(alone, prompt_embeds), x0[i : i + 1], rtol=0, atol=1e-13)
        noise = torch.randn(2, FRAMES, *LATENT, generator=torch.Generator().manual_seed(4)).double()
        assert torch.equal(rollout.run(TEXTS, FRAMES, LATENT_SIZE, 0, noise=noise).inputs, noise)


def test_memory_of_the_graph_grows_with_the_video_not_with_its_square():
    """Bytes that autograd keeps, with a window: twice as many further frames take twice as many further bytes."""
    model, prompt_embeds = student(), TEXT.double()

    def saved(frames: int) -> int:
        rollout = SelfRollout(model, config(window_frames=6))
        batch, storages = rollout.run(prompt_embeds, frames, LATENT_SIZE, 0), {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # alive, so that no address comes twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            rollout.predict(batch, prompt_embeds)
        return sum(storage.nbytes() for storage in storages.values())

    short, middle, long = saved(12), saved(24), saved(48)
    assert (long - middle) / (middle - short) == pytest.approx(2, rel=0.01)


def test_under_autocast_rollout_and_forward_work_in_its_dtype():
    model = make_model().requires_grad_(True)
    rollout = SelfRollout(model, config(window_frames=6))
    exact = rollout.predict(rollout.run(TEXT, FRAMES, LATENT_SIZE, 1), TEXT)
    with torch.autocast("cpu", torch.bfloat16):
        batch = rollout.run(TEXT, FRAMES, LATENT_SIZE, 1)
        x0 = rollout.predict(batch, TEXT)
        x0.square().mean().backward()
    assert batch.contexts[0].k.dtype == torch.bfloat16
    assert batch.inputs.dtype == x0.dtype == torch.float32
    assert 0 < float((x0 - exact).detach().abs().max()) < 0.1 < float(exact.detach().abs().max())
    # casts that the rollout left in autocast's cache have no gradient: they must not serve the forward
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rollout.predict(batch, TEXT).square().mean().backward()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        assert gradient.dtype == torch.float32 and gradient.any() and torch.equal(gradient, p.grad)


def test_keeping_all_frames_changes_nothing_that_is_seen():
    model, options = make_model().double(), config(window_frames=5)
    both = (ExecutionConfig(keep_all_frames=keep) for keep in (False, True))
    some, every = (video(model, TEXT.double(), options, 18, execution=execution) for execution in both)
    assert float((some - every).abs().max()) < 1e-12  # the order of keys in the ring differs
    with pytest.raises(ValueError, match="keep_all_frames=True needs num_latent_frames"):
        endless = config(order="stream", window_frames=6)
        video(model, TEXT.double(), endless, None, execution=ExecutionConfig(keep_all_frames=True))


@pytest.mark.parametrize("options", [{"order": "wavefront"}, {"order": "wavefront", "fuse_cache_denoise": True}, {}])
def test_on_denoise_gets_every_denoise_task_with_its_input(options):
    """In fused forwards and batches too."""
    model, inputs = make_model(), {}
    noise = torch.randn(1, 9, *LATENT, generator=torch.Generator().manual_seed(5))
    sizes = {"num_latent_frames": 9, "latent_size": LATENT_SIZE, "noise": noise}
    rollout = Rollout(model, TEXT, config(**options), **sizes)
    rollout.on_denoise = lambda task, x: inputs.setdefault(task, x.clone())
    latents = torch.cat([block.latents for block in rollout], 1)
    assert {(task.step, task.block) for task in inputs} == {(s, n) for s in range(STEPS) for n in range(3)}
    assert all(task.kind == "denoise" for task in inputs)
    for task, x in inputs.items():
        if task.step == 0:
            assert torch.equal(x, noise[:, 3 * task.block : 3 * task.block + 3])
    assert torch.equal(latents, video(model, TEXT, config(**options), 9, noise=noise))


def test_exit_steps_are_drawn_evenly():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_exit_step(4, generator) for _ in range(4000)])
    assert drawn.bincount().tolist() == pytest.approx([1000] * 4, abs=100)
    one, other = (draw_exit_step(1000, torch.Generator().manual_seed(9)) for _ in range(2))
    assert one == other


def test_refused_options():
    with pytest.raises(ValueError, match="first_frame must be 0 .* got 3"):
        SelfRollout(make_model(), config(first_frame=3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exit_step": 3}, "exit_step must be 0 to 2, got 3"),
        ({"exit_step": -1}, "exit_step must be 0 to 2, got -1"),
        ({"num_latent_frames": 10}, "got 10, nearest 9 or 12"),
        ({"noise": torch.zeros(1, 9, *LATENT)}, r"noise must be \[1, 12, 2, 2, 4\], got \[1, 9"),
    ],
)
def test_refused_runs(change, words):
    legal = {"prompt_embeds": TEXT, "num_latent_frames": 12, "latent_size": LATENT_SIZE, "exit_step": 0}
    with pytest.raises(ValueError, match=words):
        SelfRollout(make_model(), config()).run(**{**legal, **change})


# Sharded over two processes (FSDP2, gloo).


def test_a_plain_model_is_left_as_it_is():
    model = make_model()
    before = list(model.parameters())
    inside = unsharded(model, lambda: list(model.parameters()))
    assert all(p is q for p, q in zip(inside, before, strict=True))


def test_a_sharded_student_is_gathered_once_for_a_rollout(tmp_path):
    """Whatever the number of tasks; it stays so for the forward with gradient, and is sharded again after that."""
    target, job = tmp_path / "results.json", Path(__file__).parents[1] / "helpers" / "self_rollout_job.py"
    done = torchrun(2, job, target)
    assert target.exists(), done.stderr[-3000:]
    results = json.loads(target.read_text())
    parts = TINY.num_layers + 1  # the blocks, and the rest
    gather, reduce = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"
    for name in ("matched", "clean"):
        assert results[name]["wrong"] == []
        for update in (0, 1):
            whole, (rollout, update_step) = results[name]["exchanged"][2 * update : 2 * update + 2]
            assert whole == [{}, {}]
            assert rollout == {gather: parts}
            assert update_step == {reduce: parts}
    assert results["broadcast"] == []
