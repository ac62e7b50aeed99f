"""Head-parallel attention inside a task (Ulysses: Jacobs et al. 2023, arXiv 2309.14509): one video on several GPUs.

Each of R ranks holds T / R tokens, a part of every frame, with all their channels; norms, modulation, cross-attention
and feed-forward never notice. For self-attention tokens are exchanged for heads, and back:

    [B, T / R, H, D]  --all-to-all-->  [B, T, H / R, D]  attention over the ring  --all-to-all-->  [B, T / R, H, D]

so the rings of a rank hold H / R heads: 1 / R of the memory. In each layer a rank sends 4 T C (R - 1) / R^2 numbers for
a row of T tokens of C channels, and to have them in order for sending and for use it copies T C / R numbers six times;
nothing overlaps with the exchanges. Latents are whole on every rank, and every rank makes the same blocks.
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
from ..models.conditions import OutputSelection
from ..models.kv_cache import CachedAttention
from .mesh import axis, make_mesh

# An op, not a function: complete when it returns, and one operation for whoever records or compiles a task.
_LIBRARY = torch.library.Library("hiar_model", "DEF")
_GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()


def _exchange(x: Tensor, group: str) -> Tensor:
    """x [R, ...]: part i goes to rank i; part i of the result came from rank i."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=_GROUPS[group])
    return out


_LIBRARY.define("exchange(Tensor x, str group) -> Tensor")
_LIBRARY.impl("exchange", _exchange, "CompositeExplicitAutograd")
torch.library.register_fake("hiar_model::exchange", lambda x, group: torch.empty_like(x), lib=_LIBRARY)


class HeadRanks:
    """The ranks that share one task, and what this one of them holds.

    Args:
        config: of the transformer. grid: (rows, columns) of tokens in a frame. mesh: with an axis "head"; None: all
            processes of the job are that axis.

    Attributes:
        rank, size: of this process on the axis. cells: the tokens [start, stop) of every frame that it holds.
        heads: [start, stop) of its heads.

    Raises:
        ValueError: heads or the tokens of a frame cannot be shared out evenly.
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
                f"parallel='ulysses' shares {heads} heads and {tokens} tokens a frame evenly: on {legal} ranks, "
                f"not on {self.size}"
            )
        self.cells = _part(tokens, self.rank, self.size)
        self.heads = _part(heads, self.rank, self.size)

    def exchange(self, x: Tensor) -> Tensor:
        """x [R, ...], contiguous: part i goes to rank i; part i of the result came from rank i."""
        with span("all-to-all"):
            return torch.ops.hiar_model.exchange(x, self.group.group_name)

    def require_same(self, what: str, device: torch.device) -> None:
        """Refuse to go on where ranks were told different things: they would make one video out of several."""
        number = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "little")
        found = self.exchange(torch.full((self.size,), number, dtype=torch.int64, device=device)).tolist()
        others = [rank for rank, other in enumerate(found) if other != number]
        if others:
            raise ValueError(
                f"parallel='ulysses' needs the same rollout on every rank; rank {self.rank} of the head axis has "
                f"{what}, another than rank {', '.join(map(str, others))}"
            )


def _part(total: int, rank: int, size: int) -> tuple[int, int]:
    return total // size * rank, total // size * (rank + 1)


class UlyssesAttention(CachedAttention):
    """:class:`CachedAttention` of rings that hold this rank's heads, for activations that hold its tokens."""

    def __init__(self, ranks: HeadRanks, *args: Any) -> None:
        super().__init__(*args)
        self.ranks = ranks

    @property
    def writes_separately(self) -> bool:
        return True

    def share(self, x: Tensor, frames: int) -> Tensor:
        return x.unflatten(1, (frames, -1))[:, :, slice(*self.ranks.cells)].flatten(1, 2)

    def join(self, x: Tensor, frames: int) -> Tensor:
        parts = self.ranks.exchange(x.expand(self.ranks.size, *x.shape).contiguous())
        return parts.unflatten(2, (frames, -1)).permute(1, 2, 0, 3, 4).flatten(1, 3)

    def _append(self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **options: Any) -> Tensor:
        """qkv [B, T / R, 3 C] -> q [B, T, H / R, D]; k and v of these heads go into the rings of the layer."""
        (rows, tokens, width), ranks, heads = qkv.shape, self.ranks.size, options["num_heads"]
        packed = qkv.new_empty(heads, 3, rows, tokens, width // 3 // heads)  # heads outside: a part for each rank
        q_out, k_out, v_out = packed.permute(1, 2, 3, 0, 4)  # [B, T / R, H, D], as rings of the visit's own frames
        q = qk_norm_rope_append(
            qkv, q_weight, k_weight, self.frames, self._in_order, k_out, v_out, cells=self.ranks.cells, **options
        )
        q_out.copy_(q)
        # [rank, its heads, 3, B, F, cells, D] -> [3, B, F, rank, cells, heads, D]: tokens of a frame in their order
        came = self.ranks.exchange(packed).unflatten(0, (ranks, -1)).unflatten(4, (self.frames.shape[1], -1))
        whole = came.permute(2, 3, 4, 0, 5, 1, 6)
        self._write(layer, whole[1], whole[2])
        return whole[0].flatten(1, 3)

    def __call__(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, selection: OutputSelection | None
    ) -> Tensor | None:
        out = super().__call__(layer, qkv, q_weight, k_weight, selection)
        if out is None:
            return None
        ranks, frames = self.ranks.size, out.shape[1] // self.cache.frame_tokens
        # [B, F, rank, cells, heads, D] -> to each rank its cells; came back from each rank: its heads
        sent = out.unflatten(1, (frames, ranks, -1)).permute(2, 0, 1, 3, 4, 5).contiguous()
        return self.ranks.exchange(sent).permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)
