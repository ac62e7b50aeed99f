#!/usr/bin/env bash
# An average of weights "with decay 0.9999" is another one in torch, diffusers and ema-pytorch: 5, 90 and 50% of the way.
#
# Weights that move from 0 to 1 in 1,000 steps: with decay 0.9999 their average is at 0.05, and torch's AveragedModel with
# get_ema_multi_avg_fn(0.9999) says so. A guess is that EMAModel(decay=0.9999) of diffusers, whose use_ema_warmup is
# False by default, does too: it has 0.90. It takes (1 + n) / (10 + n) at step n, as long as that is less than decay,
# which for 0.9999 is 90,000 steps; use_ema_warmup=True only exchanges that formula for another. So in a shorter run
# decay has no effect at all: 0.999 and 0.99999 give the same average, of about the last tenth of the run.
# EMA(beta=0.9999) of ema-pytorch has 0.50: its decay rises in a similar way, and it starts at step 100 and updates at
# every 10th step, without making up for the other nine. Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0
# (CPU), diffusers 0.42.1, ema-pytorch 0.8.3.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/averages.py" <<'PY'
import sys

import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.set_num_threads(1)
STEPS = 1000
network = nn.Linear(1, 1, bias=False)
nn.init.zeros_(network.weight)
averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
of_diffusers = {
    "diffusers 0.9999": EMAModel(network.parameters(), decay=0.9999),
    "diffusers 0.999": EMAModel(network.parameters(), decay=0.999),
    "diffusers 0.99999": EMAModel(network.parameters(), decay=0.99999),
    "diffusers 0.9999, use_ema_warmup": EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True),
}
ema = EMA(network, beta=0.9999)
every = EMA(network, beta=0.9999, update_after_step=0, update_every=1)
for step in range(STEPS):
    nn.init.constant_(network.weight, (step + 1) / STEPS)
    averaged.update_parameters(network)
    for average in of_diffusers.values():
        average.step(network.parameters())
    ema.update()
    every.update()

exact = 0.0
for step in range(STEPS):
    exact = 0.9999 * exact + 0.0001 * (step + 1) / STEPS
seen = {
    "by hand": exact,
    "torch": averaged.module.weight.item(),
    **{name: average.shadow_params[0].item() for name, average in of_diffusers.items()},
    "ema-pytorch": ema.ema_model.weight.item(),
    "ema-pytorch, update_every=1, update_after_step=0": every.ema_model.weight.item(),
}
for name, number in seen.items():
    print(f"{name}: {number:.3f}")
expected = [0.048, 0.049, 0.900, 0.900, 0.900, 0.907, 0.501, 0.907]
if any(abs(a - b) > 0.002 for a, b in zip(seen.values(), expected)):
    sys.exit(f"changed: described as {expected}")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 diffusers==0.42.1 ema-pytorch==0.8.3
"$folder/venv/bin/python" "$folder/averages.py"
echo "as described"
