#!/usr/bin/env bash
# With one seed torch.randn_like gives a channels_last tensor other noise than a contiguous one of the same shape.
#
# channels_last is said to change the speed and not the result, and a guess is that a seed and a shape decide the noise.
# In torch 2.13.0 randn_like, normal_ and dropout fill a tensor in the order of its memory: of the noise for a video
# latent that is channels_last_3d no number but chance ones is where it is for a contiguous one, so a model that is
# switched to channels_last gives another video for the same seed. rand_like gives the same numbers in other places;
# randn_like not even that, since a contiguous tensor takes another code path. torch.randn(x.shape), and bernoulli with
# probabilities, do not depend on it. Permuted views keep their strides, and have it too. Seen on 2026-11-28, Linux
# x86-64, Python 3.11, on a CPU.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/noise.py" <<'PY'
import sys

import torch
from torch.nn.functional import dropout

torch.set_num_threads(1)
EXPECTED = {  # (equal, equal once both are sorted)
    "randn_like": (False, False),
    "rand_like": (False, True),
    "normal_": (False, False),
    "dropout of ones": (False, None),
    "randn(x.shape)": (True, True),
    "bernoulli(x / 2)": (True, True),
}
seen = {}
x = torch.ones(1, 16, 3, 8, 8)
for name, draw in {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "normal_": lambda x: x.clone().normal_(),
    "dropout of ones": dropout,
    "randn(x.shape)": lambda x: torch.randn(x.shape),
    "bernoulli(x / 2)": lambda x: torch.bernoulli(x / 2),
}.items():
    results = []
    for layout in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        torch.manual_seed(0)
        results.append(draw(layout))
    ordered = [result.flatten().sort().values for result in results]
    seen[name] = torch.equal(*results), None if name.startswith("dropout") else torch.equal(*ordered)
    alike = torch.corrcoef(torch.stack([result.flatten() for result in results]))[0, 1].item()
    print(f"{name}: equal {seen[name][0]}, the same numbers {seen[name][1]}, correlation {alike:.2f}")
if seen != EXPECTED:
    sys.exit(f"changed: described as {EXPECTED}")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/noise.py"
echo "as described"
