#!/usr/bin/env bash
# model.to(torch.bfloat16) and model.bfloat16() differ: the first makes a complex table of RoPE real, a table of cosines.
#
# Rotary embeddings are often kept as complex numbers in a buffer (torch.polar). bfloat16(), half(), float() and double()
# cast floating-point tensors alone, and a guess is that to(dtype) does the same. In torch 2.13.0 it casts complex ones
# too, to a real dtype, which drops the sines: the table is no rotation any more, and multiplying by it still works.
# A first cast warns that the imaginary part is discarded, later ones in the process do not. to(torch.float64), often
# meant to make a reference more exact, does it as well. Seen on 2026-11-28, Linux x86-64, Python 3.11, on a CPU.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/buffers.py" <<'PY'
import sys
import warnings

import torch
from torch import nn


class Rope(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        angles = torch.arange(3.0)[:, None] / torch.tensor([1.0, 10.0])
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x):  # [T, 4]
        pairs = torch.view_as_complex((x * self.gain).float().view(-1, 2, 2))
        return torch.view_as_real(pairs * self.rotations).flatten(1)


x = torch.tensor([[1.0, 0.0, 0.0, 2.0]]).expand(3, 4)
casts = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(float64)": lambda m: m.to(torch.float64),
}
seen = {}
for name, cast in casts.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = cast(Rope())
    length = model(x)[2].norm().item()
    seen[name] = (str(model.rotations.dtype).removeprefix("torch."), round(length, 2), len(caught))
    print(f"torch {torch.__version__}, {name}: table {seen[name][0]}, a vector of length 2.24 comes out with {length:.2f},"
          f" {len(caught)} warnings")
kept = ("complex64", 2.24, 0)
if seen["bfloat16()"] != kept or seen["half()"] != kept or seen["double()"] != kept:
    sys.exit("changed: bfloat16(), half() and double() are described to leave the table")
if [dtype for dtype, _, _ in seen.values()][3:] != ["bfloat16", "float16", "float64"]:
    sys.exit("changed: to(dtype) is described to make the table real")
if not all(length < 2.1 for _, length, _ in list(seen.values())[3:]):
    sys.exit("changed: the real table is described to shorten vectors")
if [warned for _, _, warned in seen.values()][3:] != [1, 0, 0]:
    sys.exit("changed: only the first cast is described to warn")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "torch==2.13.0" "numpy==2.2.6"
"$folder/venv/bin/python" "$folder/buffers.py"
echo "as described"
