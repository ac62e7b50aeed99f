"""LoRA files in every spelling, with numbers given by a formula, and what they add to a weight, in float64 numpy."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
}  # fmt: skip
"""As published, not as the package says it."""
SPELLINGS = ("diffusers", "PEFT", "kohya", "ComfyUI", "native", "training")
MODULES = {  # partial: not every layer, q without k; -> rank, alpha
    "blocks.0.self_attn.q": (2, 4.0), "blocks.0.self_attn.v": (3, 3.0), "blocks.1.self_attn.k": (2, 1.0),
    "blocks.1.cross_attn.k": (2, 2.0), "blocks.0.cross_attn.o": (4, 2.0), "blocks.1.ffn.0": (1, 8.0),
    "blocks.1.ffn.2": (2, 4.0), "time_projection.1": (2, 4.0), "text_embedding.0": (2, 4.0), "head.head": (2, 2.0),
}  # fmt: skip

ALL_OF_BLOCKS = {
    f"blocks.{i}.{name}": (2 + i, 4.0)
    for i in range(2)
    for name in DIFFUSERS
    if name.startswith(("self", "cross", "ffn"))
}
"""Of a model of two layers."""
OF_LIBRARIES = {"diffusers": MODULES, "PEFT": MODULES, "kohya": ALL_OF_BLOCKS, "ComfyUI": ALL_OF_BLOCKS}
"""Spelling -> what diffusers and PEFT can read of it: of kohya's only files of whole blocks."""


def formula(name: str, *shape: int) -> np.ndarray:
    """Numbers of order 0.3 that depend on the name."""
    count = np.arange(np.prod(shape), dtype=np.float64)
    return (0.3 * np.sin(1.7 * count + zlib.crc32(name.encode()) % 997)).reshape(shape).astype(np.float32)


def factors(module: str, rank: int, weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """down [rank, in], up [out, rank] of a module."""
    out, inner = weight.shape[0], int(np.prod(weight.shape[1:]))
    return formula(f"{module} down", rank, inner), formula(f"{module} up", out, rank)


def expected(
    state: Mapping[str, torch.Tensor], scale: float, modules: Mapping[str, Any] = MODULES
) -> dict[str, np.ndarray]:
    """Native keys -> the merged tensors, float64."""
    result = {key: value.double().numpy() for key, value in state.items()}
    for module, (rank, alpha) in modules.items():
        down, up = factors(module, rank, state[f"{module}.weight"])
        delta = up.astype(np.float64) @ down.astype(np.float64) * (scale * alpha / rank)
        result[f"{module}.weight"] = result[f"{module}.weight"] + delta.reshape(result[f"{module}.weight"].shape)
    return result


def spelled(module: str) -> str:
    """diffusers' name of a module."""
    block = module.split(".", 2)[:2] if module.startswith("blocks.") else []
    name = module.split(".", 2)[2] if block else module
    return ".".join([*block, DIFFUSERS[name]])


def write(
    folder: Path, spelling: str, state: Mapping[str, torch.Tensor], modules: Mapping[str, Any] = MODULES,
    more: Mapping[str, torch.Tensor] | None = None, name: str = "style",
) -> Path:  # fmt: skip
    """A LoRA of these modules; ranks and alphas as such files say them. ``more``: keys as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    ranks, alphas = {}, {}
    for module, (rank, alpha) in modules.items():
        down, up = (torch.from_numpy(x.copy()) for x in factors(module, rank, state[f"{module}.weight"]))
        theirs = spelled(module)
        start, a, b = {
            "diffusers": (f"transformer.{theirs}", "lora_A", "lora_B"),
            "PEFT": (f"base_model.model.{theirs}", "lora_A", "lora_B"),
            "kohya": (f"lora_unet_{module.replace('.', '_')}", "lora_down", "lora_up"),
            "ComfyUI": (f"diffusion_model.{module}", "lora_down", "lora_up"),
            "native": (module, "lora_A", "lora_B"),
            "training": (f"base_model.model.model.{module}", "lora_A.default", "lora_B.default"),
        }[spelling]
        if spelling in ("native", "training"):  # say no alpha: it is in the numbers
            up = up * (alpha / rank)
        if spelling in ("kohya", "ComfyUI"):
            tensors[f"{start}.alpha"] = torch.tensor(alpha)
        ranks[theirs], alphas[theirs] = rank, alpha
        tensors |= {f"{start}.{a}.weight": down, f"{start}.{b}.weight": up.contiguous()}
    tensors |= more or {}
    config = {
        "peft_type": "LORA", "r": 7, "lora_alpha": 5, "rank_pattern": ranks, "alpha_pattern": alphas, "use_dora": False,
        "target_modules": list(ranks),
    }  # fmt: skip
    if spelling == "PEFT":
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder
    if spelling == "training":
        file = folder / f"{name}.pt"
        torch.save({"generator_lora": tensors, "critic_lora": {}, "step": 3}, file)
        return file
    file, header = folder / f"{name}.safetensors", {"format": "pt"}
    if spelling == "diffusers":
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, file, header)
    return file
