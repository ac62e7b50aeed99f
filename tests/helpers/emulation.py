"""csrc/ on the host: the same host code, index arithmetic and work of a thread, in loops over blocks and threads.

What it cannot show is what only a device has: the shuffle and the barrier of a block, the launch, the stream.
"""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

# By its path: the package would import torch, which the process that only hands out tests has no use for.
ROOT = Path(__file__).resolve().parents[2]
EXTENSION = runpy.run_path(str(ROOT / "hiar_kernels" / "common" / "extension.py"))
WARNINGS = "-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"  # of the host compiler; #pragma unroll is nvcc's
BUILD = ROOT / "build"


def find_nvcc() -> Path:
    return EXTENSION["find_nvcc"]()


def no_nvcc() -> str | None:
    """Why there is none; None where there is one, or has to be one."""
    try:
        find_nvcc()
    except EXTENSION["CannotBuild"] as why:
        return None if os.environ.get("CI") == "true" else str(why)
    return None


def build(nvcc: Path) -> Path:
    """The library for these sources; kept from run to run."""
    from hiar_kernels.common import extension

    library = BUILD / f"csrc-{str(extension.digest())[:16]}.so"
    if not library.exists():
        BUILD.mkdir(exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        options = ["-x", "c++", "-cudart", "none", "-DHIAR_EMULATE", "-Xcompiler", f"-fno-strict-aliasing,{WARNINGS}"]
        command = extension.command(nvcc, extension.find_torch(), new, options)
        command[command.index("-O3")] = "-O1"  # nine seconds of a processor in place of sixteen
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        new.replace(library)
    return library


def use(library: Path) -> None:
    """From now on impl="cuda" runs on CPU tensors in this process."""
    from hiar_kernels.common import cuda_loader

    if cuda_loader.emulation != library:
        assert cuda_loader.emulation is None, "one emulation for a process"
        cuda_loader.emulation = library
        cuda_loader._missing.cache_clear()
        cuda_loader._loaded.cache_clear()
