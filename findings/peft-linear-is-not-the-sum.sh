#!/usr/bin/env bash
# PEFT: add_weighted_adapter(["a", "b"], [1, 1], combination_type="linear") is far from a + b: off by as much as a + b is.
#
# A LoRA adds B A to a weight, and a guess is that "linear" makes an adapter that adds w1 B1 A1 + w2 B2 A2, as
# two active adapters do. PEFT 0.21.2 adds the As and the Bs apart, each times the root of its weight; the product has the
# terms B1 A2 and B2 A1 too, which nobody trained. For adapters that have nothing to do with each other these are as
# large as the sum itself, and one adapter with itself, at 0.5 and 0.5, is twice itself. "svd", the default, keeps the rank
# of one, and is off by half of the sum here; "cat" is exact, at the rank of both. No warning. Seen on 2026-11-28, Linux
# x86-64, Python 3.11, torch 2.13.0 (CPU).
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if the version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/sum.py" <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(64, 64, bias=False))
eye = torch.eye(64)
plain = base(eye).detach()
config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(base, config, adapter_name="one")
model.add_adapter("two", config)


def added(*names: str) -> torch.Tensor:
    """What these adapters add to the weight."""
    model.base_model.set_adapter(list(names))
    return (model(eye) - plain).detach()


one, two = added("one"), added("two")
assert torch.allclose(added("one", "two"), one + two, atol=1e-5)
for kind, weights, least, most in (
    ("linear", (1.0, 1.0), 0.8, 1.3),
    ("linear", (0.7, 0.3), 0.5, 1.3),
    ("svd", (1.0, 1.0), 0.3, 0.7),
    ("cat", (1.0, 1.0), 0, 1e-5),
    ("cat", (0.7, 0.3), 0, 1e-5),
):
    name = f"{kind}_{weights[0]:g}".replace(".", "_")
    model.add_weighted_adapter(["one", "two"], list(weights), name, combination_type=kind)
    expected = weights[0] * one + weights[1] * two
    off = ((added(name) - expected).norm() / expected.norm()).item()
    print(f"{kind} {weights}: off by {off:.1%} of the weighted sum")
    if not least <= off <= most:
        sys.exit(f"changed: described as {least} to {most}")
model.add_weighted_adapter(["one", "one"], [0.5, 0.5], "itself", combination_type="linear")
print("one with itself, 0.5 and 0.5:", f"{(added('itself').norm() / one.norm()).item():.2f} times one")
if not torch.allclose(added("itself"), 2 * one, atol=1e-4):
    sys.exit("changed: described as twice itself")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    "torch==2.13.0" "numpy==2.2.6" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0"
"$folder/venv/bin/python" "$folder/sum.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
echo "as described"
