#!/usr/bin/env bash
# A scale cast to float8_e8m0fnu (powers of two, of MX formats) is rounded to the nearest, and torch drops its sign.
#
# The OCP MX paper takes the power of two below a block's largest number, and a guess is that the cast does that, or that
# it refuses what is no power of two. torch 2.13.0 rounds at the middle: 1.4999 becomes 1, 1.5 becomes 2, 3 becomes 4
# (always up, not to the even exponent). So scale = amax / 448 may come out a third too small, and the largest numbers of
# the block lie beyond 448 and are cut off. -3 becomes 4 and 0 becomes 2^-127 without a word; ml_dtypes 0.5.4, which JAX
# uses, rounds alike but makes both NaN. A block of zeros that one of them wrote is NaN, in full, if the other made its
# scale. Seen on 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if either package behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/cast.py" <<'PY'
import sys

import ml_dtypes
import numpy as np
import torch

scales = np.array([1.4999, 1.5, 3.0, 6.0, 0.0, -1.0, -3.0], np.float32)
ours = torch.from_numpy(scales).to(torch.float8_e8m0fnu).float().tolist()
theirs = scales.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32).tolist()
print(f"of {scales.tolist()}")
print(f"torch {torch.__version__}: {ours}")
print(f"ml_dtypes {ml_dtypes.__version__}: {theirs}")

block = torch.linspace(0, 448 * 1.4999, 32)
scale = (block.amax() / 448).to(torch.float8_e8m0fnu).float()
back = (block / scale).to(torch.float8_e4m3fn).float() * scale
print(f"a block whose largest number is {block[-1].item():.1f} comes back with {back[-1].item():.1f}")

if ours != [1.0, 2.0, 4.0, 8.0, 2.0**-127, 1.0, 4.0]:
    sys.exit("torch changed")
if theirs[:4] != ours[:4] or not all(np.isnan(theirs[4:])):
    sys.exit("ml_dtypes changed")
if back[-1].item() != 448:
    sys.exit("the block changed: described is 448")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    "torch==2.13.0" "ml_dtypes==0.5.4" "numpy==2.2.6"
"$folder/venv/bin/python" "$folder/cast.py"
echo "as described"
