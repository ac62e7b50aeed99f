#!/usr/bin/env bash
# Triton: bfloat16 times an integer argument is float32, unless the argument is 1: then the product is bfloat16.
#
# A scalar beside a bfloat16 tensor is said not to widen it, and a guess is that x * n is bfloat16 for an integer n. In
# Triton 3.9.0 that holds for literals and constexprs. An argument of the kernel, whether float or integer, and
# program_id are no such scalars: bfloat16 beside any of them becomes float32. But an integer argument that happens to
# be 1 is compiled as a constexpr, so the dtype of x * n, and of all that follows, depends on the value of n: with n = 1
# x * n + c is rounded to 8 bits before a store as float32, with n = 2 it is not. With do_not_specialize=["n"] it is
# float32 always. The interpreter (TRITON_INTERPRET=1) differs twice: a float argument leaves bfloat16, and an integer
# argument of 1 widens. Compiled ahead of time for sm_90, without a GPU, with the launcher's own rule for the types of
# arguments. Seen on 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if this version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/dtypes.py" <<'PY'
import contextlib
import io
import os
import re
import sys
import warnings

import torch
import triton
import triton.language as tl

warnings.filterwarnings("ignore")


@triton.jit
def products(x_ptr, out_ptr, f, n, LITERAL: tl.constexpr):
    i = tl.arange(0, 128)
    x = tl.load(x_ptr + i)
    tl.static_print("literal", (x * 3).dtype)
    tl.static_print("constexpr", (x * LITERAL).dtype)
    tl.static_print("float argument", (x * f).dtype)
    tl.static_print("integer argument", (x * n).dtype)
    tl.static_print("program_id", (x * tl.program_id(0)).dtype)
    tl.store(out_ptr + i, x * n + 0.001953125)


BFLOAT16, FLOAT32 = "bf16", "fp32"
wrong = False


def compare(name, lines, expected):
    global wrong
    dtypes = dict(line.strip().rsplit(" ", 1) for line in lines.splitlines() if line.strip())
    print(f"  {name}: {', '.join(f'{k} {v}' for k, v in dtypes.items())}")
    wrong |= dtypes != dict(zip(("literal", "constexpr", "float argument", "integer argument", "program_id"), expected))


if os.environ.get("TRITON_INTERPRET") == "1":
    for n in (1, 2):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            products[(1,)](torch.ones(128, dtype=torch.bfloat16), torch.zeros(128), 1.5, n, 1.5)
        compare(f"interpreter, n = {n}", printed.getvalue(), (BFLOAT16, BFLOAT16, BFLOAT16, FLOAT32, FLOAT32))
else:
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import native_specialize_impl

    for n, specialize in ((1, True), (2, True), (1, False)):
        kind = native_specialize_impl(BaseBackend, n, False, specialize, True)[0]  # as the launcher types an argument
        signature = {"x_ptr": "*bf16", "out_ptr": "*fp32", "f": "fp32", "n": kind, "LITERAL": "constexpr"}
        constants = {"LITERAL": 1.5} | ({"n": n} if kind == "constexpr" else {})
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            compiled = triton.compile(ASTSource(products, signature, constants), target=GPUTarget("cuda", 90, 32))
        narrow = n == 1 and specialize
        integer = BFLOAT16 if narrow else FLOAT32
        name = f"compiled, n = {n}{'' if specialize else ', not specialised'}"
        compare(name, printed.getvalue(), (BFLOAT16, BFLOAT16, FLOAT32, integer, FLOAT32))
        rounds = bool(re.search(r"\b(add|fma)(\.rn)?\.bf16|cvt\.rn\.bf16", compiled.asm["ptx"]))
        print(f"    x * n + 2^-9 is rounded to bfloat16 before it is stored as float32: {rounds}")
        wrong |= rounds != narrow
if wrong:
    sys.exit("changed: described as float32 beside arguments, and bfloat16 beside 1")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 triton==3.9.0 numpy==2.2.6
TRITON_ALWAYS_COMPILE=1 TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/dtypes.py"
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/dtypes.py"
echo "as described"
