"""The predicted memory against what torch's allocator says of a rollout on the device."""

from __future__ import annotations

import gc

import pytest
import torch
from made_runs import make_request

from hiar_model import ExecutionConfig, Rollout
from hiar_model.config import WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.planning.memory import predict

pytestmark = pytest.mark.gpu

CONFIG = WanConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=8)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("order", ["step_first", "stream"])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_the_measured_peak(order, kv_dtype, captured):
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    request = make_request(CONFIG, 60, 104, 24, order=order, window_frames=12, kv_dtype=kv_dtype, cuda_graph=captured)
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
    made = Rollout(
        model, text, request.rollout, ExecutionConfig(cuda_graph=captured, kv_dtype=kv_dtype),
        num_latent_frames=request.num_frames, latent_size=(request.height, request.width),
    )  # fmt: skip
    for _ in made:
        pass
    taken = torch.cuda.max_memory_allocated() - before
    assert abs(predicted / taken - 1) < 0.1, (predicted, taken)
