"""How processes share a video: mesh, pipeline over denoising steps, Ulysses over attention heads, watchdog."""

from .mesh import AXES, axis, make_mesh

__all__ = ["AXES", "axis", "make_mesh"]
