"""What a recipe's stage works with beside its networks: data, codec, samples, the exported model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import WanConfig
from ...io.video import Frames
from ...models.checkpoint import save_transformer
from ...models.registry import save_toy_model
from ...models.transformer import HiARTransformer
from ...models.vae import StreamingDecoder, load_vae
from ...rollout import Rollout
from ...toy.codec import ToyCodec
from ...toy.prompt import split_prompts, token_table
from ...toy.text import ToyTextEncoder
from ...toy.world import WORLDS, ToyWorld
from ..config.recipe import CausalRecipe, HiARRecipe, NetworkRecipe, Recipe
from ..data.datasets import Clips, LatentData, PromptData, Prompts, ToyData
from ..engine.distributed import gathered, is_first


class Sources:
    """Data of a recipe: the toy world, or a folder of encoded prompts (and clips).

    data: prompts, and clips where there are some. codec, world: of the toy; None for a folder.

    Args:
        device: of the VAE that decodes samples, where the recipe names one; on the first process, which shows them.

    Raises:
        ValueError: no such world; a folder that does not hold what it should, by file and key.
    """

    def __init__(self, recipe: NetworkRecipe, device: torch.device) -> None:
        config, told = WanConfig.from_name(recipe.model), recipe.data
        self.codec: ToyCodec | None = None
        self.world: ToyWorld | None = None
        self.vae: Any = None
        self.data: Prompts
        if told.folder is not None:
            assert told.latent_size is not None
            shape = (recipe.num_frames, config.in_channels, *told.latent_size)
            kind = LatentData if recipe.stage in ("teacher", "teacher_forcing") else PromptData
            self.data = kind(told.folder, shape)
            if told.vae is not None:
                self.vae = load_vae(told.vae, device=device if is_first() else "meta")
            return
        if told.world not in WORLDS:
            raise ValueError(f"recipe: data.world must be one of {', '.join(WORLDS)}, got {told.world!r}")
        self.world = ToyWorld(WORLDS[told.world])
        # of the plain world for all: one space of latents, so that weights of one world begin another's training
        self.codec = ToyCodec.fit(channels=config.in_channels, floor=told.codec_floor)
        self.text = ToyTextEncoder(config.text_dim, self.world.config.free_speed)
        train, self._held_out = split_prompts(told.held_out_prompts)
        self.data = ToyData(
            self.world,
            self.codec,
            self.text,
            token_table(train),
            recipe.num_frames,
            told.from_start,
            mark_continuing=told.mark_continuing,
        )

    def clips(self) -> Clips:
        """The data as clips; every stage that asks for them was given such data."""
        return cast(Clips, self.data)

    def shown(self, count: int) -> Tensor | None:
        """Text of the prompts that are sampled, [count, L, text_dim] like the data's; None where nothing decodes their
        videos. The first held-out ones of the toy, the first ones of a folder."""
        if self.codec is None:
            return self.data.first(count) if self.vae is not None and isinstance(self.data, PromptData) else None
        text = self.text.encode(self._held_out[:count])
        return F.pad(text, (0, 0, 0, self.data.unconditional().shape[1] - text.shape[1]))

    def decode(self, latents: Tensor) -> Frames | None:
        """Latents [N, F, C, h, w] -> uint8 [N, F, H, W, 3]; None on other processes than the first."""
        if not is_first():
            return None
        if self.codec is not None:
            return cast(Frames, np.asarray(self.codec.to_uint8(self.codec.decode(latents.float().cpu())).numpy()))
        with torch.autocast(latents.device.type, enabled=False):
            return np.stack([StreamingDecoder(self.vae).decode(video) for video in latents.split(1)])


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """The precision of a recipe's forwards outside the trainer's turns, which have it; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")


def sample_videos(sources: Sources, model: HiARTransformer, recipe: CausalRecipe) -> Frames | None:
    """Rollouts of some prompts, twice as long as trained clips: uint8 [N, F, H, W, 3]; None where nothing decodes them,
    and on other processes than the first."""
    text = sources.shown(recipe.sample_prompts)
    if text is None:
        return None
    frames, _, height, width = sources.data.latent_shape
    order, cache_source = walk(recipe)
    if cache_source == "own" and order == "stream":
        order = "step_first"  # the same videos, and one cache in memory for four

    def rolled_out() -> Tensor:
        rollout = Rollout(
            model,
            text.to(model.patch_embedding.weight.device),
            recipe.schedule,
            num_frames=2 * frames,
            height=height,
            width=width,
            batch=len(text),
            autocast=True,
            order=order,
            cache_source=cache_source,
            frames_per_block=recipe.frames_per_block,
            window_frames=recipe.window_frames,
            sink_frames=recipe.sink_frames,
        )
        return torch.cat([block.latents for block in rollout], 1)

    return sources.decode(gathered(model, rolled_out))


def walk(recipe: CausalRecipe) -> tuple[str, str]:
    """(order, cache_source) that a student of this recipe is rolled out with; matched noise by default."""
    if not isinstance(recipe, HiARRecipe):
        return "stream", "own"
    return "stream" if recipe.order == "step_first" else recipe.order, recipe.cache_source


def save_student(sources: Sources, model: HiARTransformer, recipe: CausalRecipe, folder: Path) -> Path:
    """The student as a model: a toy model's folder, or the transformer's weights alone. Returns what was written."""
    if sources.codec is None or sources.world is None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "student.safetensors"
        save_transformer(model, path)
        return path
    order, cache_source = walk(recipe)
    return save_toy_model(
        folder,
        model,
        sources.codec,
        schedule=recipe.schedule,
        frames_per_block=recipe.frames_per_block,
        window_frames=recipe.window_frames,
        sink_frames=recipe.sink_frames,
        train_frames=recipe.num_frames,
        world=sources.world.config,
        order=order,
        cache_source=cache_source,
    )
