#!/usr/bin/env bash
# bitsandbytes' fp4 is another format than FP4 (E2M1): it has 0.0052 for 0.083, and nothing between that and 0.167.
#
# E2M1, the FP4 of OCP's MX formats, NVFP4 and ml_dtypes, has the sizes 0, 0.5, 1, 1.5, 2, 3, 4, 6: in parts of the
# largest 0, 0.083, 0.167, 0.25, 0.333, 0.5, 0.667, 1. A guess is that quant_type="fp4" of bitsandbytes, 1 bit of sign,
# 2 of exponent, 1 of mantissa, has the same eight, since seven of them are. In bitsandbytes 0.50.2 the second one is
# 0.0052: a weight of 0.083 of its block's largest becomes 0.0052, which is 6% of it, and 0.02 becomes 0.0052 and not 0.
# In a normal distribution 32% of the weights are in that gap, and the error is 1.15 times that of E2M1 at the same
# block size of 64. The codes are in no order either (1 is 0.0052, 2 is 0.667, 3 is 1), so the bits of one are not the
# bits of the other. nf4 is no odd function: -x is not quantised to minus what x is. Seen on 2026-11-28, Linux x86-64,
# Python 3.11, torch 2.13.0, ml_dtypes 0.6.0, on a CPU.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/codes.py" <<'PY'
import logging
import sys

import ml_dtypes
import numpy as np
import torch

logging.disable(logging.WARNING)  # that a package for faster products is missing
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.set_num_threads(1)


def there_and_back(x: torch.Tensor, kind: str) -> torch.Tensor:
    packed, state = quantize_4bit(x, blocksize=64, quant_type=kind)
    return dequantize_4bit(packed, state).reshape(x.shape)


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """The same with the sizes of E2M1: the largest of a block of 64 becomes 6."""
    blocks = x.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 6
    numbers = (blocks / scale).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (torch.from_numpy(numbers) * scale).reshape(x.shape)


sizes = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32) / 6
block = torch.zeros(1, 64)
block[0, 0], block[0, 1:] = 1, torch.linspace(0, 1, 63)
of_bitsandbytes = there_and_back(block, "fp4").abs().unique().numpy()
_, state = quantize_4bit(block, blocksize=64, quant_type="fp4")
codes = state.code[:8].tolist()
print("E2M1, in parts of the largest:", [round(float(size), 4) for size in sizes])
print("fp4 of bitsandbytes:          ", [round(float(size), 4) for size in of_bitsandbytes])
print("by code:                      ", [round(code, 4) for code in codes])
expected = np.sort(np.where(np.arange(8) == 1, 0.0052083, sizes))
wrong = not np.allclose(of_bitsandbytes, expected, atol=1e-4) or codes == sorted(codes)

block = torch.zeros(1, 64)
block[0, :3] = torch.tensor([1, 0.083, 0.02])
fp4, exact = there_and_back(block, "fp4")[0, 1:3].tolist(), e2m1(block)[0, 1:3].tolist()
print(f"0.083 and 0.02 beside 1: fp4 {[round(x, 4) for x in fp4]}, E2M1 {[round(x, 4) for x in exact]}")
wrong |= not np.allclose(fp4, [0.0052, 0.0052], atol=1e-4) or not np.allclose(exact, [0.0833, 0], atol=1e-4)

x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
errors = {kind: ((there_and_back(x, kind) - x).norm() / x.norm()).item() for kind in ("fp4", "nf4")}
errors["E2M1"] = ((e2m1(x) - x).norm() / x.norm()).item()
part = (x.reshape(-1, 64) / x.reshape(-1, 64).abs().amax(1, keepdim=True)).abs()
share = ((part > 0.0052) & (part < 1 / 6)).float().mean().item()
print("error of normal weights:", {kind: round(error, 4) for kind, error in errors.items()}, f"in the gap: {share:.2f}")
odd = {kind: torch.equal(there_and_back(-x, kind), -there_and_back(x, kind)) for kind in ("fp4", "nf4")}
print("-x becomes minus what x becomes:", odd)
print("fp4 / E2M1:", round(errors["fp4"] / errors["E2M1"], 2))
wrong |= odd != {"fp4": True, "nf4": False} or not 1.1 < errors["fp4"] / errors["E2M1"] < 1.2
if wrong:
    sys.exit("changed: described as 0.0052 in place of 0.083")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 bitsandbytes==0.50.2 ml_dtypes==0.6.0
"$folder/venv/bin/python" "$folder/codes.py"
echo "as described"
