"""A server that the tests of this folder share, of a small model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, browser
from live_sessions import OFTEN
from processes import Started
from serving import serving
from small_toy import write_model

from hiar_model.models.registry import load_video_model
from hiar_model.serve.app import Service, Settings
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


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(service: Service, chromium: Browser) -> Iterator[Page]:
    """A page, which has complained of nothing in the end."""
    page = chromium.page()
    yield page
    errors = page.errors
    page.evaluate("document.querySelector('#stop').click()")
    page.close()
    assert not errors
