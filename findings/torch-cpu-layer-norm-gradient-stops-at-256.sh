#!/usr/bin/env bash
# On a CPU the gradients of layer_norm's weight and bias stop growing at 256 rows if the input is bfloat16.
#
# They are sums over all rows, and a guess is that these are taken in float32, as in a matrix product or sum(), or at
# least where the weights are float32. In torch 2.13.0 the backward keeps them in the input's dtype: with a gradient of
# 1 for every row, that of the bias is 256 for 1,000 rows and for 32,760 (the tokens of a short video), since 256 + 1 is
# 256 in bfloat16; float16 stops at 2,048. Each thread has its own sum, so the result grows with the number of threads.
# float32 weights and autocast do not help: both get 256, in float32. rms_norm and group_norm are right, and so is a norm
# without weights whose result is multiplied and added to. Embeddings have the same limit. No warning. Seen on
# 2026-11-28, Linux x86-64, Python 3.11, with and without AVX2 and AVX-512.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/rows.py" <<'PY'
import sys

import torch
from torch.nn.functional import embedding, group_norm, layer_norm, rms_norm


def bias(norm, rows, dtype, threads=1, autocast=False):
    """Gradient of the first number of the bias, where every row has the gradient 1; weights in float32."""
    torch.set_num_threads(threads)
    x, w, b = torch.randn(rows, 64, dtype=dtype), torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = norm(x, w, b)
    out.backward(torch.ones_like(out))
    return b.grad[0].item()


def layer(x, w, b):
    return layer_norm(x, (64,), w, b)


def apart(x, w, b):
    return layer_norm(x, (64,)) * w + b


def groups(x, w, b):
    return group_norm(x, 8, w.to(x.dtype), b.to(x.dtype))


torch.manual_seed(0)
half, float16 = torch.bfloat16, torch.float16
seen = {
    "256 rows": bias(layer, 256, half),
    "1000 rows": bias(layer, 1000, half),
    "32760 rows": bias(layer, 32760, half),
    "32760 rows, two threads": bias(layer, 32760, half, threads=2),
    "32760 rows, autocast": bias(layer, 32760, half, autocast=True),
    "32760 rows, float16": bias(layer, 32760, float16),
    "32760 rows, float32": bias(layer, 32760, torch.float32),
    "32760 rows, weight and bias apart": bias(apart, 32760, half),
    "1000 rows, group_norm": bias(groups, 1000, half),
}
gain = torch.zeros(64, dtype=half, requires_grad=True)
rms_norm(torch.ones(1000, 64, dtype=half), (64,), gain).sum().backward()
seen["1000 rows, rms_norm"] = gain.grad[0].item()
table = torch.zeros(4, 2, dtype=half, requires_grad=True)
embedding(torch.zeros(1000, dtype=torch.long), table).sum().backward()
seen["1000 times one row of an embedding"] = table.grad[0, 0].item()
expected = [256, 256, 256, 512, 256, 2048, 32760, 32760, 1000, 1000, 256]
for what, number in seen.items():
    print(f"{what}: {number:g}")
if list(seen.values()) != expected:
    sys.exit(f"changed: described as {expected}")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/rows.py"
echo "as described"
