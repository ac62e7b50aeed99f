"""`hiar serve` on the command line: what is refused, in one line, before a model is loaded."""

from __future__ import annotations

import logging
import socket

import pytest

from hiar_model.cli import main
from hiar_model.cli import serve as command
from hiar_model.serve.scheduler import Scheduler
from hiar_model.serve.store import Store

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]


@pytest.fixture(autouse=True)
def log_level():
    """The command sets it for its process, which here is that of other tests."""
    log = logging.getLogger("hiar.serve")
    before = log.level
    yield
    log.setLevel(before)


def refused(capsys, *words):
    assert main(["serve", *map(str, words)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--port", 70000), "--port must be from 0 to 65535, got 70000"),
        (("--max-sessions", 0), "--max-sessions must be at least 1, got 0"),
        (("--batch-sessions", 0), "--batch-sessions must be at least 1, got 0"),
        (("--batch-sessions", 2, "--cuda-graph", "true"), "--batch-sessions must be 1 with --cuda-graph"),
        (("--cuda-graph", "true", "--device", "cpu"), "--cuda-graph needs a CUDA device, --device cpu is cpu"),
        (("--data", ""), "--data must hold something, got ''"),
        (("--keep", -1), "--keep must be from 0 to 86400 seconds, got -1"),
        (("--state-disk", 1), "--state-disk needs --data"),
        (("--state-disk", -1, "--data", "d"), "--state-disk must be from 0 to 1000000 GB, got -1"),
        (("--host", "0.0.0.0"), "--host 0.0.0.0 can be reached from other machines: give --token-file"),
        (("--token-file", "missing"), "--token-file missing: no such file"),
        (("--proxy", "127.0.0.1,my.proxy"), "--proxy my.proxy is no address, legal: addresses such as 127.0.0.1"),
        (("--model", "tyo"), "did you mean toy?"),
        (("--height", 64, "--port", 0), "model toy makes frames of 32x32 pixels only, got 64x32"),
        (("--linear-dtype", "float7", "--port", 0), "float8_e4m3fn"),
        (("--host", "no.such.name.invalid", "--token-file", "tokens"), "cannot listen at --host no.such.name.invalid"),
    ],
)
def test_wrong_options(here, capsys, words, says):
    (here / "tokens").write_text("a-token-of-more-than-16-characters\n")
    assert says in refused(capsys, *words)
    assert [path.name for path in here.iterdir()] == ["tokens"]  # no folder for data


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen at --host 127.0.0.1 --port {port}: Address already in use" in refused(
            capsys, "--port", port
        )


def test_a_folder_of_another_server_is_told_before_the_model_is_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    store = Store(here / "data")
    assert refused(capsys, "--port", 0, "--data", "data") == "hiar: --data data: another server uses it"
    store.close()
    (here / "file").touch()
    assert refused(capsys, "--port", 0, "--data", "file/d").startswith("hiar: --data: cannot write into file/d: ")


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(command, "EXTRA", ("starlette", "no_such_package"))
    assert "needs no_such_package: pip install 'hiar-kernels[serve]'" in refused(capsys)


def test_a_signal_while_the_first_block_is_made_ends_the_thread_that_makes_it(folder, monkeypatch, capsys):
    """Python would crash if it ended beneath that thread."""
    threads = []

    def interrupted(scheduler):
        scheduler.thread.start()
        threads.append(scheduler.thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "start", interrupted)
    assert main(["serve", "--model", str(folder), "--port", "0", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("hiar: interrupted\n") and not threads[0].is_alive()
