"""csrc/: every file compiles for every GPU, cleanly and within its registers; the library links and loads without one.

What the kernels compute is tested beside their Triton twins (tests/interpreter), on a GPU or built for the host.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hiar_kernels.common import extension
from hiar_kernels.common.aot import _dump
from hiar_kernels.common.extension import (
    ARCHITECTURES,
    SOURCES,
    CannotBuild,
    architectures,
    command,
    find_torch,
    targets,
)

pytestmark = pytest.mark.compile

FILES = sorted(SOURCES.glob("*.cu"))
KERNELS = {
    "ring_advance": 1,
    "merge_attention": 6,
    "qk_norm_rope_append": 9,
    "qk_norm_rope_append_fp8": 15,
}  # instances of each
WARNINGS = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"]


def functions(said: str) -> dict[str, tuple[int, int, int]]:
    """Kernel -> (registers, bytes of spills, bytes of stack), from what ptxas says with -v."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spills, stack = re.findall(r"(\d+) bytes spill", part), re.search(r"(\d+) bytes stack frame", part)
        assert registers and spills and stack, part
        found[part.partition("'")[0]] = (int(registers[1]), sum(map(int, spills)), int(stack[1]))
    return found


def compile_one(nvcc: Path, file: Path, arch: str, folder: Path, *options: str) -> str:
    """The device code of one file; what ptxas said of its kernels."""
    words = command(nvcc, find_torch(), folder / "x.cubin", [*options, *WARNINGS, "-Xptxas", "-v"])
    words = [w for w in words if w != "-shared" and not w.endswith((".cu", ".cpp")) and w[:2].lower() != "-l"]
    done = subprocess.run([*words, "-cubin", f"-arch=sm_{arch}", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@functools.cache  # a build for two tests
def cubin(nvcc: Path, file: Path, arch: str) -> tuple[bytes, str]:
    """The device code of a file of ours, and what ptxas said of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        said = compile_one(nvcc, file, arch, Path(folder))
        return Path(folder, "x.cubin").read_bytes(), said


def most_registers(name: str) -> int:
    """What leaves room for a chip's worth of threads: of qk_norm_rope_append by the packs that a thread holds.

    Pairs take 98 on sm_90a (nvcc 13.0); registers are handed out by eights.
    """
    packs = re.search(r"qk_norm_rope_append(_fp8)?_kernelI.*Lb[01]ELi(\d)E", name)
    if packs:
        return {"1": 64, "2": 80, "8": 128}[packs[2]] if packs[1] else {"1": 64, "2": 64, "8": 104}[packs[2]]
    return 64 if "tiles_of_qk_norm_rope_append_fp8" in name else 40


def too_much(kernels: dict[str, tuple[int, int, int]]) -> list[str]:
    return [
        f"{name}: {registers} registers (at most {most_registers(name)}), {spills} bytes of spills, {stack} of stack"
        for name, (registers, spills, stack) in kernels.items()
        if registers > most_registers(name) or spills or stack
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_compiles_for_every_gpu(file, arch, nvcc):
    kernels = functions(cubin(nvcc, file, arch)[1])
    assert len(kernels) == KERNELS[file.stem]
    assert all(f"{file.stem}_kernel" in name for name in kernels)
    problems = too_much(kernels)
    assert not problems, "\n".join(problems)


GREEDY = """
__global__ void __launch_bounds__(1024) greedy(float* x) {
  float held[96];
  for (int i = 0; i < 96; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; ++i) x[(95 - i) * 1024 + threadIdx.x] = held[i];
}
"""


def test_the_gate_sees_spills(nvcc, tmp_path):
    (tmp_path / "greedy.cu").write_text(GREEDY)
    assert len(too_much(functions(compile_one(nvcc, tmp_path / "greedy.cu", "90a", tmp_path)))) == 1
    wide, narrow = "merge_attention_kernelIfLi4ELb1E", "qk_norm_rope_append_kernelI6__halfLi8ELb1ELi1EEEv"
    for name, most in ((wide, 40), (narrow, 64)):
        assert (
            too_much({name: (most + 1, 0, 0)}) and too_much({name: (most, 0, 8)}) and not too_much({name: (most, 0, 0)})
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_packs_move_whole(file, nvcc):
    """The machine code of the wide kernels loads and stores 16 bytes at a time."""
    code = _dump(cubin(nvcc, file, "90a")[0])
    parts = code.split("Function : ")[1:]
    assert len(parts) == KERNELS[file.stem]
    for part in parts:
        wide = "Lb1E" in part.partition("\n")[0]  # the template argument WIDE
        assert bool(re.search(r"LDG\.E\.128", part)) == bool(re.search(r"STG\.E\.128", part)) == wide, part[:99]


# The library


@pytest.fixture(scope="module")
def built(nvcc, tmp_path_factory) -> Path:
    """Built as an installation does, for one GPU."""
    folder = tmp_path_factory.mktemp("built")
    environment = {**os.environ, "HIAR_CUDA_ARCHS": "90a", "HIAR_BUILD_CUDA": "1"}
    done = install(folder, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hiar-kernels: CUDA extension built for sm_90a" in done.stderr.splitlines()
    return folder / "hiar_kernels"


def install(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """setup.py's part of an installation."""
    words = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", folder, "--build-base", folder / "base"]
    return subprocess.run(words, cwd=SOURCES.parent, env=environment, capture_output=True, text=True)


def test_the_record(built):
    assert {path.name for path in built.iterdir()} >= {"__init__.py", "attention", extension.LIBRARY}
    record = extension.record(built)
    assert record["reason"] is None and record["archs"] == ["90a"] and record["sources"] == extension.digest()


def test_it_loads_without_a_gpu(built):
    """In a process of its own: kernels are registered, and a CPU tensor gets one line."""
    code = f"""
import torch
torch.ops.load_library({str(built / extension.LIBRARY)!r})
names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("hiar_cuda"))
print(*names)
one, two = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
try:
    torch.ops.hiar_cuda.ring_advance(one, two, two, two, one, one, 0, 0)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, line = done.stdout.splitlines()
    assert names == " ".join(f"hiar_cuda::{name}" for name in sorted(KERNELS))
    assert line.endswith("ring_advance: position must be a CUDA tensor")


def test_it_needs_no_cuda_libraries(built):
    """Only torch and the C++ runtime: the same file serves a CPU torch and a CUDA one."""
    said = subprocess.run(["readelf", "-d", built / extension.LIBRARY], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", said.stdout))
    runtime = {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "librt", "ld-linux-x86-64"}
    assert {"libtorch_cpu"} <= needed <= {"libtorch_cpu", "libc10", *runtime}


def test_a_second_build_is_none(built, monkeypatch):
    monkeypatch.setenv("HIAR_CUDA_ARCHS", "90a")
    before = (built / extension.LIBRARY).stat().st_mtime_ns
    assert extension.build(built) == "CUDA extension up to date, for sm_90a"
    assert (built / extension.LIBRARY).stat().st_mtime_ns == before


def test_architectures(nvcc, monkeypatch):
    monkeypatch.delenv("HIAR_CUDA_ARCHS", raising=False)
    assert set(architectures(nvcc)) <= set(ARCHITECTURES)
    monkeypatch.setenv("HIAR_CUDA_ARCHS", "80; 90a")
    assert architectures(nvcc) == ("80", "90a")
    assert targets(("90a",))[-1] == "-gencode=arch=compute_90a,code=sm_90a"
    monkeypatch.setenv("HIAR_CUDA_ARCHS", "80;5")
    with pytest.raises(CannotBuild, match="HIAR_CUDA_ARCHS names '5', which .* does not know; it knows .*80"):
        architectures(nvcc)


def test_a_broken_source_is_a_reason(nvcc, tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "portable.h").touch()
    (sources / "broken.cu").write_text("int x = nothing;\n")
    monkeypatch.setattr(extension, "SOURCES", sources)
    monkeypatch.setenv("HIAR_CUDA_ARCHS", "90a")
    monkeypatch.delenv("HIAR_BUILD_CUDA", raising=False)
    (tmp_path / extension.LIBRARY).touch()  # of before
    said = extension.build(tmp_path)
    assert said.startswith("CUDA extension not built: nvcc failed: ") and '"nothing" is undefined' in said
    assert not (tmp_path / extension.LIBRARY).exists()
    assert json.loads((tmp_path / extension.RECORD).read_text())["reason"].startswith("nvcc failed: ")
    monkeypatch.setenv("HIAR_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="^hiar-kernels: HIAR_BUILD_CUDA=1, but nvcc failed: "):
        extension.build(tmp_path)
