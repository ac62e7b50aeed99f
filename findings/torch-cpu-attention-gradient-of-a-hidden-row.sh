#!/usr/bin/env bash
# On a CPU the gradient of attention is n times too large in a row whose n keys are all masked by -1e9.
#
# Masks are often added as a large negative number (-1e9, or the lowest of the dtype) instead of -inf, so that a row
# that sees nothing is a mean of the values and not NaN. In torch 2.13.0 scaled_dot_product_attention gives that mean,
# and its gradient should be that of a mean, 1 / n for each value. It is 1: the backward of the CPU's flash kernel has
# only the logsumexp of the row, -1e9 + log n, in which log n is lost to rounding. Gradients of queries and keys are n
# times too large as well, in float64 too (with the lowest number of it), so gradcheck fails. The math backend is right,
# and with -inf or a boolean mask both backends give zeros. A row that sees one key or more is right. Seen on
# 2026-11-28, Linux x86-64, Python 3.11, with and without AVX-512.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/gradient.py" <<'PY'
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
torch.set_num_threads(1)


def ratio(keys, hidden, dtype=torch.float32):
    """Gradients of q, k and v through row 1, which sees no key: the default's over those of the math backend."""
    q, k, v = (torch.randn(1, 1, n, 16, dtype=dtype, requires_grad=True) for n in (2, keys, keys))
    mask = torch.zeros(2, keys, dtype=dtype)
    mask[1] = hidden
    gradients = []
    for backends in (list(SDPBackend.__members__.values()), [SDPBackend.MATH]):
        with sdpa_kernel(backends):
            row = scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0, 1]
        torch.testing.assert_close(row, v[0, 0].mean(0) if hidden > -torch.inf else torch.zeros_like(row))
        gradients.append(torch.autograd.grad(row.sum(), (q, k, v)))
    if hidden == -torch.inf:
        return [a.abs().max().item() + b.abs().max().item() for a, b in zip(*gradients)]
    return [round((a.norm() / b.norm()).item(), 3) for a, b in zip(*gradients)]


for keys in (4, 64, 1000):
    by_number, by_lowest = ratio(keys, -1e9), ratio(keys, torch.finfo(torch.float64).min, torch.float64)
    print(f"torch {torch.__version__}, {keys} keys: times the right gradient of q, k, v: {by_number}, in float64 {by_lowest}")
    if any(abs(times - keys) > keys / 1000 for times in by_number + by_lowest):
        sys.exit(f"changed: described is {keys} times")
    if ratio(keys, -torch.inf) != [0, 0, 0]:
        sys.exit("changed: described are zeros with -inf")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "torch==2.13.0" "numpy==2.2.6"
"$folder/venv/bin/python" "$folder/gradient.py"
ATEN_CPU_CAPABILITY=default "$folder/venv/bin/python" "$folder/gradient.py"
echo "as described"
