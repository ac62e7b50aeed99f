"""The machine and the state of the sources, which every result names, and its folder. Needs torch alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h", ".toml", ".json", ".safetensors"}
NOT_SOURCES = {"build", "dist", "out", "runs", "results", "__pycache__"}
PEERS = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers")


def error_line(error: BaseException) -> str:
    """Class and first line of an error, at most 300 characters."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '').strip()}"[:300]


def output_of(*command: str, folder: Path = ROOT) -> str:
    """Standard output of a command, or "unknown (why)"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error_line(error)})"
    return done.stdout.strip() if done.returncode == 0 else f"unknown ({done.stderr.strip()[:100]})"


def clocks() -> str:
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    return output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv").replace("\n", ": ")


def revision(folder: Path = ROOT) -> str:
    """Git revision of a checkout, "-dirty" where something but results has changed; "unknown" for a plain folder."""
    top = output_of("git", "rev-parse", "--show-toplevel", folder=folder)
    if Path(top).resolve() != folder.resolve():
        return "unknown"  # no repository, or one around the folder
    dirty = output_of("git", "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results", folder=folder)
    return output_of("git", "rev-parse", "--short=10", "HEAD", folder=folder) + ("-dirty" if dirty else "")


def environment(device: str) -> dict[str, str]:
    """Device, driver, date, git revision and versions."""
    cuda = device == "cuda"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "driver": output_of(*driver) if cuda else "none",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "none",
        **{name: version(name) for name in PEERS},
    }


def version(distribution: str) -> str:
    """Of what is installed, or "absent"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def sources(root: Path) -> str:
    """A digest of every source file under a folder, committed or not; hidden and generated folders are left out."""
    digest = hashlib.sha256()
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(d for d in inside if d[0] != "." and d not in NOT_SOURCES and not d.endswith(".egg-info"))
        for file in sorted(Path(folder, name) for name in files if Path(name).suffix in SOURCES):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def result_folder(about: dict[str, str], rehearsal: bool = False) -> Path:
    """bench/results/<device>/<date>-<revision> of an :func:`environment`; out/bench for a rehearsal."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    name = f"{about['date'][:10]}-{about['revision']}"
    return ROOT / "out" / "bench" if rehearsal else ROOT / "bench" / "results" / device / name
