"""Versions, for `hiar --version`, `hiar doctor` and the record beside a video. Imports nothing heavy."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

DISTRIBUTION = "hiar-kernels"
NOISE = "philox-128"
"""How random numbers follow from a key (:mod:`.common.keyed`), in records, sessions and states: another way gets
another name."""
EARLIER_NOISE = "torch-32"
"""That of what names none, of before 2026-11-28: torch.Generator, which takes 32 bits of a key."""


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is not installed; if it is imported, with its build (torch
    2.11.0+cu130).
    """
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    imported = str(getattr(sys.modules.get(distribution), "__version__", ""))
    return imported if imported.startswith(f"{version}+") else version


def package_version() -> str:
    """Version of this package; "unknown" if it runs from a checkout that was never installed."""
    return installed_version(DISTRIBUTION) or "unknown"


def versions(*distributions: str) -> dict[str, str]:
    """Versions of this package, of Python and of the given distributions ("absent" for what is not installed)."""
    own = {DISTRIBUTION: package_version(), "python": platform.python_version()}
    return own | {name: installed_version(name) or "absent" for name in distributions}


def require_noise(what: str, noise: str | None) -> None:
    """ValueError of one line if the noise of ``what``, which names it or does not, is drawn in another way here."""
    if noise != NOISE:
        raise ValueError(
            f"{what}: its noise is {noise or EARLIER_NOISE!r}, this version draws {NOISE!r} and would make something "
            "else: use the version that made it, or start anew"
        )
