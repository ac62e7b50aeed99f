"""Several processes for one video: the mesh of a job, and head-parallel attention inside a task."""

from .mesh import AXES, axis, make_mesh

__all__ = ["AXES", "axis", "make_mesh"]
