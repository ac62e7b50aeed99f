#!/usr/bin/env bash
# On a CPU 300.0.to(int8) is 44, and 127 once compiled, but for one number alone; 300.0.to(uint8) is 44 in both.
#
# Quantising by (x / scale).round().to(torch.int8) without a clamp wraps around in eager: 128 becomes -128 and 300
# becomes 44, so outliers change their sign. A guess is that torch.compile does the same, or that it saturates all small
# integers. In torch 2.13.0 inductor's vector code for a CPU saturates int8 alone: 127 and -128, and NaN becomes -128
# where eager has 0; infinity becomes -128 as well, not 127. uint8 wraps as in eager: 300 is 44. A tensor of one element
# is not vectorised, and wraps. So compiling hides a missing clamp, and a model that was calibrated compiled fails in
# eager. Seen on 2026-11-28, Linux x86-64, Python 3.11, g++ 12.2, AVX-512 and AVX2.
#
# Needs g++, python3 (3.10 to 3.13) with venv, and a package index, on a processor with AVX2. Fails if torch behaves
# otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/casts.py" <<'PY'
import math
import sys

import torch

torch.set_num_threads(1)
NUMBERS = (128.0, 300.0, -129.0, math.inf, math.nan)
WRAPPED = {torch.int8: [-128, 44, 127, 0, 0], torch.uint8: [128, 44, 127, 0, 0]}
SATURATED = [127, 127, -128, -128, -128]
wrong = False
for dtype in (torch.int8, torch.uint8):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x.to(dtype), dynamic=False)
    for count in (1, 100):
        tensors = [torch.full((count,), number) for number in NUMBERS]
        eager = [x.to(dtype)[0].item() for x in tensors]
        results = [compiled(x) for x in tensors]
        first, last = ([result[at].item() for result in results] for at in (0, -1))
        print(f"{dtype}, {count}: eager {eager}, compiled {first}")
        expected = SATURATED if dtype == torch.int8 and count == 100 else WRAPPED[dtype]
        wrong |= eager != WRAPPED[dtype] or first != expected or last != expected
if wrong:
    sys.exit("changed: described as saturating int8 alone")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/casts.py"
echo "as described"
