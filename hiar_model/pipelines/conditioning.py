"""Conditioning frames: an image, or the end of a clip, that a video starts with, at the size of the model.

Both are read as a viewer shows them: rotated as the file says, on white where transparent, in sRGB, with square pixels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from ..common.checks import path_like
from ..io.atomic import SPECIAL, is_special
from ..io.encoders import decoded_rgb
from ..io.files import refuse_stand_in
from ..io.video import Frames

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
ANIMATED = "for a clip write it as .mp4 and use extend"  # of .webp and .png
HDR = {16: "PQ", 18: "HLG"}
"""Transfer curves of high dynamic range, by their numbers in H.273."""
_CHUNK, _CHUNK_BYTES = 8, 1 << 26  # frames scaled together, and their bytes
_REPAIR = "get it again, or write what is whole of it anew (ffmpeg -i IN OUT)"
_ORIENTATION = 0x0112  # of EXIF
_BACKGROUND = 255  # grey level behind transparent pixels
_TRANSPARENT = "transparent parts are put on white"
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders that read transparency


@dataclass(frozen=True, eq=False)
class ConditioningFrames:
    """The first frames of a video, uint8 [F, H, W, 3]; ``notes``: a line for each change made to them."""

    frames: Frames
    notes: tuple[str, ...] = ()


def read_conditioning(
    image: str | os.PathLike[str] | None,
    extend: str | os.PathLike[str] | None,
    size: tuple[int, int],
    step: int = 1,
    fps: float | None = None,
) -> ConditioningFrames | None:
    """Read the conditioning frames of a video; None if neither ``image`` nor ``extend`` is set.

    Args:
        image: path of a picture. extend: path of a clip, of which the last 1 + n ``step`` frames are used.
        size: (height, width) in pixels of the video; other sizes are scaled to cover it and centre-cropped.
        step: pixel frames of a latent frame. fps: of the video; clips of another rate are not resampled, with a note.

    Raises:
        ValueError: one line: both are set; or the file is missing, unreadable, of another kind, or too short.
    """
    if image is not None and extend is not None:
        raise ValueError(f"image {image!s} and extend {extend!s} exclude each other: give one")
    if image is not None:
        return read_picture("image", image, size)
    if extend is None:
        return None
    path = path_like("extend", extend, "clip")
    clip = _Clip(path)
    resizer = _Resizer(path, size, clip)
    frames = resizer(clip.frames())
    if len(frames) < 1 + step:
        legal = f"at least {1 + step} (1 + {step}n)" if step > 1 else "at least 2"
        length = f"{len(frames)} frame{'s' * (len(frames) != 1)}"
        raise ValueError(f"extend {path}: a clip of {length} is too short, expected {legal}; for one use image")
    count = 1 + (len(frames) - 1) // step * step
    notes = list(clip.notes)
    if count < len(frames):
        notes.append(f"{path}: the last {count} of {len(frames)} frames are used (1 + {step}n)")
    if clip.rate and fps and abs(clip.rate - fps) > 0.01 * fps:
        notes.append(f"{path}: recorded at {clip.rate:g} fps, shown at {fps:g}")
    return ConditioningFrames(frames[-count:], (*notes, *resizer.notes))


def read_picture(option: str, file: str | os.PathLike[str], size: tuple[int, int]) -> ConditioningFrames:
    """Read one picture at a size (height, width); errors as :func:`read_conditioning`, with the name of the option."""
    path = path_like(option, file, "picture")
    picture, notes = _read_image(path, option)
    resizer = _Resizer(path, size)
    return ConditioningFrames(resizer([picture]), (*notes, *resizer.notes))


def _check(path: Path, option: str, suffixes: tuple[str, ...]) -> None:
    if path.is_dir():
        raise ValueError(f"{option} {path}: a folder, expected a file")
    if path.suffix.lower() not in suffixes:
        other = "; for a clip use extend" if option != "extend" and path.suffix.lower() in CLIPS else ""
        legal = f"legal: {', '.join(suffixes)}{other}"
        what = repr(path.suffix) if path.suffix else "a name without a suffix"
        raise ValueError(f"{option} {path}: cannot read {what}; {legal}")
    if is_special(path):
        raise ValueError(f"{option} {path}: {SPECIAL}")
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    refuse_stand_in(path)


def _read_image(path: Path, option: str) -> tuple[Frames, list[str]]:
    """A picture as uint8 [H, W, 3] sRGB, and notes on changes made to it."""
    from PIL import Image, ImageOps

    _check(path, option, IMAGES)
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photos are welcome
            opened = Image.open(path)
            if opened.format == "PNG":
                with Image.open(path) as again:
                    again.verify()  # the checksums, which decoding passes over
        with opened as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames != 1 and picture.format != "MPO":  # a photo, and its preview or depth map behind it
                raise ValueError(f"{option} {path} holds {frames} frames, expected one; {ANIMATED}")
            upright: Any = ImageOps.exif_transpose(picture)
            upright.load()
            if picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
                notes.append(f"{path}: rotated by its EXIF orientation")
            if picture.format in ("JPEG", "MPO") and _is_damaged(path):
                notes.append(f"{path}: damaged inside, parts of it are wrong: look at it, or get it again")
            return _to_srgb(upright, path, notes), notes
    except Image.DecompressionBombError as error:
        raise ValueError(f"{option} {path}: more pixels than are read (178 million): scale it down first") from error
    except (OSError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{option} {path}: corrupt, or not the format of its suffix: {reason}") from error


def _is_damaged(path: Path) -> bool:
    """Whether the data of a JPEG cannot be what was written: Pillow shows what it gets. Baseline files have no check of
    their data, so that most changes in them look like another picture.
    """
    try:
        with av.open(str(path), format="jpeg_pipe") as container:
            container.streams.video[0].codec_context.options = {"err_detect": "explode"}
            return any(frame.is_corrupt for frame in container.decode(video=0))
    except av.error.InvalidDataError:
        return True
    except (av.error.FFmpegError, OSError):
        return False  # of a kind that libav does not read


def _to_srgb(picture: Any, path: Path, notes: list[str]) -> Frames:
    from PIL import Image

    profile, transparent = picture.info.get("icc_profile"), picture.info.get("transparency")
    alpha = None
    if picture.mode.startswith(("I", "F")):  # 16 bits per pixel; Pillow would clip at 255, and forget what is beside
        grey = np.asarray(picture).astype(np.float64)
        alpha = None if transparent is None else Image.fromarray(np.uint8(255) * (grey != transparent))
        grey = grey * (255 / 65535) if picture.mode.startswith("I") else grey
        picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif "A" in picture.getbands() or transparent is not None:
        alpha = picture.convert("RGBA").getchannel("A")
    if picture.mode not in ("RGB", "L", "CMYK"):
        picture = picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB")
    if profile:
        picture, note = _by_profile(picture, profile)
        notes += [f"{path}: {note}"] if note else []
    picture = picture.convert("RGB")
    if alpha is not None and np.asarray(alpha).min() < 255:
        notes.append(f"{path}: {_TRANSPARENT}")
        picture = Image.composite(picture, Image.new("RGB", picture.size, (_BACKGROUND,) * 3), alpha)
    return np.array(picture)


def _by_profile(picture: Any, profile: bytes) -> tuple[Any, str]:
    """A picture of mode RGB, L or CMYK in sRGB, and a note or ""."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and picture.mode == "L":
            picture = picture.convert("RGB")
        if space != {"L": "GRAY"}.get(picture.mode, picture.mode):
            return picture, f"its colour profile is one of {space}; read without it"
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, source, srgb, outputMode="RGB"), ""
    except (ImageCms.PyCMSError, OSError):
        return picture, "its colour profile cannot be read; read as sRGB"


