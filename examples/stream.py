"""A video without an end, shown while it is made: python examples/stream.py

You see a window in which a green plus moves down, until you close it. `python examples/stream.py plus.mp4` needs no
screen and writes the first 16 blocks (48 frames). Takes a few seconds on one CPU core.
"""

import argparse
import itertools
import time

from hiar_model import VideoPipeline
from hiar_model.io.video import VideoWriter


def main(path: str | None = None, blocks: int | None = None) -> None:
    pipeline = VideoPipeline("toy")
    stream = itertools.islice(pipeline.stream("a green plus moving down"), blocks)  # uint8 [f, H, W, 3] each
    show(stream, pipeline.model.fps) if path is None else write(stream, pipeline.model.fps, path)


def write(stream, fps: float, path: str) -> None:
    with VideoWriter(path, fps) as writer:  # memory does not grow with the length
        for frames in stream:
            writer.write(frames)


def show(stream, fps: float) -> None:
    import tkinter

    from PIL import Image, ImageTk

    label = tkinter.Label(tkinter.Tk())
    label.pack()
    for frame in itertools.chain.from_iterable(stream):
        picture = ImageTk.PhotoImage(Image.fromarray(frame).resize((512, 512), Image.Resampling.NEAREST))
        try:
            label.configure(image=picture)
            label.update()
        except tkinter.TclError:  # the window was closed
            return
        time.sleep(1 / fps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", help="of a video; default: a window")
    path = parser.parse_args().path
    main(path, blocks=16) if path else main()
