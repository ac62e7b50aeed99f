#!/usr/bin/env bash
# gloo: all_reduce(MAX) of a NaN is NaN if process 0 has it, and the largest of the numbers if another one has.
#
# torch's max, amax and maximum keep a NaN, and a guess is that a maximum over processes does as well, or never does.
# In torch 2.13.0 gloo compares with < : a NaN of rank 0 stays, and one of any other rank is dropped, in MAX and MIN; SUM
# keeps all. The processes agree with each other, so nothing looks wrong: a loss or a gradient norm that is NaN on rank 1
# comes out as a finite number everywhere, and a test for NaN after the reduction works on rank 0's data alone. max()
# and min() of a sharded DTensor reduce that way: NaN in the first shard is seen, in the last one not, where
# the same max of a plain tensor is NaN. Reduce isnan() beside it. Seen on 2026-11-28, Linux x86-64, Python 3.11,
# two and three processes, on a CPU.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/nan.py" <<'PY'
import math
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

OPS = {"MAX": dist.ReduceOp.MAX, "MIN": dist.ReduceOp.MIN, "SUM": dist.ReduceOp.SUM}


def main(rank, store, processes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    wrong = False
    for owner in range(processes):
        seen = {}
        for name, op in OPS.items():
            x = torch.tensor([math.nan if rank == owner else 1.0 + rank])
            dist.all_reduce(x, op)
            seen[name] = x.item()
        numbers = torch.arange(1.0, 2 * processes + 1)
        numbers[2 * owner] = math.nan  # each has two
        seen["DTensor.max"] = distribute_tensor(numbers, mesh, [Shard(0)]).max().full_tensor().item()
        seen["Tensor.max"] = numbers.max().item()
        if rank == 0:
            print(f"{processes} processes, NaN on rank {owner}: {seen}", flush=True)
        kept = {name for name, value in seen.items() if math.isnan(value)}
        wrong |= kept != ({"SUM", "Tensor.max"} if owner else set(seen))
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit("changed: described as kept from rank 0 alone")


if __name__ == "__main__":
    for processes in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(main, (f"{folder}/store", processes), nprocs=processes)
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/nan.py"
echo "as described"
