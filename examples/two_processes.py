"""One video by two processes, each with half of the denoising steps: a pipeline.

    torchrun --nproc-per-node 2 examples/two_processes.py

You see the blocks as the last process finishes them, and whether they equal, bit for bit, those of one process. Takes
some ten seconds on two CPU cores, most of them to start; `hiar generate --nproc 2` does the same with a video.
"""

import argparse
from dataclasses import replace

import torch

from hiar_model import ExecutionConfig, Rollout, load_video_model
from hiar_model.distributed import make_mesh
from hiar_model.distributed.pipeline import init_distributed


def main(num_latent_frames: int = 48) -> None:
    processes = init_distributed("cpu")  # "cuda" for NCCL and a GPU for each process
    model = load_video_model("toy", "cpu")
    embeds = model.encode_text("a small yellow triangle moving left")
    config = replace(model.rollout, order="stream")
    size = {"num_latent_frames": num_latent_frames, "latent_size": model.latent_size[1:]}
    shared = Rollout(model.transformer, embeds, config, ExecutionConfig(mesh=make_mesh(step=processes)), **size)
    blocks = []
    for block in shared:  # every process iterates; only the last one gets blocks
        print(f"block {block.block}: {[*block.latents.shape]}", flush=True)
        blocks.append(block.latents)
    if blocks:
        alone = [block.latents for block in Rollout(model.transformer, embeds, config, **size)]
        print(f"equal to one process: {all(map(torch.equal, blocks, alone))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_latent_frames", type=int, nargs="?", default=48)
    main(**vars(parser.parse_args()))
