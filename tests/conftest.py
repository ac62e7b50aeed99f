"""What needs nvcc: tests of csrc/, left out (and said to be) where there is none; in CI its absence is a failure. And
what tests of the command line share.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: tests and the processes that they start compute the same bits, on one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import emulation as host
import pytest
from emulation import no_nvcc

from hiar_kernels.common.extension import find_nvcc

NEEDS_NVCC = {"nvcc", "emulation"}  # fixtures


def pytest_configure() -> None:
    """A job in the background of a script has SIGINT ignored, and its children too: tests of Ctrl-C need it heard."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str | None:
    why = no_nvcc()
    return why and f"csrc: {why}, tests that need it are left out (with CI=true they fail)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if no_nvcc() is None:
        return
    left_out = [item for item in items if NEEDS_NVCC & set(getattr(item, "fixturenames", ()))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def nvcc() -> Path:
    return find_nvcc()


@pytest.fixture(scope="session")
def emulation(nvcc: Path) -> Path:
    """csrc/ built for the host."""
    return host.build(nvcc)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the test runs; the number of threads is put back."""
    import torch

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
