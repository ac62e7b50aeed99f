"""Videos in memory and on disk, written frame by frame and atomically.

The path chooses the format: `name.mp4` is H.264, `name.gif` an endless animation, a path without a suffix or with a
slash at its end a folder of PNG files. Beside a file, or in the folder, lies a JSON record of how the video was made.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.checks import FASTEST, SLOWEST, number_within, one_line, plain, whole
from .atomic import atomic_write, cannot_write, discard, publish, temporary, unused
from .encoders import FrameEncoder, GifEncoder, Mp4Encoder, PngEncoder, encode_png
from .files import as_text, check_output, output_path, seen_from

Frames = npt.NDArray[np.uint8]
"""uint8 [F, H, W, 3], RGB."""

SUFFIXES = (".mp4", ".gif")
FOLDER_RECORD = "video.json"  # inside a folder of PNGs; beside a file it is called as the file, with .json behind
LEAST_SIDE = 256
"""Pixels on the short side that a written video has at least; smaller frames are enlarged by a whole factor."""
LARGEST_ENLARGED = 4096
"""Pixels on the long side that enlarged frames have at most."""
LARGEST_SIDE = {".mp4": 16384, ".gif": 65535}  # x264's limit; two bytes in the format
GIF_FASTEST = 50.0  # viewers slow down anything faster
CHUNK = 16  # frames enlarged at once


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video.

    Attributes:
        frames: uint8 [F, H, W, 3], RGB.
        fps: frames per second.
        metadata: how it was made: what JSON can hold.

    Raises:
        ValueError: frames of another dtype or shape, no frames, an ``fps`` that is no number from 0.01 to 1000,
            metadata that is no mapping.

    >>> video = Video(np.zeros((24, 32, 48, 3), np.uint8), fps=12, metadata={"prompt": "night"})
    >>> video, len(video)
    (Video(24 frames of 48x32, 12 fps, 2.0 s, 'night'), 24)
    """

    frames: Frames
    fps: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_frames(self.frames)
        if not isinstance(self.metadata, Mapping):
            raise ValueError(f"metadata must be a mapping, got {one_line(self.metadata)}")
        object.__setattr__(self, "fps", check_fps(self.fps))

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        prompt = self.metadata.get("prompt")
        about = "" if prompt is None else f", {textwrap.shorten(str(prompt), 60, placeholder='...')!r}"
        return f"Video({count} frames of {width}x{height}, {self.fps:g} fps, {count / self.fps:.1f} s{about})"

    def _repr_html_(self) -> str:
        """For notebooks: the video as an .mp4 inside the page, and its one-line description."""
        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder, "video.mp4")).read_bytes()).decode()
        source = f"data:video/mp4;base64,{data}"
        return f'<video controls loop muted autoplay src="{source}"></video><br>{html.escape(repr(self))}'

    def save(self, path: str | os.PathLike[str], least_side: int = LEAST_SIDE) -> Path:
        """Write as .mp4, .gif or a folder of PNGs, with the record beside it, and return the path.

        Args:
            least_side: smaller frames are enlarged until their short side has this many pixels; 1: never.

        Raises:
            ValueError: what :func:`check_target` refuses. OSError: it cannot be written. Nothing is left after either.
        """
        with VideoWriter(path, self.fps, self.metadata, least_side) as writer:
            for first in range(0, len(self.frames), CHUNK):
                writer.write(self.frames[first : first + CHUNK])
        return writer.path


def check_fps(fps: float) -> float:
    """The rate as a float; ValueError unless it is a number from 0.01 to 1000."""
    return number_within("fps", fps, SLOWEST, FASTEST)


def is_folder_target(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a folder of PNGs: no suffix, or a slash at its end."""
    return os.fspath(path).endswith(("/", os.sep)) or not Path(path).suffix


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path as a `Path`, if a video can be written there; call it before any computation starts.

    An existing video file will be replaced; an existing folder must be empty.

    Raises:
        ValueError: one line: unknown suffix (names the legal ones), what :func:`check_output` refuses of the video or
            its record, a folder with files.
    """
    target = Path() if path == "" else output_path(path)
    if not target.name or target.name == "-" or target.name.lower() in SUFFIXES:
        raise ValueError(f"{os.fspath(path)!r} is not a file name for a video; {_legal()}")
    folder = is_folder_target(path)
    if not folder and target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {target}: unknown suffix {target.suffix!r}; {_legal()}")
    if not folder:
        return check_output(target, beside=[record_path(target, folder)])
    if os.path.exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"cannot write {target}: it exists and is no empty folder; choose another name")
    check_output(target / FOLDER_RECORD if os.path.isdir(target) else target)
    return target


