"""What a video goes on from: an image, or the end of a clip, as frames of the size that the model makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from .video import Frames

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
_AT_ONCE = 8  # frames resized together


@dataclass(frozen=True, eq=False)
class Given:
    """The first frames of a video, uint8 [F, H, W, 3]; ``notes``: what was done to them, a line each."""

    frames: Frames
    notes: tuple[str, ...] = ()


def read_given(
    image: str | os.PathLike[str] | None,
    extend: str | os.PathLike[str] | None,
    size: tuple[int, int],
    step: int = 1,
    fps: float | None = None,
) -> Given | None:
    """The frames that a video begins with; None if nothing is given.

    Args:
        image: one picture. extend: a clip, of which the last 1 + n ``step`` frames are taken.
        size: (height, width) of the video. What has another size is scaled until it covers that, and what stands out on
            two sides is cut off, as much on either.
        step: pixel frames of a latent frame. fps: of the video; a clip of another rate is taken frame by frame, and a
            note says so.

    Raises:
        ValueError: one line: both, no such file, not readable, another kind of file, too few frames.
    """
    if image is not None and extend is not None:
        raise ValueError(f"image {os.fspath(image)} and extend {os.fspath(extend)} cannot both begin a video: give one")
    if image is not None:
        path = Path(image)
        frames, _ = _read(path, "image", IMAGES)
        if len(frames) != 1:
            raise ValueError(f"image {path} holds {len(frames)} frames, expected one; give a clip as extend")
        return Given(*_fitted(path, frames, size))
    if extend is None:
        return None
    path = Path(extend)
    frames, rate = _read(path, "extend", CLIPS)
    if len(frames) < 1 + step:
        legal = f"at least {1 + step} (1 + {step}n)" if step > 1 else "at least 2"
        raise ValueError(
            f"extend {path}: a clip of {len(frames)} frames is too short, expected {legal}; one is an image"
        )
    kept = 1 + (len(frames) - 1) // step * step
    notes = []
    if kept < len(frames):
        notes.append(f"{path}: the last {kept} of {len(frames)} frames are taken (1 + {step}n)")
    if rate and fps and abs(rate - fps) > 0.01 * fps:
        notes.append(f"{path}: its frames are of {rate:g} fps, in the video they are shown at {fps:g}")
    found, more = _fitted(path, frames[-kept:], size)
    return Given(found, (*notes, *more))


def _read(path: Path, option: str, suffixes: tuple[str, ...]) -> tuple[list[Frames], float]:
    """All frames uint8 [H, W, 3] of a file, and their rate (0: it says none)."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path}: cannot read {path.suffix or 'no suffix'!r}; legal: {', '.join(suffixes)}")
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{option} {path}: holds no picture")
            stream: Any = container.streams.video[0]
            frames = list(_frames(container))
            rate = float(stream.average_rate or 0)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{option} {path}: corrupt, or not what its suffix says: {error.strerror or error}") from error
    if not frames:
        raise ValueError(f"{option} {path}: corrupt: no frame can be read")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError(f"{option} {path}: its frames differ in size")
    return frames, rate


def _frames(container: Any) -> Iterator[Frames]:
    for frame in container.decode(video=0):
        yield frame.to_ndarray(format="rgb24")


def _fitted(path: Path, frames: list[Frames], size: tuple[int, int]) -> tuple[Frames, tuple[str, ...]]:
    (height, width), (high, wide) = frames[0].shape[:2], size
    if (height, width) == size:
        return np.stack(frames), ()
    import torch

    factor = max(high / height, wide / width)
    scaled = max(high, round(height * factor)), max(wide, round(width * factor))
    top, left = (scaled[0] - high) // 2, (scaled[1] - wide) // 2
    found = np.empty((len(frames), high, wide, 3), np.uint8)
    for first in range(0, len(frames), _AT_ONCE):
        planes = torch.from_numpy(np.stack(frames[first : first + _AT_ONCE])).movedim(3, 1).float()
        planes = torch.nn.functional.interpolate(planes, scaled, mode="bicubic", antialias=True)
        cut = planes[:, :, top : top + high, left : left + wide].round_().clamp_(0, 255).to(torch.uint8)
        found[first : first + _AT_ONCE] = cut.movedim(1, 3).numpy()
    return found, (f"{path}: scaled from {height}x{width} and cut to {high}x{wide} (height x width)",)
