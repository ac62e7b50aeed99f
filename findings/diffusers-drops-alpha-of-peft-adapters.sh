#!/usr/bin/env bash
# A LoRA of PEFT does nothing in a diffusers pipeline, and once its prefix is named it is alpha / rank times too weak.
#
# PEFT saves a folder: adapter_model.safetensors, and lora_alpha in adapter_config.json. diffusers builds on PEFT and takes
# folders too, so a guess is that load_lora_weights(folder) reads it, or says what is wrong. In diffusers 0.42.1 a
# WanPipeline finds the file, takes none of its keys (they begin with base_model.model.), and logs that this is safe to
# ignore if there were none. With transformer.load_lora_adapter(folder, prefix="base_model.model") the keys fit, but the
# JSON beside them is not read: alpha is taken to be the rank, so an adapter with alpha 32 and rank 2 comes at a
# sixteenth. Nothing is logged. The right strength needs set_adapters with alpha / rank as its weight. Seen on
# 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0 (CPU), PEFT 0.21.2.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/alpha.py" <<'PY'
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model

torch.set_grad_enabled(False)
torch.manual_seed(0)
inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 3, 8)
folder = Path(sys.argv[1])


def tiny():
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8,
    ).eval()


plain = tiny()(*inputs)[0]
trained = get_peft_model(
    tiny(), LoraConfig(r=2, lora_alpha=32, target_modules=["attn1.to_v"], init_lora_weights=False)
)
trained.save_pretrained(folder)
wanted = trained(*inputs)[0]


def distances(model):
    out = model(*inputs)[0]
    return [round((out - there).abs().max().item() / (wanted - plain).abs().max().item(), 3) for there in (plain, wanted)]


pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=tiny())
pipe.load_lora_weights(folder)
by_pipeline = distances(pipe.transformer)
model = tiny()
model.load_lora_adapter(folder, prefix="base_model.model", weight_name="adapter_model.safetensors")
by_prefix = distances(model)
scaling = model.blocks[0].attn1.to_v.scaling
(name,) = scaling
model.set_adapters(name, 16.0)
by_weight = distances(model)
print(f"diffusers {diffusers.__version__}: how far from the plain output, and from that of PEFT, in parts of the whole:")
print(f"  load_lora_weights: {by_pipeline}, adapters {pipe.get_list_adapters()}")
print(f"  load_lora_adapter with the prefix: {by_prefix}; set_adapters with 16: {by_weight}")
if by_pipeline != [0, 1] or pipe.get_list_adapters():
    sys.exit("changed: described is that a pipeline takes nothing of the folder")
if not (0 < by_prefix[0] < 0.2 and by_prefix[1] > 0.8):
    sys.exit("changed: described is a sixteenth of the adapter with the prefix")
if by_weight[1] > 0.001:
    sys.exit("changed: described is the whole adapter with a weight of 16")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    "torch==2.13.0" "numpy==2.2.6" "diffusers==0.42.1" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0"
"$folder/venv/bin/python" "$folder/alpha.py" "$folder/adapter" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
echo "as described"
