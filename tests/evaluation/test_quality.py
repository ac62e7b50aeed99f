"""Quality of one video by stretches: figures worked out by hand, and the same however the frames come."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hiar_model.evaluation.quality import LABELS, QualityMeter, channel_cdf, frame_statistics
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.world import ToyWorld

pytestmark = pytest.mark.cpu


def measured(frames, sizes, parts=4, **truth):
    meter = QualityMeter(len(frames), parts, **truth)
    for block in np.split(frames, np.cumsum(sizes)[:-1]):
        meter.add(block)
    return meter.by_part()


def test_statistics_of_pictures_worked_out_by_hand():
    halves = np.zeros((1, 8, 8, 3), np.uint8)
    halves[:, :, 4:] = 255  # black beside white
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    of = {name: values[0] for name, values in frame_statistics(np.concatenate([halves])).items()}
    assert of["contrast"] == pytest.approx(0.5) and of["colour_saturation"] == 0
    # Of the 6 columns inside two touch the edge, where the Laplacian is 1 or -1.
    assert of["sharpness"] == pytest.approx((2 / 6) ** 0.5)
    of = {name: values[0] for name, values in frame_statistics(red).items()}
    assert (of["contrast"], of["colour_saturation"], of["sharpness"]) == pytest.approx((0, 1, 0), abs=1e-6)


def test_cumulative_histograms():
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    for image, cdf in zip(frames, channel_cdf(frames), strict=True):
        for channel in range(3):
            histogram, _ = np.histogram(image[..., channel], 256, (0, 256))
            np.testing.assert_allclose(cdf[channel], histogram.cumsum() / 35)


def test_a_sample_of_a_large_frame_stands_for_it():
    ramp = np.linspace(0, 255, 1000).astype(np.uint8)
    frame = np.stack(np.broadcast_arrays(ramp, ramp[:800, None], 7), axis=2)[None]
    whole = np.stack([np.histogram(frame[..., i], 256, (0, 256))[0].cumsum() / 800_000 for i in range(3)])
    assert np.abs(channel_cdf(frame)[0] - whole).max() < 0.01


def test_change_is_how_far_values_move_wherever_they_are():
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    frames[:, :, :4] = 100
    frames[1] = frames[1][:, ::-1]  # the same colours elsewhere
    frames[2] += 51  # all values move by a fifth
    frames[3, :, :4, 0] = 202  # half of one channel of three by two fifths
    assert measured(frames, [1, 1, 1, 1])["change"] == pytest.approx([0, 0, 0.2, 0.4 / 6], abs=1e-9)


@pytest.mark.parametrize("sizes", [[7, 8, 8], [1] * 23, [3, 20]], ids=str)
def test_blocks_of_any_size_give_the_same_figures(sizes):
    frames = np.random.default_rng(1).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
    parts = [frames[23 * i // 4 : 23 * (i + 1) // 4] for i in range(4)]  # as Reading.parts cuts
    of = measured(frames, sizes)
    for name, values in frame_statistics(frames).items():
        assert of[name] == pytest.approx([frame_statistics(part)[name].mean() for part in parts]), name
        assert len(values) == 23
    assert list(of) == [name for name in LABELS if name != "valid"]


def test_valid_frames_are_the_oracles():
    video = ToyWorld().sample_batch(1, 12, torch.Generator().manual_seed(0))
    frames = ToyCodec.to_uint8(video.videos)[0].numpy()
    prompt = video.prompts[0].text()
    frames = np.concatenate([frames[:6], np.full_like(frames[6:], 20)])  # then nothing
    of = measured(frames, [3, 3, 3, 3], 2, oracle=ToyOracle(), prompt=prompt)
    assert of["valid"] == [1, 0]


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least 8 frames, got 7"):
        QualityMeter(7, 8)
    meter = QualityMeter(2, 1)
    meter.add(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="1 of 2 frames"):
        meter.by_part()
