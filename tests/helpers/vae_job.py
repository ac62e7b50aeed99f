"""What test_vae.py runs under torchrun: two steps on the first rank, on the last one nothing but the VAE.

torchrun --nproc-per-node 2 tests/helpers/vae_job.py FOLDER      of a VAE -> frames.npy, split.json in it
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from made_runs import make_rollout
from tiny_model import SIZE, make_model

from hiar_model.config import FlowSchedule, WanConfig
from hiar_model.distributed.pipeline import init_distributed
from hiar_model.models.vae import StreamingDecoder, load_vae
from hiar_model.rollout import Rollout

CONFIG = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, freq_dim=8, text_dim=6, text_len=5)
STEPS, FRAMES = 2, 6


def video(executor: str, **options: object) -> Rollout:
    """Of 6 latent frames; the same bits whatever executes it."""
    text = torch.randn(1, 3, CONFIG.text_dim, generator=torch.Generator().manual_seed(1))
    schedule = FlowSchedule.uniform(STEPS)
    order = {"order": "stream", "window_frames": 6}
    return make_rollout(
        make_model(0, CONFIG), text, schedule, num_frames=FRAMES, executor=executor, **SIZE, **order, **options
    )


def main(folder: Path) -> None:
    made = video("pipeline", dedicated_decoder_rank=True, timeout=60)
    assert made.pipeline is not None
    if made.pipeline.stage.steps:
        assert not list(made)
    else:
        decoder = StreamingDecoder(load_vae(folder), own_stream=True)
        np.save(folder / "frames.npy", np.concatenate([decoder.decode(block.latents) for block in made]))
        (folder / "split.json").write_text(json.dumps([dist.get_rank(), *made.pipeline.stage.split]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
