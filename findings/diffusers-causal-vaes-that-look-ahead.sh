#!/usr/bin/env bash
# diffusers: only some causal video VAEs decode a clip's beginning alone as in the clip; CogVideoX gives 8 frames for 2.
#
# CogVideoX and HunyuanVideo have "causal" 3D VAEs like Wan: convolutions look at the past alone, so a guess is that the
# first n latent frames decode to the first 4n - 3 frames of the whole clip, and can be shown while the rest is made. In
# diffusers 0.42.1 that is so for Wan, and for Mochi and Cosmos (6n - 5 and 8n - 7 frames). HunyuanVideo has group norms
# over time: its first frame is another picture for each length. CogVideoX decodes two latent frames at a time, an odd
# one together with the first two, and its group norms see what is decoded together: an odd n of 3 or more agrees, 1 gives
# another picture, and an even n gives 4n frames in place of 4n - 3, the first one another too. Small networks of random
# weights. Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0, on a CPU.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if these versions behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/prefixes.py" <<'PY'
import sys

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)

torch.set_num_threads(1)
FOUR = (8, 8, 8, 8)
VAES = {
    "Wan": lambda: AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ),
    "Mochi": lambda: AutoencoderKLMochi(
        latent_channels=4, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ),
    "Cosmos": lambda: AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=FOUR, decode_block_out_channels=FOUR, attention_resolutions=(4,),
        resolution=32, num_layers=1,
    ),
    "HunyuanVideo": lambda: AutoencoderKLHunyuanVideo(
        block_out_channels=FOUR, latent_channels=4, layers_per_block=1, norm_num_groups=2
    ),
    "CogVideoX": lambda: AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    ),
}
LENGTHS = (1, 2, 3, 4)  # latent frames of seven
changed = False
for name, make in VAES.items():
    torch.manual_seed(0)
    vae, latents = make().eval(), torch.randn(1, 4, 7, 8, 8)
    beginnings = {}
    with torch.no_grad():
        clip = vae.decode(latents).sample
        for n in LENGTHS:
            start = vae.decode(latents[:, :, :n]).sample
            off = (start - clip[:, :, : start.shape[2]]).abs().max() / clip.abs().max()
            first = (start[:, :, 0] - clip[:, :, 0]).abs().max() / clip.abs().max()
            beginnings[n] = (start.shape[2], bool(off < 1e-4), bool(first < 1e-4))
    print(f"{name}: {clip.shape[2]} frames of 7")
    for n, (frames, same, first) in beginnings.items():
        print(f"  the first {n} alone: {frames} frames, {'as in the clip' if same else 'others than in the clip'}"
              f"{'' if same or first else ', the first one too'}")
    per = {"Wan": 4, "Mochi": 6, "Cosmos": 8, "HunyuanVideo": 4, "CogVideoX": 4}[name]
    for n, (frames, same, first) in beginnings.items():
        late = name == "CogVideoX" and n % 2 == 0
        right = name in ("Wan", "Mochi", "Cosmos") or (name == "CogVideoX" and n == 3)
        changed |= (frames, same, first) != (per * n if late else per * (n - 1) + 1, right, right)
if changed:
    sys.exit("changed: described as the same for Wan, Mochi, Cosmos, and for an odd number from CogVideoX")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 diffusers==0.42.1
"$folder/venv/bin/python" "$folder/prefixes.py"
echo "as described"
