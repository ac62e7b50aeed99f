"""A video from a prompt, by the model that ships with the package.

You see circle.mp4: a red circle that moves to the right for four seconds. Takes a few seconds on one CPU core.
"""

import argparse
from pathlib import Path

from hiar_model import VideoPipeline


def main(num_frames: int = 48) -> Path:
    pipeline = VideoPipeline("toy")  # or a folder of Wan2.1; loaded once, for any number of videos
    video = pipeline("a red circle moving right", num_frames=num_frames, seed=0)
    path = video.save("circle.mp4")  # circle.mp4.json beside it: hiar generate --config circle.mp4.json -o again.mp4
    print(f"{path}: {video}")
    return path


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
