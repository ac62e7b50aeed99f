"""Functions of a module of Python's own that are others for one of our modules, and not for every thread.

``monkeypatch.setattr(files, "os", altered(os, fsync=refuse))`` sets the name in one module. Set in ``os`` itself, the
function would also be that of a server or a job beside the test: its calls would be counted with those of the test, and
its files refused.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


def altered(module: ModuleType, **functions: Any) -> SimpleNamespace:
    """All that a module has, with these functions in place of its own."""
    assert vars(module).keys() >= functions.keys(), f"{module.__name__} has no {functions.keys() - vars(module).keys()}"
    return SimpleNamespace(**{**vars(module), **functions})