def _legal() -> str:
    return f"legal: {', '.join(f'name{suffix}' for suffix in SUFFIXES)}, or name/ for a folder of PNG files"


def record_path(target: Path, folder: bool = False) -> Path:
    """Where the record of a video lies: beside it, or inside its folder."""
    return target / FOLDER_RECORD if folder else target.with_name(target.name + ".json")


class VideoWriter:
    """Context manager that writes a video frame by frame; only .gif keeps the frames in memory until the end.

    The video and its record appear when the block ends without an error. After an error or Ctrl-C nothing is left.

    Args:
        path: checked at once by :func:`check_target`. fps: frames per second.
        metadata: for the record; numpy numbers and paths too. A "command" in it (a list of words) becomes a command
            line that, run in the video's folder, makes the video again.
        size: (height, width) of the frames, where it is known: what the format cannot hold is refused at once.
        least_side: frames with a shorter side are enlarged, see :func:`upscale`; 1: never.
        smooth: the frames were enlarged already: encoded as quickly as those that are enlarged here.
        overwrite: an existing file is replaced. Else, and where a folder was filled since the check, the video is put
            beside it as name-2 (``path`` says where).

    Raises:
        ValueError: what :func:`check_target` refuses, an illegal rate, frames of different sizes, no frames at all.
        OSError: the video, or only its record, cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        least_side: int = LEAST_SIDE,
        size: tuple[int, int] | None = None,
        smooth: bool = False,
        overwrite: bool = True,
    ) -> None:
        fps, least_side = check_fps(fps), whole("least_side", least_side, 1, most=LARGEST_ENLARGED)
        self.path, self.fps, self.least_side = check_target(path), float(fps), least_side
        self.metadata, self.smooth, self.overwrite = dict(metadata or {}), smooth, overwrite
        self.folder = is_folder_target(path)
        if not self.folder and self.path.suffix.lower() == ".gif" and fps > GIF_FASTEST:
            raise ValueError(f"a .gif has at most {GIF_FASTEST:g} fps, got {fps:g}; use .mp4 or a folder of PNG files")
        self._check_size(size)
        try:
            json.dumps(self.metadata, default=_as_json, allow_nan=False)  # NaN is no JSON: others cannot read it
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"metadata of {self.path} cannot be written as JSON: {error}") from error
        self.frames_written = 0
        self._size: tuple[int, ...] | None = None
        self._encoder: FrameEncoder | None = None
        self._partial = temporary(self.path)

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: Frames) -> None:
        """Append frames uint8 [f, H, W, 3]; ValueError if they are of another size than those before."""
        _check_frames(frames)
        self._size = self._size or frames.shape[1:3]
        if frames.shape[1:3] != self._size:
            raise ValueError(f"frames of {frames.shape[1:3]} behind frames of {self._size} (height, width)")
        frames = upscale(frames, self.least_side)
        with self._named():
            if self._encoder is None:
                height, width = frames.shape[1:3]
                self._encoder = self._open(height, width, enlarged=self.smooth or (height, width) != self._size)
            for image in frames:
                self._encoder.add(image)
        self.frames_written += len(frames)

    def _check_size(self, size: tuple[int, int] | None) -> None:
        suffix = "" if self.folder else self.path.suffix.lower()
        largest = LARGEST_SIDE.get(suffix)
        if size is not None and largest is not None and max(size) > largest:
            shape = "x".join(map(str, size))
            raise ValueError(f"a {suffix} has at most {largest} pixels a side, got {shape}; use a folder of PNG files")

    def _open(self, height: int, width: int, enlarged: bool) -> FrameEncoder:
        self._check_size((height, width))
        if self.folder:
            return PngEncoder(self._partial)
        if self.path.suffix.lower() == ".gif":
            return GifEncoder(self._partial, self.fps, height, width)
        return Mp4Encoder(self._partial, self.fps, height, width, quick=enlarged)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        if self._encoder is None:
            raise ValueError(f"no frame was written to {self.path}")
        encoder, self._encoder = self._encoder, None
        with self._named():
            encoder.close()
            self.path = unused(self.path, overwrite=self.overwrite, beside=None if self.folder else record_path)
        text, beside = self.metadata_text(), record_path(self.path, self.folder)
        with self._named():
            publish(self._partial, self.path)
        try:
            atomic_write(beside, text)
        except OSError as error:
            beside.unlink(missing_ok=True)  # of the video that was replaced
            raise OSError(f"{self.path} is complete, but without its record: {error}") from error

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors such as a full disk name the video, not its temporary name."""
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def metadata_text(self) -> bytes:
        """The JSON that is written beside the video, as far as it is known."""
        import shlex

        metadata = {"file": self.path.name, "frames": self.frames_written, "fps": self.fps, **self.metadata}
        if "command" in metadata:
            name = self.path.name + "/" * self.folder
            words = seen_from(self.path.parent, metadata["command"])
            words += ["--out", os.path.join(os.curdir, name) if name[0] == "-" else name]
            metadata["command"] = shlex.join(words if self.folder else [*words, "--overwrite"])
        text = as_text(json.dumps(metadata, indent=2, ensure_ascii=False, default=_as_json))
        return f"{text}\n".encode("utf-8", "backslashreplace")  # surrogates, as JSON escapes them

    def _discard(self) -> None:
        """Close the encoder and remove the temporary file or folder, if there still is one."""
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            with suppress(Exception):
                encoder.close()
        discard(self._partial)


