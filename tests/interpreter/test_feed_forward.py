"""The feed-forward part on a device: bias and GELU in one epilogue keep the error budget."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget

from hiar_model.config import WanConfig
from hiar_model.models.transformer import Block

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_feed_forward(device, dtype):
    torch.manual_seed(0)
    block = Block(WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=1)).to(device)
    x = torch.randn(2, 33, 64, device=device)
    block.to(dtype)
    exact = block.double().ffn(x.to(dtype).double())  # of the rounded weights
    block.to(dtype)
    with torch.no_grad():
        assert_within_budget(block._feed_forward(x.to(dtype)), block.ffn(x.to(dtype)), exact.detach())
