"""Fragments on disk: cut off, gone on with after a crash, made an mp4 without encoding again."""

from __future__ import annotations

import errno
import json
import os

import av
import numpy as np
import pytest
from altered import altered

from hiar_model.io.fragments import FragmentEncoder
from hiar_model.io.video import VideoWriter
from hiar_model.serve import spool as spool_module
from hiar_model.serve.live import Piece
from hiar_model.serve.protocol import StartMessage
from hiar_model.serve.session import ViewerSession
from hiar_model.serve.spool import Spool, TooLarge, Transcoding

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("equal_mp4")]

BLOCK = 3


@pytest.fixture(scope="module")
def fragments():
    return FragmentEncoder(12, 32, 32, least_side=1)


def block(number: int) -> np.ndarray:
    """Frames of one grey each, whose brightness tells which they are."""
    return np.stack([np.full((32, 32, 3), 8 * (BLOCK * number + i), np.uint8) for i in range(BLOCK)])


def decoded(path) -> list[tuple[float, int]]:
    """(seconds, number) of each frame."""
    with av.open(str(path)) as file:
        return [(round(float(f.time), 4), round(f.to_ndarray(format="rgb24").mean() / 8)) for f in file.decode(video=0)]


def test_a_spool_becomes_an_mp4(tmp_path, fragments):
    spool = Spool(tmp_path / "a.spool", fragments)
    for number in range(4):
        spool.encode(block(number), BLOCK * number)
    spool.truncate(2)  # a fork
    spool.encode(block(7), BLOCK * 2)
    assert spool.blocks == 3
    assert spool.write_mp4(tmp_path / "a.mp4", {"prompt": "grey"}) == 9
    numbers = [*range(6), 21, 22, 23]
    for file in ("a.mp4", "a.spool"):
        assert decoded(tmp_path / file) == [(round(i / 12, 4), n) for i, n in enumerate(numbers)]
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "a browser seeks in it before all has come"
    assert json.loads((tmp_path / "a.mp4.json").read_text()) == {
        "file": "a.mp4", "frames": 9, "fps": 12.0, "prompt": "grey",
    }  # fmt: skip


def test_what_a_killed_process_left_counts_for_nothing(tmp_path, fragments):
    spool = Spool(tmp_path / "a.spool", fragments)
    for number in range(2):
        spool.encode(block(number), BLOCK * number)
    whole = spool.path.read_bytes()
    for half in (fragments.fragment(block(2), 6)[:-5], bytes(100)):  # zeros: of a file system whose power was cut
        spool.path.write_bytes(whole + half)
        again = Spool(spool.path, fragments)
        assert again.blocks == 2
        again.truncate(2)
        assert spool.path.read_bytes() == whole
    with pytest.raises(ValueError, match="holds 2 blocks, not 3"):
        again.truncate(3)


def test_a_file_of_other_frames_is_begun_anew(tmp_path, fragments):
    spool = Spool(tmp_path / "a.spool", fragments)
    spool.encode(block(0), 0)
    assert Spool(spool.path, fragments).blocks == 1
    assert Spool(spool.path, FragmentEncoder(12, 48, 32, least_side=1)).blocks == 0
    assert Spool(spool.path, fragments).blocks == 0


def test_an_empty_spool_is_no_video(tmp_path, fragments):
    with pytest.raises(ValueError, match="no block"):
        Spool(tmp_path / "a.spool", fragments).write_mp4(tmp_path / "a.mp4", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.spool"]


def test_an_endless_video_does_not_fill_the_disk(tmp_path, fragments):
    spool = Spool(tmp_path / "a.spool", fragments)
    spool.encode(block(0), 0)
    before, fragment = spool.path.read_bytes(), fragments.fragment(block(1), 3)
    spool.largest = len(before) + len(fragment) - 1
    with pytest.raises(TooLarge, match="cannot write .*a.spool: it would be larger than"):
        spool.append(fragment)
    assert spool.path.read_bytes() == before and spool.blocks == 1
    spool.largest = len(before) + len(fragment)
    spool.append(fragment)
    assert spool.blocks == 2


def test_sync_has_the_file_on_the_disk(tmp_path, fragments, monkeypatch):
    spool, synced = Spool(tmp_path / "a.spool", fragments), []
    note = lambda descriptor: synced.append(os.fstat(descriptor).st_ino)  # noqa: E731
    monkeypatch.setattr(spool_module, "os", altered(os, fsync=note))
    spool.sync()
    assert synced == [spool.path.stat().st_ino]


def test_a_full_disk_leaves_whole_blocks(tmp_path, fragments, monkeypatch):
    spool = Spool(tmp_path / "a.spool", fragments)
    spool.encode(block(0), 0)
    whole = spool.path.read_bytes()
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))  # the real error, in the middle of a block
    try:
        with pytest.raises(OSError, match="cannot write .*a.spool"):
            spool.encode(block(1), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert spool.path.read_bytes() == whole and spool.blocks == 1


def test_a_session_goes_on_without_what_the_disk_has_no_room_for(tmp_path, fragments, monkeypatch):
    def full(self, fragment):
        raise OSError(errno.ENOSPC, "No space left on device")

    session = ViewerSession(StartMessage(1, "grey"), None, "")
    session.fragments = fragments
    session.open_spool(tmp_path / "a.spool", 0)
    piece = [Piece(number, BLOCK * number, block(number), 0, "grey") for number in range(2)]
    shown = fragments.init + session.encode(piece[0])
    monkeypatch.setattr(Spool, "append", full)
    shown += session.encode(piece[1])
    assert session.spool is None and not list(tmp_path.iterdir()), "its bytes are free for others"
    (tmp_path / "shown.mp4").write_bytes(shown)
    assert [number for _, number in decoded(tmp_path / "shown.mp4")] == list(range(6))


@pytest.mark.parametrize(("height", "width", "least_side"), [(32, 32, 64), (32, 47, 1), (719, 32, 1)])
def test_a_lossless_spool_becomes_the_file_that_is_written_without_one(tmp_path, height, width, least_side):
    """Byte for byte: enlarged, of an odd size, and just below HD, where the even size is above."""
    frames = np.random.default_rng(0).integers(0, 255, (7, height, width, 3), np.uint8)
    with VideoWriter(tmp_path / "direct.mp4", 12, least_side=least_side) as writer:
        writer.write(frames)
    encoder = FragmentEncoder(12, height, width, least_side=least_side, lossless=True)
    spool = Spool(tmp_path / "a.spool", encoder)
    for first in (0, 3, 6):
        spool.encode(frames[first : first + 3], first)
    transcoding = Transcoding(spool, tmp_path / "a.mp4")
    assert [transcoding.advance(3) for _ in range(3)] == [False, False, True] and transcoding.frames == 7
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "direct.mp4").read_bytes()


def test_a_transcoding_that_fails_leaves_nothing(tmp_path):
    spool = Spool(tmp_path / "a.spool", FragmentEncoder(12, 32, 32, least_side=1, lossless=True))
    spool.encode(block(0), 0)
    transcoding = Transcoding(spool, tmp_path / "a.mp4")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    transcoding.encoder.add_yuv = full
    with pytest.raises(OSError, match=r"cannot write .*a\.mp4: No space left on device") as error:
        transcoding.advance(24)
    assert error.value.errno == errno.ENOSPC and [path.name for path in tmp_path.iterdir()] == ["a.spool"]
