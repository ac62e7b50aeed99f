"""Small quantised Wan checkpoints in the published layouts, and the weights that they mean, dequantised one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import wan_files
from safetensors.torch import save_file
from torch import Tensor

from hiar_model.planning.memory import LiveBytes

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Written = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Tensors of a file, and what its quantised ones mean, float64."""


def is_linear(key: str, value: Tensor) -> bool:
    """What writers quantise: the linear layers of the blocks."""
    return key.startswith("blocks.") and key.endswith(".weight") and value.dim() == 2


def _amax(value: Tensor, dims: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 127
    amax = value.abs().max() if dims is None else value.abs().amax(dims, keepdim=True)
    return (amax / largest).float()


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)


def scaled(
    state: Mapping[str, Tensor],
    dtype: torch.dtype = E4M3,
    scale: str = "scale_weight",
    inputs: str | None = None,
    per: str = "tensor",
    block: int = 128,
) -> Written:
    """float8 or int8 with scales. ``per``: "tensor" (no dimension), "one" ([1]), "row" ([out, 1]), "rows" ([out]),
    "block" ([out / block, in / block]) or "group" ([out, in / block, 1]).
    """
    result, meaning = {}, {}
    for key, value in state.items():
        if not is_linear(key, value):
            result[key] = value.clone()
            continue
        module = key.removesuffix(".weight")
        if per in ("block", "group"):
            high = block if per == "block" else 1
            rows, columns = value.shape
            padded = torch.zeros(-(-rows // high) * high, -(-columns // block) * block)
            padded[:rows, :columns] = value
            cells = padded.view(len(padded) // high, high, -1, block)
            factor = _amax(cells, (1, 3), dtype).clamp(min=1e-12)
            whole = factor.expand_as(cells).reshape(padded.shape)[:rows, :columns]
            factor = factor[:, 0, :, 0] if per == "block" else factor[:, 0]
        else:
            factor = _amax(value, (1,) if per in ("row", "rows") else None, dtype)
            whole = factor.expand_as(value)
            factor = {"one": factor.reshape(1) if per == "one" else factor, "rows": factor.flatten()}.get(per, factor)
        result[key] = _rounded(value / whole, dtype)
        result[f"{module}.{scale}"] = factor.contiguous()
        if inputs is not None:
            result[f"{module}.{inputs}"] = torch.tensor(1.0)
        meaning[key] = result[key].double() * whole.double()
    return result, meaning


def comfy(state: Mapping[str, Tensor], **options: Any) -> Written:
    """ComfyUI's first layout, as of wan2.1_t2v_14B_fp8_scaled.safetensors."""
    result, meaning = scaled(state, inputs="scale_input", **options)
    return {f"model.diffusion_model.{key}": x for key, x in result.items()} | {
        "model.diffusion_model.scaled_fp8": torch.empty(2, dtype=E4M3)
    }, meaning


def comfy_quant(state: Mapping[str, Tensor], dtype: torch.dtype = E4M3, name: str = "float8_e4m3fn") -> Written:
    """ComfyUI's present layout: JSON in bytes beside each layer."""
    result, meaning = scaled(state, dtype, "weight_scale", "input_scale")
    mark = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    return result | {f"{key.removesuffix('.weight')}.comfy_quant": mark.clone() for key in meaning}, meaning


def cast(state: Mapping[str, Tensor], dtype: torch.dtype = E4M3) -> Written:
    """Linear layers cast to float8, as of Wan2_1-T2V-14B_fp8_e4m3fn.safetensors."""
    result = {key: x.to(dtype) if is_linear(key, x) else x.clone() for key, x in state.items()}
    return result, {key: x.double() for key, x in result.items() if x.dtype == dtype}


def diffusers(written: Written) -> Written:
    """The same with diffusers' keys, scales too."""
    from hiar_model.models.key_mapping import to_diffusers

    def spelled(key: str) -> str:
        module, _, kind = key.rpartition(".")
        own = to_diffusers(f"{module}.weight")
        return to_diffusers(key) if kind in ("weight", "bias", "modulation") else own.removesuffix("weight") + kind

    return {spelled(key): value for key, value in written[0].items()}, written[1]


FILES: dict[str, Callable[[Mapping[str, Tensor]], Written]] = {
    "comfy scale_weight e4m3": comfy,
    "comfy scale_weight e5m2": lambda state: comfy(state, dtype=E5M2),
    "comfy_quant fp8": comfy_quant,
    "comfy_quant int8": lambda state: comfy_quant(state, torch.int8, "int8_tensorwise"),
    "lightx2v int8": lambda state: scaled(state, torch.int8, "weight_scale", per="row"),
    "lightx2v fp8": lambda state: scaled(state, E4M3, "weight_scale", per="row"),
    "rows without a dimension": lambda state: scaled(state, E4M3, "weight_scale", "input_scale", per="rows"),
    "scale of one number": lambda state: scaled(state, E4M3, "weight_scale", per="one"),
    "deepseek": lambda state: scaled(state, E4M3, "weight_scale_inv", per="block"),
    "blocks of 32": lambda state: scaled(state, torch.int8, "weight_scale", per="block", block=32),
    "groups of a row": lambda state: scaled(state, E4M3, "scale_weight", per="group", block=32),
    "cast": cast,
    "cast e5m2": lambda state: cast(state, E5M2),
    "diffusers": lambda state: diffusers(scaled(state, E4M3, "weight_scale", "input_scale")),
}
"""Every layout of safetensors files that is read."""


def write(path: Path, written: Written, header: Mapping[str, str] | None = None) -> Path:
    """A .safetensors file with these tensors."""
    save_file({key: value.contiguous() for key, value in written[0].items()}, path, dict(header or {}))
    return path


def gguf_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Any:
    """Random blocks of a GGUF type, numpy uint8 [rows, bytes], whose numbers are about as large as weights."""
    import gguf
    import numpy as np

    numbers, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows * columns // numbers, nbytes), dtype=np.uint8)
    scales = {"Q8_0": ((0, 8e-4),), "Q6_K": ((208, 6e-5),), "Q5_K": ((0, 1e-4), (2, 1e-4)),
              "Q4_K": ((0, 2e-4), (2, 2e-4))}[kind]  # fmt: skip
    for at, number in scales:
        blocks[:, at : at + 2] = np.array([number], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(
    path: Path, state: Mapping[str, Tensor], kinds: tuple[str, ...], architecture: str = "wan", prefix: str = ""
) -> dict[str, Tensor]:
    """A GGUF file as ComfyUI-GGUF writes it: linear layers of the blocks in turn of these kinds (Q8_0 where rows do not
    fill blocks of 256), other matrices F16, all else F32. Returns its meaning, by the gguf package.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    meaning: dict[str, Tensor] = {}
    for key, value in state.items():
        kind = "F32" if value.dim() != 2 else "F16"
        if is_linear(key, value):
            kind = kinds[len(meaning) % len(kinds)]
            kind = "Q8_0" if kind.endswith("_K") and value.shape[1] % 256 else kind
        of = gguf.GGMLQuantizationType[kind]
        if kind in ("Q6_K", "Q5_K", "Q4_K"):  # the package only dequantises these
            data = gguf_blocks(kind, *value.shape, seed=len(meaning))
        else:
            data = gguf.quants.quantize(value.numpy(), of)
        meaning[key] = torch.from_numpy(np.array(gguf.quants.dequantize(data, of)).reshape(value.shape))
        writer.add_tensor(prefix + key, data, raw_dtype=of)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return meaning


def native() -> dict[str, Tensor]:
    """The weights that all files are of."""
    return wan_files.native_state()


class Allocated(LiveBytes):
    """Without the shapes that a model is built of."""

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._see(storage)
