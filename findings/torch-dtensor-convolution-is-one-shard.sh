#!/usr/bin/env bash
# A convolution of a DTensor that is sharded in height gives half of the picture, and calls it complete.
#
# DTensor promises the result of one device, or an error: pooling, interpolate and pad of a picture that is sharded in
# height are right (they gather), reflection padding raises. A guess is that a convolution exchanges the rows at the
# seams, or raises. In torch 2.13.0 conv1d, conv2d, conv3d and conv_transpose2d convolve each process's own shard, zeros
# at the seam, and mark the result Replicate: the shape of the DTensor is that of one shard, full_tensor() returns it
# without any communication, and each process has other numbers under one name. So it is for every dimension of space or
# time, for kernels of size 1 and for patches too, where no seam exists; and for a weight that is sharded in its output
# channels (tensor parallelism), which gives half of the channels. Sharded in the batch it is right, in the input
# channels it raises. Seen on 2026-11-28, Linux x86-64, Python 3.11, two processes on gloo.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/convolutions.py" <<'PY'
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F

warnings.filterwarnings("ignore")
RIGHT, ONE_SHARD = "right", "one shard, as Replicate"


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    wrong = False

    def check(name, expected, function, x, weight=None, x_at=None, weight_at=None):
        nonlocal wrong
        arguments = [(x, x_at)] + ([] if weight is None else [(weight, weight_at)])
        shards = [distribute_tensor(t, mesh, [Replicate() if at is None else Shard(at)]) for t, at in arguments]
        exact, result = function(*(t for t, _ in arguments)), function(*shards)
        full = result.full_tensor()
        if full.shape == exact.shape and torch.allclose(full, exact, atol=1e-4):
            kind = RIGHT
        else:
            same = torch.equal(full, function(*(s.to_local() for s in shards)))
            kind = ONE_SHARD if same and result.placements == (Replicate(),) else "wrong otherwise"
        if rank == 0:
            print(f"{name}: {list(full.shape)} of {list(exact.shape)}, {kind}")
        wrong |= kind != expected

    torch.manual_seed(0)
    video, picture, sound = torch.randn(2, 4, 8, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8)
    for at, axis in ((2, "time"), (3, "height"), (4, "width")):
        check(f"conv3d, video sharded in {axis}", ONE_SHARD, lambda x, w: F.conv3d(x, w, padding=1), video,
              torch.randn(6, 4, 3, 3, 3), at)
    check("conv3d of patches (1, 2, 2), height", ONE_SHARD, lambda x, w: F.conv3d(x, w, stride=(1, 2, 2)), video,
          torch.randn(6, 4, 1, 2, 2), 3)
    check("conv2d, height", ONE_SHARD, lambda x, w: F.conv2d(x, w, padding=1), picture, torch.randn(6, 4, 3, 3), 2)
    check("conv2d of size 1, height", ONE_SHARD, F.conv2d, picture, torch.randn(6, 4, 1, 1), 2)
    check("conv1d, time", ONE_SHARD, lambda x, w: F.conv1d(x, w, padding=1), sound, torch.randn(6, 4, 3), 2)
    check("conv_transpose2d, height", ONE_SHARD, lambda x, w: F.conv_transpose2d(x, w, stride=2), picture,
          torch.randn(4, 6, 2, 2), 2)
    check("conv2d, weight sharded in output channels", ONE_SHARD, lambda x, w: F.conv2d(x, w, padding=1), picture,
          torch.randn(6, 4, 3, 3), None, 0)
    check("conv2d, batch", RIGHT, lambda x, w: F.conv2d(x, w, padding=1), picture, torch.randn(6, 4, 3, 3), 0)
    check("max_pool2d, height", RIGHT, lambda x: F.max_pool2d(x, 3, 1, 1), picture, x_at=2)
    check("interpolate, height", RIGHT, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), picture, x_at=2)
    check("pad, height", RIGHT, lambda x: F.pad(x, (1, 1, 1, 1)), picture, x_at=2)
    dist.destroy_process_group()
    if wrong:
        sys.exit("changed: described as one shard for a convolution")


if __name__ == "__main__":
    mp.spawn(process, (sys.argv[1],), 2)
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo "$folder/venv/bin/python" "$folder/convolutions.py" "$folder"
echo "as described"
