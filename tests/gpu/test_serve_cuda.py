"""A live session on a device: with captured graphs or without, and a decoder on its own stream, it streams what
`generate` makes.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_session_streams_what_generate_makes(cuda_graph):
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    import numpy as np

    from hiar_model import ExecutionConfig, HiARTransformer, PromptSchedule, RolloutConfig, VideoPipeline, WanConfig
    from hiar_model.models.small_stream import SmallDecoder
    from hiar_model.models.small_vae import SmallVAE
    from hiar_model.models.video_model import VideoModel
    from hiar_model.serve.live import LiveVideo
    from hiar_model.serve.protocol import StartMessage

    torch.manual_seed(0)
    network = HiARTransformer(WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, freq_dim=16, text_dim=8))
    vae = SmallVAE().to("cuda", torch.float16).eval().requires_grad_(False)
    model = VideoModel(
        name="wan",
        transformer=network.to("cuda", torch.bfloat16).eval().requires_grad_(False),
        rollout=RolloutConfig(window_frames=9),
        fps=16,
        num_frames=81,
        train_frames=81,
        latent_size=(16, 8, 12),
        weights_sha256="",
        text_encoder=lambda prompt: torch.full((1, 4, 8), len(prompt) / 10),
        new_decoder=lambda: SmallDecoder(vae, own_stream=True),
        temporal_compression=4,
        spatial_compression=8,
        size_step=(16, 16),
    )
    execution = ExecutionConfig(cuda_graph=cuda_graph)

    def made(seed: int) -> np.ndarray:
        return VideoPipeline(model, execution)("a cat", num_frames=45, seed=seed, order="stream").frames

    def take(video: LiveVideo, count: int) -> list[np.ndarray]:
        pieces: list[np.ndarray] = []
        while len(pieces) < count:
            pieces += [piece.frames for piece in [video.make()] if piece is not None]
        return pieces

    one, other = (LiveVideo(model, execution, StartMessage(1, "a cat", seed=seed)) for seed in (1, 2))
    shown: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for _ in range(4):  # in turns, so that one is decoded while the other's tasks run
        shown[1] += take(one, 1)
        shown[2] += take(other, 1)
    for seed, pieces in shown.items():
        assert np.array_equal(np.concatenate(pieces), made(seed))
    one.seek(1)
    assert np.array_equal(take(one, 1)[0], shown[1][1])
    at = one.change_prompt("a dog in the rain")
    assert at.block >= 3  # block 2 is on its way through the decoder
    pieces = shown[1][:2] + take(one, at.block - 1)
    schedule = PromptSchedule.of([(0, "a cat"), (at.frame / 16, "a dog in the rain")])
    options = {"num_frames": at.frame + 12, "seed": 1, "order": "stream"}
    expected = VideoPipeline(model, execution)(None, prompts=schedule, **options).frames
    assert np.array_equal(np.concatenate(pieces), expected)
