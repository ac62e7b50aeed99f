"""Attention alone, with the mask of a rollout: who sees whom is decided by the numbers of the frames.

You see the mask as a picture of characters, one row for each query frame, one column for each key. Four blocks of three
frames: a block sees six frames at most, its own among them, and always the first of the video. Takes seconds, most of
them to import torch.
"""

import argparse

import torch

from hiar_kernels import BlockCausal, attention


def main(frames: int = 12) -> torch.Tensor:
    mask = BlockCausal(frame_tokens=1, frames_per_block=3, window_frames=6, sink_frames=1)  # one token for each frame
    zeros = torch.zeros(1, frames, 1, frames)  # [B, T, H, D]: equal scores, so each visible key weighs the same
    values = torch.eye(frames).view(1, frames, 1, frames)  # one-hot: the output is the row of weights
    weights = attention(zeros, zeros, values, mask=mask).view(frames, frames)
    for frame, row in enumerate(weights):
        print(f"{frame:>3} ", "".join("#" if weight > 0 else "." for weight in row))
    # Keys may lie in any order, as in the ring of a cache: their frame numbers say who they are.
    order = torch.randperm(frames)
    ids = order.to(torch.int32).unsqueeze(0)  # [1, frames]; -1 would be an empty slot
    shuffled = attention(zeros, zeros, values[:, order], mask=mask, kv_frames=ids).view(frames, frames)
    print(f"the same with shuffled keys: {torch.allclose(weights, shuffled, atol=1e-6)}")
    return weights


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
