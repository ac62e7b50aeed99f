"""Recomputing the cached context when the prompt changes: ``on_prompt_change="recache"``.

Cached keys and values carry the prompt that their block was made with, through cross-attention. Where the prompt
changes at block n, "keep" leaves them as they are. "recache" does this before denoise(s, n), for each step s: it
empties cache s and caches the blocks that n sees there again, oldest first, from the same latents x[s + 1][m] but with
the prompt of n. They see each other and nothing older: cache s is then as if the video had started with them under the
new prompt. In the clean graph (block_first) the one cache is recomputed before denoise(0, n).

This depends on the prompt of each block, not on the task order: all orders of the matched graph still agree. It costs
the cache tasks of a window for each step, once per change, and keeps the latents of a window at every level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hiar_kernels import EMPTY

from ..models.kv_cache import RingCache
from ..schedule.plan import Plan, Task, cache


@dataclass
class History:
    """Latents that a later block may have to cache again.

    plan: of the tasks. stored: (level, block) -> latents [B, F, C, H, W], copies.
    """

    plan: Plan
    stored: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def store(self, task: Task, latents: Tensor) -> None:
        """Store the result of a denoise task if a cache is computed from it; drop what no later block sees."""
        if not self._cached(task.step):
            return
        level, following = task.step + 1, task.block + 1
        seen = self._seen(task.step, following)
        for key in [key for key in self.stored if key[0] == level and key[1] not in seen]:
            del self.stored[key]
        if task.block in seen:
            self.stored[level, task.block] = latents.clone()

    def tasks(self, task: Task) -> list[Task]:
        """The cache tasks to run before a denoise task at which the prompt changes."""
        clean = self.plan.graph == "clean"
        if clean and task.step:
            return []
        step = self.plan.steps - 1 if clean else task.step
        return [cache(step, block) for block in self._seen(step, task.block)]

    def latents(self, task: Task) -> Tensor | None:
        """The input of a cache task; None for a block of the prefix."""
        return None if task.block < self.plan.prefix_blocks else self.stored[task.step + 1, task.block]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, named level/block."""
        return {f"{level}/{block}": x.clone() for (level, block), x in self.stored.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], like: Tensor) -> None:
        """Restore a saved state, on the device and in the dtype of ``like``."""
        named = [(name.split("/"), x) for name, x in state.items()]
        self.stored = {(int(level), int(block)): x.to(like) for (level, block), x in named}

    def _cached(self, step: int) -> bool:
        return self.plan.graph == "matched" or step == self.plan.steps - 1

    def _seen(self, step: int, block: int) -> list[int]:
        """The earlier blocks that a block sees in the cache of this step."""
        readers = range(self.plan.steps) if self.plan.graph == "clean" else (step,)
        return sorted({seen for s in readers for seen in self.plan.seen(s, block)})


def empty(cache: RingCache, index: int) -> None:
    """Empty one ring: none of its frames is visible any more."""
    cache.frames[index].fill_(EMPTY)
    cache.slot_frames[index] = [EMPTY] * len(cache.slot_frames[index])
