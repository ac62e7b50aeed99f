"""The page that defines the rollout, against the published implementation; how the engine keeps to it: test_rollout."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import MODEL, TEXT, TINY, difference, make_model, reference, run

from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.rollout import reference as page

pytestmark = pytest.mark.cpu


def test_the_examples_run():
    failed, tried = doctest.testmod(page)
    assert tried and not failed


def test_it_is_the_published_method():
    golden = load_file(Path(__file__).parents[1] / "data" / "wan_tiny.safetensors")
    model = HiARTransformer(
        WanConfig(128, 256, 2, 3, freq_dim=64, text_dim=48, text_len=16, in_channels=4, out_channels=4)
    )
    model.load_state_dict({k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")})
    first, renoise = golden["step_first.noise"], golden["step_first.renoise"]
    expected = golden["step_first.sde_global.output"]

    def noise(step: int, block: int) -> torch.Tensor:
        return first[:, 3 * block : 3 * block + 3] if step == -1 else renoise[step, block]

    prompt, blocks = golden["step_first.context"], first.shape[1] // 3
    made = page.hierarchical_denoising(model.double(), prompt, FlowSchedule(), noise, blocks)
    assert made.dtype == torch.float64
    assert difference(made, expected) < 2e-5  # the published one computed in float32
    other = page.hierarchical_denoising(model, prompt, FlowSchedule(), noise, blocks, context="clean")
    assert difference(other, expected) > 1e-2


def test_a_learned_position_embedding():
    model = make_model(config=replace(TINY, position_grid=(1, 2)))
    assert difference(run(model=model), reference(model=model)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of sde, ode, got 'euler'"),
        ({"context": "own"}, "context must be one of matched, next_step, clean, got 'own'"),
        ({"prompt_embeds": TEXT.repeat(1, 2, 1)}, "prompt_embeds must have at most 5 tokens, got 6"),
    ],
)
def test_bad_options_are_refused(options, message):
    arguments = {"prompt_embeds": TEXT, "schedule": FlowSchedule(), "num_blocks": 1, **options}
    with pytest.raises(ValueError, match=message):
        page.hierarchical_denoising(MODEL, noise=lambda *_: torch.zeros(1, 3, 2, 2, 4), **arguments)
