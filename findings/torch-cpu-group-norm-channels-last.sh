#!/usr/bin/env bash
# On a CPU group_norm of a channels_last tensor is wrong where the mean is large: by 0.3 at 1000, by 1000 at 10,000.
#
# channels_last is said to change the speed and not the result. In torch 2.13.0 group_norm of a contiguous tensor uses a
# stable algorithm (mean 1000, deviation 1: within 0.0002 of float64); of a channels_last one it takes the variance as
# mean(x^2) - mean(x)^2 in float32, from which nothing is left when the mean is a few thousand deviations: the result
# of a VAE's layer is noise, or huge where the difference comes out as 0. No warning. A shift of the input, which
# group_norm removes anyway, changes it. layer_norm over the same numbers is right. Seen on 2026-11-28, Linux x86-64,
# Python 3.11.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/norm.py" <<'PY'
import sys

import torch
from torch.nn.functional import group_norm, layer_norm

torch.manual_seed(0)
noise = torch.randn(1, 64, 16, 16)
for mean, least in ((0, 0), (100, 0.003), (1000, 0.05), (10_000, 10)):
    x = noise + mean
    exact = group_norm(x.double(), 8)
    plain = (group_norm(x, 8) - exact).abs().max().item()
    last = (group_norm(x.contiguous(memory_format=torch.channels_last), 8) - exact).abs().max().item()
    rows = (layer_norm(x.view(8, -1), (2048,)).view_as(x) - exact).abs().max().item()
    print(f"mean {mean}: contiguous off by {plain:.1e}, channels_last {last:.1e}, layer_norm {rows:.1e}")
    if max(plain, rows) > 0.01 or last < least or (mean == 0 and last > 1e-5):
        sys.exit("changed: described as wrong with channels_last alone")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/norm.py"
echo "as described"
