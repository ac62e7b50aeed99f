"""RolloutConfig and ExecutionConfig: what they take, what they refuse, and that JSON gives them back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from hiar_model import ExecutionConfig, FlowSchedule, RolloutConfig
from hiar_model.config.rollout import KV_SOURCES, ON_PROMPT_CHANGE, ORDERS, SAMPLERS, windows_per_step
from hiar_model.schedule.plan import Plan

pytestmark = pytest.mark.cpu

configs = st.builds(
    dict,
    steps=st.sampled_from([(1000,), (1000.0, 500.0), [1000, 750, 500, 250]]),
    shift=st.sampled_from([1, 5.0]),
    order=st.sampled_from(ORDERS),
    frames_per_block=st.integers(1, 4),
    window_frames=st.one_of(st.none(), st.integers(6, 30)),
    sink_frames=st.integers(0, 2),
    kv_source=st.sampled_from(KV_SOURCES),
    fuse_cache_denoise=st.booleans(),
    sampler=st.sampled_from(SAMPLERS),
    context_noise=st.sampled_from([0, 20.0]),
    on_prompt_change=st.sampled_from(ON_PROMPT_CHANGE),
    first_frame=st.integers(0, 100),
)


@settings(max_examples=200, deadline=None)
@given(configs)
def test_json_gives_back_what_was_written(values):
    try:
        config = RolloutConfig(**values)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    again = RolloutConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    plan = Plan.of(config, 3)
    assert (plan.steps, plan.order, plan.window_frames) == (len(config.steps), config.order, config.windows)
    assert (plan.sink_frames, plan.kv_source, plan.prefix_frames) == (config.sink_frames, config.kv_source, 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"order": "straem"}, r"order must be one of step_first, .*'straem'; did you mean stream\?"),
        ({"steps": ()}, "steps must fall within"),
        ({"steps": (500, 750)}, "steps must fall within"),
        ({"shift": 0}, "shift must be a number above 0, got 0"),
        ({"frames_per_block": 0}, "frames_per_block must be a whole number of at least 1, got 0"),
        ({"frames_per_block": 2.5}, "frames_per_block must be a whole number of at least 1, got 2.5"),
        ({"sink_frames": -1}, "sink_frames must be a whole number of at least 0, got -1"),
        ({"sink_frames": 4, "window_frames": 6}, r"window_frames must be .* at least 7 \(sink_frames \+ frames_per"),
        ({"window_frames": (9, 9)}, r"window_frames must be .* one per step \(4\), got \(9, 9\)"),
        ({"window_frames": "9"}, "window_frames must be None, one number of frames, .* got '9'"),
        ({"kv_source": "next_step"}, "kv_source='next_step' is impossible with order='step_first': use stream or wave"),
        ({"order": "block_first", "fuse_cache_denoise": True}, "impossible with order='block_first'"),
        (
            {"order": "stream", "kv_source": "next_step", "fuse_cache_denoise": True},
            "impossible with kv_source='next_step'",
        ),
        ({"fuse_cache_denoise": "measured"}, "fuse_cache_denoise must be True or False, got 'measured'"),
        ({"fuse_cache_denoise": True, "on_prompt_change": "recache"}, "impossible with fuse_cache_denoise=True"),
        ({"sampler": "euler"}, "sampler must be one of sde, ode, got 'euler'"),
        ({"context_noise": -1}, "context_noise must be a number of at least 0, got -1"),
        ({"context_noise": float("nan")}, "context_noise must be a number of at least 0"),
        ({"first_frame": None}, "first_frame must be a whole number of at least 0, got None"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line(values, said):
    with refused(said):
        RolloutConfig(**values)


def test_options_that_say_nothing_change_nothing():
    config = RolloutConfig(order="stream", window_frames=9, sink_frames=2)
    assert config.with_options(order=None, window_frames="model", sink_frames=None) == config
    assert config.with_options(window_frames=None, sink_frames=0) == RolloutConfig(order="stream")
    with refused("window_frames must be .* or \"model\", got 'all'"):
        config.with_options(window_frames="all")


def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match="unknown cache_source, pairs; known: steps, shift, order"):
        RolloutConfig.from_dict({"pairs": True, "cache_source": "own"})


def test_numbers_of_numpy_and_torch_are_numbers():
    config = RolloutConfig(
        steps=np.array([1000, 500]), frames_per_block=np.int64(3), window_frames=np.array([6, 9]),  # type: ignore[arg-type]
        sink_frames=torch.tensor(1), context_noise=np.float32(5), first_frame=np.uint8(7),  # type: ignore[arg-type]
    )  # fmt: skip
    assert json.loads(json.dumps(config.to_dict()))["window_frames"] == [6, 9]
    assert config == RolloutConfig((1000, 500), window_frames=(6, 9), sink_frames=1, context_noise=5, first_frame=7)


def test_steps_and_windows():
    assert RolloutConfig().with_options(steps=2).steps == (1000, 500)
    assert RolloutConfig().with_options(steps=torch.tensor(2)).steps == (1000, 500)
    assert RolloutConfig().with_options(steps=(900, 100)).schedule == FlowSchedule((900, 100))
    for wrong in (0, 2.5):
        with refused(f"steps must be a whole number .*at least 1, got {wrong}"):
            RolloutConfig().with_options(steps=wrong)
    assert windows_per_step(None, 3) == (None, None, None) and windows_per_step([6, None], 2) == (6, None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cuda_graph": "yes"}, "cuda_graph must be True or False, got 'yes'"),
        ({"on_nan": "ignore"}, "on_nan must be one of stop, retry, got 'ignore'"),
        ({"kv_dtype": "int8"}, "kv_dtype must be one of float32, .* got 'int8'"),
        ({"timeout": 0}, "timeout must be a number above 0, got 0"),
        ({"steps_per_rank": 4}, "steps_per_rank must be a sequence .* got 4"),
        ({"steps_per_rank": (1, -1)}, "steps_per_rank must be a whole number of at least 0, got -1"),
    ],
    ids=str,
)
def test_executions_that_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        ExecutionConfig(**values)


def test_dtypes_by_name_or_as_they_are():
    assert ExecutionConfig(kv_dtype=torch.float8_e4m3fn) == ExecutionConfig(kv_dtype="float8_e4m3fn")  # type: ignore[arg-type]


def test_both_are_frozen_and_import_no_torch():
    for config in (RolloutConfig(), ExecutionConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.order = "stream"  # type: ignore[union-attr, misc]
    code = "import sys, hiar_model as h; h.RolloutConfig(); h.ExecutionConfig(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
