"""Save a video in the middle, and continue it twice: with the same prompt, and with another one.

You see same.mp4 and fork.mp4. They begin alike: a red circle moving right; in fork.mp4 it becomes a blue square moving
up. Takes a few seconds on one CPU core.
"""

import argparse
import itertools

import numpy as np

from hiar_model import Video, VideoPipeline
from hiar_model.pipelines.video_pipeline import VideoOptions

PROMPTS = {"same": "a red circle moving right", "fork": "a blue square moving up"}


def main(num_frames: int = 72, blocks: int = 8) -> dict[str, Video]:
    pipeline = VideoPipeline("toy")
    run = pipeline.prepare(VideoOptions(PROMPTS["same"], num_frames=num_frames, order="stream"))
    begun = list(itertools.islice(run, blocks))
    session = run.save_session("begun.safetensors")  # caches, latents in flight: all that is needed to go on
    videos = {}
    for name, prompt in PROMPTS.items():
        fork = pipeline.prepare(VideoOptions(prompt, num_frames=num_frames, order="stream", session=session))
        videos[name] = Video(np.concatenate([*begun, *fork]), fork.fps, fork.metadata)
        print(videos[name].save(f"{name}.mp4"))
    return videos


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
