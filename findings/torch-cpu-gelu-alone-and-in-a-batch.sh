#!/usr/bin/env bash
# On a CPU torch's GELU of a number is another one in a tensor of one than in a tensor of many: at -5.35 twice as large.
#
# A guess is that a function that looks at one number at a time gives that number the same result wherever it stands. In
# torch 2.13.0 gelu does not: of 4,096 numbers from -0.005 to -20.48, 566 have other bits alone than together in float32,
# and 130 in bfloat16, for small and large tensors go through different code. Where GELU is nearly 0 they differ by a
# factor: gelu(-5.35) is -3.19e-07 together, -1.59e-07 alone, and -2.35e-07 in float64. exp and tanh are the same
# everywhere; sigmoid, silu, exp2, softplus and mish differ in their last bit on processors with AVX2, also between the
# last few numbers of a tensor and the rest. So a sample is not the same alone and in a batch, though no layer mixes
# samples. Seen on 2026-11-28, Linux x86-64, Python 3.11, with and without AVX-512.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index, on x86-64. Fails if it behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/alone.py" <<'PY'
import sys

import torch
from torch.nn.functional import gelu, silu

torch.set_num_threads(1)
x = -torch.arange(1.0, 4097.0) / 200
differ = {}
for function in (torch.exp, torch.tanh, gelu, torch.sigmoid, silu, torch.exp2):
    for dtype in (torch.float32, torch.bfloat16):
        numbers = x.to(dtype)
        alone = torch.cat([function(one.clone()) for one in numbers.split(1)])
        differ[function.__name__, dtype] = int((alone != function(numbers)).sum())
capability = torch.backends.cpu.get_cpu_capability()
print(f"torch {torch.__version__}, {capability}: of {len(x)} numbers so many differ:")
for (name, dtype), count in differ.items():
    print(f"  {name} {dtype}: {count}")
at = int((x == -5.35).nonzero())
together, one, exact = gelu(x)[at].item(), gelu(x[at : at + 1].clone()).item(), gelu(x.double())[at].item()
print(f"gelu({x[at]:.2f}): {together:.3g} together, {one:.3g} alone, {exact:.3g} in float64")

if any(differ[name, dtype] for name in ("exp", "tanh") for dtype in (torch.float32, torch.bfloat16)):
    sys.exit("exp or tanh changed")
if not (differ["gelu", torch.float32] > 100 and differ["gelu", torch.bfloat16] > 10 and together / one > 1.9):
    sys.exit("gelu changed")
if capability.startswith("AVX") and not all(differ[name, torch.float32] for name in ("sigmoid", "silu", "exp2")):
    sys.exit("sigmoid, silu or exp2 changed")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "torch==2.13.0" "numpy==2.2.6"
for capability in "" avx2 default; do
    ATEN_CPU_CAPABILITY=$capability "$folder/venv/bin/python" "$folder/alone.py"
done
echo "as described"
