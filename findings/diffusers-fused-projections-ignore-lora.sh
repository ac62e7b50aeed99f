#!/usr/bin/env bash
# diffusers: after transformer.fuse_qkv_projections() a LoRA on the projections of Wan's attention has no effect at all.
#
# Fusing makes a fourth matrix from those of q, k and v. A guess is that it replaces them, so that a LoRA is either part
# of it or refused. In diffusers 0.42.1 the three stay beside it: an adapter that is loaded later is attached to them,
# is listed as active, and is never read; one that was there before is left out of the new matrix, and its effect is gone
# too. Neither says a word. fuse_lora() changes the three as well, so the fused matrix stays without it; what brings the
# LoRA back is unfuse_qkv_projections(). A model with fused projections also takes the memory of both. Seen on
# 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0 (CPU), PEFT 0.21.2.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/fused.py" <<'PY'
import sys

import diffusers
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

torch.set_grad_enabled(False)
torch.manual_seed(0)
inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 3, 8)


def tiny():
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8,
    ).eval()


def add_lora(model):
    torch.manual_seed(2)
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["attn1.to_q", "attn1.to_k", "attn1.to_v"], init_lora_weights=False)
    )


def count(model):
    return sum(weight.numel() for weight in model.parameters())


plain = tiny()(*inputs)[0]


def effect(*steps):
    """How far the output moves from that of the plain model, at most."""
    model = tiny()
    for step in steps:
        step(model)
    return (model(*inputs)[0] - plain).abs().max().item(), model


fuse, unfuse = WanTransformer3DModel.fuse_qkv_projections, WanTransformer3DModel.unfuse_qkv_projections
effects = {
    "LoRA": effect(add_lora)[0],
    "fused": effect(fuse)[0],
    "fused, then LoRA": effect(fuse, add_lora)[0],
    "LoRA, then fused": effect(add_lora, fuse)[0],
    "fused, then LoRA, fuse_lora()": effect(fuse, add_lora, lambda m: m.fuse_lora())[0],
    "fused, then LoRA, unfused": effect(fuse, add_lora, unfuse)[0],
}
model = effect(fuse, add_lora)[1]
numbers = count(tiny()), count(effect(fuse)[1])
for name, size in effects.items():
    print(f"diffusers {diffusers.__version__}, {name}: the output moves by {size:.2g}")
print(f"active after fusing: {model.active_adapters()}; numbers of the model, alone and fused: {numbers}")
full = effects["LoRA"]
expected = [full, 0, 0, 0, 0, full]
if full < 1e-3 or any(abs(a - b) > full / 1000 for a, b in zip(effects.values(), expected)):
    sys.exit("changed: described is no effect while the projections are fused")
if model.active_adapters() != ["default"] or numbers[1] <= numbers[0]:
    sys.exit("changed: described are an active adapter, and weights that are there twice")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    "torch==2.13.0" "numpy==2.2.6" "diffusers==0.42.1" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0"
"$folder/venv/bin/python" "$folder/fused.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
echo "as described"
