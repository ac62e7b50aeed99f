"""A server that the tests of this folder share, of a small model."""

from __future__ import annotations

import pytest
from serving import serving
from small_toy import write_model

from hiar_model.models.registry import load_video_model
from hiar_model.serve.app import Settings
from hiar_model.serve.scheduler import Limits


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def model(folder):
    return load_video_model(folder, "cpu")


@pytest.fixture(scope="session")
def service(model, tmp_path_factory):
    settings = Settings(limits=Limits(64, keep=20))  # tests leave sessions behind
    with serving(model, tmp_path_factory.mktemp("data"), settings) as running:
        yield running
