"""The processes of a run: which samples each takes, how networks are sharded, what is reduced over processes.

Under torchrun every process takes its share of the samples of a batch and of every network (FSDP2): each copy of the
weights is sharded over ``scale.shard`` processes. Only the first process reads weights; the others receive their shards
from it. Without torchrun there is no process group, and modules stay plain.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ...common import environment
from ...models.registry import pick_device
from ...models.transformer import HiARTransformer
from ..config.recipe import ScaleRecipe

T = TypeVar("T")
_RUN_UNSHARDED = "run_unsharded"  # name of the method that :func:`unsharded` calls


@dataclass(frozen=True)
class DistContext:
    """This process among those of the run.

    mesh   (replicate, shard) over all processes; None: this process alone, or one that does not communicate
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    def micro_batches(self, batch_size: int, micro_batch: int | None) -> list[list[int]]:
        """This process's samples of a batch, in groups that are computed at once.

        Raises:
            ValueError: the batch is not a multiple of the number of processes, which must take equally many steps.
        """
        if batch_size % self.world_size:
            raise ValueError(
                f"recipe: batch_size must be a multiple of the {self.world_size} processes, got {batch_size}"
            )
        mine = list(range(self.rank, batch_size, self.world_size))
        size = micro_batch or len(mine)
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def all_reduce_sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers

    def gather(self, name: str) -> list[str]:
        """That of every process, by rank."""
        names = [name] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(names, name)
        return names

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        """The maximum of each number over all processes."""
        if self.world_size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()


def init_training(scale: ScaleRecipe, device: str | torch.device = "auto") -> DistContext:
    """Join the process group of torchrun; without torchrun, this process alone.

    Not :func:`hiar_model.distributed.pipeline.init_distributed`: its collectives never time out, training's should.

    Raises:
        ValueError: ``scale.shard`` does not divide the number of processes; fewer GPUs than processes.
    """
    local = launched_context(device)
    if local.world_size == 1 and not dist.is_initialized():
        return local
    if not dist.is_initialized():
        dist.init_process_group("nccl" if local.device.type == "cuda" else "gloo")
    world_size = dist.get_world_size()
    shard = scale.shard or world_size
    if world_size % shard:
        raise ValueError(f"recipe: scale.shard must divide the {world_size} processes, got {shard}")
    mesh = dist.init_device_mesh(local.device.type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return DistContext(dist.get_rank(), world_size, local.device, mesh)


def launched_context(device: str | torch.device = "auto") -> DistContext:
    """What torchrun's environment says, without joining a process group: for work in which no process waits for another
    (one may have minutes more to do than the others, and NCCL's timeout would end the job).
    """
    return DistContext(environment.rank(), environment.world_size(), _device(device))


def from_first(value: Callable[[], T]) -> T:
    """What the function returns in the first process, which alone calls it, in all of them."""
    if not dist.is_initialized():
        return value()
    values = [value() if is_first() else None]
    dist.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


def is_first() -> bool:
    """Whether this is rank 0 of the process group, or there is none."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _device(name: str | torch.device) -> torch.device:
    if str(name) not in ("auto", "cuda") or not torch.cuda.is_available():
        return pick_device(name)
    local = environment.local_rank()
    if local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine needs a CUDA device, it has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def shard(
    network: HiARTransformer,
    dist_context: DistContext,
    precision: str,
    *,
    trained: bool,
    activation_checkpointing: bool = False,
) -> None:
    """Move a network to its device and shard it, in place: every block and the root become FSDP2 units.

    The weights are the first process's; of the others only the shapes matter (:func:`.networks.make_network`).
    A frozen network unshards one block at a time. A trained one stays unsharded until :func:`reshard`, at the end of an
    optimiser step: rollouts, several forwards, and keys that outlive their forward share one all-gather.
    With precision "bfloat16" the blocks' weights are gathered and used in bfloat16; embeddings and head, which take
    timesteps and latents, stay float32, and gradients are reduced in float32.
    """
    if activation_checkpointing:
        for block in network.blocks:
            checkpoint(block, preserve_rng_state=False)  # no block draws random numbers
    mesh = dist_context.mesh
    if mesh is None:
        network.to(dist_context.device)
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # no in-place ops
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    compute, reduce = (torch.bfloat16, torch.float32) if precision == "bfloat16" else (None, None)
    for parameter in network.parameters():  # FSDP2 refuses other strides, and gloo's broadcast ignores them
        parameter.data = parameter.data.contiguous()
    weights = {name: p.detach() for name, p in network.named_parameters()}
    # Inputs keep their dtypes: a timestep in bfloat16 would be another one.
    narrow = MixedPrecisionPolicy(compute, reduce, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=narrow, reshard_after_forward=not trained)
    root = fully_shard(network, mesh=mesh, mp_policy=wide, reshard_after_forward=not trained)
    root.set_reshard_after_backward(not trained)
    _broadcast_weights(network, weights, dist_context)
    setattr(network, _RUN_UNSHARDED, MethodType(_unshard_and_run, network))
    for method in ("kv", _RUN_UNSHARDED):
        register_fsdp_forward_method(network, method)


def _unshard_and_run(network: nn.Module, function: Callable[[], T]) -> T:
    for module in _fsdp_modules(network):
        module.unshard()
    return function()


@torch.no_grad()
def unsharded(network: nn.Module, function: Callable[..., T], *arguments: object) -> T:
    """function(*arguments) without gradient, with all weights of a trained network unsharded.

    Tasks of a rollout run parts of the network, which FSDP does not take for its forward: this makes all of them one
    forward to FSDP. The weights stay unsharded until :func:`reshard`. A plain network is used as it is.
    """
    if not isinstance(network, FSDPModule):
        return function(*arguments)
    return getattr(network, _RUN_UNSHARDED)(partial(function, *arguments))


@torch.no_grad()
def _broadcast_weights(network: nn.Module, weights: Mapping[str, Tensor], dist_context: DistContext) -> None:
    """Fill a sharded network with rank 0's ``weights``, one parameter after the other.

    By parameters, not by torch's state-dict helpers: the network's ``state_dict`` has the published layout (q, k and v
    apart), and its keys are not the names of parameters.
    """
    if dist_context.rank:
        network.to_empty(device=dist_context.device)
    for name, shards in network.named_parameters():
        assert isinstance(shards, DTensor)
        if dist_context.rank:
            full = torch.empty(shards.shape, dtype=shards.dtype, device=dist_context.device)
        else:
            full = weights[name].to(dist_context.device)
        dist.broadcast(full, 0)
        shards.copy_(distribute_tensor(full, shards.device_mesh, shards.placements, src_data_rank=None))


def set_requires_gradient_sync(network: nn.Module, sync: bool) -> None:
    """Whether the next backward passes of a sharded network reduce gradients over the processes."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(sync)


def reshard(network: nn.Module) -> None:
    """Free the unsharded weights of a sharded network."""
    for module in _fsdp_modules(network):
        module.reshard()


def _fsdp_modules(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]
