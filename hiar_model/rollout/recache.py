"""A new prompt over old context: policy "recache".

Keys in the caches carry the prompt that their block was made with (through cross-attention, layer by layer). Where the
text changes at block n, the policy "keep" leaves them so. "recache" does this before denoise(s, n), for each step s: it
empties cache s, and caches the blocks that n sees there once more, the oldest first, from the same latents x[s + 1][m]
but with the text of n. They see each other and nothing older: cache s is then as if the video had begun with them under
the new text. In the clean graph (block_first) the one cache is made anew ahead of denoise(0, n).

That is a property of the text at each block, not of a walk: all walks of the matched graph still agree. It takes the
cache tasks of a window for each step, once for a change, and the latents of a window at every level are kept for it.
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
    """Latents of finished levels, as long as a later block may have to cache them again.

    plan: of the tasks. kept: (level, block) -> latents [B, F, C, H, W], copies.
    """

    plan: Plan
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def note(self, task: Task, latents: Tensor) -> None:
        """A denoise task is done: keep what it made, where caches are made of that; forget what no block will see."""
        if not self._cached(task.step):
            return
        level, following = task.step + 1, task.block + 1
        seen = self._seen(task.step, following)
        for key in [key for key in self.kept if key[0] == level and key[1] not in seen]:
            del self.kept[key]
        if task.block in seen:
            self.kept[level, task.block] = latents.clone()

    def tasks(self, task: Task) -> list[Task]:
        """The cache tasks that come before a denoise task at which the text changes."""
        clean = self.plan.graph == "clean"
        if clean and task.step:
            return []
        step = self.plan.steps - 1 if clean else task.step
        return [cache(step, block) for block in self._seen(step, task.block)]

    def latents(self, task: Task) -> Tensor | None:
        """The input of one of them; None for a block of the prefix."""
        return None if task.block < self.plan.prefix_blocks else self.kept[task.step + 1, task.block]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, by name."""
        return {f"{level}/{block}": x.clone() for (level, block), x in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], like: Tensor) -> None:
        """Take over a saved state, on the device and in the dtype of ``like``."""
        self.kept = {(int(level), int(block)): x.to(like) for (level, block), x in _keys(state)}

    def _cached(self, step: int) -> bool:
        return self.plan.graph == "matched" or step == self.plan.steps - 1

    def _seen(self, step: int, block: int) -> list[int]:
        """The earlier blocks that a block sees in the cache that tasks of this step fill."""
        readers = range(self.plan.steps) if self.plan.graph == "clean" else (step,)
        return sorted({seen for s in readers for seen in self.plan.seen(s, block)})


def _keys(state: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    return [(name.split("/"), x) for name, x in state.items()]


def forget(cache: RingCache, index: int) -> None:
    """Empty one ring: no frame of it is seen any more."""
    cache.frames[index].fill_(EMPTY)
    cache.slot_frames[index] = [EMPTY] * len(cache.slot_frames[index])
    cache.write_position[index] = None
