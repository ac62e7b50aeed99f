"""Several rollouts of one network, side by side: forwards of equal shape run as one batch.

Each rollout keeps its caches, noise, prompt and position, so its blocks are those that it would make alone. The layers
between the attentions work on all samples at once; attention goes to the rollouts one by one, each over its own rings.
That pays where a forward alone does not fill the device: small networks, few frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hiar_kernels import qk_norm_rope
from hiar_kernels.nvtx import span

from ..common.settings import own_settings
from ..models.cached_attention import CachedAttention
from ..models.conditions import ModulationTable, OutputSelection
from ..models.self_attention import SelfAttention
from .batched_forward import BatchedForward
from .engine import FinishedBlock, Rollout
from .executor import Ready
from .prompt_cache import JointPrompt
from .shapes import require_kind

Outcome = list[FinishedBlock] | Exception | None
"""What a group of tasks gave: the blocks that it finished, or why it failed; None: nothing was left to do."""


def step_together(rollouts: Iterable[Rollout]) -> list[Outcome]:
    """:meth:`Rollout.step` of several rollouts, with their forwards in common where they match.

    Forwards match if they have the same network object, sizes of latents and frames, and run eagerly with
    :class:`.CachedAttention`; order, step, block, prompt, window and noise may differ. Others run by themselves: in
    particular those of captured CUDA graphs.

    Returns:
        For each rollout the blocks that it finished, most often none (known to be finite: on an accelerator this waits
        for the device); None: it has nothing left to do; or the exception that ended its step, which ends no other's.

    Raises:
        ValueError: before any work: something else than rollouts, one of them twice, or one that shares its video with
            other processes.

    Example:
        >>> from hiar_model import HiARTransformer, RolloutConfig, WanConfig
        >>> model = HiARTransformer(WanConfig(16, 32, 2, 2, text_dim=6, text_len=5, in_channels=4, out_channels=4))
        >>> config = RolloutConfig(order="stream", window_frames=6)
        >>> videos = [
        ...     Rollout(model, torch.randn(1, 5, 6), config, num_latent_frames=6, latent_size=(4, 8), seed=seed)
        ...     for seed in (1, 2)
        ... ]
        >>> for outcomes in iter(lambda: step_together(videos), [None, None]):
        ...     for video, blocks in zip(videos, outcomes):
        ...         for block in blocks:
        ...             print(f"seed {video.seed}: block {block.block}")
        seed 1: block 0
        seed 2: block 0
        seed 1: block 1
        seed 2: block 1
    """
    if isinstance(rollouts, Rollout) or not isinstance(rollouts, Iterable):
        raise ValueError(f"rollouts must be a list of hiar_model.Rollout, got {type(rollouts).__name__}")
    rollouts = list(rollouts)
    for i, rollout in enumerate(rollouts):
        require_kind(f"rollouts[{i}]", rollout, Rollout)
        if any(rollout is other for other in rollouts[:i]):
            raise ValueError(f"rollouts must each stand there once, got rollouts[{i}] a second time")
    if any(rollout.pipeline is not None for rollout in rollouts):
        raise ValueError("rollouts must each be made by one process to step together, got one of a pipeline")
    outcomes: list[Outcome] = [None] * len(rollouts)
    steps = dict(enumerate(rollout._step_in_parts() for rollout in rollouts))
    while steps:
        ready: dict[int, Ready] = {}
        for i in list(steps):
            try:
                with own_settings(rollouts[i].execution.autocast):
                    ready[i] = next(steps[i])
            except StopIteration as end:
                outcomes[i] = end.value
                del steps[i]
            except Exception as error:
                outcomes[i] = error
                del steps[i]
        for members in _matching(rollouts, ready):
            try:
                with own_settings(rollouts[members[0]].execution.autocast):
                    _run([rollouts[i] for i in members], [ready[i] for i in members])
            except Exception as error:
                for i in members:
                    outcomes[i] = error
                    del steps[i]
    return outcomes


def batches_with(a: Rollout, b: Rollout) -> bool:
    """Whether forwards of two rollouts may run as one batch: those with as many frames, which plans of the same kind
    have in most steps.
    """
    if not (_batches(a) and _batches(b)) or {*map(id, a._executor.models)}.isdisjoint(map(id, b._executor.models)):
        return False
    sizes_of_a, sizes_of_b = ((r.shape, r.config.frames_per_block, r.config.fuse_cache_denoise) for r in (a, b))
    return sizes_of_a == sizes_of_b and a.execution.autocast == b.execution.autocast


def _batches(rollout: Rollout) -> bool:
    """Whether forwards of a rollout may run with those of others at all."""
    return rollout._executor.capture is None and rollout._executor.attend is CachedAttention


def _matching(rollouts: Sequence[Rollout], ready: dict[int, Ready]) -> list[list[int]]:
    """The rollouts whose forwards run as one batch."""
    alike: dict[Any, list[int]] = {}
    for i, (_, forward) in ready.items():
        kind: Any = i
        if _batches(rollouts[i]):
            first = 0 if forward.selection is None else forward.selection.first
            kind = (id(forward.model), forward.x.shape[1:], first, rollouts[i].execution.autocast)
        alike.setdefault(kind, []).append(i)
    return list(alike.values())


def _run(rollouts: Sequence[Rollout], ready: Sequence[Ready]) -> None:
    if len(rollouts) == 1:
        rollouts[0]._executor.run_forward(*ready[0])
        return
    with span("task", *(task for items, _ in ready for item in items for task in item)):
        run_together([forward for _, forward in ready])


@torch.no_grad()
def run_together(forwards: Sequence[BatchedForward]) -> None:
    """Run filled forwards of equal kind as one batch, eagerly; each has its result in its own buffers."""
    model = forwards[0].model
    for one in forwards:
        one.attend.advance_device(separately=True)
    samples, selected = [len(one.x) for one in forwards], [_selected(one) for one in forwards]
    starts = [0, *accumulate(samples)]
    selection = None
    if any(one.selection is not None for one in forwards):
        items = (start + item for start, items in zip(starts, selected, strict=False) for item in items)
        selection = OutputSelection(tuple(items), max(one.selection.first for one in forwards if one.selection))
    velocity = model.run(
        torch.cat([one.x for one in forwards]),
        ModulationTable(torch.cat([one.table.at(one.levels).vectors for one in forwards])),
        JointPrompt.stacked([one.prompt_kv for one in forwards], samples),
        JointAttention(forwards),
        selection,
    )
    if velocity is None:
        return
    for one, part in zip(forwards, velocity.split([len(items) for items in selected]), strict=True):
        if len(part):
            one.denoise(part)


def _selected(forward: BatchedForward) -> Sequence[int]:
    return range(len(forward.x)) if forward.selection is None else forward.selection.items


class JointAttention(SelfAttention):
    """Self-attention of several forwards: each writes to its own rings and attends over them."""

    def __init__(self, forwards: Sequence[BatchedForward]) -> None:
        self.forwards, self.samples = forwards, [len(one.x) for one in forwards]
        self.frames = torch.cat([one.attend.frames for one in forwards])
        self.grid, c = forwards[0].attend.grid, forwards[0].model.config
        self.options: dict[str, Any] = {"num_heads": c.num_heads, "eps": c.eps, "theta": c.rope_theta}

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        joint = qk_norm_rope(qkv, q_weight, k_weight, self.frames, grid=self.grid, **self.options)
        parts = []
        for one, q, k, v in zip(self.forwards, *(x.split(self.samples) for x in joint), strict=True):
            one.attend.write(layer, k, v)
            parts.append(one.attend.read(layer, q, None if selection is None else one.selection))
        attended = [part for part in parts if part is not None]
        return torch.cat(attended) if attended else None
