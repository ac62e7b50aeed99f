#!/usr/bin/env bash
# On a CPU torch.compile turns expm1(x) into exp(x) - 1: it is 0 for 1e-9, and 0.7% off for 3e-6.
#
# expm1, atanh and erf exist for small numbers, and a guess is that compiled code may be off in its last bits. In torch
# 2.13.0 inductor writes vector code for a CPU in which expm1 is exp() - 1, so everything below 6e-8 becomes 0, also
# in float64 (below 1.1e-16); F.elu, celu and selu of small negative numbers with it. erf and atanh lose them in the same
# manner. Eager is right to the last bits, and so is compiled code for one number, which is not vectorised. Where expm1 of
# a step size is a factor (exponential integrators such as UniPC's), a fine schedule loses its steps. log1p is right.
# Seen on 2026-11-28, Linux x86-64, Python 3.11, g++ 12.2, AVX-512.
#
# Needs g++, python3 (3.10 to 3.13) with venv, and a package index, on a processor with AVX2. Fails if torch behaves
# otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/small.py" <<'PY'
import sys

import torch
from torch.nn.functional import elu

torch.set_num_threads(1)


def error(function, x, numbers, dtype):
    """Largest error of eager and of compiled code, relative to float64."""
    torch.compiler.reset()
    values = torch.full((numbers,), x, dtype=dtype)
    exact = torch.log1p(values.double()) if function is log1p else None
    if exact is None:  # for numbers so small: x + x^2 / 2 or x alone, erf 2 / sqrt(pi) x
        slope = 1.1283791670955126 if function is erf else 1
        exact = slope * values.double() + (values.double() ** 2 / 2 if function in (expm1, elus) else 0)
    results = function(values), torch.compile(function)(values)
    return [((result.double() - exact) / exact).abs().max().item() for result in results]


def expm1(x):
    return torch.expm1(x)


def atanh(x):
    return torch.atanh(x)


def erf(x):
    return torch.erf(x)


def elus(x):
    return elu(x)


def log1p(x):
    return torch.log1p(x)


single, double = torch.float32, torch.float64
wrong = False
for function, x, numbers, dtype, lost in (
    (expm1, 1e-9, 1000, single, True),
    (expm1, 3e-6, 1000, single, True),
    (expm1, 1e-17, 1000, double, True),
    (expm1, 1e-9, 1, single, False),
    (elus, -1e-9, 1000, single, True),
    (atanh, 1e-9, 1000, single, True),
    (erf, 1e-9, 1000, single, True),
    (log1p, 1e-9, 1000, single, False),
):
    eager, compiled = error(function, x, numbers, dtype)
    print(f"{function.__name__}({x}), {numbers} of {dtype}: eager off by {eager:.0e} of it, compiled by {compiled:.0e}")
    wrong |= eager > 1e-6 or (compiled > 1e-3) != lost
if wrong:
    sys.exit("changed: described as lost in vector code")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/small.py"
echo "as described"
