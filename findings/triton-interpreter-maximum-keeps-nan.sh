#!/usr/bin/env bash
# tl.maximum(x, 1.0) of a NaN is NaN in the interpreter of Triton 3.7.1 and 1.0 on a GPU: a test there proves nothing.
#
# Kernels divide by tl.maximum(norm, eps), and a NaN in a row should make the row NaN, as in torch. In the interpreter
# (TRITON_INTERPRET=1) of Triton 3.7.1 tl.maximum and tl.clamp keep a NaN; compiled for sm_90 they are max.f32 and
# min.xorsign.abs.f32, which PTX defines to drop it: the row is divided by eps, and its other numbers become huge. tl.max
# drops it in both. The interpreter of 3.8.0 drops it too, so the same test fails after an update of Triton. With
# propagate_nan=tl.PropagateNan.ALL it is max.NaN.f32, and all agree. Compiled ahead of time, without a GPU. Seen on
# 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if either version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/nan.py" <<'PY'
import os
import re
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def maximum(x_ptr, out_ptr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, tl.maximum(tl.load(x_ptr + i), 1.0))


@triton.jit
def clamp(x_ptr, out_ptr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, tl.clamp(tl.load(x_ptr + i), -1.0, 1.0))


@triton.jit
def largest(x_ptr, out_ptr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, tl.max(tl.load(x_ptr + i), 0))


@triton.jit
def keeping(x_ptr, out_ptr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, tl.maximum(tl.load(x_ptr + i), 1.0, propagate_nan=tl.PropagateNan.ALL))


KERNELS = {"maximum": maximum, "clamp": clamp, "max": largest, "maximum, ALL": keeping}
if os.environ.get("TRITON_INTERPRET") == "1":
    x, results = torch.arange(128.0), {}
    x[5] = float("nan")
    for name, kernel in KERNELS.items():
        out = torch.zeros(128)
        kernel[(1,)](x, out)
        results[name] = "NaN" if out[5].isnan() else f"{out[5]:g}"
    expected = {"maximum": "NaN", "clamp": "NaN", "max": "127", "maximum, ALL": "NaN"}
    if triton.__version__ != "3.7.1":
        expected |= {"maximum": "1", "clamp": "-1"}
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    results = {}
    for name, kernel in KERNELS.items():
        source = ASTSource(kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        results[name] = " ".join(sorted(set(re.findall(r"\b(?:max|min)\.[\w.]*f32", ptx))))
    expected = {"maximum": "max.f32", "clamp": "min.xorsign.abs.f32", "max": "max.f32", "maximum, ALL": "max.NaN.f32"}
for name, value in results.items():
    print(f"  {name}: {value}")
if results != expected:
    sys.exit(f"changed: described as {expected}")
PY

for version in 3.7.1 3.8.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
        torch==2.13.0 "triton==$version" numpy==2.2.6
    echo "Triton $version, interpreter"
    TRITON_INTERPRET=1 "$folder/$version/bin/python" "$folder/nan.py"
    echo "Triton $version, compiled for sm_90"
    TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/nan.py"
done
echo "as described"
