"""The pipeline rank without steps: it receives finished blocks and decodes them while the other ranks work."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..distributed.pipeline import Pipeline
from ..schedule.plan import Group
from .executor import Counters


class Receiver:
    """Replaces the executor on a rank without steps."""

    about, last_started_block = "no tasks", -1
    prompt_embeds: Any = None  # set by Rollout.load_state_dict, unused here

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.counters = pipeline, Counters()

    def run(self, group: Group) -> list[tuple[int, Tensor]]:
        """Receive the block of the last denoise task."""
        block = group[0][-1].block
        return [(block, self.pipeline.receive(block).to(self.pipeline.device, copy=True))]

    def may_run_ahead(self, following: Group) -> bool:
        """Never: a pipeline runs its groups in lockstep."""
        return False

    def await_finished(self, following: Group | None) -> None:
        """Nothing: the rank that made a block has checked it."""

    def warm_up(self, blocks: int) -> int:
        """Nothing."""
        return 0

    def state_dict(self, device: Any = None) -> dict[str, Any]:
        """Empty."""
        return {"cache": {}, "latents": {}, "history": {}, "step": 0, "prompt_embeds": {}}

    def load_state_dict(self, state: dict[str, Any], executed: set[Any]) -> None:
        """Nothing."""
