"""HiAR for users of diffusers: :class:`HiARPipeline`, a DiffusionPipeline over the rollout of this package, and
:func:`apply_hiar_kernels` for diffusers' own Wan transformer. Importing this module imports diffusers.
"""

from importlib.util import find_spec

if find_spec("diffusers") is None:
    raise ImportError("hiar_model.integrations.diffusers needs diffusers: pip install 'hiar-kernels[wan]'")

import diffusers

from .backend import register_attention_backend
from .kernels import AppliedKernels, apply_hiar_kernels
from .pipeline import HiARPipeline

diffusers.HiARPipeline = HiARPipeline  # where DiffusionPipeline.from_pretrained looks for what model_index.json names

__all__ = ["AppliedKernels", "HiARPipeline", "apply_hiar_kernels", "register_attention_backend"]
