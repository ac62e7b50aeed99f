"""Random weights that training starts from: what is zero, and what each number depends on."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import train_job  # noqa: F401 - makes the model "tiny" known

from hiar_model.train.engine.networks import make_network

pytestmark = pytest.mark.cpu


def test_it_begins_as_the_identity():
    """Gates and head are zero (adaLN-Zero): the velocity is 0, whatever comes in."""
    network = make_network("tiny", seed=0)
    config = network.config
    x = torch.randn(1, 3, config.in_channels, 4, 4)
    if config.position_grid is not None:
        height, width = (n * p for n, p in zip(config.position_grid, config.patch_size[1:], strict=True))
        x = torch.randn(1, 3, config.in_channels, height, width)
    prompt_embeds = torch.randn(1, config.text_len, config.text_dim)
    assert not network(x, torch.full((1, 3), 500.0), prompt_embeds).any()
    zeros = [network.head.head.weight, network.time_projection[-1].weight, *(b.modulation for b in network.blocks)]
    assert not any(bool(weight.any()) for weight in zeros)
    assert network.training and all(p.requires_grad for p in network.parameters())


def test_each_weight_has_numbers_of_its_own():
    """Of the seed and its name, whatever torch's generator gives."""
    weights = {name: p.detach() for name, p in make_network("tiny", seed=0).named_parameters() if p.any()}
    torch.manual_seed(7)
    again = dict(make_network("tiny", seed=0).named_parameters())
    other = dict(make_network("tiny", seed=1).named_parameters())
    drawn = {name: value for name, value in weights.items() if not torch.equal(value, torch.ones_like(value))}
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert not any(torch.equal(value, other[name]) for name, value in drawn.items())
    same_shape = [pair for pair in combinations(drawn, 2) if drawn[pair[0]].shape == drawn[pair[1]].shape]
    assert len(same_shape) > 20 and not any(torch.equal(drawn[one], drawn[two]) for one, two in same_shape)
    for name, value in drawn.items():
        if value.dim() == 2 and "modulation" not in name:
            assert float(value.abs().max()) <= value.shape[1] ** -0.5 < 1.2 * float(value.abs().max()), name
