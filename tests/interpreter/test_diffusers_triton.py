"""Triton kernels inside diffusers' own Wan transformer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

import hiar_kernels
from hiar_model.config import WanConfig
from hiar_model.models.key_mapping import to_native
from hiar_model.models.transformer import HiARTransformer

pytestmark = pytest.mark.interpreter

SIZES = {"num_layers": 2, "ffn_dim": 64, "freq_dim": 16, "text_dim": 8, "in_channels": 4, "out_channels": 4}


@pytest.fixture
def diffusers() -> Any:
    """The library; tests with this fixture are left out of the gpu tier where it is not installed."""
    import diffusers

    return diffusers


def exact(model: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Our transformer in float64, by references, on the same weights."""
    config = WanConfig(dim=32, num_heads=2, text_len=6, **SIZES)
    network = HiARTransformer(config).double().to(latents.device)
    network.load_state_dict({to_native(key): value.double() for key, value in model.state_dict().items()})
    with torch.no_grad(), hiar_kernels.prefer("reference"):
        return network(latents.double().transpose(1, 2), timesteps.double(), text.double()).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_error_budget(diffusers, device, dtype):
    from hiar_model.integrations.diffusers import apply_hiar_kernels

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, **SIZES).to(device, dtype)
    theirs = copy.deepcopy(model)
    args = (torch.randn(2, 4, 3, 6, 4), torch.tensor([900.0, 400.0]), torch.randn(2, 6, 8))
    latents, timesteps, text = (x.to(device) for x in args)
    args = (latents.to(dtype), timesteps, text.to(dtype))
    apply_hiar_kernels(model)
    with torch.no_grad(), hiar_kernels.prefer("triton"), hiar_kernels.taken() as taken:
        found = model(*args, return_dict=False)[0]
        expected = theirs(*args, return_dict=False)[0]
    assert {impl for _, impl in taken} == {"triton"} and len(taken) == 9 * 2 + 1
    assert_within_budget(found.cpu(), expected.cpu(), exact(model, *args).cpu())
