"""Frames for viewers that watch while they are made: a block of frames at a time, as a fragment of an mp4 that browsers
play through MediaSource, or as images one behind the other.

ISO/IEC 14496-12 names the boxes: an init segment (ftyp, moov) tells what follows, a fragment (moof, mdat) holds frames.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import av
import numpy as np

from ..common.checks import one_of, whole
from .encoders import Mp4Encoder
from .video import LEAST_SIDE, Frames, check_fps, upscale

MUXER = {
    # No index in front, positions counted from the fragment itself, and the times that the frames have: a viewer may
    # begin at any of them, and a fork goes back.
    "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont",
    "avoid_negative_ts": "disabled",
}
X264 = {"crf": "18", "preset": "superfast", "bf": "0", "threads": "1"}
"""Frames in the order in which they are shown, and no more cores than one: the others make the next block."""
LOSSLESS = {**X264, "crf": "0", "qp": "0", "preset": "ultrafast"}
"""What is decoded is what went in, in yuv420p."""
PICTURE_FORMATS = ("webp", "jpeg")


class FragmentEncoder:
    """Encodes the blocks of a video, each by itself: it begins with a keyframe, so a viewer may begin there too.

    Args:
        fps: frames per second. height, width: pixels of the frames that come in.
        least_side: frames with a shorter side are enlarged, see :func:`hiar_model.io.video.upscale`; 1: never.
        lossless: for another encoder, not for viewers: what is decoded is what went in, in yuv420p.

    Attributes:
        init: the init segment, the same for every block. mime: what MediaSource calls the format (RFC 6381).
        size: (height, width) in pixels of the frames that a viewer gets, which are even. enlarged_size: before that.

    Raises:
        ValueError: an illegal size or rate; FFmpeg was built without x264.

    >>> encoder = FragmentEncoder(12, height=32, width=32)
    >>> block = encoder.fragment(np.zeros((3, 32, 32, 3), np.uint8), first_frame=6)
    >>> with av.open(io.BytesIO(encoder.init + block)) as video:
    ...     [frame.time for frame in video.decode(video=0)][0], encoder.size, encoder.mime
    (0.5, (256, 256), 'video/mp4; codecs="avc1.64000C"')
    """

    def __init__(
        self, fps: float, height: int, width: int, least_side: int = LEAST_SIDE, lossless: bool = False
    ) -> None:
        if "libx264" not in av.codecs_available:
            raise ValueError(f"format 'mp4' needs FFmpeg with libx264; legal here: {', '.join(PICTURE_FORMATS)}")
        self.fps, self.least_side = check_fps(fps), whole("least_side", least_side, 1)
        self.frame_size = whole("height", height, 1), whole("width", width, 1)
        self.x264 = LOSSLESS if lossless else X264
        black = upscale(np.zeros((1, *self.frame_size, 3), np.uint8), self.least_side)
        self.enlarged_size = black.shape[1:3]
        self.size = black.shape[1] + black.shape[1] % 2, black.shape[2] + black.shape[2] % 2
        self.init, _ = self._encode(black, 0)
        self.mime = f'video/mp4; codecs="avc1.{_profile(self.init)}"'

    def fragment(self, frames: Frames, first_frame: int) -> bytes:
        """A fragment of frames uint8 [f, H, W, 3]; the first is shown at ``first_frame / fps`` seconds."""
        if frames.shape[1:3] != self.frame_size:
            raise ValueError(f"frames must be of {self.frame_size} (height, width), got {frames.shape[1:3]}")
        init, fragment = self._encode(upscale(frames, self.least_side), whole("first_frame", first_frame, 0))
        return fragment if init == self.init else init + fragment  # players accept a new one anywhere

    def _encode(self, frames: Frames, first: int) -> tuple[bytes, bytes]:
        """(init segment, fragment)."""
        file = io.BytesIO()
        encoder = Mp4Encoder(file, self.fps, *frames.shape[1:3], options=MUXER, x264=self.x264, first=first)
        try:
            for image in frames:
                encoder.add(image)
        finally:
            encoder.close()
        boxes = list(split_boxes(file.getvalue()))
        head, body = ((b"ftyp", b"moov"), (b"moof", b"mdat"))
        return b"".join(b for name, b in boxes if name in head), b"".join(b for name, b in boxes if name in body)


def split_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The outermost boxes of an mp4: (name, the whole box)."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at : at + size]
        at += size


def _profile(init: bytes) -> str:
    """Profile, constraints and level, six hexadecimal digits, of the decoder configuration in an init segment."""
    at = init.index(b"avcC") + 5  # behind the version
    return init[at : at + 3].hex().upper()


def pictures(frames: Frames, picture_format: str) -> bytes:
    """Frames uint8 [f, H, W, 3] as images, each behind its length in bytes (32 bits, big-endian). Small frames, which
    the viewer enlarges, are kept exactly in WebP.

    Raises:
        ValueError: an unknown format.

    >>> packed = pictures(np.zeros((2, 32, 32, 3), np.uint8), "webp")
    >>> [image[8:12] for image in split_pictures(packed)]
    [b'WEBP', b'WEBP']
    """
    from PIL import Image

    one_of("picture_format", picture_format, PICTURE_FORMATS)
    exact = min(frames.shape[1:3]) < LEAST_SIDE
    options = {"webp": {"quality": 85, "method": 0, "lossless": exact}, "jpeg": {"quality": 90, "subsampling": 0}}
    packed = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, picture_format, **options[picture_format])
        packed.append(struct.pack(">I", file.tell()) + file.getvalue())
    return b"".join(packed)


def split_pictures(packed: bytes) -> Iterator[bytes]:
    """The images that :func:`pictures` packed, as files."""
    at = 0
    while at < len(packed):
        (size,) = struct.unpack_from(">I", packed, at)
        yield packed[at + 4 : at + 4 + size]
        at += 4 + size
