"""Processes of a run: where each stands, how networks are sharded over them, what they add up.

Under torchrun every process takes its share of the rows of a batch, and holds its share of every network (FSDP2): each
copy of the weights is spread over ``shard`` processes. Only the first process reads weights; the others are sent their
shares. Without torchrun there is no process group, and modules stay plain.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ...models.registry import pick_device
from ...models.transformer import HiARTransformer
from ..config.recipe import ScaleRecipe

T = TypeVar("T")
_GATHERED = "work_gathered"  # a sharded network's method behind :func:`gathered`


@dataclass(frozen=True)
class Place:
    """This process among those of the run. ``mesh``: (replicate, shard) of all processes; None where it is alone, or
    does not talk to the others."""

    rank: int
    ranks: int
    device: torch.device
    mesh: DeviceMesh | None = None

    def rows(self, batch: int, micro_batch: int | None) -> list[list[int]]:
        """This process's rows of a batch, in parts that are computed at once.

        Raises:
            ValueError: the batch is no multiple of the number of processes: they must take the same number of steps.
        """
        if batch % self.ranks:
            raise ValueError(f"recipe: batch_size must be a multiple of the {self.ranks} processes, got {batch}")
        mine = list(range(self.rank, batch, self.ranks))
        size = micro_batch or len(mine)
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(numbers)
        return numbers


def find_place(scale: ScaleRecipe, device: str | torch.device = "auto") -> Place:
    """Join the processes that torchrun started with this one, if it did.

    Raises:
        ValueError: ``scale.shard`` does not divide the number of processes; fewer GPUs than processes.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device)
    if ranks == 1 and not dist.is_initialized():
        return Place(0, 1, chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    shard = scale.shard or ranks
    if ranks % shard:
        raise ValueError(f"recipe: scale.shard must divide the {ranks} processes, got {shard}")
    mesh = dist.init_device_mesh(chosen.type, (ranks // shard, shard), mesh_dim_names=("replicate", "shard"))
    return Place(rank, ranks, chosen, mesh)


def is_first() -> bool:
    """Whether this is the first of the joined processes, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def find_share(device: str | torch.device = "auto") -> Place:
    """This process among those that torchrun started, without joining them: for work in which none waits for another.

    A collective would end the job where one process has minutes more to do than the others (NCCL's timeout).
    """
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), _device(device))


def _device(asked: str | torch.device) -> torch.device:
    if str(asked) not in ("auto", "cuda") or not torch.cuda.is_available():
        return pick_device(asked)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine needs a CUDA device, it has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def shard(
    network: HiARTransformer, place: Place, precision: str, *, trained: bool, activation_checkpointing: bool = False
) -> None:
    """Prepare a network for its place, in place: every block and the root become FSDP2 units.

    The weights are the first process's; of the others' only the shapes count (:func:`.networks.make_network`).
    A frozen network gathers one block at a time. A trained one keeps what it has gathered until :func:`release`, at the
    end of a turn: rollouts, several forwards and keys that are used beyond their forward share one gathering.
    With precision "bfloat16" the blocks' weights travel and compute as bfloat16; embeddings and head, which see
    timesteps and latents, stay float32, as do gradients on their way.
    """
    if activation_checkpointing:
        for block in network.blocks:
            _recompute(block)
    if place.mesh is None:
        network.to(place.device)
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing is in place
    mesh = place.mesh if place.mesh.size(0) > 1 else place.mesh["shard"]
    compute, reduce = (torch.bfloat16, torch.float32) if precision == "bfloat16" else (None, None)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    # Inputs keep their dtypes: a timestep in bfloat16 would be another one.
    narrow = MixedPrecisionPolicy(compute, reduce, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=narrow, reshard_after_forward=not trained)
    root = fully_shard(network, mesh=mesh, mp_policy=wide, reshard_after_forward=not trained)
    root.set_reshard_after_backward(not trained)
    _deal_out(network, weights, place)
    setattr(network, _GATHERED, MethodType(_gather_and_work, network))
    for entrance in ("kv", _GATHERED):
        register_fsdp_forward_method(network, entrance)


def _gather_and_work(network: nn.Module, work: Callable[[], T]) -> T:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return work()


@torch.no_grad()
def gathered(network: nn.Module, work: Callable[..., T], *arguments: object) -> T:
    """work(*arguments) without gradient, while all weights of a trained network are whole.

    Visits of a rollout run parts of the network alone, which FSDP takes for no forward of it: so for FSDP all of them
    together are one. What was gathered stays until :func:`release`; a network that is not sharded is left as it is.
    """
    if not isinstance(network, FSDPModule):
        return work(*arguments)
    return getattr(network, _GATHERED)(partial(work, *arguments))


@torch.no_grad()
def _deal_out(network: nn.Module, weights: Mapping[str, Tensor], place: Place) -> None:
    """Fill a sharded network with the first process's ``weights``, one tensor after the other."""
    if place.rank:
        network.to_empty(device=place.device)
    for name, shares in network.named_parameters():
        assert isinstance(shares, DTensor)
        if place.rank:
            whole = torch.empty(shares.shape, dtype=shares.dtype, device=place.device)
        else:
            whole = weights[name].to(place.device)
        dist.broadcast(whole, 0)
        shares.copy_(distribute_tensor(whole, shares.device_mesh, shares.placements, src_data_rank=None))


def synchronise(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward passes of a sharded network add gradients up over the processes."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


def release(network: nn.Module) -> None:
    """Let go of the weights that a sharded network has gathered."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _recompute(block: nn.Module) -> None:
    """The block's forward keeps its inputs only, and runs once more in the backward pass."""
    forward = block.forward

    def again(*arguments: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    block.forward = again


def largest(numbers: Sequence[float], place: Place) -> list[float]:
    """Of each number the largest among all processes."""
    if place.ranks == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64, device=place.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()
