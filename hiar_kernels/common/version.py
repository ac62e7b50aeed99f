"""The version of the distribution that both packages are installed by."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("hiar-kernels")
except metadata.PackageNotFoundError:  # a checkout on the path
    __version__ = "unknown"
