"""Frames of a video that are not made but given: conditioning frames inside generated blocks.

Such a frame is clean from the start, as a prefix is: at every step the network sees it at noise level 0, in the denoise
tasks of its block as in the cache tasks, and the block's other frames are made around it. This is a rule about blocks,
whatever the task order: all orders still agree.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..schedule.plan import Plan
from .shapes import require_shape


class FixedFrames:
    """The given frames of one video, by block.

    Args:
        frames: number of a latent frame, counted from the start of the video -> its clean latents [B, C, H, W].
        plan: of the tasks. num_frames: latent frames of the video; None: endless. shape: (B, C, H, W) of a frame.
        like: a tensor with the device and dtype of the latents.

    Raises:
        ValueError: a frame of the prefix or behind the end, latents of another shape.
    """

    def __init__(
        self,
        frames: Mapping[int, Tensor],
        plan: Plan,
        num_frames: int | None,
        shape: tuple[int, ...],
        like: Tensor,
    ) -> None:
        self.numbers = sorted(frames)
        self.blocks: dict[int, dict[int, Tensor]] = {}
        for frame in self.numbers:
            if frame < plan.prefix_frames or (num_frames is not None and frame >= num_frames):
                end = "" if num_frames is None else f" to {num_frames - 1}"
                raise ValueError(f"conditioning_frames must be in {plan.prefix_frames}{end}, got {frame}")
            require_shape(f"conditioning_frames[{frame}]", frames[frame], shape)
            block = plan.block_of(frame)
            inside = frame - plan.block_frames(block)[0]
            self.blocks.setdefault(block, {})[inside] = frames[frame].to(like.device, like.dtype)

    def inside(self, block: int) -> Mapping[int, Tensor]:
        """The given frames of a block: number inside the block -> latents [B, C, H, W]."""
        return self.blocks.get(block, {})

    def put(self, block: int, latents: Tensor) -> Tensor:
        """Write the given frames of a block into its latents [B, F, C, H, W], in place; returns them."""
        for number, frame in self.inside(block).items():
            latents[:, number].copy_(frame)
        return latents