class _Clip:
    """A clip, decoded lazily.

    Attributes:
        rate: frames per second (0: unknown). aspect: width over height of a pixel. notes: on changes made to it.
    """

    def __init__(self, path: Path) -> None:
        _check(path, "extend", CLIPS)
        self.path, self.rate, self.aspect = path, 0.0, 1.0
        self.notes: list[str] = []

    def frames(self) -> Iterator[Frames]:
        """uint8 [H, W, 3] each, rotated as a player shows them; pixels may not be square."""
        path, size, count, end = self.path, None, 0, 0.0
        try:
            with av.open(str(path)) as container:
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams:
                    raise ValueError(f"extend {path}: has no video stream")
                stream: Any = streams[0]
                self.rate = float(stream.average_rate or 0)
                for frame in self._decoded(container, stream):
                    image = self._upright(frame, stream)
                    if size not in (None, image.shape):
                        raise ValueError(f"extend {path}: frames differ in size")
                    size, count = image.shape, count + 1
                    if frame.is_corrupt:
                        raise ValueError(f"extend {path}: damaged at its frame {count}; {_REPAIR}")
                    end = max(end, float(frame.time or 0) + float((frame.duration or 0) * (frame.time_base or 0)))
                    yield image
                whole = _seconds(container, stream)
                if count and whole - end > max(0.05 * whole, 2 / (self.rate or 1)):
                    raise ValueError(
                        f"extend {path}: cut short: its frames end at {end:.2f} of {whole:.2f} s; {_REPAIR}"
                    )
        except (av.error.FFmpegError, OSError) as error:
            reason = error.strerror or error
            raise ValueError(f"extend {path}: corrupt, or not the format of its suffix: {reason}") from error
        if not count:
            raise ValueError(f"extend {path}: corrupt: no frame can be read")

    def _note(self, change: str) -> None:
        """Once for the clip."""
        if (line := f"{self.path}: {change}") not in self.notes:
            self.notes.append(line)

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """Its frames; of VP8 and VP9 with their transparency, which FFmpeg's own decoders leave out."""
        decoder = _WITH_ALPHA.get(stream.codec.name) if stream.metadata.get("alpha_mode") == "1" else None
        if decoder in av.codecs_available:
            context: Any = av.CodecContext.create(decoder, "r")
            for packet in container.demux(stream):
                yield from context.decode(packet)
            return
        if decoder:
            self._note(f"transparent parts are not read as such: this libav has no {decoder}")
        yield from container.decode(stream)

    def _upright(self, frame: Any, stream: Any) -> Frames:
        image, transparent = _on_white(frame)
        if transparent:
            self._note(_TRANSPARENT)
        turns, flip = _orientation(frame)
        if turns or flip:
            self._note("rotated as the file says")
        if curve := HDR.get(int(frame.color_trc or 0)):
            self._note(f"in high dynamic range ({curve}), taken as it is: paler than in a player")
        aspect = float(stream.sample_aspect_ratio or 0) or 1.0
        self.aspect = 1 / aspect if turns % 2 else aspect
        image = np.rot90(image, turns)
        return np.ascontiguousarray(image[:, ::-1] if flip else image)


