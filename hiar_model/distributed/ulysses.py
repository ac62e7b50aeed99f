"""Head-parallel attention (Ulysses: Jacobs et al. 2023, arXiv 2309.14509): several GPUs share every task.

Each of R ranks has T / R tokens, a part of every frame, with all channels; norms, modulation, cross-attention and
feed-forward run unchanged. Self-attention exchanges tokens for heads, and back:

    [B, T / R, H, D]  --all-to-all-->  [B, T, H / R, D]  attention over the ring  --all-to-all-->  [B, T / R, H, D]

so the KV cache of a rank has H / R heads and takes 1 / R of the memory. In each layer a rank sends 4 T C (R - 1) / R^2
numbers per batch item of T tokens and C channels, and copies T C / R numbers six times to order them; nothing overlaps
with the exchanges. Every rank has whole latents and returns the same blocks.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hiar_kernels import qk_norm_rope_append
from hiar_kernels.nvtx import span

from ..config import WanConfig
from ..models.cached_attention import CachedAttention
from ..models.conditions import OutputSelection
from .mesh import axis, make_mesh

# A custom op, so that CUDA graph capture and torch.compile see one operation, complete when it returns.
_LIBRARY = torch.library.Library("hiar_model", "DEF")
_GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()


def _exchange(x: Tensor, group: str) -> Tensor:
    """All-to-all of x [R, ...]: x[i] goes to rank i; result[i] is from rank i."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=_GROUPS[group])
    return out


_LIBRARY.define("exchange(Tensor x, str group) -> Tensor")
_LIBRARY.impl("exchange", _exchange, "CompositeExplicitAutograd")
torch.library.register_fake("hiar_model::exchange", lambda x, group: torch.empty_like(x), lib=_LIBRARY)


class HeadRanks:
    """The ranks that share every task, and the share of this one.

    Args:
        config: of the transformer. grid: (rows, columns) of tokens in a frame. mesh: with an axis "head"; None: all
            processes of the job.

    Attributes:
        rank, size: of this process on the axis. cells: its tokens [start, stop) of every frame.
        heads: its heads [start, stop).

    Raises:
        ValueError: the heads or the tokens of a frame are not a multiple of the ranks.
    """

    def __init__(self, config: WanConfig, grid: tuple[int, int], mesh: DeviceMesh | None = None) -> None:
        if mesh is None:
            mesh = make_mesh(head=dist.get_world_size() if dist.is_initialized() else 1)
        self.group = axis(mesh, "head")
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        _GROUPS[self.group.group_name] = self.group
        heads, tokens = config.num_heads, math.prod(grid)
        if heads % self.size or tokens % self.size:
            common = math.gcd(heads, tokens)
            legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"parallel='ulysses' divides {heads} heads and {tokens} tokens per frame evenly: the head axis must "
                f"have {legal} ranks, got {self.size}"
            )
        self.cells = _share(tokens, self.rank, self.size)
        self.heads = _share(heads, self.rank, self.size)

    def exchange(self, x: Tensor) -> Tensor:
        """All-to-all of contiguous x [R, ...]: x[i] goes to rank i; result[i] is from rank i."""
        with span("all-to-all"):
            return torch.ops.hiar_model.exchange(x, self.group.group_name)

    def require_same(self, description: str, device: torch.device) -> None:
        """ValueError unless the description of the rollout is the same on every rank; compares hashes."""
        own = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "little")
        hashes = self.exchange(torch.full((self.size,), own, dtype=torch.int64, device=device)).tolist()
        others = [rank for rank, other in enumerate(hashes) if other != own]
        if others:
            raise ValueError(
                f"parallel='ulysses' needs the same rollout on every rank; rank {self.rank} of the head axis has "
                f"{description}, unlike rank {', '.join(map(str, others))}"
            )


def _share(total: int, rank: int, size: int) -> tuple[int, int]:
    return total // size * rank, total // size * (rank + 1)


class UlyssesAttention(CachedAttention):
    """:class:`CachedAttention` with caches of this rank's heads and activations of this rank's tokens."""

    def __init__(self, ranks: HeadRanks, *args: Any) -> None:
        super().__init__(*args)
        self.ranks = ranks

    @property
    def writes_separately(self) -> bool:
        return True

    def share(self, x: Tensor, frames: int) -> Tensor:
        return x.unflatten(1, (frames, -1))[:, :, slice(*self.ranks.cells)].flatten(1, 2)

    def join(self, x: Tensor, frames: int) -> Tensor:
        shares = self.ranks.exchange(x.expand(self.ranks.size, *x.shape).contiguous())
        return shares.unflatten(2, (frames, -1)).permute(1, 2, 0, 3, 4).flatten(1, 3)

    def _append(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        """qkv [B, T / R, 3 C] -> q [B, T, H / R, D]; k and v of these heads go into the layer's cache."""
        (batch, tokens, width), ranks, heads = qkv.shape, self.ranks.size, options["num_heads"]
        packed = qkv.new_empty(heads, 3, batch, tokens, width // 3 // heads)  # heads first: a share for each rank
        q_out, k_out, v_out = packed.permute(1, 2, 3, 0, 4)  # [B, T / R, H, D], as caches of the task's own frames
        q = qk_norm_rope_append(
            qkv, q_weight, k_weight, self.frames, self._in_order, k_out, v_out, cells=self.ranks.cells, **options
        )
        q_out.copy_(q)
        # [rank, heads of it, 3, B, F, cells, D] -> [3, B, F, rank, cells, heads, D]: the tokens of a frame in order
        received = self.ranks.exchange(packed).unflatten(0, (ranks, -1)).unflatten(4, (self.frames.shape[1], -1))
        q_k_v = received.permute(2, 3, 4, 0, 5, 1, 6)
        self._write(layer, q_k_v[1], q_k_v[2])
        return self._queries(q_k_v[0].flatten(1, 3))

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        out = super().__call__(layer, qkv, q_weight, k_weight, selection)
        if out is None:
            return None
        ranks, frames = self.ranks.size, out.shape[1] // self.cache.frame_tokens
        # [B, F, rank, cells, heads, D]: send each rank its cells, receive from each rank its heads
        sent = out.unflatten(1, (frames, ranks, -1)).permute(2, 0, 1, 3, 4, 5).contiguous()
        return self.ranks.exchange(sent).permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)
