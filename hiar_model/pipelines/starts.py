"""What a video takes up from files: its first frames, images over time (a storyboard), and its last frame.

- An image at frame 0, or a clip, is a prefix of the rollout: its frames come first, unchanged.
- An image at a later frame is the first latent frame of the block that begins there: a conditioning frame, clean at
  every step, around which the block is made. It is shown as the decoder has it.
- Before a last frame, the last blocks are infilled: made at once, in bidirectional attention, between the block before
  them and the last frame, together as many as the model has seen in training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.image_file import ImageFile, ImageLike, image_files
from ..config import ExecutionConfig
from ..models.quantized_linear import quantized
from ..models.vae import to_pixels
from ..models.video_model import VideoModel
from ..rollout import FinishedBlock, Rollout
from ..rollout.infill import infill
from ..schedule.plan import Plan
from .conditioning import ConditioningFrames, read_conditioning, read_picture


@dataclass(frozen=True, eq=False)
class Starts:
    """The frames of a video that come from files, at its size.

    Attributes:
        first: frames that it starts with, or None. later: pixel frame -> image. last: the last frame, or None.
        files: of the images of ``later``. names: of all files as they are typed, for the metadata.
    """

    first: ConditioningFrames | None
    later: Mapping[int, ConditioningFrames]
    last: ConditioningFrames | None
    files: Mapping[int, ImageFile]
    names: tuple[str, ...]

    @classmethod
    def read(
        cls,
        model: VideoModel,
        fps: float,
        image: ImageLike | Sequence[ImageLike] | None,
        extend: str | os.PathLike[str] | None,
        last_frame: str | os.PathLike[str] | None,
    ) -> Starts:
        """Read the files; ValueError of one line for what :func:`.read_conditioning` and ``image_files`` refuse."""
        files = {file.frame: file for file in image_files(image)}
        size, step = model.pixel_size, model.temporal_compression
        first = None if 0 not in files else files.pop(0)
        start = read_conditioning(None if first is None else first.path, extend, size, step, fps)
        later = {frame: read_picture("image", file.path, size) for frame, file in files.items()}
        last = None if last_frame is None else read_picture("last_frame", last_frame, size)
        names = [first.path if first is not None else extend, *map(str, files.values()), last_frame]
        return cls(start, later, last, files, tuple(os.fspath(name) for name in names if name is not None))

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each change made to a picture or clip."""
        some = (self.first, *self.later.values(), self.last)
        return tuple(note for each in some if each is not None for note in each.notes)

    @property
    def sha256(self) -> str | None:
        """Of all these pixels; None without any."""
        if self.first is None and not self.later:
            return None
        digest = hashlib.sha256(b"" if self.first is None else self.first.frames.tobytes())
        for frame, picture in self.later.items():
            digest.update(f"@{frame}".encode() + picture.frames.tobytes())
        return digest.hexdigest()

    def prefix_frames(self, model: VideoModel) -> int:
        """Latent frames that the video starts with."""
        return 0 if self.first is None else 1 + (len(self.first.frames) - 1) // model.temporal_compression

    def prefix(self, model: VideoModel) -> Tensor | None:
        """Latents [1, f, C, h, w] that the video starts with."""
        return None if self.first is None else _encode(model, self.first)

    def conditioning_frames(self, model: VideoModel, plan: Plan, num_frames: int | None) -> dict[int, Tensor]:
        """The later images and the last frame: {latent frame: latents [1, C, h, w]}, for :class:`hiar_model.Rollout`.

        Args:
            num_frames: latent frames of the video; None: endless.

        Raises:
            ValueError: an image at a frame at which no block begins; names the nearest.
        """
        at = {frame: self._latent_frame(model, plan, num_frames, file) for frame, file in self.files.items()}
        frames = {at[frame]: _still(model, picture) for frame, picture in self.later.items()}
        if self.last is not None:
            assert num_frames is not None
            frames[num_frames - 1] = _still(model, self.last)
        return frames

    def _latent_frame(self, model: VideoModel, plan: Plan, num_frames: int | None, file: ImageFile) -> int:
        last = None if num_frames is None else plan.block_of(num_frames - 1)
        block = plan.block_of(1 + (file.frame - 1) // model.temporal_compression)

        def starts(blocks: Sequence[int]) -> list[int]:
            generated = (n for n in blocks if n >= plan.prefix_blocks and (last is None or n <= last))
            return [model.pixel_frames(plan.block_frames(n)[0]) for n in generated]

        if file.frame in starts([block]):
            return plan.block_frames(block)[0]
        near = starts([block, block + 1]) or starts([plan.prefix_blocks if block < plan.prefix_blocks else last or 0])
        raise ValueError(
            f"image {file}: no block of the video begins at frame {file.frame}, nearest {' or '.join(map(str, near))}"
        )


def _encode(model: VideoModel, frames: ConditioningFrames) -> Tensor:
    return model.encoder().encode(to_pixels(frames.frames)).to(model.device, model.dtype)


def _still(model: VideoModel, picture: ConditioningFrames) -> Tensor:
    """Latents [1, C, h, w] of a picture inside a video: of all pixel frames of a latent frame, which stand still."""
    step = model.temporal_compression
    if step > 1:  # the first latent frame of a clip is one pixel frame alone
        picture = ConditioningFrames(np.repeat(picture.frames, 1 + step, 0))
    return _encode(model, picture)[:, -1]


@dataclass(frozen=True, eq=False)
class Ending:
    """The last blocks of a video, infilled before its last frame.

    Attributes:
        plan: of the whole video. block: the first infilled one. num_frames: latent frames of the video.
    """

    plan: Plan
    block: int
    num_frames: int

    @classmethod
    def of(cls, model: VideoModel, plan: Plan, num_frames: int | None, execution: ExecutionConfig) -> Ending:
        """Infill as many blocks as, with the one before them, the model has seen together in training.

        Raises:
            ValueError: a video of several processes.
        """
        if execution.mesh is not None or execution.steps_per_rank is not None or execution.dedicated_decoder_rank:
            raise ValueError("last_frame is for one process without a pipeline: its last blocks are made at once")
        assert num_frames is not None
        together = (1 + (model.train_frames - 1) // model.temporal_compression) // plan.frames_per_block
        end = plan.block_of(num_frames - 1) + 1
        earliest = max(plan.prefix_blocks, min(1, end - 1))  # a context: without one, few-step models break the motion
        return cls(plan, max(earliest, end - max(1, together - 1)), num_frames)

    @property
    def rolled_out(self) -> int:
        """Latent frames before it: of the prefix and of the rollout."""
        return self.plan.block_frames(self.block)[0]

    def ahead(self, frames: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Those of the conditioning frames that the rollout makes its blocks around."""
        return {frame: x for frame, x in frames.items() if frame < self.rolled_out}

    def note(self, model: VideoModel) -> str:
        """A line for the user: which frames are infilled."""
        first, last = (model.pixel_frames(frame) for frame in (self.rolled_out, self.num_frames))
        return f"frames {first} to {last - 1} are made at once, by infilling before the last frame"

    def blocks(
        self, model: VideoModel, rollout: Rollout, prefix: Tensor | None, frames: Mapping[int, Tensor]
    ) -> Iterator[FinishedBlock]:
        """The blocks of the whole video: those of the rollout, if any, then the infilled ones.

        Args:
            rollout: of the blocks before. prefix: its latents [1, f, C, h, w], or None.
            frames: :meth:`Starts.conditioning_frames`.
        """
        before, config = prefix, rollout.config
        for finished in rollout if self.block > self.plan.prefix_blocks else ():
            before = finished.latents
            yield finished
        start, size, shape = self.rolled_out, self.plan.frames_per_block, rollout.shape
        context = torch.zeros(1, 0, *shape).to(model.device, model.dtype) if before is None else before[:, -size:]
        short = context.shape[1]
        latents = torch.cat([context, context.new_zeros(1, self.num_frames - start, *shape)], 1)
        known = torch.zeros(1, latents.shape[1], dtype=torch.bool)
        known[:, :short] = True
        for frame, x in frames.items():
            if frame >= start:
                latents[:, frame - start + short], known[:, frame - start + short] = x, True
        networks: Any = model.networks(len(config.steps))
        if (name := rollout.execution.linear_dtype) is not None:
            several, dtype = networks if isinstance(networks, list) else [networks], getattr(torch, name)
            eight_bits = [quantized(one, dtype) for one in several]
            networks = eight_bits if isinstance(networks, list) else eight_bits[0]
        infilled = infill(
            networks, latents, known, rollout.prompt_embeds(self.block), config.schedule, frames_per_block=size,
            sampler=config.sampler, seed=rollout.seed, first_frame=config.first_frame + start - short,
            first_block=self.block - bool(short), first_block_frames=short or None, clean_context=True,
        )  # fmt: skip
        for block in range(self.block, self.plan.block_of(self.num_frames - 1) + 1):
            first, stop = self.plan.block_frames(block)
            yield FinishedBlock(block, first, infilled[:, first - start + short : stop - start + short])
