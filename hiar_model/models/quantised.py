"""Quantised checkpoints: in which dialect the scales lie beside the weights, and what is not read.

    ComfyUI           X.weight float8, X.scale_weight, X.scale_input, one empty tensor scaled_fp8
    ComfyUI, newer    X.weight float8 or int8, X.weight_scale, X.input_scale, X.comfy_quant: JSON in bytes, or the same
                      JSON for all layers in the header (_quantization_metadata)
    LightX2V, compressed-tensors, ModelOpt   X.weight float8 or int8, X.weight_scale, X.input_scale
    DeepSeek          X.weight float8, X.weight_scale_inv, for blocks of 128 x 128
    plain cast        X.weight float8 without any scale
    GGUF              blocks with their own scales (:mod:`hiar_model.io.gguf_files`)

In all of them the weight is the stored number times the scale: DeepSeek's "inverse" is the inverse of what the weight
was multiplied with. A scale is one number, one for each row, or one for each block.
docs/howto/quantised_files.md cites them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..io.gguf_files import ARCHITECTURE
from ..io.packed import Blocks, Packed, Scaled
from ..io.weight_files import parse_json, some
from .foreign import kind_of_file
from .key_mapping import plain

WORK = torch.bfloat16  # dtype of dequantised weights, unless another one is asked for
EIGHT_BITS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8"}
_BLOCK = 128  # along both sides, where a grid of scales does not divide the weight
_SCALES = ("scale_weight", "weight_scale_inv", "weight_scale")
_INPUTS = ("scale_input", "input_scale", "scale_output", "output_scale")
_MARKERS = ("scaled_fp8",)  # of a whole file
_COMFY, _COMFY_HEADER = "comfy_quant", "_quantization_metadata"
_COMFY_READ = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
_GGUF_OTHERS = {"pig", "cow", "general", ""}  # architectures that say nothing

READ = (
    "float8 and int8 with scale_weight, weight_scale or weight_scale_inv, "
    "GGUF of F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K, or weights of 16 bits and more"
)
_REFUSED = (  # part of a key -> what such a file is
    (
        r"\.(nested_)?(absmax|quant_map)$|\.quant_state(\.|$)|\.SCB$|\.weight_format$",
        "a checkpoint quantised by bitsandbytes",
    ),
    (r"\.(wscales|wcscales|wtscale|smooth_factor)$", "an SVDQuant (Nunchaku) checkpoint"),
    (r"\.(qweight|qzeros|g_idx)$", "a GPTQ or AWQ checkpoint"),
    (r"\.weight_packed$", "a compressed-tensors checkpoint of packed 4-bit numbers"),
    (r"\.weight_scale_2$|\.weight_global_scale$", "a checkpoint with scales of scales (NVFP4)"),
    (r"\.pre_quant_scale$", "a checkpoint with scales of the inputs inside the weights (pre_quant_scale)"),
    (r"\.weight\._(data|scale)$", "a checkpoint quantised by optimum-quanto"),
    (r"(:|_weight_|\._)qdata$", "a checkpoint quantised by torchao"),
)


@dataclass(frozen=True)
class Quantisation:
    """What is quantised in a checkpoint.

    Attributes:
        dialect: who writes such keys. kinds: type of numbers, and for whom each scale is -> count of tensors.
        unused: keys that dequantising does not need, scales of inputs.
    """

    dialect: str
    kinds: Mapping[str, int]
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} tensors of {kind}" for kind, count in self.kinds.items())
        unused = f"; not needed: {len(self.unused)} scales of inputs ({some(self.unused, 1)})" if self.unused else ""
        return f"quantised, {self.dialect}: {kinds}{unused}"


def unread(keys: Iterable[str]) -> str | None:
    """If a key belongs to a quantised checkpoint that is not read: that key and what the file is; else None."""
    return kind_of_file(keys, _REFUSED, READ)


def pack(
    state: Mapping[str, Any], header: Mapping[str, str], source: Any
) -> tuple[dict[str, Any], Quantisation | None]:
    """A state dict with each quantised weight and its scales as one :class:`.Packed` tensor, and what was quantised.

    Args:
        state: keys without wrappers -> tensors as in the file. header: of the file. source: named in errors.

    Raises:
        ValueError: one line that names the tensor: a format that is not read, a scale of no weight, of a wrong shape,
            negative or not finite, zero points.
    """
    architecture = header.get(ARCHITECTURE, "")
    if architecture != "wan" and architecture not in _GGUF_OTHERS:
        raise ValueError(f"{source}: a GGUF file of a {architecture} model, expected wan")
    formats = _comfy_formats(state, header, source)
    result: dict[str, Any] = {}
    scales: dict[str, tuple[str, Tensor]] = {}  # key of a weight -> key of its scale, scale
    unused, marked = [], False
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if key in _MARKERS:
            marked = True
        elif kind in _SCALES and isinstance(value, Tensor):
            weight = f"{module}.weight"
            if weight not in state:
                raise ValueError(f"{source}: {key} is a scale, but there is no {weight}")
            if weight in scales:
                raise ValueError(f"{source}: {weight} has two scales: {scales[weight][0]} and {key}")
            scales[weight] = key, value
        elif kind in _INPUTS:
            unused.append(key)
        elif kind.endswith("zero_point") and isinstance(value, Tensor):
            if bool(value.to(torch.float32).ne(0).any()):
                raise ValueError(f"{source}: {key} is not 0: numbers with zero points are not read; legal: {READ}")
        elif kind != _COMFY:
            result[key] = value
    kinds: Counter[str] = Counter()
    for key, value in result.items():
        if isinstance(value, Packed):
            kinds[value.kind] += 1
            continue
        if not isinstance(value, Tensor):
            continue
        name, scale = scales.get(key, (None, None))
        value = _stored(value, formats.get(key.removesuffix(".weight"), ""))
        if value.dtype not in EIGHT_BITS:
            if scale is not None and bool(scale.to(torch.float32).ne(1).any()):
                raise ValueError(f"{source}: {name} is a scale of {key}, which is {value.dtype}; {_legal()}")
            continue
        if scale is None and value.dtype == torch.int8:
            raise ValueError(f"{source}: {key} is int8 without a scale; expected {key}_scale beside it")
        result[key], per = _scaled(key, value, name, scale, source)
        kinds[f"{EIGHT_BITS[value.dtype]} {per}"] += 1
    if not kinds:
        return result, None
    dialect = _dialect(result, scales, marked, bool(formats), architecture)
    return result, Quantisation(dialect, dict(kinds.most_common()), tuple(unused))


def _legal() -> str:
    return f"a scale belongs to one of {', '.join(EIGHT_BITS.values())}"


def _stored(value: Tensor, comfy: str) -> Tensor:
    """ComfyUI may store float8 as bytes."""
    if value.dtype == torch.uint8 and comfy.startswith("float8"):
        return value.view(getattr(torch, comfy))
    return value


def _scaled(key: str, value: Tensor, name: str | None, scale: Tensor | None, source: Any) -> tuple[Scaled, str]:
    """A weight with its scale, and for whom each of its scales is, in words."""
    kind, rows, columns = EIGHT_BITS[value.dtype], len(value) if value.dim() else 1, 1
    columns = value.numel() // max(rows, 1)
    if scale is None:
        return Scaled(key, kind, value.shape, value, torch.ones(1, 1), (max(rows, 1), max(columns, 1))), "without scale"
    if not scale.is_floating_point() or scale.dtype.itemsize == 1:
        raise ValueError(f"{source}: {name} is {scale.dtype}, expected float32, bfloat16 or float16")
    numbers = scale.float()
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise ValueError(f"{source}: {name} has numbers that are negative or not finite: no scale")
    grid, block, per = _grid(scale, rows, columns)
    if grid is None:
        raise ValueError(
            f"{source}: wrong shape: {name} is {list(scale.shape)}, for {key} {list(value.shape)} expected one number, "
            f"[{rows}], [{rows}, 1], or one for each block of {_BLOCK} x {_BLOCK}"
        )
    return Scaled(key, kind, value.shape, value, grid, block), per


def _grid(scale: Tensor, rows: int, columns: int) -> tuple[Tensor | None, tuple[int, int], str]:
    """Scales as [n, m], the block of each (rows, columns), and that in words; None: they do not fit the weight."""
    if scale.numel() == 1:
        return scale.reshape(1, 1), (rows, columns), "with one scale each"
    shape = list(scale.shape)
    while (len(shape) > 2 and shape[-1] == 1) or (len(shape) == 2 and shape[0] == rows and shape[1] == 1):
        shape.pop()
    if shape == [rows]:
        return scale.reshape(rows, 1), (1, columns), "with a scale for each row"
    if len(shape) != 2 or shape[0] > rows or shape[1] > columns:
        return None, (0, 0), ""
    if shape == [-(-rows // _BLOCK), -(-columns // _BLOCK)]:
        block = _BLOCK, _BLOCK
    elif shape[0] > 1 and rows % shape[0] == 0 and columns % shape[1] == 0:  # [1, n] could be transposed
        block = rows // shape[0], columns // shape[1]
    else:
        return None, (0, 0), ""
    return scale.reshape(shape), block, f"with a scale for each block of {block[0]} x {block[1]}"


def _comfy_formats(state: Mapping[str, Any], header: Mapping[str, str], source: Any) -> dict[str, str]:
    """Layer -> format, as newer ComfyUI files say; ValueError for one that is not read."""
    layers: dict[str, Any] = {}
    if _COMFY_HEADER in header:
        inside = parse_json(header[_COMFY_HEADER], source)
        layers |= inside.get("layers", inside.get(_COMFY_HEADER, {}).get("layers", {}))
    for key, value in state.items():
        if key.endswith(f".{_COMFY}") and isinstance(value, Tensor):
            layers[key.removesuffix(f".{_COMFY}")] = parse_json(
                bytes(value.flatten().to(torch.uint8).tolist()).decode("utf-8", "replace"), source
            )
    formats = {}
    for layer, settings in layers.items():
        name = str(settings.get("format"))
        if name not in _COMFY_READ:
            raise ValueError(
                f"{source}: {layer} is quantised as {name}, which is not read; legal: {', '.join(_COMFY_READ)}"
            )
        if settings.get("convrot"):
            raise ValueError(f"{source}: {layer} is {name} of rotated weights (convrot), which is not read")
        formats[plain(layer)] = name
    return formats


def _dialect(
    state: Mapping[str, Any], scales: Mapping[str, tuple[str, Tensor]], marked: bool, comfy: bool, architecture: str
) -> str:
    if any(isinstance(value, Blocks) for value in state.values()):
        return f"GGUF, architecture {architecture or 'not named'}"
    ends = {name.rpartition(".")[2] for name, _ in scales.values()}
    if marked or "scale_weight" in ends:
        return "scale_weight as ComfyUI writes it"
    if comfy:
        return "weight_scale with ComfyUI's comfy_quant"
    if "weight_scale_inv" in ends:
        return "weight_scale_inv as DeepSeek writes it (a factor, despite its name)"
    if ends:
        return "weight_scale as LightX2V and compressed-tensors write it"
    return "cast without scales"
