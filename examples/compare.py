"""Drift, and its cure: the same weights, prompt, seed and noise in two orders, side by side.

You see compare.mp4, 32 times as long as the clips that the model was trained on, at eight times its speed. On the left
every block is finished before the next one sees it (block_first), on the right each block sees its past at its own
noise level (HiAR). The table says how good each eighth of both is; 1 is best in "valid". Takes half a minute on one
CPU core.
"""

import argparse

from hiar_model import compare


def main(num_frames: int = 384, speed: int = 8):
    prompt = "a red circle moving right"
    result = compare(prompt, "compare.mp4", model="scenes", num_frames=num_frames, speed=speed)
    for order in result.orders:
        for name, eighths in order.quality.items():
            print(f"{order.order:<12} {name:<18}", *(f"{value:7.3f}" for value in eighths))
    print(f"{result.path}: {result.frames_shown} of {result.num_frames} frames; quality drawn in {result.plot}")
    return result


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
