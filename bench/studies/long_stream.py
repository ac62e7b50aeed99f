"""Whether memory stays flat while a long video is streamed: what the process holds, minute by minute of video.

    python -m bench.studies.long_stream "a red circle moving right" -o long.mp4 --num-frames 21600

21,600 frames are 30 minutes of the toy model's video. On a CPU (2026-11-20, revision e37c073), from minute 1 to minute
30: the same 275 tensors and 12.185 MB, 2.0 MB more resident.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.lib import report
from bench.lib.script import script
from hiar_model.io.video import VideoWriter
from hiar_model.pipelines.video_pipeline import VideoOptions, VideoPipeline, VideoRun

HEADINGS = ("minutes of video", "frames", "tensors", "their MB", "Python blocks", "resident MB")


class MemoryInUse(NamedTuple):
    """After so many frames: live tensors, bytes of their storages, blocks that Python has allocated, resident bytes of
    the process (0: unknown).
    """

    frames: int
    tensors: int
    tensor_bytes: int
    blocks: int
    resident: int


def memory(frames: int) -> MemoryInUse:
    """What this process holds now."""
    gc.collect()
    # by type: asking an object may run its code; other subclasses (fake tensors) hold no memory
    plain = (torch.Tensor, torch.nn.Parameter)
    alive = [x for x in gc.get_objects() if type(x) in plain and x.layout == torch.strided]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive if x.device.type != "meta"}
    status = Path("/proc/self/statm")
    resident = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
    tensors, nbytes = len(alive), sum(storages.values())
    del alive, storages
    return MemoryInUse(frames, tensors, nbytes, sys.getallocatedblocks(), resident)


def watch(run: VideoRun, writer: VideoWriter, every: int) -> Iterator[MemoryInUse]:
    """Make the video, and look each time another ``every`` frames are there, and at the end."""
    following = every
    for frames in run:
        writer.write(frames)
        del frames
        if run.frames_done >= following or run.frames_done == run.num_frames:
            following += every
            yield memory(run.frames_done)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prompt", help="such as 'a red circle moving right'")
    parser.add_argument("-o", "--out", required=True, help="name.mp4, or name/ for PNG files")
    parser.add_argument("--model", default="toy", help="name of a shipped model, or a folder")
    parser.add_argument("--num-frames", type=int, default=21600)
    parser.add_argument("--order", default="stream")
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = VideoPipeline(a.model, device=a.device)
    run = pipeline.prepare(VideoOptions(a.prompt, num_frames=a.num_frames, order=a.order))
    begun = time.perf_counter()
    print("\n".join(report.table(HEADINGS, [], text_columns=0)))
    with VideoWriter(a.out, run.fps, run.metadata) as writer:
        for m in watch(run, writer, round(60 * run.fps)):
            sizes = (f"{m.tensor_bytes / 1e6:.3f}", m.blocks, f"{m.resident / 1e6:.1f}")
            print(
                "|",
                " | ".join(map(str, (f"{m.frames / run.fps / 60:.1f}", m.frames, m.tensors, *sizes))),
                "|",
                flush=True,
            )
    print(f"\n{a.out}: {run.frames_done} frames in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    script(main)
