"""HiAR in a script for diffusers' WanPipeline: python examples/diffusers_pipeline.py FOLDER "A cat surfs."

FOLDER is what `HiARPipeline.from_pretrained(..., checkpoint="hiar.pt").save_pretrained(FOLDER)` wrote. Two lines are
changed; what stood there is behind them. You see cat.gif grow block by block, where it came in one piece at the end.
Takes a GPU and published weights.
"""

import argparse

import torch
from diffusers.utils import export_to_gif

from hiar_model.integrations.diffusers import HiARPipeline as WanPipeline  # from diffusers import WanPipeline


def main(folder: str, prompt: str, device: str = "cuda", num_frames: int = 81, **size: int) -> None:
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
    video = []
    for part in pipe.stream(prompt, num_frames=num_frames, output_type="pil", **size):  # [pipe(...).frames]
        video.extend(part[0])
        export_to_gif(video, "cat.gif", fps=16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("prompt")
    main(**vars(parser.parse_args()))
