"""A toy model of random weights, small enough to be made for a test: its videos are noise, but legal ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_codec import fit_once

from hiar_model.config import RolloutConfig, WanConfig
from hiar_model.models.registry import load_video_model, save_toy_model
from hiar_model.models.transformer import HiARTransformer
from hiar_model.models.video_model import VideoModel

PROMPT = "a red circle moving right"
BLOCK, WINDOW, TRAIN_FRAMES, FRAMES = 3, 9, 6, 12
SIDE = 32  # pixels


def rollout(**options: Any) -> RolloutConfig:
    """That of the model, or another."""
    return RolloutConfig((1000, 500), 2.0, **{"frames_per_block": BLOCK, "window_frames": WINDOW, **options})


def write_model(folder: Path, config_of_rollout: RolloutConfig | None = None) -> Path:
    """A folder that load_video_model reads."""
    channels = 8
    config = WanConfig(
        dim=32, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=32, text_dim=32, text_len=8,
        in_channels=channels, out_channels=channels,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = HiARTransformer(config)
    return save_toy_model(
        folder,
        transformer,
        fit_once(channels=config.in_channels, frames=64),
        rollout=config_of_rollout or rollout(),
        train_frames=TRAIN_FRAMES,
        num_frames=FRAMES,
        fps=12,
    )


@pytest.fixture(scope="module", name="folder")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a folder, for tests that import this fixture and only read it."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module", name="model")
def small_model(folder: Path) -> VideoModel:
    return load_video_model(folder, "cpu")
