"""Schedule-driven rollout: visits as data, one loop that executes them. The module itself is callable."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..distributed.pipeline import PipelineOptions
from .engine import FinishedBlock, Rollout
from .shapes import require_shape

__all__ = ["FinishedBlock", "PipelineOptions", "Rollout", "rollout"]


def rollout(model: Any, noise: Tensor | None, text: Any, schedule: Any, **options: Any) -> Tensor | None:
    """Latents of a whole video [B, F, C, H, W], its prefix included; a thin wrapper of :class:`Rollout`.

    Args:
        noise: initial noise [B, F, C, H, W] of the frames to make; for keyed noise give ``noise=None`` and
            ``num_frames``, ``height``, ``width``.
        on_block: called with each :class:`FinishedBlock`.
        The others: as for :class:`Rollout`.

    Returns:
        None on the ranks of a pipeline that have no finished blocks: all but the last.
    """
    on_block = options.pop("on_block", None)
    prefix = options.get("prefix")
    for name, latents in (("noise", noise), ("prefix", prefix)):
        if latents is not None:
            require_shape(name, latents, (None,) * 5)
    if noise is not None:
        made, size = noise.shape[1], {"batch": noise.shape[0], "height": noise.shape[3], "width": noise.shape[4]}
        options = {"num_frames": made + (0 if prefix is None else prefix.shape[1]), **size, **options}
    parts = [] if prefix is None else [prefix]
    run = Rollout(model, text, schedule, noise=noise, **options)
    for block in run:
        parts.append(block.latents)
        if on_block is not None:
            on_block(block)
    if run.pipeline is not None and run.pipeline.stage.sends:
        return None
    return torch.cat([part.to(parts[-1]) for part in parts], dim=1)


class _CallableModule(ModuleType):
    """``hiar_model.rollout(...)`` is the function, ``hiar_model.schedule.plan`` the package: both names are public."""

    __call__ = staticmethod(rollout)


sys.modules[__name__].__class__ = _CallableModule
