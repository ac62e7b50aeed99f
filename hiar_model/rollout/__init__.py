"""Schedule-driven rollout: tasks as data, one loop that executes them. The module itself is callable."""

from __future__ import annotations

import sys
from types import ModuleType

from .engine import FinishedBlock, Rollout
from .flat import rollout

__all__ = ["FinishedBlock", "Rollout", "rollout"]


class _CallableModule(ModuleType):
    """``hiar_model.rollout(...)`` is the function, ``hiar_model.rollout.engine`` the package: both names are public."""

    __call__ = staticmethod(rollout)


sys.modules[__name__].__class__ = _CallableModule
