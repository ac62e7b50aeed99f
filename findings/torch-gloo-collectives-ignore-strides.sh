#!/usr/bin/env bash
# gloo broadcasts and adds tensors in the order of their memory: one process's channels_last scrambles the others'.
#
# A guess is that broadcast and all_reduce of tensors of one shape give each element what belongs there, or refuse. In
# torch 2.13.0 they accept any tensor without gaps and look at no stride: a weight [1, 3, 2, 4] that is channels_last (or
# transposed) on rank 0 arrives on rank 1, contiguous, with its elements in other places; all_reduce adds elements that do
# not belong together, on both. Shapes agree, so nothing fails. all_gather is right, into either layout, and send and recv
# refuse what is not contiguous. It is enough that one process called model.to(memory_format=torch.channels_last), or has
# its weight from `.t()`. Seen on 2026-11-28, Linux x86-64, Python 3.11, two processes with gloo, on a CPU.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/strides.py" <<'PY'
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

x = torch.arange(24.0).reshape(1, 3, 2, 4)
EXPECTED = {"broadcast": [True, False], "broadcast, t()": [True, False], "all_reduce": [False, False],
            "all_reduce, both channels_last": [True, True], "all_gather": [True, True]}


def last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def run(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    right = {}
    sent = last(x) if rank == 0 else torch.zeros_like(x)
    dist.broadcast(sent, 0)
    right["broadcast"] = torch.equal(sent, x)
    sent = x[0, 0].clone().t() if rank == 0 else torch.zeros(4, 2)
    dist.broadcast(sent, 0)
    right["broadcast, t()"] = torch.equal(sent, x[0, 0].t())
    added = last(x) if rank == 0 else x.clone()
    dist.all_reduce(added)
    right["all_reduce"] = torch.equal(added, 2 * x)
    added = last(x)
    dist.all_reduce(added)
    right["all_reduce, both channels_last"] = torch.equal(added, 2 * x)
    gathered = [last(torch.zeros_like(x)), torch.zeros_like(x)]
    dist.all_gather(gathered, last(x) if rank == 0 else x)
    right["all_gather"] = all(torch.equal(one, x) for one in gathered)
    both = [None, None]
    dist.all_gather_object(both, right)
    if rank == 0:
        results = {name: [one[name] for one in both] for name in right}
        for name, values in results.items():
            print(f"{name}: right on rank 0: {values[0]}, on rank 1: {values[1]}")
        if results != EXPECTED:
            sys.exit("changed: other results than described")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder,), 2)
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/strides.py"
echo "as described"
