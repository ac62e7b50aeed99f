"""csrc/ on the host: the same host code, index arithmetic and work of a thread, in loops over blocks and threads.

What it cannot show is what only a device has: the shuffle and the barrier of a block, the launch, the stream.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hiar_kernels import _cuda, _extension

WARNINGS = "-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"  # of the host compiler; #pragma unroll is nvcc's
BUILD = _extension.SOURCES.parent / "build"


def no_nvcc() -> str | None:
    """Why there is none; None where there is one, or has to be one."""
    try:
        _extension.find_nvcc()
    except _extension.CannotBuild as why:
        return None if os.environ.get("CI") == "true" else str(why)
    return None


def build(nvcc: Path) -> Path:
    """The library for these sources; kept from run to run."""
    library = BUILD / f"csrc-{str(_extension.digest())[:16]}.so"
    if not library.exists():
        BUILD.mkdir(exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        options = ["-x", "c++", "-cudart", "none", "-DHIAR_EMULATE", "-Xcompiler", f"-fno-strict-aliasing,{WARNINGS}"]
        command = _extension.command(nvcc, _extension.find_torch(), new, options)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        new.replace(library)
    return library


def use(library: Path) -> None:
    """From now on impl="cuda" runs on CPU tensors in this process."""
    if _cuda.emulation != library:
        assert _cuda.emulation is None, "one emulation for a process"
        _cuda.emulation = library
        _cuda._missing.cache_clear()
        _cuda._loaded.cache_clear()
