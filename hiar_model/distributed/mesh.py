"""The processes of a job as a mesh of three axes, (step, head, replica).

step      denoising steps live on ranks; latents go from one to the next
head      one task is shared: tokens outside self-attention, heads inside it
replica   other videos; nothing is exchanged
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("step", "head", "replica")


def make_mesh(step: int = 1, head: int = 1, replica: int = 1, *, device_type: str | None = None) -> DeviceMesh:
    """The mesh of all processes; ranks count up along the last axis first. Every process must call it.

    Args:
        step, head, replica: processes along each axis; their product is the number of processes.
        device_type: "cuda" | "cpu"; default: "cuda" where the processes talk through NCCL, else "cpu".

    Raises:
        ValueError: torch.distributed has not been started, or the product is another number.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not started: run under torchrun and call init_process_group() first")
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
        raise ValueError(f"the mesh needs an axis named {name!r}, it has {', '.join(names) or 'no names'}")
    return mesh.get_group(name)


def axis_size(mesh: DeviceMesh | None, name: str) -> int:
    """How many processes there are along an axis; 1 where the mesh has no such axis, or there is none."""
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return mesh.size(names.index(name)) if mesh is not None and name in names else 1
