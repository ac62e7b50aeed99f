#!/usr/bin/env bash
# .item() and bool() of a DTensor give each process the number of its own shard: 6 and 22, where sum() is 28.
#
# A DTensor behaves as the whole tensor, and a guess is that sum().item() is the sum. In torch 2.13.0 sum, mean, max, norm
# and any of a sharded tensor are partial: each process has its share, to be added up when needed. Arithmetic does
# that (sum() + 1 is 29 on both), clip_grad_norm_ also gives the whole norm; item(), bool() and float() do not, and read
# the local share without a communication or a warning. mean().item() is 1.5 and 5.5. `if p.isnan().any():` is true only
# on the process whose shard has the NaN, so processes take different branches; median, argmax and torch.equal
# are right. full_tensor() before item() helps. Seen on 2026-11-28, Linux x86-64, Python 3.11, two processes with gloo.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/shards.py" <<'PY'
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

READ = {
    "sum().item()": (lambda x: x.sum().item(), [6.0, 22.0]),
    "float(sum())": (lambda x: float(x.sum()), [6.0, 22.0]),
    "mean().item()": (lambda x: x.mean().item(), [1.5, 5.5]),
    "max().item()": (lambda x: x.max().item(), [3.0, 7.0]),
    "bool((x > 6).any())": (lambda x: bool((x > 6).any()), [False, True]),
    "(sum() + 1).item()": (lambda x: (x.sum() + 1).item(), [29.0, 29.0]),
    "sum().full_tensor().item()": (lambda x: x.sum().full_tensor().item(), [28.0, 28.0]),
    "median().item()": (lambda x: x.median().item(), [3.0, 3.0]),
    "argmax().item()": (lambda x: x.argmax().item(), [7, 7]),
}


def run(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    own = {name: read(x) for name, (read, _) in READ.items()}
    both = [None, None]
    dist.all_gather_object(both, own)
    if rank == 0:
        results = {name: [one[name] for one in both] for name in READ}
        for name, values in results.items():
            print(f"{name:28}", *values)
        if results != {name: expected for name, (_, expected) in READ.items()}:
            sys.exit("changed: other numbers than described")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder,), 2)
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/shards.py"
echo "as described"
