"""The engine without prompts and pixels: a Rollout yields latents, and no order of its tasks changes them.

You see one line for each finished block, then how far the latents of two orders are apart: nothing, or rounding.
Takes a few seconds on one CPU core.
"""

import argparse
from dataclasses import replace

import torch

from hiar_model import Rollout, load_video_model


def main(num_latent_frames: int = 24) -> float:
    model = load_video_model("toy", "cpu")  # model.transformer is a HiARTransformer, trained or of your own
    embeds = model.encode_text("a large blue square moving up fast")  # [1, L, text_dim]
    latents = {}
    for order in ("stream", "step_first"):
        rollout = Rollout(
            model.transformer, embeds, replace(model.rollout, order=order),
            num_latent_frames=num_latent_frames, latent_size=model.latent_size[1:], seed=7,
        )  # fmt: skip
        blocks = []
        for block in rollout:
            print(f"{order}: block {block.block} after {rollout.forwards_done} forwards, {[*block.latents.shape]}")
            blocks.append(block.latents)
        latents[order] = torch.cat(blocks, dim=1)  # [1, F, C, H, W]
    difference = (latents["stream"] - latents["step_first"]).abs().max().item()
    print(f"largest difference between the two orders: {difference:.1e}")
    return difference


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