def _as_json(value: Any) -> Any:
    """What JSON knows by another name: numpy's numbers, paths."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if plain(value) is value:
        raise TypeError(f"{value!r} of {type(value).__name__} is no JSON")
    return plain(value)


def save_png(image: Frames, path: str | os.PathLike[str]) -> None:
    """Write an image uint8 [H, W, 3] as .png, atomically."""
    _check_frames(image[None])
    atomic_write(path, encode_png(image))


def upscale(frames: Frames, least_side: int = LEAST_SIDE) -> Frames:
    """Enlarge frames [F, H, W, 3] by the smallest whole factor that makes both sides at least ``least_side`` pixels, or
    by the largest that keeps the long side within 4096.

    Bicubic, as one matrix product for each axis, which takes a sixth of the time of torch's interpolation.
    """
    short, long = sorted(frames.shape[1:3])
    factor = min(math.ceil(least_side / short), LARGEST_ENLARGED // long)
    if factor <= 1:
        return frames
    import torch

    planes = torch.from_numpy(np.ascontiguousarray(frames)).movedim(3, 1).float()
    rows, columns = (_bicubic(n, factor) for n in frames.shape[1:3])
    planes = rows @ (planes @ columns.t())
    return planes.round_().clamp_(0, 255).to(torch.uint8).movedim(1, 3).contiguous().numpy()


@functools.lru_cache(maxsize=8)
def _bicubic(size: int, factor: int) -> Any:
    """Interpolation matrix of one axis, float32 [size * factor, size]."""
    import torch

    lines = torch.eye(size, dtype=torch.float32)[None, None]
    wide = (size * factor, size)
    return torch.nn.functional.interpolate(lines, size=wide, mode="bicubic", align_corners=False)[0, 0]


def contact_sheet(frames: Frames | Iterable[Frames], columns: int, gap: int = 2, colour: int = 255) -> Frames:
    """Arrange frames uint8 [F, H, W, 3] in reading order in one image uint8 [H', W', 3], on a grey ``colour``, with
    ``gap`` pixels between and around them.
    """
    images = np.asarray(frames if isinstance(frames, np.ndarray) else list(frames))
    _check_frames(images)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), colour, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _check_frames(frames: Frames) -> None:
    if not isinstance(frames, np.ndarray):
        raise ValueError(f"frames must be a numpy array, uint8 [F, H, W, 3], got {type(frames).__name__}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 [F, H, W, 3] and not empty, got {frames.dtype} {list(frames.shape)}")
