#!/usr/bin/env bash
# FSDP2: weights that are written through model.parameters() after a forward are computed with, and are in no checkpoint.
#
# The parameters of a model under fully_shard are DTensors, each process's shard of them, and a guess is that they are
# that whenever no forward or backward runs. In torch 2.13.0 the outermost unit keeps its weights gathered after a
# forward, also under no_grad; until something shards them again (state_dict() does, or a backward), parameters() gives
# plain whole tensors. So what is copied into them (an average for sampling, an older checkpoint, a clamp) is used by
# every forward, then dropped: state_dict() has the old weights, and the next forward too. Inner units take the write. So
# half of an average may be applied. Without a forward before it all of it is kept; nothing warns. reshard_after_forward
# set to True for the outermost unit, or model.reshard() before the write, helps. One process is enough to see it. Seen on
# 2026-11-28, Linux x86-64, Python 3.11, on a CPU with gloo.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/writes.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(1, 4)


def network(forward_before: bool, reshard: bool = False, **options) -> nn.Module:
    """Two layers of ones, all of which are then written to be 2."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    fully_shard(model[1])
    fully_shard(model, **options)
    with torch.no_grad():
        if forward_before:
            model(x)
        if reshard:
            model.reshard()
        print("  before the write:", [type(p).__name__ for p in model.parameters()])
        for parameter in model.parameters():
            parameter.fill_(2)
    return model


@torch.no_grad()
def seen(model: nn.Module) -> list[float]:
    """The output, the two weights in state_dict(), the output after it."""
    before = model(x)[0, 0].item()
    weights = [weight.full_tensor()[0, 0].item() for weight in model.state_dict().values()]
    return [before, *weights, model(x)[0, 0].item()]


kept, lost = [64.0, 2.0, 2.0, 64.0], [64.0, 1.0, 2.0, 32.0]
for name, model, expected in (
    ("no forward before", network(False), kept),
    ("a forward before", network(True), lost),
    ("a forward before, reshard()", network(True, reshard=True), kept),
    ("a forward before, reshard_after_forward=True", network(True, reshard_after_forward=True), kept),
):
    results = seen(model)
    print(f"{name}: output {results[0]:g}, saved {results[1:3]}, then output {results[3]:g}")
    if results != expected:
        sys.exit(f"changed: described as {expected}")
dist.destroy_process_group()
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/writes.py"
echo "as described"
