"""The rank of a pipeline that has no steps: it takes finished blocks, to decode them beside the others' work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..distributed.pipeline import Pipeline
from ..schedule.plan import Group
from .executor import Counters


class Receiver:
    """In place of an executor, on a rank without steps: takes finished blocks."""

    about, begun = "no visits", -1
    text: Any = None  # of the blocks: nothing here needs it

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.counters = pipeline, Counters()

    def run(self, group: Group) -> list[tuple[int, Tensor]]:
        """The block of the last denoise task, made elsewhere."""
        block = group[0][-1].block
        return [(block, self.pipeline.receive(block).to(self.pipeline.device, copy=True))]

    def may_run_ahead(self, following: Group) -> bool:
        """A pipeline's groups have their times."""
        return False

    def await_finished(self, following: Group | None) -> None:
        """Nothing: the rank that made a block has looked at it."""

    def warm_up(self, blocks: int) -> int:
        """Nothing."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {"cache": {}, "latents": {}, "history": {}, "step": 0, "texts": {}}

    def load_state_dict(self, state: dict[str, Any], done: Callable[[Any], bool]) -> None:
        """Nothing."""
