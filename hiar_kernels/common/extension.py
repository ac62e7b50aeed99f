"""Build of the CUDA extension from csrc/, and the record of the result.

    python hiar_kernels/common/extension.py        build it in place, as `pip install -e .` does

Standard library only: setup.py runs this before torch is importable, and locates torch by path.

    HIAR_BUILD_CUDA   auto (default: built where nvcc and torch are found) | 0 | 1 (fail where it cannot be built)
    HIAR_CUDA_ARCHS   such as 80;90a (default: those of 80;89;90a;100a;120 that nvcc knows)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent  # where the library is put
SOURCES = PACKAGE.parent / "csrc"
LIBRARY = "_cuda_ops.so"
RECORD = "_cuda_ops.json"
ARCHITECTURES = ("80", "89", "90a", "100a", "120")
_TORCH = (2, 11)  # the oldest with all of the stable ABI that csrc/ uses
_HEADER = "include/torch/csrc/stable/library.h"


class CannotBuild(Exception):
    """The reason, in one line."""


def mode() -> str:
    """The value of HIAR_BUILD_CUDA."""
    value = os.environ.get("HIAR_BUILD_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"HIAR_BUILD_CUDA must be auto, 0 or 1, got {value!r}")
    return value


def find_nvcc() -> Path:
    """Path of nvcc; only CUDA_HOME is searched if it is set."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None and not home:
        nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise CannotBuild(f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH or in /usr/local/cuda/bin")
    return Path(nvcc)


def find_torch() -> Path:
    """torch's folder, located without import; in an isolated build the target environment comes first."""
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for folder in (Path(root, "torch") for root in roots if root):
        if (folder / "version.py").is_file():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text(encoding="utf-8"))
            if version is None or (int(version[1]), int(version[2])) < _TORCH or not (folder / _HEADER).is_file():
                raise CannotBuild(f"the torch in {folder} is older than {_TORCH[0]}.{_TORCH[1]} or has no headers")
            return folder
    raise CannotBuild(f"no torch in {roots[0]} yet: install torch first, then this package again")


def architectures(nvcc: Path) -> tuple[str, ...]:
    """Architectures to compile for, as nvcc numbers them."""
    known = set(_output(nvcc, "--list-gpu-code").replace("sm_", "").split())
    requested = os.environ.get("HIAR_CUDA_ARCHS")
    if not requested:
        return tuple(arch for arch in ARCHITECTURES if arch.rstrip("af") in known)
    archs = tuple(arch for arch in re.split(r"[;,\s]+", requested) if arch)
    for arch in archs:
        if not re.fullmatch(r"\d+[af]?", arch) or arch.rstrip("af") not in known:
            legal = " ".join(sorted(known, key=int))
            raise CannotBuild(f"HIAR_CUDA_ARCHS names {arch!r}, which {nvcc} does not know; it knows {legal}")
    return archs


def compiler_version(nvcc: Path) -> str:
    match = re.search(r"release ([\d.]+)", _output(nvcc, "--version"))
    return match[1] if match else "unknown"


def targets(archs: Sequence[str]) -> list[str]:
    """nvcc options for GPU architectures."""
    return ["-cudart", "static", *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]


def command(nvcc: Path, torch: Path, output: Path, options: Sequence[str]) -> list[str]:
    """The nvcc command for the library. It uses torch's stable ABI only, so one binary serves later versions too."""
    return [
        str(nvcc), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION=0x{_TORCH[0]:02x}{_TORCH[1]:02x}000000000000", "-isystem", f"{torch}/include",
        "--threads", "2", *options, "-o", str(output), *map(str, sorted(SOURCES.glob("*.c*"))),
        f"-L{torch}/lib", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


def digest() -> str | None:
    """Hash of the sources; None if there are none, as in an installed wheel."""
    files = [path for path in sorted(SOURCES.glob("*")) if path.suffix in (".cpp", ".cu", ".h")]
    if not (SOURCES / "portable.h").is_file():
        return None
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def record(folder: Path | None = None) -> dict[str, Any]:
    """The record of the last build: "reason" (None: it was built), "sources" (:func:`digest`), "archs", "nvcc"."""
    try:
        content: dict[str, Any] = json.loads(((folder or PACKAGE) / RECORD).read_text(encoding="utf-8"))
    except OSError:
        return {
            "reason": "it was never built here; pip install -e . does it, or python hiar_kernels/common/extension.py"
        }
    return content


def missing() -> str | None:
    """Why there is no library to load, in one line; None if there is one."""
    last = record()
    if last["reason"] is not None:
        return str(last["reason"])
    if not (PACKAGE / LIBRARY).is_file():
        return f"{PACKAGE / LIBRARY} is gone"
    if digest() not in (None, last["sources"]):
        return "csrc/ has changed since; build it again: pip install -e . or python hiar_kernels/common/extension.py"
    return None


def _tools() -> tuple[Path, Path]:
    """Paths of nvcc and torch."""
    if mode() == "0":
        raise CannotBuild("HIAR_BUILD_CUDA=0 when the package was installed")
    if sys.platform != "linux":
        raise CannotBuild(f"it is built on Linux, this is {sys.platform}")
    return find_nvcc(), find_torch()


def builds() -> bool:
    """Whether :func:`build` will try."""
    try:
        return bool(_tools())
    except CannotBuild:
        return False


def build(folder: Path | None = None) -> str:
    """Build the library and write its record into a folder, by default the package's; returns a one-line summary.

    Raises:
        SystemExit: HIAR_BUILD_CUDA=1, and it cannot be built.
    """
    folder = folder or PACKAGE
    library = folder / LIBRARY
    try:
        nvcc, torch = _tools()
        state = {"reason": None, "sources": digest(), "archs": architectures(nvcc), "nvcc": compiler_version(nvcc)}
        state = json.loads(json.dumps(state))
        names = ", ".join(f"sm_{arch}" for arch in state["archs"])
        if library.is_file() and record(folder) == state:
            return f"CUDA extension up to date, for {names}"
        new = library.with_suffix(f".{os.getpid()}.so")  # a process may have the old one open
        try:
            done = subprocess.run(command(nvcc, torch, new, targets(state["archs"])), capture_output=True, text=True)
            if done.returncode:
                print(done.stdout + done.stderr, file=sys.stderr)
                errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
                raise CannotBuild(f"nvcc failed: {errors[0].strip() if errors else f'exit status {done.returncode}'}")
            new.replace(library)
        finally:
            new.unlink(missing_ok=True)
        result = f"CUDA extension built for {names}"
    except CannotBuild as why:
        if mode() == "1":
            raise SystemExit(f"hiar-kernels: HIAR_BUILD_CUDA=1, but {why}") from None
        last = record(folder)
        if mode() == "auto" and library.is_file() and last["reason"] is None and last["sources"] == digest():
            return f"CUDA extension kept as it was built: {why}"
        library.unlink(missing_ok=True)
        state = {"reason": str(why)}
        result = f"CUDA extension not built: {why}; PyTorch and Triton serve every op"
    (folder / RECORD).write_text(json.dumps(state) + "\n", encoding="utf-8")
    return result


def _output(*words: object) -> str:
    try:
        return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{words[0]} does not run: {error}") from None


if __name__ == "__main__":
    print(f"hiar-kernels: {build()}")
