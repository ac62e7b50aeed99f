#!/usr/bin/env bash
# torch: bicubic enlargement with antialias=True is another filter than without it, though there is nothing to alias.
#
# antialias=True widens the filter when a picture becomes smaller, and a guess is that it changes nothing when one becomes
# larger, as it does for bilinear. In torch 2.13.0 interpolate(mode="bicubic") is Keys' cubic with a = -0.75 and, with
# antialias=True, with a = -0.5: at an edge they differ by 3.5% of it, and the overshoot is 10.5% and 7%. There are two
# camps: OpenCV 5.0 resizes as torch does without, Pillow 13 and JAX's "cubic" as torch does with it, all within
# rounding. So a frame that was enlarged by one library is not what another one, or the same one with the flag that
# "matches Pillow", makes of it, and a decoder's or a discriminator's input shifts. Bilinear agrees in all. Seen on
# 2026-11-28, Linux x86-64, Python 3.11, on a CPU.
#
# Needs python3 (3.11 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/edge.py" <<'PY'
import sys

import cv2
import jax
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

torch.set_num_threads(1)
edge = np.zeros((4, 16), np.float32)
edge[:, 8:] = 1
picture = torch.from_numpy(edge)[None, None]
filters = {
    "bilinear": (Image.Resampling.BILINEAR, cv2.INTER_LINEAR, "linear"),
    "bicubic": (Image.Resampling.BICUBIC, cv2.INTER_CUBIC, "cubic"),
}
wrong = False
for mode, (pillow, opencv, of_jax) in filters.items():
    plain, antialias = (interpolate(picture, scale_factor=2, mode=mode, antialias=a)[0, 0].numpy() for a in (False, True))
    others = {
        "Pillow": np.asarray(Image.fromarray(edge).resize((32, 8), pillow)),
        "OpenCV": cv2.resize(edge, (32, 8), interpolation=opencv),
        "JAX": np.asarray(jax.image.resize(edge, (8, 32), of_jax)),
    }
    apart = abs(plain - antialias).max()
    print(f"{mode}: with and without antialias {apart:.4f} apart, at most {plain.max():.4f} and {antialias.max():.4f}")
    wrong |= apart > 1e-6 if mode == "bilinear" else abs(apart - 0.0352) > 0.001
    for name, result in others.items():
        without, with_it = abs(result - plain).max(), abs(result - antialias).max()
        print(f"  {name}: {without:.4f} from torch without, {with_it:.4f} from torch with it")
        wrong |= (without if mode == "bilinear" or name == "OpenCV" else with_it) > 1e-5
if wrong:
    sys.exit("changed: described as two cubics, and one bilinear")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6 \
    pillow==13.0.0 opencv-python-headless==5.0.0.93 jax==0.10.2
"$folder/venv/bin/python" "$folder/edge.py"
echo "as described"
