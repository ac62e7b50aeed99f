"""Writes lora_golden.safetensors: what diffusers and PEFT make of LoRA files whose numbers a formula gives.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 diffusers==0.42.1 peft==0.21.2 accelerate
    PYTHONPATH=.:tests/helpers /tmp/golden/bin/python tests/data/lora_golden.py

For each spelling the merged weights of the layers that it changes, at scale 0.75, under "spelling/native module".
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import diffusers
import lora_files
import peft
import torch
from safetensors.torch import save_file
from tiny_model import TINY

SCALE = 0.75


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


def merged(spelling: str, modules: dict[str, tuple[int, float]]) -> dict[str, torch.Tensor]:
    """By the library that reads such files."""
    model = transformer()
    base = {f"{module}.weight": model.get_submodule(lora_files.spelled(module)).weight for module in modules}
    file = lora_files.write(Path(tempfile.mkdtemp()), spelling, base, modules)
    if spelling == "PEFT":
        wrapped = peft.PeftModel.from_pretrained(model, file)
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("default", SCALE)
        model = wrapped.merge_and_unload()
    else:
        state, metadata = diffusers.WanPipeline.lora_state_dict(str(file), return_lora_metadata=True)
        model.load_lora_adapter(state, prefix="transformer", adapter_name="style", metadata=metadata)
        model.set_adapters(["style"], [SCALE])
        model.fuse_lora(adapter_names=["style"])
        model.unload_lora()
    return {f"{spelling}/{m}": model.get_submodule(lora_files.spelled(m)).weight.detach().clone() for m in modules}


if __name__ == "__main__":
    tensors: dict[str, torch.Tensor] = {}
    for spelling, modules in lora_files.OF_LIBRARIES.items():
        tensors |= merged(spelling, modules)
    header = {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}
    save_file(tensors, Path(__file__).with_suffix(".safetensors"), header)
    print(len(tensors), "tensors,", header)
