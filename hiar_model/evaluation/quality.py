"""How one video keeps its quality from its first eighth to its last, measured block by block as it is made.

For videos of any model, statistics of the frames; for a toy world also the share of frames that its oracle calls valid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from ..common.checks import whole
from ..io.plot import COLOURS
from ..io.video import Frames
from ..toy.oracle import ToyOracle

PARTS = 8
"""Stretches that a video is judged in."""
LABELS = {
    "valid": "valid frames",
    "contrast": "contrast",
    "colour_saturation": "colour saturation",
    "sharpness": "sharpness",
    "change": "change of colours since the first block",
}
"""What is measured, in words; all from 0 to 1."""
ORDER_COLOURS = dict(zip(("block_first", "stream", "wavefront", "step_first"), COLOURS, strict=False))
"""In every plot; orders with the same result have colours of their own too."""
SAMPLED = 2**16
"""Pixels of a large frame, at least, of which histograms are made."""
AT_ONCE = 2**16
"""Pixels that small frames are collected to before they are measured, which is quicker than block by block."""
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601


def ordinal(parts: int) -> str:
    """The name of one of so many stretches, such as "eighth"."""
    return {4: "quarter", 5: "fifth", 6: "sixth", 8: "eighth", 10: "tenth"}.get(parts, f"1/{parts}")


def frame_statistics(frames: Frames) -> dict[str, np.ndarray]:
    """Statistics of frames uint8 [F, H, W, 3] that need no truth, float64 [F] each, in units of the full range.

    contrast            standard deviation of the luma over a frame
    colour_saturation   mean over the pixels of the largest channel less the smallest
    sharpness           root mean square of the Laplacian of the luma
    """
    red, green, blue = (frames[..., channel] for channel in range(3))
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    luma = sum(np.multiply(frames[..., i], weight / 255, dtype=np.float32) for i, weight in enumerate(LUMA))
    assert isinstance(luma, np.ndarray)
    laplacian = -4 * luma[:, 1:-1, 1:-1]
    for neighbours in (luma[:, 2:, 1:-1], luma[:, :-2, 1:-1], luma[:, 1:-1, 2:], luma[:, 1:-1, :-2]):
        laplacian += neighbours
    return {
        "contrast": luma.std(axis=(1, 2), dtype=np.float64),
        "colour_saturation": spread.mean(axis=(1, 2), dtype=np.float64) / 255,
        "sharpness": np.sqrt(np.square(laplacian).mean(axis=(1, 2), dtype=np.float64)),
    }


def channel_cdf(frames: Frames) -> np.ndarray:
    """Cumulative histograms of the channels of frames uint8 [F, H, W, 3]: float64 [F, 3, 256]. Of large frames only
    every so many-th row and column counts."""
    stride = max(1, math.isqrt(frames.shape[1] * frames.shape[2] // SAMPLED))
    frames = frames[:, ::stride, ::stride]
    count, pixels = len(frames), frames.shape[1] * frames.shape[2]
    offsets = 256 * np.arange(3 * count).reshape(count, 1, 1, 3)
    counted = np.bincount((frames + offsets).ravel(), minlength=3 * count * 256)
    return counted.reshape(count, 3, 256).cumsum(2) / pixels


class QualityMeter:
    """Adds up the quality of one video while it is made; its size does not depend on the video's length.

    Args:
        num_frames: of the whole video. parts: stretches of nearly equal length.
        oracle, prompt: of a toy world: "valid" is measured too.

    >>> meter = QualityMeter(4, parts=2)
    >>> meter.add(np.zeros((2, 8, 8, 3), np.uint8))
    >>> meter.add(np.full((2, 8, 8, 3), 51, np.uint8))
    >>> [round(x, 6) for x in meter.by_part()["change"]]
    [0.0, 0.2]
    """

    def __init__(
        self, num_frames: int, parts: int = PARTS, oracle: ToyOracle | None = None, prompt: str | None = None
    ) -> None:
        self.num_frames, self.parts = whole("num_frames", num_frames, 1), whole("parts", parts, 1)
        if self.num_frames < self.parts:
            raise ValueError(f"a video is judged in {parts} stretches: at least {parts} frames, got {num_frames}")
        self.oracle, self.prompt = oracle, prompt
        self.frames_done = 0
        self._first: np.ndarray | None = None  # cumulative histograms of the first block
        self._waiting: list[Frames] = []
        self._counts = np.zeros(self.parts)
        self._sums: dict[str, np.ndarray] = {}

    def add(self, frames: Frames) -> None:
        """The next frames, uint8 [f, H, W, 3]; the first call gives the first block, with which others are compared."""
        self.frames_done += len(frames)
        if self._first is None:
            self._first = channel_cdf(frames).mean(0)
        self._waiting.append(frames)
        pixels = sum(block.shape[0] * block.shape[1] * block.shape[2] for block in self._waiting)
        if pixels >= AT_ONCE or self.frames_done >= self.num_frames:
            self._measure(np.concatenate(self._waiting))
            self._waiting = []

    def _measure(self, frames: Frames) -> None:
        """Add up the values of the last frames."""
        values: dict[str, np.ndarray] = {}
        if self.oracle is not None and self.prompt is not None:
            reading = self.oracle.evaluate(torch.from_numpy(frames), self.prompt)
            values["valid"] = reading.valid.double().numpy()
        values |= frame_statistics(frames)
        # Between two distributions on a line the area between the cumulative ones is how far values have to move.
        values["change"] = np.abs(channel_cdf(frames) - self._first).mean(1).sum(1) / 255
        numbers = np.arange(self.frames_done - len(frames), self.frames_done)
        part = ((numbers + 1) * self.parts - 1) // self.num_frames  # as Reading.parts cuts
        self._counts += np.bincount(part, minlength=self.parts)
        for name, of in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.bincount(part, of, minlength=self.parts)

    def by_part(self) -> Mapping[str, list[float]]:
        """Means over the frames of each stretch, by the names of :data:`LABELS`. ValueError if frames are missing."""
        if self.frames_done != self.num_frames:
            raise ValueError(f"{self.frames_done} of {self.num_frames} frames were measured")
        return {name: [float(x) for x in sums / self._counts] for name, sums in self._sums.items()}
