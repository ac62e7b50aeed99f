#!/usr/bin/env bash
# A comparison of two scalars is no mask in the interpreter of Triton 3.9.0: the load raises. 3.8.0 ran it, GPUs do.
#
# Kernels hide what lies before the first frame with mask=inside & (frame >= 0), where frame is a number of the program,
# not a block. It compiles for sm_90, and the interpreter (TRITON_INTERPRET=1) of 3.8.0 runs it. In that of 3.9.0 the
# comparison keeps the type of the numbers compared (int64 here, int32 alike) once it is spread over the block, `&` with
# a mask makes numbers of the mask, and the load says "mask has unsupported dtype". A comparison of blocks is fine, and
# so is the scalar one as `if`. So a suite of kernels that was green in the interpreter fails after an update of torch
# (2.15 brings 3.9.0) with kernels that are right. Seen on 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if either version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/mask.py" <<'PY'
import os
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def masked(x_ptr, out_ptr, frame, SCALAR: tl.constexpr):
    i = tl.arange(0, 8)
    inside = i < 6
    visible = inside & (frame >= 0) if SCALAR else inside & (frame + tl.zeros([8], tl.int32) >= 0)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=visible, other=0.0))


old = triton.__version__ == "3.8.0"
if os.environ.get("TRITON_INTERPRET") == "1":
    for scalar in (False, True):
        out = torch.zeros(8)
        try:
            masked[(1,)](torch.ones(8), out, 3, scalar)
            result = f"{out.sum():g} of 8 loaded"
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(f"  comparison of {'scalars' if scalar else 'blocks'}: {result}")
        expected = "6 of 8 loaded" if old or not scalar else "mask has unsupported dtype"
        if expected not in result:
            sys.exit(f"changed: described as {expected}")
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "frame": "i32", "SCALAR": "constexpr"}
    source = ASTSource(masked, types, constexprs={"SCALAR": True})
    print("  comparison of scalars:", len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0)
PY

for version in 3.8.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
        torch==2.13.0 "triton==$version" numpy==2.2.6
    echo "Triton $version, interpreter"
    TRITON_INTERPRET=1 "$folder/$version/bin/python" "$folder/mask.py"
    echo "Triton $version, compiled for sm_90"
    TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/mask.py"
done
echo "as described"
