#!/usr/bin/env bash
# The gradient of mse_loss of a DTensor is too large by the number of processes; that of (x - y).square().mean() is right.
#
# A DTensor behaves as the whole tensor, and a guess is that a loss of torch.nn.functional does too. In torch 2.13.0 the
# value of mse_loss of a tensor that is sharded evenly is right, and its gradient is divided by the number of elements of
# the local shard: twice too large with two processes, three times with three, without a warning. smooth_l1_loss and
# huber_loss as well; l1_loss, binary_cross_entropy_with_logits and the same formula in plain arithmetic are right. Adam
# hides the factor, clipping and other losses beside it do not. Of shards of different sizes (5 elements on 2
# processes) the value is wrong too: the mean of the shards' means, 12.58 instead of 11, where mean() takes the sizes
# into account and cross_entropy refuses. Seen on 2026-11-28, Linux x86-64, Python 3.11, gloo.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/losses.py" <<'PY'
import math
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

LOSSES = {
    "mse_loss": F.mse_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "l1_loss": F.l1_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "square().mean()": lambda x, y: (x - y).square().mean(),
}


def ratios(mesh, numbers, loss):
    """Value and last element of the gradient over those of a plain tensor."""
    full = torch.arange(1.0, numbers + 1)
    plain, sharded = full.clone().requires_grad_(), distribute_tensor(full, mesh, [Shard(0)]).requires_grad_()
    results = []
    for x in (plain, sharded):
        value = loss(x, torch.zeros_like(x))
        (gradient,) = torch.autograd.grad(value, x)
        results += [value, gradient]
    value, gradient = (tensor.full_tensor() for tensor in results[2:])
    return (value / results[0]).item(), (gradient / results[1])[-1].item()


def main(rank, store, processes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    wrong = False
    for name, loss in LOSSES.items():
        value, gradient = ratios(mesh, 6, loss)
        if rank == 0:
            print(f"{processes} processes, {name}: value times {value:.3f}, gradient times {gradient:.3f}", flush=True)
        factor = processes if name in ("mse_loss", "smooth_l1_loss", "huber_loss") else 1
        wrong |= not (math.isclose(value, 1, rel_tol=1e-5) and math.isclose(gradient, factor, rel_tol=1e-5))
    if processes == 2:
        for name, expected in (("mse_loss", (14 / 3 + 20.5) / 2 / 11), ("square().mean()", 1), ("l1_loss", 1)):
            value, _ = ratios(mesh, 5, LOSSES[name])
            if rank == 0:
                print(f"shards of 3 and 2, {name}: value times {value:.3f}", flush=True)
            wrong |= not math.isclose(value, expected, rel_tol=1e-5)
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit("changed: described as too large by the number of processes, and uneven shards as a mean of means")


if __name__ == "__main__":
    for processes in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(main, (f"{folder}/store", processes), nprocs=processes)
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/losses.py"
echo "as described"
