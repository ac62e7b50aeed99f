"""The small autoencoder on a device: captured on its own stream, the frames of the eager run and nearly float32's."""

from __future__ import annotations

import pytest
import torch

from hiar_model.models.small_stream import SmallDecoder
from hiar_model.models.small_vae import SmallVAE
from hiar_model.models.vae import decode_behind

pytestmark = pytest.mark.gpu

BLOCKS = torch.randn(4, 1, 3, 16, 8, 12, generator=torch.Generator().manual_seed(0))


def test_captured_on_its_own_stream():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    torch.manual_seed(0)
    exact = SmallVAE().eval().requires_grad_(False)
    state = exact.state_dict()
    vae = SmallVAE().to("cuda", torch.float16).eval().requires_grad_(False)
    vae.load_state_dict(state)
    captured, eager = SmallDecoder(vae, own_stream=True), SmallDecoder(vae, cuda_graph=False)
    cpu = SmallDecoder(exact)
    for _ in range(2):  # the second clip replays what the first captured
        blocks = [block.cuda() for block in BLOCKS]
        for frames, block in zip(decode_behind(captured, blocks), BLOCKS, strict=True):
            plain, near = eager.decode(block), cpu.decode(block)
            assert abs(frames.astype(int) - plain).max() <= 1
            assert abs(frames.astype(int) - near).max() <= 3
        for decoder in (captured, eager, cpu):
            decoder.reset()
    assert len(captured._calls) == 1
