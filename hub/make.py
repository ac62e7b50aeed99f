"""Lay out hiar_kernels as a kernel of the Hugging Face hub: `make hub`, or `python hub/make.py FOLDER`.

FOLDER becomes a project for kernel-builder (build.toml, flake.nix, torch-ext/hiar_kernels/), and gets what that builds
of a kernel without compiled parts, build/torch-cpu/ and build/torch-cuda/, so that it can be loaded without Nix. All of
it is copied from the package: nothing here is a second source. The CUDA extension is not part of it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "hiar_kernels"
CONFIG = tomllib.loads((HERE / "build.toml").read_text())
GENERAL, NOARCH = CONFIG["general"], CONFIG["torch-noarch"]
MODULE = GENERAL["name"].replace("-", "_")
LEFT_OUT = ("compile_report.py",)
"""Tools of the repository, which nothing else imports."""


def sources() -> dict[str, bytes]:
    """The files of the kernel, by their path in the package."""
    files = sorted(path for suffix in NOARCH["pyext"] for path in PACKAGE.rglob(f"*.{suffix}"))
    named = {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if name not in LEFT_OUT}


def write(folder: Path) -> list[Path]:
    """Write the project and its builds, in place of those of an earlier run; returns the folders of the builds.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "build.toml").is_file():
        raise ValueError(f"{folder} holds something else: give a new folder")
    for old in (folder / "torch-ext", folder / "build"):
        shutil.rmtree(old, ignore_errors=True)
    files = sources()
    unique = hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()[:10]
    _put(folder / "torch-ext" / MODULE, files)
    _put(folder, {name: (HERE / name).read_bytes() for name in ("build.toml", "flake.nix", "CARD.md")})
    builds = []
    for backend in GENERAL["backends"]:
        builds.append(folder / "build" / f"torch-{backend}")
        _put(builds[-1], {**files, "metadata.json": _metadata(backend, unique, files)})
    return builds


def _put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _metadata(backend: str, unique: str, files: dict[str, bytes]) -> bytes:
    """metadata.json as kernel-builder writes it; its id is the name of the module and of the ops' namespace."""
    digests = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()}
    archs = {"archs": NOARCH["cuda-capabilities"]} if backend == "cuda" else {}
    about: dict[str, Any] = {
        **{key: GENERAL[key] for key in ("name", "version", "license")},
        "id": f"_{MODULE}_{backend}_{unique}",
        "python-depends": [],
        "backend": {"type": backend, **archs},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return (json.dumps(about, indent=2) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for build in write(folder):
        print(build)


if __name__ == "__main__":
    main()