def _on_white(frame: Any) -> tuple[Frames, bool]:
    """The picture of a decoded frame, transparent parts on white, and whether there are any."""
    if not (frame.format.has_palette or any(component.is_alpha for component in frame.format.components)):
        return decoded_rgb(frame), False
    image = decoded_rgb(frame, "rgba")
    colours, alpha = image[..., :3], image[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(colours), False
    return ((colours * alpha + _BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8), True


def _seconds(container: Any, stream: Any) -> float:
    """How long the pictures of a file are to go on, as it says itself; 0: it does not say."""
    if container.format.name == "avi":  # its duration is that of what is there
        return float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    alone = len(container.streams) == 1  # sound may go on longer
    return float(container.duration or 0) / 1e6 if alone else 0.0


def _orientation(frame: Any) -> tuple[int, bool]:
    """Quarter turns counter-clockwise, then whether to mirror, from the frame's display matrix."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return 0, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()  # x' = a x + c y, y' = b x + d y
    mirrored = a * d - b * c < 0
    if mirrored:  # undo it first: x' -> -x'
        a, c = -a, -c
    turns = round(np.degrees(np.arctan2(-b, a)) / 90) % 4
    return int(turns), mirrored


class _Resizer:
    """Scales frames to a size in chunks, so that few are in memory at their original size."""

    def __init__(self, path: Path, size: tuple[int, int], clip: _Clip | None = None) -> None:
        self.path, self.size, self.clip = path, size, clip
        self.notes: tuple[str, ...] = ()

    def __call__(self, frames: Iterable[Frames]) -> Frames:
        """uint8 [F, high, wide, 3]."""
        chunks, source = [], iter(frames)
        for first in source:
            at_once = max(1, min(_CHUNK, _CHUNK_BYTES // (4 * first.size)))  # float32 while they are scaled
            chunks.append(self._resize(np.stack([first, *islice(source, at_once - 1)])))
        return np.concatenate(chunks)

    def _resize(self, frames: Frames) -> Frames:
        (height, width), (high, wide) = frames.shape[1:3], self.size
        aspect = 1.0 if self.clip is None else self.clip.aspect
        if (height, width) == (high, wide) and aspect == 1:
            return frames
        import torch

        factor = max(high / height, wide / (width * aspect))
        scaled = max(high, round(height * factor)), max(wide, round(width * aspect * factor))
        top, left = (scaled[0] - high) // 2, (scaled[1] - wide) // 2
        planes = torch.from_numpy(frames).movedim(3, 1).to(torch.float32)
        planes = torch.nn.functional.interpolate(planes, scaled, mode="bicubic", antialias=True)
        cropped = planes[:, :, top : top + high, left : left + wide].round_().clamp_(0, 255).to(torch.uint8)
        pixels = "" if aspect == 1 else f", its pixels {aspect:.4g} times as wide as high"
        change = f"scaled from {height}x{width} and cropped to {high}x{wide} (height x width){pixels}"
        self.notes = (f"{self.path}: {change}",)
        return cropped.movedim(1, 3).numpy()
