"""``ExecutionConfig.attention_impl``: what runs self-attention, and nothing else."""

from __future__ import annotations

import pytest
import torch
from made_runs import prepare
from refusals import refused
from tiny_model import MODEL, SIZE, TEXT, run

import hiar_kernels
from hiar_kernels.attention.dispatch import IMPLS
from hiar_kernels.attention_fp8 import api as attention_fp8
from hiar_model import ExecutionConfig, Rollout, RolloutConfig
from hiar_model.config.execution import ATTENTION_IMPLS, FLOAT8_IMPLS

pytestmark = pytest.mark.cpu

LAYERS = MODEL.config.num_layers


def test_the_names_are_those_of_the_op():
    assert {"auto", *IMPLS} == set(ATTENTION_IMPLS)
    assert ("auto", *attention_fp8.IMPLS) == FLOAT8_IMPLS
    with pytest.raises(ValueError, match="attention_impl must be one of auto, reference, .*gluon, got 'sdp'"):
        ExecutionConfig(attention_impl="sdp")


def test_self_attention_takes_it_cross_attention_does_not():
    with hiar_kernels.taken() as ops:
        latents = run(order="stream", attention_impl="reference")
    impls = [impl for op, impl in ops if op == "attention"]
    assert impls.count("reference") >= len(impls) // 3 and "sdpa" in impls
    with hiar_kernels.taken() as ops:
        expected = run(order="stream")
    assert {impl for op, impl in ops if op == "attention"} == {"sdpa"}
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "gluon", "cudnn", "flash-attn-2"])
def test_one_that_cannot_run_here_is_refused_by_name(impl):
    rollout = Rollout(
        MODEL, TEXT, RolloutConfig(order="stream"), ExecutionConfig(attention_impl=impl), num_latent_frames=6,
        latent_size=(SIZE["height"], SIZE["width"]),
    )  # fmt: skip
    with refused(f"attention.*{impl}"):
        next(iter(rollout))


@pytest.mark.parametrize("impl", ["triton", "gluon"])
def test_over_an_8_bit_ring(impl):
    e4m3 = "float8_e4m3fn"
    execution = ExecutionConfig(kv_dtype=e4m3, attention_dtype=e4m3, attention_impl=impl)
    rollout = Rollout(
        MODEL, TEXT, RolloutConfig(order="stream"), execution, num_latent_frames=6,
        latent_size=(SIZE["height"], SIZE["width"]),
    )  # fmt: skip
    with refused(f"attention.*impl='{impl}'"):
        next(iter(rollout))
    with refused("attention_impl gluon with kv_dtype float8_e4m3fn needs attention_dtype float8_e4m3fn"):
        ExecutionConfig(kv_dtype=e4m3, attention_impl="gluon")


def test_a_retry_takes_the_reference_all_the_same(monkeypatch):
    from hiar_kernels.attention import library

    attend = library.attend

    def broken(impl, call, *args):
        out, lse = attend(impl, call, *args)
        return (out if call.mask is None else torch.full_like(out, float("nan"))), lse

    expected = run(order="stream")
    monkeypatch.setattr(library, "attend", broken)
    with pytest.warns(RuntimeWarning, match="self-attention .*attention: sdpa.*finite with the reference ops"):
        latents = run(order="stream", attention_impl="sdpa", on_nan="retry")
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


def test_metadata_and_its_command_say_it():
    made = prepare(
        "a red circle moving right", num_frames=3, execution=ExecutionConfig(attention_impl="reference"), device="cpu"
    )
    assert made.metadata["attention_impl"] == "reference"
    command = made.metadata["command"]
    assert command[command.index("--attention-impl") + 1] == "reference"
