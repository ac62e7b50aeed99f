"""What diffusers and PEFT make of LoRA files whose numbers a formula gives."""

from __future__ import annotations

from pathlib import Path

import diffusers
import lora_files
import peft
import torch
from tiny_model import TINY


def transformer() -> diffusers.WanTransformer3DModel:
    """A tiny one; the weights that matter are given by the formula."""
    model = diffusers.WanTransformer3DModel(
        patch_size=TINY.patch_size, num_attention_heads=TINY.num_heads, attention_head_dim=TINY.head_dim,
        in_channels=TINY.in_channels, out_channels=TINY.out_channels, text_dim=TINY.text_dim,
        freq_dim=TINY.freq_dim, ffn_dim=TINY.ffn_dim, num_layers=TINY.num_layers, eps=TINY.eps,
    )  # fmt: skip
    for module in {**lora_files.MODULES, **lora_files.ALL_OF_BLOCKS}:
        weight = model.get_submodule(lora_files.spelled(module)).weight
        weight.data = torch.from_numpy(lora_files.formula(f"{module} base", *weight.shape))
    return model


def merged_by_library(
    folder: Path, spelling: str, modules: dict[str, tuple[int, float]], scale: float
) -> dict[str, torch.Tensor]:
    """Native module -> its merged weight, by the library that writes such files."""
    model = transformer()
    base = {f"{module}.weight": model.get_submodule(lora_files.spelled(module)).weight for module in modules}
    file = lora_files.write(folder, spelling, base, modules)
    if spelling == "PEFT":
        wrapped = peft.PeftModel.from_pretrained(model, file)
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("default", scale)
        model = wrapped.merge_and_unload()
    else:
        state, metadata = diffusers.WanPipeline.lora_state_dict(str(file), return_lora_metadata=True)
        model.load_lora_adapter(state, prefix="transformer", adapter_name="style", metadata=metadata)
        model.set_adapters(["style"], [scale])
        model.fuse_lora(adapter_names=["style"])
        model.unload_lora()
    return {module: model.get_submodule(lora_files.spelled(module)).weight.detach() for module in modules}
