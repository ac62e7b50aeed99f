#!/usr/bin/env bash
# diffusers: from_pretrained(torch_dtype=torch.bfloat16) computes a model's tables in bfloat16, not only stores them so.
#
# A model of one's own (ModelMixin) computes a table of rotations or of positions in __init__, in a buffer that is not
# saved. A guess is that from_pretrained(folder, torch_dtype=torch.bfloat16) gives what from_pretrained(folder) and
# .to(torch.bfloat16) give. In diffusers 0.42.1 torch's default dtype is bfloat16 while __init__ runs, and so is all
# that comes of arange(64) / 64, linspace or torch.tensor(0.1): angles are rounded before their cosine is taken,
# which is off by 0.08 at frame 100 and by more than 1 at frame 1000 (0.002 when the finished table is cast). A later
# .float() does not bring it back, and the same model built from its class is right, so a test of it passes. A table
# that is computed with dtype=torch.float32 is right, and stays float32. Seen on 2026-11-28, Linux x86-64, Python 3.11,
# torch 2.13.0 (CPU).
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if the version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/tables.py" <<'PY'
import sys

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

torch.set_num_threads(1)
FRAMES = [1, 10, 100, 1000]


class Rotations(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 64, frames: int = 1024, dtype: str | None = None):
        super().__init__()
        dtype = getattr(torch, dtype) if dtype else None
        frequencies = 10_000 ** -(torch.arange(0, width, 2, dtype=dtype) / width)
        angles = torch.arange(frames, dtype=dtype)[:, None] * frequencies
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.project = nn.Linear(4, 4)


wrong = False
for dtype in (None, "float32"):
    path = f"{sys.argv[1]}/{dtype}"
    model = Rotations(dtype=dtype)
    model.save_pretrained(path)
    loaded = Rotations.from_pretrained(path, torch_dtype=torch.bfloat16)
    cast = Rotations.from_pretrained(path).to(torch.bfloat16)
    for name, other in (("loaded in bfloat16", loaded), ("loaded, then cast", cast)):
        off = (other.cosines.float() - model.cosines).abs().amax(1)[FRAMES]
        print(f"table of dtype {dtype}, {name}: frames {FRAMES} off by", *(f"{number:.4f}" for number in off))
        broken = dtype is None and other is loaded
        wrong |= (off[2] > 0.03).item() != broken or (off[3] > 0.5).item() != broken
    wrong |= loaded.cosines.dtype != (torch.float32 if dtype else torch.bfloat16)
if wrong:
    sys.exit("changed: described as computed in bfloat16")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 diffusers==0.42.1 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/tables.py" "$folder"
echo "as described"
