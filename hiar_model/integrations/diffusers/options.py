"""The arguments of a call of HiARPipeline, and what they mean: seeds of generators, pictures, forms of the output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from torch import Tensor

from ...common.checks import MOST_STEPS, as_number, dtype_name, nearest, one_line, one_of, whole
from ...config import RolloutConfig
from ...io.video import Frames
from ...pipelines.conditioning import ConditioningFrames, read_conditioning

log = logging.get_logger(__name__)
OUTPUT_TYPES = ("np", "pt", "pil", "latent")
CALLBACK_INPUTS = ("latents", "prompt_embeds")
WITHOUT_EFFECT = {
    "negative_prompt_embeds": "a distilled network", "guidance_scale_2": "a distilled network",
    "attention_kwargs": "no processors of diffusers run",
}  # fmt: skip
"""Arguments of WanPipeline that are not taken here, and why."""
_MOST_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class CallOptions:
    """Arguments of a call, with diffusers' names and order.

    Args:
        prompt: one, or one for each video. negative_prompt, guidance_scale: HiAR's networks are distilled and take no
            guidance; anything but None, and at most 1, is refused.
        height, width: in pixels; None: 480x832. num_frames: pixel frames that fill whole blocks, the image included;
            None: 81, or with an image as many new blocks.
        num_inference_steps: None: the steps of the rollout; a number: evenly spaced.
        num_videos_per_prompt: videos of each prompt, with noise of their own.
        generator: one, or one for each video. An unused one gives the video of its seed, that of
            ``VideoPipeline(...)(prompt, seed=...)``; a used one, and None (torch's global one), another at each call.
        latents: initial noise [B, C, F, h, w] of the new frames, in diffusers' order of axes.
        prompt_embeds: [B, L, text_dim] in place of ``prompt``.
        image: the first frame: a PIL image, uint8 [H, W, 3], or a path; scaled to cover the frame, and cropped.
        output_type: "np" (float32 [B, F, H, W, 3]) or "pt" ([B, F, 3, H, W]), both in [0, 1] in steps of 1 / 255;
            "pil" (a list of pictures for each video); "latent" ([B, C, F, h, w], normalised).
        return_dict: False: a tuple in place of a WanPipelineOutput.
        callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": ...})`` after each denoising step
            of each block (``pipe.current_block``), with the latents [B, C, f, h, w] of that block. What it returns
            under "latents" and "prompt_embeds" counts from then on. ``pipe._interrupt = True`` ends the video behind
            the last finished block.
        callback_on_step_end_tensor_inputs: what it is handed, of "latents" and "prompt_embeds"; None: nothing.
        max_sequence_length: tokens of a prompt; more are cut. At most as many as the network takes.
        rollout: a :class:`hiar_model.RolloutConfig`, or its plain mapping, in place of ``pipe.rollout`` for this call.
        order: of its tasks.

    Raises:
        ValueError: one line with the illegal argument, its value and the legal ones.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    num_videos_per_prompt: int = 1
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    image: Any = None
    output_type: str = "np"
    return_dict: bool = True
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",)
    max_sequence_length: int = 512
    rollout: RolloutConfig | Mapping[str, Any] | None = None
    order: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            got = "neither" if self.prompt is None else "both"
            raise ValueError(f"give either prompt or prompt_embeds, got {got}")
        if self.prompt is not None and (not isinstance(self.prompt, str | list | tuple) or not self.prompts):
            raise ValueError(f"prompt must be a string, or a list of at least one, got {one_line(self.prompt)}")
        one_of("output_type", self.output_type, OUTPUT_TYPES)
        whole("num_videos_per_prompt", self.num_videos_per_prompt, 1)
        if self.num_inference_steps is not None:
            whole("num_inference_steps", self.num_inference_steps, 1, most=MOST_STEPS)
        if not as_number(self.guidance_scale) <= 1:
            got = one_line(self.guidance_scale)
            raise ValueError(f"guidance_scale must be at most 1 (a distilled network), got {got}")
        _require_none("negative_prompt", self.negative_prompt)
        whole("max_sequence_length", self.max_sequence_length, 1)
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be callable, got {one_line(self.callback_on_step_end)}")
        for generator in self.generators:
            if not isinstance(generator, torch.Generator):
                raise ValueError(f"generator must be a torch.Generator, or a list of them, got {one_line(generator)}")
        for name in self.tensor_inputs:
            one_of("callback_on_step_end_tensor_inputs", name, CALLBACK_INPUTS)

    @classmethod
    def of(cls, call: str, args: Sequence[Any], named: Mapping[str, Any]) -> CallOptions:
        """The options of a call; those that WanPipeline has beside them may be None, as they are there by default.

        Raises:
            TypeError: an argument that is none of these, with the nearest one. ValueError: of the class.
        """
        known = [field.name for field in fields(cls)]
        for name in named.keys() - {*known, *WITHOUT_EFFECT}:
            raise TypeError(f"{call}() takes no argument {name!r}{nearest(name, known)}")
        for name in WITHOUT_EFFECT:
            _require_none(name, named.get(name))
        return cls(*args, **{name: value for name, value in named.items() if name in known})

    @property
    def tensor_inputs(self) -> Sequence[str]:
        """What the callback is handed."""
        if isinstance(self.callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            return self.callback_on_step_end.tensor_inputs
        names = self.callback_on_step_end_tensor_inputs
        return (names,) if isinstance(names, str) else names or ()

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or ())

    @property
    def generators(self) -> list[torch.Generator]:
        """All generators; none: torch's global one."""
        several = isinstance(self.generator, list | tuple)
        return [] if self.generator is None else list(self.generator) if several else [self.generator]  # type: ignore

    def seeds(self, batch: int) -> list[int]:
        """One for all videos of a batch, or one for each; generators move on."""
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return [seed_of(self.generator)]
        if len(self.generators) != batch:
            raise ValueError(f"generator must be one, or one for each of {batch} videos, got {len(self.generators)}")
        return [seed_of(generator) for generator in self.generators]


def _require_none(name: str, value: Any) -> None:
    """ValueError unless an argument without effect is left out."""
    if value is not None:
        why = WITHOUT_EFFECT.get(name, "a distilled network")
        raise ValueError(f"{name} must be None ({why}), got {one_line(value)}")


def seed_of(generator: torch.Generator | None) -> int:
    """The seed of a video: an unused generator's own, else a number drawn from it. Moves the generator on."""
    if generator is None:
        return int(torch.randint(_MOST_SEED, ()))
    own = generator.initial_seed()
    unused = torch.Generator(generator.device).manual_seed(own).get_state()
    fresh = torch.equal(unused, generator.get_state())
    drawn = int(torch.randint(_MOST_SEED, (), generator=generator, device=generator.device))
    return own if fresh else drawn


def read_image(image: Any, size: tuple[int, int]) -> ConditioningFrames | None:
    """The first frame, at (height, width) ``size``, of a PIL image, uint8 [H, W, 3] or a path; None of None. A line of
    diffusers' log for each change made to it.
    """
    from PIL import Image

    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        if image is not None and not isinstance(image, str | Path):
            shape = getattr(image, "shape", None)
            got = type(image).__name__ if shape is None else f"{dtype_name(image.dtype)} {list(shape)}"
            raise ValueError(f"image must be a PIL image, uint8 [H, W, 3] or a path, got {got}")
        return _logged(read_conditioning(image, None, size))
    if 0 in image.size:
        raise ValueError(f"image must have pixels, got {image.size[0]}x{image.size[1]}")
    with tempfile.TemporaryDirectory() as folder:  # as a file, which is read with all that a viewer heeds
        file = Path(folder, "image.png")
        _storable(image).save(file, exif=image.getexif(), icc_profile=image.info.get("icc_profile"))
        return _logged(read_conditioning(file, None, size), file)


def _logged(frames: ConditioningFrames | None, temporary: Path | None = None) -> ConditioningFrames | None:
    for note in () if frames is None else frames.notes:
        log.warning(note if temporary is None else note.replace(str(temporary), "image"))
    return frames


def _storable(image: Any) -> Any:
    """A PIL image in a mode that PNG has, with its transparency and all 16 bits; of other modes Pillow writes another
    picture.
    """
    from PIL import Image

    if image.mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(np.asarray(image).clip(0, 65535).astype(np.uint16))
    return image.convert({"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(image.mode, "RGB"))


def as_output(frames: Frames, output_type: str) -> Any:
    """uint8 [B, F, H, W, 3] in the form that is asked for."""
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in video] for video in frames]
    pixels = frames.astype(np.float32) / 255
    return torch.from_numpy(pixels).movedim(-1, 2) if output_type == "pt" else pixels


def joined(parts: Sequence[Any], output_type: str) -> Any:
    """Parts of :func:`as_output`, or latents, one behind another in time."""
    if not parts:
        raise ValueError("the video was interrupted before its first block was finished: there are no frames")
    if output_type == "pil":
        return [[frame for part in parts for frame in part[i]] for i in range(len(parts[0]))]
    if output_type == "np":
        return np.concatenate(parts, 1)
    return torch.cat(list(parts), 1 if output_type == "pt" else 2)
