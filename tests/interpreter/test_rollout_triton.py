"""The whole model on Triton kernels: a small rollout equals the reference's."""

from __future__ import annotations

import pytest
import torch
from made_runs import make_rollout

import hiar_kernels
from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.models.transformer import HiARTransformer

pytestmark = pytest.mark.interpreter

CONFIG = WanConfig(
    dim=64, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=6, in_channels=4, out_channels=4
)


EIGHT_BITS = {"order": "stream", "kv_dtype": "float8_e4m3fn", "attention_dtype": "float8_e4m3fn"}


@pytest.mark.parametrize(
    "options",
    [
        {"order": "step_first"},
        {"order": "wavefront", "pairs": True},
        {"order": "stream", "window_frames": (4, 5)},
        {"cache_source": "next_step", "window_frames": 5, "num_frames": 6, **EIGHT_BITS},
    ],
    ids=str,
)
def test_a_rollout_on_triton_kernels(device, options):
    torch.manual_seed(0)
    model = HiARTransformer(CONFIG).to(device).eval().requires_grad_(False)
    text = torch.randn(1, 4, CONFIG.text_dim, device=device)

    def run() -> torch.Tensor:
        size = {"num_frames": 9, "height": 4, "width": 6}
        made = make_rollout(model, text, FlowSchedule.uniform(2), **{**size, **options})
        return torch.cat([block.latents for block in made], 1)

    with hiar_kernels.prefer("reference"):
        expected = run()
    with hiar_kernels.prefer("triton"):
        found = run()
    assert float(expected.abs().max()) > 0.5
    # a number next to a tie of e4m3 may round to its other side
    assert float((found - expected).abs().max()) < (0.2 if "kv_dtype" in options else 1e-4)
    if "kv_dtype" in options:
        assert float((found - expected).abs().median()) < 0.01


@pytest.mark.parametrize("options", [{"order": "stream"}, {"order": "wavefront", "pairs": True}], ids=str)
def test_captured_launches_on_triton_kernels(device, options):
    """The kernels read all that changes from device memory: what was captured at one block serves the others."""
    torch.manual_seed(0)
    model = HiARTransformer(CONFIG).to(device).eval().requires_grad_(False)
    text = torch.randn(1, 4, CONFIG.text_dim, device=device)
    captured = "recorded" if device.type == "cpu" else "graph"
    with hiar_kernels.prefer("triton"):
        eager, replayed = (
            make_rollout(
                model, text, FlowSchedule.uniform(2), num_frames=5, height=2, width=4, frames_per_block=1,
                window_frames=2, executor=executor, **options,
            )
            for executor in ("eager", captured)
        )  # fmt: skip
        for one, other in zip(eager, replayed, strict=True):
            assert torch.equal(one.latents, other.latents), one.block
    assert replayed._executor.counters.captures < replayed._executor.counters.launches


def test_what_is_preferred_is_restored():
    with hiar_kernels.prefer("reference"):
        pass
    assert hiar_kernels.common.dispatch._preferred is None
    with pytest.raises(ValueError, match="unknown impl 'warp'; known: auto, reference"), hiar_kernels.prefer("warp"):
        pass


def test_the_first_call_may_be_compiled(device):
    """Loading the kernels is no graph break, even where nothing has loaded them before."""
    mask = hiar_kernels.BlockCausal(3, 2, window_frames=4)
    q, k, v = torch.randn(3, 1, 12, 2, 16, device=device).unbind()
    hiar_kernels.common.triton_loader._loaded.cache_clear()
    compiled = torch.compile(
        lambda q, k, v: hiar_kernels.attention(q, k, v, mask=mask, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    expected = hiar_kernels.reference.attention(q, k, v, mask=mask)
    assert float((compiled(q, k, v) - expected).abs().max()) < 1e-5
