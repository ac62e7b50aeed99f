#!/usr/bin/env bash
# PEFT: a DoRA adapter at scale 0 keeps half of its effect, and at scale 0.5 nearly all of it; only disabling ends it.
#
# The strength of a LoRA is linear: at scale 0.5 its effect is half, at 0 none, and sliders of strength and ablations
# build on it. A guess is that use_dora=True, which only trains a magnitude per row beside A and B, behaves so too. In
# PEFT 0.21.2 set_scale reaches A and B alone. At 0 the weight is m W / |W| with the trained magnitudes m, another
# network than the base: in the trained example below 53% of the adapter's effect stay, 97% at 0.5, and -1 does not
# reverse it. The middle of the way is missed by half. disable_adapter() is the base, merged and unmerged agree at every
# scale, and before training all scales are the base. Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0,
# transformers 5.23.0.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if this version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/scales.py" <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
x, target = torch.randn(64, 16), torch.randn(16, 16) / 2
SCALES = (1.0, 0.5, 0.0, -1.0)
wrong = False
for kind in ("LoRA", "DoRA"):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(16, 16, bias=False))
    base = network(x).detach()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=kind == "DoRA")
    model = get_peft_model(network, config)
    layer = model.base_model.model[0]
    layer.set_scale("default", 0.0)
    fresh = (model(x) - base).abs().max().item()
    layer.set_scale("default", 1.0)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(300):
        adam.zero_grad()
        (model(x) - x @ target).square().mean().backward()
        adam.step()
    full = (model(x) - base).detach()
    effects, merged_off = {}, 0.0
    for scale in SCALES:
        layer.set_scale("default", scale)
        effects[scale] = (model(x) - base).detach()
        model.merge_adapter()
        merged_off = max(merged_off, (model(x) - base - effects[scale]).abs().max().item())
        model.unmerge_adapter()
    sizes = {scale: (effect.norm() / full.norm()).item() for scale, effect in effects.items()}
    middle = ((effects[0.5] - full / 2).norm() / full.norm()).item()
    with model.disable_adapter():
        disabled = ((model(x) - base).norm() / full.norm()).item()
    print(f"{kind}: effect at scales {{{', '.join(f'{s:g}: {size:.3f}' for s, size in sizes.items())}}}, "
          f"0.5 is {middle:.3f} from the middle, disabled {disabled:.3f}")
    wrong |= fresh > 1e-5 or merged_off > 1e-4 or disabled > 1e-5
    if kind == "LoRA":
        wrong |= any(abs(size - abs(s)) > 1e-4 for s, size in sizes.items()) or middle > 1e-4
    else:
        wrong |= not (0.4 < sizes[0.0] < 0.65 and sizes[0.5] > 0.9 and 0.35 < middle < 0.6)
        wrong |= (effects[-1.0] + full).norm() < 0.5 * full.norm()
if wrong:
    sys.exit("changed: described as half at 0 and nearly all at 0.5")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/scales.py"
echo "as described"
