"""What all tests of training share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy_codec import codec_once  # noqa: F401 (fixture)
from train_job import recipe, train


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates of the stage of train_job, which no test changes."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    train(folder, recipe(updates=2))
    return folder


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(ended, tmp_path / "run")
