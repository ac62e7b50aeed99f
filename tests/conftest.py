"""What needs nvcc: tests of csrc/, left out (and said to be) where there is none; in CI its absence is a failure. And
what tests of the command line share.
"""

from __future__ import annotations

import gc
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import before_torch  # noqa: F401
import emulation as host
import pytest
from emulation import find_nvcc, no_nvcc

TIERS = {"cpu", "interpreter", "compile", "browser"}  # not gpu, which a folder gives to all of its files
NEEDS_NVCC = {"nvcc", "emulation"}  # fixtures
# Files that prepare something for many seconds. They run first: a worker that has done takes half of what another has
# left, and where that cuts such a file in two, both prepare it.
PREPARED = {
    "test_ab.py",
    "test_bench.py",
    "test_csrc.py",
    "test_pipeline.py",
    "test_train_distributed.py",
    "test_ulysses.py",
}
# Files with a test of several seconds. They come next: at the end, such a test would run while the other workers have
# nothing left.
LONG = {
    "test_anchors.py", "test_distribution.py", "test_examples.py", "test_experts.py", "test_free_memory.py",
    "test_jobs.py", "test_keeper.py", "test_long_stream.py", "test_outputs.py", "test_rollout.py",
    "test_shipped_model.py", "test_train_prompts.py", "test_train_toy.py", "test_vae.py",
}  # fmt: skip


def pytest_configure() -> None:
    """A job in the background of a script has SIGINT ignored, and its children too: tests of Ctrl-C need it heard."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str | None:
    why = no_nvcc()
    return why and f"csrc: {why}, tests that need it are left out (with CI=true they fail)"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of one tier alone, files without a test of it are not even imported."""
    tier = config.getoption("markexpr")
    if tier not in TIERS or not re.fullmatch(r"test_.*\.py", collection_path.name):
        return None
    return f"mark.{tier}" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if long := [item.nodeid for item in items if len(item.nodeid) > 300]:
        raise pytest.UsageError(f"{long[0][:200]}... has {len(long[0])} characters: ids=brief, of tests/helpers/ids.py")
    items.sort(key=lambda item: (item.path.name not in PREPARED, item.path.name not in LONG))
    if no_nvcc() is None:
        return
    left_out = [item for item in items if NEEDS_NVCC & set(getattr(item, "fixturenames", ()))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the modules hold stays: no collection of garbage looks through it again, and few look at all, except where
    garbage may hold a GPU's memory.
    """
    gc.freeze()
    if not any(item.get_closest_marker("gpu") for item in session.items):
        gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def nvcc() -> Path:
    return find_nvcc()


@pytest.fixture(scope="session")
def emulation(nvcc: Path) -> Path:
    """csrc/ built for the host."""
    return host.build(nvcc)


@pytest.fixture(scope="module")
def equal_mp4() -> Iterator[None]:
    """Equal frames become equal files: without the part of x264 that reads memory which nobody wrote."""
    from hiar_model.io import encoders

    with mock.patch.dict(encoders.X264, mbtree="0"):
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the test runs; the number of threads is put back."""
    import torch

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
