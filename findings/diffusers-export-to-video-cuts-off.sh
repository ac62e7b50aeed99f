#!/usr/bin/env bash
# diffusers: a video with output_type="np", the default, is darker in its file than the same one with output_type="pil".
#
# Pipelines return numbers from 0 to 1, and export_to_video makes bytes of them. A guess is that it rounds, as the path
# through PIL does. diffusers 0.42.1 cuts off: on average every number loses half a level of 255, and pixels that came
# from bytes (a first frame that is held, a clip that is continued) lose a whole one at more than a third of the 256 levels
# in float32 and bfloat16, at half of them in float16. So a clip that goes through a pipeline again and again gets darker.
# Through output_type="pil" all levels come back. Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0 (CPU); it
# is what export_to_video gives to its encoder that is looked at, not what a codec makes of it.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if the version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/levels.py" <<'PY'
import sys

import imageio
import numpy as np
import torch
from diffusers.utils import export_to_video
from diffusers.video_processor import VideoProcessor


class Seen(list):
    """Takes what export_to_video writes."""

    def __init__(self, *_, **__):
        super().__init__()
        written.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    append_data = list.append


written = []
imageio.get_writer = Seen
levels = np.arange(256)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    decoded = (levels / 255 * 2 - 1).reshape(1, 1, 1, 16, 16).repeat(3, 1)  # as a VAE gives it, from -1 to 1
    for kind in ("np", "pil"):
        video = VideoProcessor().postprocess_video(torch.from_numpy(decoded).to(dtype), output_type=kind)[0]
        export_to_video(video, "unused.mp4", fps=16)
        off = written[-1][0][..., 0].reshape(256).astype(int) - levels
        print(f"{dtype}, {kind}: {(off != 0).sum()} of 256 levels changed, by {off.mean():.2f} on average")
        lost = 0 if kind == "pil" else 50
        if (off > 0).any() or (off < -1).any() or not lost <= (off != 0).sum() <= 3 * lost:
            sys.exit("changed: described as exact through PIL, and a level darker at 50 to 150 levels without")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    "torch==2.13.0" "numpy==2.2.6" "diffusers==0.42.1" "imageio==2.38.1" "imageio-ffmpeg"
"$folder/venv/bin/python" "$folder/levels.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
echo "as described"
