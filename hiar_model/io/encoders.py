"""Encoders of videos, a frame at a time, and what pictures become on the way to YUV and back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import av
import numpy as np
import numpy.typing as npt
from av.filter import Graph

Image = npt.NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""

GIF_TICKS = 100  # per second: the format counts time in hundredths
HD_LINES = 720
"""From so many lines on video is BT.709, below BT.601: written so, and taken so where a file does not say."""
_ROUNDED = 4 | 1 << 13 | 1 << 14 | 1 << 18
"""How pictures are converted to and from YUV: swscale's BICUBIC, FULL_CHR_H_INT, FULL_CHR_H_INP and ACCURATE_RND. With
its defaults each trip is one level darker (findings/pyav-darkens-yuv420p.sh). PyAV 17 has no names for them."""
_QUICK = {"compression_level": "1", "pred": "up"}
"""For the many frames of a video: much quicker, for files that are a little larger."""


X264 = {"crf": "16"}
"""Its macroblock tree (mbtree), without which files are larger, reads memory that nobody wrote: now and then equal
frames become other bytes (docs/contributing/behaviour.md)."""


class FrameEncoder(Protocol):
    """Encodes the frames of one video, uint8 [H, W, 3] each, all of one size."""

    def add(self, image: Image) -> None:
        """The next frame."""

    def close(self) -> None:
        """Flush and close; called once, also to give up."""


class Mp4Encoder:
    """H.264 (MPEG-4 part 2 if FFmpeg was built without x264) in yuv420p, which every player and browser shows.

    Args:
        file: a path, or an open binary file. fps, height, width: of the frames.
        options: of FFmpeg's mp4 muxer. x264: of its encoder, in place of ours.
        quick: for enlarged frames, which are smooth: half of x264's time for a file of the same size, 0.3 dB worse.
        first: number of the first frame, which is then shown at first / fps seconds.
    """

    def __init__(
        self,
        file: Path | IO[bytes],
        fps: float,
        height: int,
        width: int,
        *,
        options: Mapping[str, str] | None = None,
        x264: Mapping[str, str] | None = None,
        quick: bool = False,
        first: int = 0,
    ) -> None:
        target = str(file) if isinstance(file, Path) else file
        self.container = av.open(target, "w", format="mp4", options=dict(options or {"movflags": "+faststart"}))
        rate = Fraction(fps).limit_denominator(1001)
        self.odd, self.next, self.tick = (height % 2, width % 2), first, 1 / rate
        if "libx264" in av.codecs_available:
            coding = dict(x264 or {**X264, "preset": "veryfast" if quick else "medium"})
            stream = self.container.add_stream("libx264", rate=rate, options=coding)
        else:
            stream = self.container.add_stream("mpeg4", rate=rate, options={"qscale": "2", "flags": "+qscale"})
        self.stream: Any = stream
        self.stream.height, self.stream.width = height + self.odd[0], width + self.odd[1]
        self.stream.pix_fmt = "yuv420p"
        self.matrix, tag = _matrix(height), 1 if height >= HD_LINES else 6  # ITU-T H.273: BT.709, SMPTE 170M
        context = self.stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = tag
        context.color_range = 1  # "tv"

    def add(self, image: Image) -> None:
        if any(self.odd):  # yuv420p has even sizes only: repeat the last row or column
            image = np.pad(image, ((0, self.odd[0]), (0, self.odd[1]), (0, 0)), mode="edge")
        self.add_yuv(_av_frame(image).reformat(format="yuv420p", dst_colorspace=self.matrix, interpolation=_ROUNDED))

    def add_yuv(self, frame: Any) -> None:
        """The next frame, an ``av.VideoFrame`` in yuv420p of the video's size, made even."""
        frame.pts, frame.time_base, self.next = self.next, self.tick, self.next + 1
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        try:
            self.container.mux(self.stream.encode())
        finally:
            self.container.close()


class GifEncoder:
    """One palette for the whole animation, so that nothing flickers. FFmpeg keeps all frames until the end for that."""

    def __init__(self, path: Path, fps: float, height: int, width: int) -> None:
        self.tick, self.fps, self.count = Fraction(1, GIF_TICKS), fps, 0
        self.graph = Graph()
        rgb = av.VideoFormat("rgb24", width, height)
        self.source = self.graph.add_buffer(width=width, height=height, format=rgb, time_base=self.tick)
        split, make = self.graph.add("split"), self.graph.add("palettegen", "reserve_transparent=0")
        use, self.sink = self.graph.add("paletteuse", "dither=none"), self.graph.add("buffersink")
        self.source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(make, 1, 0)
        make.link_to(use, 0, 1)
        use.link_to(self.sink)
        self.graph.configure()
        last = str(round(GIF_TICKS / fps))  # no frame behind it says how long the last one stays
        self.container = av.open(str(path), "w", format="gif", options={"final_delay": last})
        self.stream: Any = self.container.add_stream("gif", rate=GIF_TICKS)
        self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "pal8"

    def add(self, image: Image) -> None:
        frame = _av_frame(image)
        frame.pts, frame.time_base = round(self.count * GIF_TICKS / self.fps), self.tick
        self.count += 1
        self.source.push(frame)

    def close(self) -> None:
        try:
            self.source.push(None)
            with suppress(av.error.EOFError):
                while True:
                    self.container.mux(self.stream.encode(self.sink.pull()))
            self.container.mux(self.stream.encode())
        finally:
            self.container.close()


class PngEncoder:
    """frame_00000.png, frame_00001.png, ... in a folder."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path, self.count = path, 0

    def add(self, image: Image) -> None:
        (self.path / f"frame_{self.count:05d}.png").write_bytes(encode_png(image, _QUICK))
        self.count += 1

    def close(self) -> None:
        pass


def decoded_rgb(frame: Any, format: str = "rgb24") -> Image:
    """The picture uint8 [H, W, 3] of a decoded ``av.VideoFrame``, before any rotation that its file asks for; as "rgba"
    [H, W, 4].
    """
    return frame.to_ndarray(format=format, src_colorspace=source_matrix(frame), interpolation=_ROUNDED)


def source_matrix(frame: Any) -> str | None:
    """The colour matrix of a decoded frame that names none itself; None: use the frame's."""
    unspecified = frame.colorspace in (0, 2) and not frame.format.is_rgb  # 0 means RGB, but some YUV files have it
    if not unspecified or len(frame.planes) < 3:
        return None
    return _matrix(frame.height)


def _matrix(height: int) -> str:
    return "ITU709" if height >= HD_LINES else "ITU601"


def _av_frame(image: Image) -> Any:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")


def encode_png(image: Image, options: Mapping[str, str] | None = None) -> bytes:
    """A PNG file of an image uint8 [H, W, 3], with options of FFmpeg's encoder."""
    codec: Any = av.CodecContext.create("png", "w")
    codec.options = dict(options or {})
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *image.shape[:2], "rgb24", Fraction(1)
    return b"".join(bytes(packet) for packet in [*codec.encode(_av_frame(image)), *codec.encode(None)])
