"""Blocks for viewers: fragments that, one behind the other, are the video; images that are the frames."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from refusals import refused

from hiar_model.io.fragments import FragmentEncoder, pictures, split_boxes, split_pictures
from hiar_model.io.video import upscale

pytestmark = pytest.mark.cpu

FPS = 12


def clip(frames: int = 9, height: int = 32, width: int = 32, shift: int = 0) -> np.ndarray:
    """A soft disc that moves right, around the edge, over a dark ground."""
    y, x = np.mgrid[:height, :width]
    images = []
    for i in range(shift, shift + frames):
        cover = np.clip(5.5 - np.hypot((x - 2 * i) % width - width / 2, y - height / 2), 0, 1)[..., None]
        images.append(cover * (230, 30, 36) + (1 - cover) * (20, 23, 36))
    return np.stack(images).round().astype(np.uint8)


def decode(data: bytes) -> tuple[np.ndarray, list[int], list[bool]]:
    """Frames, their numbers by their times, and which are keyframes."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    images = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return images, [round(frame.time * FPS) for frame in frames], [bool(frame.key_frame) for frame in frames]


@pytest.mark.parametrize("size", [(32, 32), (30, 45), (256, 300)])
def test_blocks_one_behind_the_other_are_the_video(size):
    """Odd sizes too; blocks of one and of several frames, the first not at 0."""
    frames, encoder = clip(9, *size), FragmentEncoder(FPS, *size)
    cuts = [(0, 3), (3, 4), (4, 9)]
    blocks = [encoder.fragment(frames[a:b], 100 + a) for a, b in cuts]
    images, numbers, keys = decode(b"".join([encoder.init, *blocks]))
    assert numbers == list(range(100, 109))
    assert [i for i, key in enumerate(keys) if key] == [0, 3, 4]
    enlarged = upscale(frames)
    assert images.shape[1:3] == encoder.size
    error = np.abs(images[:, : enlarged.shape[1], : enlarged.shape[2]].astype(int) - enlarged)
    assert error.mean() < 2 and np.abs(error).mean((1, 2, 3)).max() < 2
    for (a, b), block in zip(cuts, blocks, strict=True):  # each by itself, and as one fragment
        alone, numbers, _ = decode(encoder.init + block)
        assert numbers == list(range(100 + a, 100 + b)) and np.array_equal(alone, images[a:b])
        assert [name for name, _ in split_boxes(block)] == [b"moof", b"mdat"]


def test_the_format_is_that_of_the_stream_whatever_comes():
    """MediaSource is told once, before there are frames; noise needs the same level as black."""
    encoder = FragmentEncoder(FPS, 32, 32)
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    block = encoder.fragment(noise, 0)
    assert [name for name, _ in split_boxes(block)] == [b"moof", b"mdat"]  # no init segment of its own
    assert [name for name, _ in split_boxes(encoder.init)] == [b"ftyp", b"moov"]
    assert encoder.init[encoder.init.index(b"avcC") + 5 :].startswith(bytes.fromhex(encoder.mime[-7:-1]))
    with av.open(io.BytesIO(encoder.init + block)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert float(container.streams.video[0].time_base) <= 1 / 10000


@pytest.mark.parametrize("fps", [24000 / 1001, 16, 0.5])
def test_the_rate_is_kept(fps):
    encoder = FragmentEncoder(fps, 32, 32)
    with av.open(io.BytesIO(encoder.init + encoder.fragment(clip(6), 24))) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, (24 + np.arange(6)) / fps, atol=1e-4)


def test_frames_of_another_size_and_bad_numbers_are_refused():
    encoder = FragmentEncoder(FPS, 32, 32)
    with refused(r"frames must be of \(32, 32\) \(height, width\), got \(32, 48\)"):
        encoder.fragment(clip(1, 32, 48), 0)
    with refused("first_frame must be a whole number of at least 0, got 0.5"):
        encoder.fragment(clip(1), 0.5)
    with refused("fps"):
        FragmentEncoder(0, 32, 32)


def test_without_x264_the_other_formats_are_named(monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    with refused("libx264; legal here: webp, jpeg"):
        FragmentEncoder(FPS, 32, 32)


def read_images(packed: bytes) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in split_pictures(packed)])


def test_images_are_the_frames():
    frames = clip(4, 32, 48)
    assert np.array_equal(read_images(pictures(frames, "webp")), frames)
    jpeg = read_images(pictures(frames, "jpeg"))
    assert np.abs(jpeg.astype(int) - frames).mean() < 2
    large = clip(2, 256, 256)
    packed = pictures(large, "webp")
    assert np.abs(read_images(packed).astype(int) - large).mean() < 2 and len(packed) < large.size / 50
    with refused("picture_format.*'png'"):
        pictures(frames, "png")
