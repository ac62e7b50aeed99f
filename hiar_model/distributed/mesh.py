"""The processes of a job as a mesh with three axes, (step, head, replica).

step      each rank runs some of the denoising steps; latents go from one rank to the next (pipeline)
head      ranks share every task: by tokens outside self-attention, by heads inside it (Ulysses)
replica   ranks make other videos; nothing is exchanged
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("step", "head", "replica")


def make_mesh(step: int = 1, head: int = 1, replica: int = 1, *, device_type: str | None = None) -> DeviceMesh:
    """The mesh of all processes; ranks count up along the last axis first. Every process must call it.

    Args:
        step, head, replica: processes along each axis; their product is the number of processes.
        device_type: "cuda" | "cpu"; default: "cuda" if the process group uses NCCL, else "cpu".

    Raises:
        ValueError: torch.distributed is not initialized, or the product is not the number of processes.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialized: run under torchrun and call init_process_group() first")
    sizes, world = (step, head, replica), dist.get_world_size()
    if min(sizes) < 1 or step * head * replica != world:
        raise ValueError(
            f"step x head x replica must be the {world} processes of the job, got {step} x {head} x {replica}"
        )
    if device_type is None:
        device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    return init_device_mesh(device_type, sizes, mesh_dim_names=AXES)


def axis(mesh: DeviceMesh, name: str) -> dist.ProcessGroup:
    """This process's group along an axis of the mesh."""
    names = mesh.mesh_dim_names or ()
    if name not in names:
        raise ValueError(f"mesh must have an axis named {name!r}, got {', '.join(names) or 'no names'}")
    return mesh.get_group(name)


def axis_size(mesh: DeviceMesh | None, name: str) -> int:
    """Number of processes along an axis; 1 without a mesh or such an axis."""
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return mesh.size(names.index(name)) if mesh is not None and name in names else 1
