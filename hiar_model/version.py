"""Versions, for `hiar --version`, `hiar doctor` and the record beside a video. Imports nothing heavy."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

DISTRIBUTION = "hiar-kernels"


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if there is none; once it is imported, with the build that only the
    module tells (torch 2.11.0+cu130).
    """
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    told = str(getattr(sys.modules.get(distribution), "__version__", ""))
    return told if told.startswith(f"{found}+") else found


def package_version() -> str:
    """Version of this package; "unknown" if it runs from a checkout that was never installed."""
    return installed_version(DISTRIBUTION) or "unknown"


def versions(*distributions: str) -> dict[str, str]:
    """Versions of this package, of Python and of the given distributions ("absent" for what is not installed)."""
    found = {DISTRIBUTION: package_version(), "python": platform.python_version()}
    return found | {name: installed_version(name) or "absent" for name in distributions}
