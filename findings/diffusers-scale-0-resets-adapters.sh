#!/usr/bin/env bash
# diffusers: one call with attention_kwargs={"scale": 0} sets all LoRA adapters to full strength for the calls after it.
#
# set_adapters(name, 0.5) sets an adapter's strength, and attention_kwargs={"scale": s} multiplies it for one call. A guess
# is that it is back to what it was after the call. In diffusers 0.42.1 it is for any s but 0, since the strength is
# divided by s again; 0 cannot be divided by, so it is set to 1. Whoever compares a video without its LoRA (s = 0) with one
# at a strength of 0.5 gets 1.0 from the second call on, and an adapter that was switched off by weight 0 comes on.
# Nothing is logged. disable_lora() and enable_lora() keep the strength. Seen on 2026-11-28, Linux x86-64, Python 3.11,
# torch 2.13.0 (CPU), PEFT 0.21.2.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if the version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/scale.py" <<'PY'
import sys

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
).eval()  # fmt: skip
latents, prompt = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 16)
model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


@torch.no_grad()
def output(scale: float | None = None) -> torch.Tensor:
    more = {} if scale is None else {"attention_kwargs": {"scale": scale}}
    return model(latents, torch.tensor([500]), prompt, return_dict=False, **more)[0]


full = output()
for weight, name in ((0.5, "half"), (0.0, "none")):
    model.set_adapters("default", weight)
    before = output()
    assert not torch.equal(before, full)
    for scale in (0.3, 2.0):
        output(scale)
        if not torch.allclose(output(), before, atol=1e-6):
            sys.exit(f"changed: not restored after scale {scale}")
    model.disable_adapters()
    without = output()
    model.enable_adapters()
    if not torch.equal(output(), before):
        sys.exit("changed: not restored by enable_adapters")
    if not torch.equal(output(0.0), without):
        sys.exit("changed: scale 0 is not without the adapter")
    as_before, as_full = (torch.equal(output(), other) for other in (before, full))
    print(f"weight {weight:g}, after one call with scale 0: as before {as_before}, at full strength {as_full}")
    if as_before or not as_full:
        sys.exit("changed: described as at full strength")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/scale.py"
echo "as described"
