"""What every stage uses beside its networks: data, codec, sampled videos, the exported model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.checks import one_of
from ...config import ExecutionConfig, WanConfig
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
from ..config.recipe import CausalRecipe, NetworkRecipe, Recipe
from ..data.datasets import Clips, LatentData, PromptData, Prompts, ToyData
from ..data.trajectories import TrajectoryStore
from ..engine.distributed import is_first, unsharded
from .base import Inputs, Stage

CausalRecipeT = TypeVar("CausalRecipeT", bound=CausalRecipe)


class Sources:
    """Data of a recipe: the toy world, or a folder of encoded prompts (and clips).

    data           prompts, and clips where there are some
    codec, world   of the toy; None for a folder

    Args:
        device: of the VAE that decodes samples, where the recipe names one; rank 0 alone loads it.

    Raises:
        ValueError: an unknown world; a folder with a missing or malformed file or key.
    """

    def __init__(self, recipe: NetworkRecipe, device: torch.device) -> None:
        config, data = WanConfig.from_name(recipe.model), recipe.data
        self.codec: ToyCodec | None = None
        self.world: ToyWorld | None = None
        self.vae: Any = None
        self.data: Prompts
        if data.folder is not None:
            assert data.latent_size is not None
            shape = (recipe.num_latent_frames, config.in_channels, *data.latent_size)
            kind = LatentData if recipe.stage in ("teacher", "teacher_forcing") else PromptData
            self.data = kind(data.folder, shape)
            if data.vae is not None:
                self.vae = load_vae(data.vae, device=device if is_first() else "meta")
            return
        one_of("recipe: data.world", data.world, WORLDS)
        self.world = ToyWorld(WORLDS[data.world])
        try:
            train, self._held_out = split_prompts(data.held_out_prompts)
        except ValueError as error:
            raise ValueError(f"recipe: data.held_out_prompts: {error}") from error
        # one latent space for all worlds, so that training can start from another world's weights
        self.codec = ToyCodec.fit(channels=config.in_channels, floor=data.codec_floor).for_size(self.world.config)
        self.text_encoder = ToyTextEncoder(config.text_dim, self.world.config.free_speed)
        self.data = ToyData(
            self.world,
            self.codec,
            self.text_encoder,
            token_table(train),
            recipe.num_latent_frames,
            data.from_start,
            mark_continuing=data.mark_continuing,
        )

    def inputs(self, key: str = "", store: TrajectoryStore | None = None) -> Inputs:
        """Of a stage with this data, and the trajectories of a key of its recipe. The toy world is none of them: the
        recipe says which it is."""
        content = {} if self.codec is not None else {"data.folder": self.data.fingerprint}
        if store is None:
            return Inputs(content)
        return Inputs({**content, key: store.settings_sha256}, {f"shards of {key}": store.shards})

    def clips(self) -> Clips:
        """The data as clips, for the stages whose data has them."""
        return cast(Clips, self.data)

    def sample_prompts(self, count: int) -> Tensor | None:
        """prompt_embeds of sampled videos, [count, L, text_dim] like the data's: the first held-out prompts of the toy,
        the first ones of a folder; None where there is no decoder."""
        if self.codec is None:
            return self.data.first(count) if self.vae is not None and isinstance(self.data, PromptData) else None
        prompt_embeds = self.text_encoder.encode(self._held_out[:count])
        return F.pad(prompt_embeds, (0, 0, 0, self.data.unconditional().shape[1] - prompt_embeds.shape[1]))

    def decode(self, latents: Tensor) -> Frames | None:
        """Latents [N, F, C, h, w] -> uint8 [N, F, H, W, 3]; None on ranks other than 0."""
        if not is_first():
            return None
        if self.codec is not None:
            return cast(Frames, np.asarray(self.codec.to_uint8(self.codec.decode(latents.float().cpu())).numpy()))
        with torch.autocast(latents.device.type, enabled=False):
            return np.stack([StreamingDecoder(self.vae).decode(video) for video in latents.split(1)])


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """The precision of a recipe's forwards outside the trainer, which sets it itself; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")


class StudentStage(Stage, Generic[CausalRecipeT]):
    """A stage whose averaged network is a causal student."""

    averaged = "student"
    recipe: CausalRecipeT
    sources: Sources

    def inputs(self) -> Inputs:
        return self.sources.inputs()

    def sample(self, update: int) -> Frames | None:
        """Rollouts of prompts, twice as long as trained clips; None without a decoder, or on another rank than 0."""
        sources, config, model = self.sources, self.recipe.rollout, self.trained["student"]
        prompt_embeds = sources.sample_prompts(self.recipe.sample_prompts)
        if prompt_embeds is None:
            return None
        frames, _, height, width = sources.data.latent_shape
        if config.order != "block_first" and config.kv_source == "own":
            config = config.with_order("step_first")  # the same videos, with one cache in memory for all steps

        def roll_out() -> Tensor:
            rollout = Rollout(
                model,
                prompt_embeds.to(model.patch_embedding.weight.device),
                config,
                ExecutionConfig(autocast=True),
                num_latent_frames=2 * frames,
                latent_size=(height, width),
                video_ids=range(len(prompt_embeds)),
            )
            return torch.cat([block.latents for block in rollout], 1)

        return sources.decode(unsharded(model, roll_out))

    def export(self, model: HiARTransformer, folder: Path) -> Path:
        """Write the student: a toy model's folder, or the transformer's weights alone."""
        sources, recipe = self.sources, self.recipe
        if sources.codec is None or sources.world is None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "student.safetensors"
            save_transformer(model, path)
            return path
        return save_toy_model(
            folder,
            model,
            sources.codec,
            rollout=recipe.rollout,
            train_frames=recipe.num_latent_frames,
            world=sources.world.config,
        )
