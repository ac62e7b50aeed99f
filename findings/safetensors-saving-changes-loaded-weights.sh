#!/usr/bin/env bash
# safetensors 0.7.0: save_file over a file changes the weights of models that were loaded from it; 0.8.0 does not.
#
# A guess is that load_file reads a file into memory. For a CPU it maps it, in all versions, and pages that nobody has
# written to are the file's. save_file of 0.5.3, 0.6.2 and 0.7.0 writes into the same file, so a model (or an average, or
# a reference for a comparison) that was loaded with load_state_dict(load_file(path), assign=True), or uses the
# tensors as they are, has the new numbers from then on, in every process that holds it. After load_state_dict without
# assign nothing changes, for it copies. 0.8.0 puts a new file in the place of the old one, and loaded tensors stay
# as they were. Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0 (CPU).
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/save.py" <<'PY'
import sys

import torch
from safetensors import __version__
from safetensors.torch import load_file, save_file
from torch import nn


def model(value: float, **options) -> nn.Module:
    network = nn.Linear(64, 64, bias=False)
    network.load_state_dict({"weight": torch.full((64, 64), value)}, **options)
    return network


path = sys.argv[1]
save_file(model(1.0).state_dict(), path)
assigned, copied = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
assigned.load_state_dict(load_file(path), assign=True)
copied.load_state_dict(load_file(path))
save_file(model(2.0).state_dict(), path)
print(__version__, *(int(network.weight.mean().item()) for network in (assigned, copied)))
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6 packaging
for version in 0.5.3 0.6.2 0.7.0 0.8.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "safetensors==$version"
    read -r seen assigned copied < <("$folder/venv/bin/python" "$folder/save.py" "$folder/$version.safetensors")
    echo "safetensors $seen: loaded 1 and saved 2 over it: assigned $assigned, copied $copied"
    expected=2
    [ "$version" = 0.8.0 ] && expected=1
    if [ "$seen $assigned $copied" != "$version $expected 1" ]; then
        echo "changed: described as assigned $expected, copied 1" >&2
        exit 1
    fi
done
echo "as described"
