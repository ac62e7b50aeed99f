#!/usr/bin/env bash
# diffusers: after fuse_lora(lora_scale=0.5) and unfuse_lora() the adapter is at half strength, at a quarter the next time.
#
# A guess is that unfuse_lora() undoes fuse_lora(). In diffusers 0.42.1 the matrices come back, and the scale of each layer
# stays multiplied by lora_scale: calls after it run at half strength, and a second fuse_lora(lora_scale=0.5) fuses a
# quarter. And PEFT takes out of the matrices what the adapter is now, not what was put in: set_adapters(name, 0.5) in
# between has no visible effect while fused, and unfuse_lora() then leaves half of the adapter in the model's own
# weights, for good, also with the adapter disabled or deleted. Nothing is logged. set_adapters after unfuse_lora,
# and not before, gives the right strength. Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0 (CPU), PEFT
# 0.21.2.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/strength.py" <<'PY'
import math
import sys

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

torch.set_num_threads(1)
torch.set_grad_enabled(False)
layer = "blocks.0.attn1.to_q"


def model():
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1)
    network = WanTransformer3DModel(in_channels=4, out_channels=4, rope_max_seq_len=32, **sizes)
    before = network.get_submodule(layer).weight.clone()
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    lora = network.get_submodule(layer)
    whole = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    return network, lora, before, whole


def share(lora, before, whole):
    """How much of the adapter is in the layer's own matrix."""
    return ((lora.base_layer.weight - before).norm() / whole.norm()).item()


network, lora, *start = model()
seen = []
for _ in range(2):
    network.fuse_lora(lora_scale=0.5)
    seen.append(share(lora, *start))
    network.unfuse_lora()
    seen += [share(lora, *start), lora.scaling["default"]]
print("fuse_lora(0.5): {:.2f} in the matrix; unfused: {:.2f}, strength {:.2f}".format(*seen[:3]))
print("fuse_lora(0.5): {:.2f} in the matrix; unfused: {:.2f}, strength {:.2f}".format(*seen[3:]))

network, lora, *start = model()
network.fuse_lora()
network.set_adapters("default", 0.5)
seen.append(share(lora, *start))
network.unfuse_lora()
network.disable_lora()
seen.append(share(lora, *start))
print("fuse_lora(), set_adapters(0.5): {:.2f} in the matrix; unfused and disabled: {:.2f}".format(*seen[6:]))
expected = [0.5, 0, 0.5, 0.25, 0, 0.25, 1, 0.5]
if not all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(seen, expected)):
    sys.exit(f"changed: {seen}, described: {expected}")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 diffusers==0.42.1 peft==0.21.2
"$folder/venv/bin/python" "$folder/strength.py"
echo "as described"
