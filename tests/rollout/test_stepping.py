"""`Rollout.step` and `run_until`: the same tasks as iterating, one group at a time; making a rollout does nothing."""

from __future__ import annotations

import pytest
import torch
from ids import brief
from refusals import refused
from tiny_model import MODEL, TEXT

from hiar_model import ExecutionConfig, Rollout, RolloutConfig
from hiar_model.rollout.engine import _Cursor

pytestmark = pytest.mark.cpu

SIZES = {"num_latent_frames": 12, "latent_size": (2, 4), "seed": 3}
CONFIGS = [RolloutConfig(order=o, window_frames=6) for o in ("step_first", "stream", "wavefront", "block_first")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.order)
def test_steps_make_the_same_blocks(config):
    expected = list(Rollout(MODEL, TEXT, config, **SIZES))
    made, blocks = Rollout(MODEL, TEXT, config, **SIZES), []
    groups = sum(1 for _ in made.groups())
    for done in range(groups):
        assert made.groups_done == done
        blocks += made.step() or []
    assert made.step() is None
    assert [b.block for b in blocks] == [b.block for b in expected]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(blocks, expected, strict=True))


def test_stepping_and_iterating_take_turns():
    config = CONFIGS[1]
    expected = [block.latents for block in Rollout(MODEL, TEXT, config, **SIZES)]
    made = Rollout(MODEL, TEXT, config, **SIZES)
    for _ in range(3):
        assert made.step() == []
    first = next(iter(made)).latents
    rest = [block.latents for blocks in iter(made.step, None) for block in blocks]
    assert all(torch.equal(a, b) for a, b in zip([first, *rest], expected, strict=True))


def test_groups_are_found_by_number_back_and_forth():
    cursor = _Cursor(lambda: iter("abcd"))
    assert [cursor.at(number) for number in (0, 2, 1, 1, 3, 4, 3, 9, 0)] == [*"acbbd", None, "d", None, "a"]


def test_run_until_a_group():
    made = Rollout(MODEL, TEXT, CONFIGS[0], **SIZES)
    seen = []
    made.on_denoise = lambda task, latents: seen.append((task.step, task.block, tuple(latents.shape)))
    made.run_until(lambda group: group[0][-1].step > 1)
    assert {step for step, _, _ in seen} == {0, 1} and {block for _, block, _ in seen} == {0, 1, 2, 3}
    assert made.cache.capacities == (6,) or list(made.cache.capacities) == [6]
    made.run_until()
    assert made.step() is None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.order)
def test_what_a_denoise_task_gave(config):
    """It is seen before any other task reads it, and a change of it is what they read."""
    made, inputs, outputs = Rollout(MODEL, TEXT, config, **SIZES), {}, {}
    made.on_denoise = lambda task, x: inputs.setdefault((task.step, task.block), x.clone())
    made.on_denoised = lambda task, x: outputs.setdefault((task.step, task.block), x.clone())
    plain = [block.latents for block in made]
    assert len(outputs) == 16 and all(torch.equal(outputs[3, n], plain[n]) for n in range(4))
    assert all(torch.equal(outputs[s, n], inputs[s + 1, n]) for s in range(3) for n in range(4))
    made = Rollout(MODEL, TEXT, config, **SIZES)
    made.on_denoised = lambda task, x: x.zero_() if task == ("denoise", 3, 0) else None
    changed = [block.latents for block in made]
    assert not changed[0].any() and not torch.equal(changed[1], plain[1])  # through the cache


def test_every_frame_is_kept_where_that_is_asked_for():
    made = Rollout(MODEL, TEXT, CONFIGS[1], ExecutionConfig(keep_all_frames=True), **SIZES)
    assert list(made.cache.capacities) == [12] * 4
    wide = Rollout(MODEL, TEXT, RolloutConfig(order="stream", window_frames=(21, 6, None, 9)), **SIZES)
    assert list(wide.cache.capacities) == [12, 6, 12, 9], "no more than the video has"
    plain = torch.cat([block.latents for block in Rollout(MODEL, TEXT, CONFIGS[1], **SIZES)], 1)
    torch.testing.assert_close(torch.cat([block.latents for block in made], 1), plain)  # rings turn elsewhere


def test_making_a_rollout_runs_nothing(monkeypatch):
    import torch.distributed as dist

    def no_work(*_, **__):
        raise AssertionError("a rollout is made without a forward and without a process group")

    monkeypatch.setattr(type(MODEL), "forward", no_work)
    monkeypatch.setattr(type(MODEL), "cross_attention_kv", no_work)
    monkeypatch.setattr(dist, "init_process_group", no_work)
    monkeypatch.setattr(dist, "new_group", no_work)
    for config in CONFIGS:
        Rollout(MODEL, TEXT, config, **SIZES)
    Rollout(MODEL, TEXT, CONFIGS[1], ExecutionConfig(steps_per_rank=(4,)), **SIZES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_latent_frames": 10}, "num_latent_frames must be the prefix .* nearest 9 or 12"),
        ({"num_latent_frames": None, "config": CONFIGS[0]}, "order must be one of stream, .* for an endless video"),
        ({"num_latent_frames": None, "config": RolloutConfig(order="stream")}, "window_frames must be a number for"),
        ({"latent_size": (3, 4)}, "multiples of the patch 2x2, got 3x4"),
        ({"latent_size": (0, 4)}, "latent_size must be a whole number of at least 1, got 0"),
        ({"execution": ExecutionConfig(cuda_graph=True)}, "cuda_graph=True needs a CUDA device, the model is on cpu"),
        ({"noise": torch.zeros(1, 9, 2, 2, 4)}, r"noise must be \[1, 12, 2, 2, 4\], got \[1, 9, 2, 2, 4\]"),
        ({"prefix": torch.zeros(2, 3, 2, 2, 4)}, r"prefix must be \[1, any, 2, 2, 4\], got \[2, 3, 2, 2, 4\]"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ],
    ids=brief,
)
def test_refusals(changes, said):
    options = {"config": CONFIGS[1], "execution": None, **SIZES, **changes}
    with refused(said):
        Rollout(MODEL, TEXT, options.pop("config"), options.pop("execution"), **options)
