"""Kernel tests, in two tiers from the same files: on the CPU in Triton's interpreter, or on a CUDA device.

    TRITON_INTERPRET=1 pytest -m interpreter tests/interpreter
    pytest -m gpu tests/interpreter

Triton reads TRITON_INTERPRET when it is imported, so the tiers never share a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from emulation import no_nvcc, use

from hiar_kernels.common.triton_loader import interpreting


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts these tests into the gpu tier too, which needs torch and pytest alone: those of diffusers if it is there,
    none that needs csrc/ built for the host.
    """
    here, left_out = Path(__file__).parent, {"emulation"}
    if find_spec("diffusers") is None:
        left_out.add("diffusers")
    for item in [item for item in items if here in item.path.parents]:
        if not left_out & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels of this process run: "cpu" in the interpreter, else "cuda"."""
    tier = request.config.getoption("markexpr")
    if tier == "gpu" and interpreting():
        pytest.fail("pytest -m gpu needs a process without TRITON_INTERPRET=1, got one with it", pytrace=False)
    if tier == "interpreter" and not interpreting():
        pytest.fail("pytest -m interpreter needs TRITON_INTERPRET=1, which is not set", pytrace=False)
    if not interpreting() and not torch.cuda.is_available():
        pytest.fail("pytest -m gpu needs a CUDA device, torch finds none", pytrace=False)
    return torch.device("cpu" if interpreting() else "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        here = interpreting() and no_nvcc()
        metafunc.parametrize("kernel", ["triton"] if here else ["triton", "cuda"], indirect=True)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The implementation of an op that Triton and CUDA C++ both have; on the CPU the latter is built for the host."""
    if request.param == "cuda" and interpreting():
        use(request.getfixturevalue("emulation"))
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every fresh tensor (torch.empty, empty_like, new_empty, ...) is full of NaN, or of the largest integer."""
    fill, strict = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(3).isnan().all()), "fresh memory is not poisoned"
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]
        torch.use_deterministic_algorithms(strict, warn_only=warn)
