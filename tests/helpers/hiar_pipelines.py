"""HiARPipeline of small random weights in diffusers' layout, for tests that import these fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wan_files

from hiar_model.integrations.diffusers import HiARPipeline


@pytest.fixture(scope="module", name="folder")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_files.write_diffusers(tmp_path_factory.mktemp("diffusers") / "wan")


@pytest.fixture(scope="module", name="pipe")
def hiar_pipe(folder: Path) -> HiARPipeline:
    return load(folder)


def load(folder: Path, **options: Any) -> HiARPipeline:
    return quiet(HiARPipeline.from_pretrained(folder, **options))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
