"""GGUF weight files, through the `gguf` package (optional: `pip install 'hiar-kernels[gguf]'`).

Shapes are written as ComfyUI-GGUF does: reversed, and `comfy.gguf.orig_shape.KEY` where a tensor was reshaped so that
its rows fill whole blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .packed import BLOCKS, Blocks, Packed

ARCHITECTURE = "general.architecture"
_PLAIN = ("F32", "F16", "BF16")
READ = (*_PLAIN, *BLOCKS)
_SHAPE = "comfy.gguf.orig_shape."


class NotReadError(ValueError):
    """A whole file with contents that this package does not read."""


def read_gguf(file: Path) -> tuple[dict[str, Tensor | Packed], dict[str, str]]:
    """The tensors of a GGUF file, memory-mapped, and a header with its ``general.architecture``, if it has one.

    Raises:
        NotReadError: one line: a type of tensors that is not read. ValueError: the package is missing, or whatever it
            raises for a file that is damaged.
    """
    reader = gguf_package().GGUFReader(file, "c")  # copy on write: torch cannot hold arrays that are read-only
    if reader.byte_order != "I":
        raise NotReadError(f"{file}: numbers in the byte order of another machine")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    if unknown := sorted(kinds - set(READ)):
        name = next(tensor.name for tensor in reader.tensors if tensor.tensor_type.name == unknown[0])
        raise NotReadError(
            f"{file}: GGUF type {', '.join(unknown)} is not read ({name}); legal: {', '.join(READ)}, "
            "such as Q8_0, Q6_K, Q5_K_M or Q4_K_M files"
        )
    result: dict[str, Tensor | Packed] = {}
    for tensor in reader.tensors:
        field = reader.get_field(_SHAPE + tensor.name)
        numbers = field.contents() if field is not None else reversed(tensor.shape.tolist())
        shape = torch.Size(int(n) for n in numbers)
        if shape.numel() != tensor.n_elements:
            raise ValueError(f"{tensor.name} has {tensor.n_elements} numbers, its shape {list(shape)}")
        result[tensor.name] = _tensor(tensor.name, tensor.tensor_type.name, torch.from_numpy(tensor.data), shape)
    field = reader.get_field(ARCHITECTURE)
    return result, {} if field is None else {ARCHITECTURE: str(field.contents())}


def _tensor(name: str, kind: str, data: Tensor, shape: torch.Size) -> Tensor | Packed:
    if kind not in _PLAIN:
        return Blocks(name, kind, shape, data)
    return (data.view(torch.bfloat16) if kind == "BF16" else data).view(shape)


def gguf_package() -> Any:
    """The `gguf` package, imported when it is needed; ValueError of one line if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"GGUF files need gguf: pip install 'hiar-kernels[gguf]' ({error})") from error
    return gguf
