"""ring_advance in CUDA C++ (csrc/ring_advance.cu): one launch, nothing allocated."""

from __future__ import annotations

from typing import Any

import torch

from ..common import cuda_loader


def launch(*arguments: Any) -> None:
    """hiar::ring_advance_cuda."""
    torch.ops.hiar_cuda.ring_advance(*arguments)


cuda_loader.register("ring_advance_cuda", launch)
