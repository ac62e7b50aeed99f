"""A server that the tests of this folder share, of a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_sessions import OFTEN
from processes import Started
from serving import serving
from small_toy import write_model

from hiar_model.models.registry import load_video_model
from hiar_model.serve.app import Settings
from hiar_model.serve.metrics import Metrics
from hiar_model.serve.scheduler import Limits
from hiar_model.serve.states import StateDisk


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


@pytest.fixture
def disk(tmp_path):
    disk = StateDisk(tmp_path / "states", 10**8, Metrics(), **OFTEN)
    yield disk
    disk.close()


@pytest.fixture
def started(folder, tmp_path):
    """Starts the whole command, to be killed, or code that ends in it; what still runs after the test is killed too."""
    words = ["serve", "--model", folder, "--port", 0, "--device", "cpu", "--data", tmp_path / "data"]
    running = []

    def start(code=None):
        command = ["-m", "hiar_model"] if code is None else ["-c", code]
        running.append(Started([*command, *words], cwd=Path(__file__).parents[2]))
        running[-1].url = next(running[-1].lines()).split()[-1]
        return running[-1]

    yield start
    for server in running:
        if server.poll() is None:
            server.kill()
            server.wait()
