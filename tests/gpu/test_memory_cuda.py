"""The predicted memory against what torch's allocator says of a rollout on the device."""

from __future__ import annotations

import gc

import pytest
import torch

from hiar_model.config import WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.planning.memory import Request, predict

pytestmark = pytest.mark.gpu

CONFIG = WanConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=8)


@pytest.mark.parametrize("executor", ["eager", "graph"])
@pytest.mark.parametrize("order", ["step_first", "stream"])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_the_measured_peak(order, cache_dtype, executor):
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    request = Request(CONFIG, 60, 104, 24, order=order, window_frames=12, cache_dtype=cache_dtype, executor=executor)
    predicted = predict(request).total
    gc.collect()  # what is freed while the rollout runs would be missing in the figure
    torch._C._cuda_clearCublasWorkspaces()  # those of streams that other tests worked on
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        model = HiARTransformer(CONFIG).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.02)
    text = torch.randn(1, CONFIG.text_len, CONFIG.text_dim, device="cuda", dtype=torch.bfloat16)
    for _ in request.rollout(model, text):
        pass
    taken = torch.cuda.max_memory_allocated() - before
    assert abs(predicted / taken - 1) < 0.1, (predicted, taken)
