"""Installing the CUDA extension or not: what decides, what is left behind, what is said; all without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hiar_kernels as hk
from hiar_kernels.common import cuda_loader, extension
from hiar_kernels.common.extension import CannotBuild
from hiar_model.cli.doctor import report

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of the installed package, no variables set, and no memory of what was found before."""
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    for name in ("HIAR_BUILD_CUDA", "HIAR_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_loader, "emulation", None)
    cuda_loader._missing.cache_clear()
    cuda_loader._loaded.cache_clear()
    yield tmp_path
    cuda_loader._missing.cache_clear()
    cuda_loader._loaded.cache_clear()


def leave(package: Path, **record: object) -> None:
    (package / extension.RECORD).write_text(json.dumps(record))


ONE, TWO = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
CALLS = {
    "ring_advance": lambda: hk.ring_advance(ONE, TWO, TWO, TWO, advance=ONE, capacities=ONE, impl="cuda"),
    "merge_attention": lambda: hk.merge_attention([torch.zeros(1, 1, 1, 2)], [torch.zeros(1, 1, 1)], impl="cuda"),
    "qk_norm_rope_append": lambda: hk.qk_norm_rope_append(
        torch.ones(1, 1, 6), *[torch.ones(2)] * 2, TWO, TWO, *torch.zeros(2, 1, 1, 1, 2), num_heads=1, grid=(1, 1),
        impl="cuda",
    ),
    "qk_norm_rope_append_fp8": lambda: hk.qk_norm_rope_append_fp8(
        torch.ones(1, 1, 6), *[torch.ones(2)] * 2, TWO, TWO, torch.zeros(1, 1, 1, 2, dtype=torch.float8_e4m3fn),
        torch.zeros(1, 1, 1, 2, 16, dtype=torch.float8_e4m3fn), *torch.ones(2, 1, 1, 1), num_heads=1, grid=(1, 1),
        impl="cuda",
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", CALLS)
def test_every_op_says_why(op, package):
    leave(package, reason="no nvcc on PATH")
    with pytest.raises(ValueError) as refused:
        CALLS[op]()
    assert str(refused.value) == f"{op}: impl='cuda' needs the CUDA extension, which is not built: no nvcc on PATH"


@pytest.mark.parametrize("op", CALLS)
def test_a_built_one_needs_cuda_tensors(op, package):
    leave(package, reason=None, sources=extension.digest(), archs=["80", "90a"], nvcc="13.0")
    (package / extension.LIBRARY).touch()
    with pytest.raises(ValueError) as refused:
        CALLS[op]()
    assert str(refused.value) == f"{op}: impl='cuda' needs a CUDA tensor, got one on cpu"
    assert hk.backends().extension == "built for sm_80, sm_90a by nvcc 13.0"


def test_a_library_that_does_not_load(package):
    leave(package, reason=None, sources=extension.digest(), archs=["80"], nvcc="13.0")
    (package / extension.LIBRARY).write_text("no library")
    with pytest.raises(ValueError, match="^ring_advance: impl='cuda' cannot load its library: .*too short|invalid ELF"):
        cuda_loader._loaded("ring_advance", "cuda:0")


def test_doctor_and_backends_repeat_the_reason(package):
    leave(package, reason="no nvcc on PATH")
    assert dict(report())["CUDA extension"] == "not built: no nvcc on PATH"
    assert "CUDA extension: not built: no nvcc on PATH" in str(hk.backends())


def test_reasons(package):
    assert extension.missing().startswith("it was never built here; pip install -e . does it")
    leave(package, reason=None, sources=extension.digest(), archs=["80"], nvcc="13.0")
    assert extension.missing() == f"{package / extension.LIBRARY} is gone"
    (package / extension.LIBRARY).touch()
    assert extension.missing() is None
    leave(package, reason=None, sources="of other sources", archs=["80"], nvcc="13.0")
    assert extension.missing().startswith("csrc/ has changed since; build it again")


def test_an_installed_wheel_has_no_sources(package, monkeypatch):
    monkeypatch.setattr(extension, "SOURCES", package / "csrc")
    leave(package, reason=None, sources="of some sources", archs=["80"], nvcc="13.0")
    (package / extension.LIBRARY).touch()
    assert extension.digest() is None and extension.missing() is None


@pytest.mark.parametrize("variables", [{"HIAR_BUILD_CUDA": "0"}, {"CUDA_HOME": "/nowhere"}], ids=["off", "no nvcc"])
def test_not_building_is_a_line_and_a_record(variables, package, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (package / extension.LIBRARY).touch()  # of before: it goes
    said = extension.build()
    why = "HIAR_BUILD_CUDA=0 when" if "HIAR_BUILD_CUDA" in variables else "no nvcc in /nowhere/bin (CUDA_HOME)"
    assert said.startswith(f"CUDA extension not built: {why}") and said.count("\n") == 0
    assert extension.missing().startswith(why) and not (package / extension.LIBRARY).exists()
    assert not extension.builds()


def test_what_was_built_elsewhere_is_kept(package, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    leave(package, reason=None, sources=extension.digest(), archs=["80"], nvcc="13.0")
    (package / extension.LIBRARY).touch()
    assert extension.build().startswith("CUDA extension kept as it was built: no nvcc in /nowhere/bin")
    assert extension.missing() is None
    leave(package, reason=None, sources="of other sources", archs=["80"], nvcc="13.0")
    assert extension.build().startswith("CUDA extension not built: no nvcc")
    assert not (package / extension.LIBRARY).exists()


def test_a_build_that_must_be(package, monkeypatch):
    monkeypatch.setenv("HIAR_BUILD_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match="^hiar-kernels: HIAR_BUILD_CUDA=1, but no nvcc in /nowhere/bin"):
        extension.build()
    monkeypatch.setenv("HIAR_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="^HIAR_BUILD_CUDA must be auto, 0 or 1, got 'yes'$"):
        extension.build()


def test_where_nvcc_is(package, tmp_path, monkeypatch):
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert extension.find_nvcc() == nvcc
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "")
    assert extension.find_nvcc() == nvcc
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(CannotBuild, match="CUDA_HOME"):
        extension.find_nvcc()


def test_which_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(extension.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(CannotBuild, match="^no torch in .* yet: install torch first"):
        extension.find_torch()
    header = tmp_path / "torch" / extension._HEADER
    header.parent.mkdir(parents=True)
    for version, found in (("2.10.1", False), ("2.11.0+cu130", False), ("2.11.0+cu130", True), ("3.0.0", True)):
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
        if found:
            header.touch()
            assert extension.find_torch() == tmp_path / "torch"
        else:
            with pytest.raises(CannotBuild, match="is older than 2.11 or has no headers"):
                extension.find_torch()


# setup.py, in a process of its own


def setup(*words: object, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--quiet", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)


def test_an_installation_without_nvcc(tmp_path):
    done = setup("build", "--build-lib", tmp_path, "--build-base", tmp_path / "base", CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    line = (
        "hiar-kernels: CUDA extension not built: no nvcc in /nowhere/bin (CUDA_HOME); PyTorch and Triton serve every op"
    )
    assert line in done.stderr.splitlines()
    folder = tmp_path / "hiar_kernels"
    assert not (folder / extension.LIBRARY).exists() and (folder / "ring_advance" / "cuda.py").exists()
    assert json.loads((folder / extension.RECORD).read_text()) == {"reason": "no nvcc in /nowhere/bin (CUDA_HOME)"}
