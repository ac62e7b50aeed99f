"""Live sessions of the toy, in a server and without one, with states on disk."""

from __future__ import annotations

from serving import PROMPT, serving, until
from serving import pictures as all_pictures

from hiar_model import ExecutionConfig, PromptSchedule, VideoPipeline
from hiar_model.serve.app import Settings
from hiar_model.serve.live import LiveVideo
from hiar_model.serve.protocol import StartMessage
from hiar_model.serve.scheduler import Limits

OFTEN = {"every": 2, "rate": 1e12}  # states


def pictures(chunks):
    """The first frame of each chunk."""
    return all_pictures(chunks)[::3]


def made(model, blocks, *changes, **options):
    """The first frames of the blocks of the same video made at once; changes: (block, prompt)."""
    schedule = PromptSchedule.of([(0, PROMPT), *((3 * block / model.fps, prompt) for block, prompt in changes)])
    frames = VideoPipeline(model)(None, prompts=schedule, num_frames=3 * blocks, order="stream", **options).frames
    return frames[::3]


def running(model, data, keep=60.0, **options):
    return serving(model, data, Settings(limits=Limits(8, keep), state_bytes=10**8), states=OFTEN, **options)


def video(model, disk, name="a", rewind_bytes=0, **start):
    start = StartMessage(1, PROMPT, **start)
    return LiveVideo(model, ExecutionConfig(), start, rewind_bytes=rewind_bytes, disk=disk.of(name))


def blocks(live, count, disk=None):
    """The next blocks, those on the way to a place left out; with ``disk``, each when all states are written."""
    pieces = []
    while len(pieces) < count:
        pieces += filter(None, [live.make()])
        if disk is not None:
            until(lambda: all(file.written for states in disk.sessions.values() for file in states.files))
    return pieces


def counted(live):
    """A list to which each block that is made is added, seen or not."""
    numbers = []
    live.on_group = lambda group: numbers.extend(
        t.block for i in group for t in i if (t.kind, t.step) == ("denoise", 0)
    )
    return numbers
