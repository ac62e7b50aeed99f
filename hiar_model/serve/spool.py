"""The blocks of one video on disk, as fragments of an mp4: appended, cut off, made an mp4 that players seek in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import av

from ..io.atomic import atomic, atomic_write, cannot_write, discard, publish, temporary
from ..io.encoders import Mp4Encoder
from ..io.fragments import FragmentEncoder
from ..io.video import Frames, record_path

SUFFIX = ".spool"
LARGEST = 4 << 30
"""Bytes of one live video: an endless one must not fill the disk."""


class TooLarge(OSError):
    """A video that takes more than the room that there is for one; waiting, as for a full disk, would not help."""


class ShortSpool(ValueError):
    """It holds fewer blocks than it should."""


class Spool:
    """A file of the init segment and a fragment for each block: an mp4 already, but one without an index.

    Args:
        path: of the file; one that is there is gone on with, unless it has another init segment. fragments: the encoder
            of the blocks. largest: bytes that it may have.

    Raises:
        OSError: one line: it cannot be written.
    """

    def __init__(self, path: Path, fragments: FragmentEncoder, largest: int = LARGEST) -> None:
        self.path, self.fragments, self.largest, init = path, fragments, largest, fragments.init
        try:
            with path.open("ab+") as file:
                file.seek(0)
                if file.read(len(init)) != init:
                    file.truncate(0)
                    file.write(init)
        except OSError as error:
            raise cannot_write(path, error) from error
        self.blocks = sum(1 for _ in self._ends())

    def append(self, fragment: bytes) -> None:
        """Add the next block; a part of one, where the disk is full, is removed again."""
        before = self.path.stat().st_size
        if before + len(fragment) > self.largest:
            raise TooLarge(f"cannot write {self.path}: it would be larger than {self.largest / (1 << 30):g} GiB")
        try:
            with self.path.open("ab") as file:
                file.write(fragment)
        except OSError as error:
            os.truncate(self.path, before)
            raise cannot_write(self.path, error) from error
        self.blocks += 1

    def encode(self, frames: Frames, first_frame: int) -> bytes:
        """Append a block's frames, uint8 [f, H, W, 3], and return its fragment."""
        fragment = self.fragments.fragment(frames, first_frame)
        self.append(fragment)
        return fragment

    def truncate(self, blocks: int) -> None:
        """Keep the first blocks only.

        Raises:
            ShortSpool: there are not so many.
        """
        ends = [len(self.fragments.init)]
        for end in self._ends():
            if len(ends) > blocks:
                break
            ends.append(end)
        if len(ends) <= blocks:
            raise ShortSpool(f"{self.path} holds {len(ends) - 1} blocks, not {blocks}")
        os.truncate(self.path, ends[blocks])
        self.blocks = blocks

    def sync(self) -> None:
        """Have all blocks on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file."""
        discard(self.path)

    def _ends(self) -> Iterator[int]:
        """Where each whole block ends; what follows the last, of a process that was killed, counts for nothing."""
        at, size = 0, self.path.stat().st_size
        with self.path.open("rb") as file:
            while at + 8 <= size:
                file.seek(at)
                head = file.read(8)
                length = int.from_bytes(head[:4], "big")
                if length < 8 or at + length > size:
                    return
                at += length
                if head[4:] == b"mdat":
                    yield at

    def write_mp4(self, target: Path, metadata: Mapping[str, Any]) -> int:
        """Write the video as an mp4 that any player can seek in, with its record beside it; no frame is encoded again:
        it is what the viewer has seen.

        Returns:
            How many frames it has.

        Raises:
            OSError: one line: it cannot be written; nothing is left.
            ValueError: there is no block.
        """
        if not self.blocks:
            raise ValueError(f"{self.path} holds no block yet")
        with atomic(target) as partial:
            frames = _remux(self.path, partial)
        write_metadata(target, frames, self.fragments.fps, metadata)
        return frames


def write_metadata(target: Path, frames: int, fps: float, metadata: Mapping[str, Any]) -> None:
    """Write the record of a video beside it."""
    about = {"file": target.name, "frames": frames, "fps": fps, **metadata}
    atomic_write(record_path(target), json.dumps(about, indent=2, ensure_ascii=False) + "\n")


class Transcoding:
    """Encodes the frames of a lossless spool as :class:`.VideoWriter` would have encoded them, a few at a time, since
    it may take minutes: :meth:`advance`.
    """

    def __init__(self, spool: Spool, target: Path) -> None:
        self.target, self.partial, self.frames, fragments = target, temporary(target), 0, spool.fragments
        enlarged = fragments.enlarged_size != fragments.frame_size
        try:
            self.encoder = Mp4Encoder(self.partial, fragments.fps, *fragments.enlarged_size, quick=enlarged)
        except OSError as error:
            raise cannot_write(target, error) from error
        self.decoded = _decoded(spool.path)

    def advance(self, count: int) -> bool:
        """Encode the next frames; returns whether that was all and the file is there. OSError: it cannot be written."""
        try:
            for _ in range(count):
                if (frame := next(self.decoded, None)) is None:
                    self.encoder.close()
                    publish(self.partial, self.target)
                    return True
                frame.pict_type = 0  # else x264 would make a keyframe wherever the spool has one
                self.encoder.add_yuv(frame)
                self.frames += 1
        except OSError as error:
            self.discard()
            raise cannot_write(self.target, error) from error
        return False

    def discard(self) -> None:
        """Give up: nothing is left."""
        with suppress(Exception):
            self.encoder.close()
        discard(self.partial)


def _decoded(path: Path) -> Iterator[Any]:
    with av.open(str(path), "r", format="mp4") as file:
        yield from file.decode(file.streams.video[0])


def _remux(path: Path, target: Path) -> int:
    """Returns how many frames there are."""
    frames, options = 0, {"movflags": "+faststart"}
    with (
        av.open(str(path), "r", format="mp4") as fragments,
        av.open(str(target), "w", format="mp4", options=options) as out,
    ):
        stream = fragments.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in fragments.demux(stream):
            if packet.dts is None:
                continue
            packet.stream = copy
            out.mux(packet)
            frames += 1
    return frames
