#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) casts float32 to float8e4nv otherwise than torch and GPUs do.
#
# Both cast to the nearest number of e4m3, so 1.98 becomes 2. The interpreter of Triton 3.7.1 and 3.9.0 gives 1: the
# mantissa is rounded up in its own bits, and the carry never reaches the exponent. Ties go up instead of to even
# (1.0625 becomes 1.125, not 1), and numbers below 2^-6 are cut off instead of rounded. A kernel that is right on a GPU
# fails beside its reference, or one that is compared with the interpreter seems right. Seen on 2026-11-28, Linux x86-64,
# Python 3.11, torch 2.13.0 (CPU).
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if either version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/cast.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, x.to(tl.float8e4nv), mask=at < n)


x = torch.tensor([1.98, 1.0625, 0.0149, 1.5])
out = torch.empty(4, dtype=torch.float8_e4m3fn)
cast[(1,)](x, out, 4, BLOCK=4)
by_torch = x.to(torch.float8_e4m3fn)
print(f"Triton {triton.__version__}: {out.tolist()}, torch {torch.__version__}: {by_torch.tolist()}")
if by_torch.tolist() != [2.0, 1.0, 0.015625, 1.5]:
    sys.exit("torch changed")
if out.tolist() != [1.0, 1.125, 0.013671875, 1.5]:
    sys.exit("changed: described are 1, 1.125, 0.013671875 and 1.5")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "torch==2.13.0" "numpy==2.2.6"
for version in 3.7.1 3.9.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: --no-deps "triton==$version"
    TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/cast.py"
done
echo "as described"
