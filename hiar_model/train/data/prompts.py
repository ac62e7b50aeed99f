"""Encodes prompts to disk, once for all stages; :class:`.datasets.PromptData` reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as pack_tensors
from torch import Tensor

from ...io.files import read_text
from ...models.text_encoder import WanTextEncoder, clean_prompt
from ..config.recipe import PromptsRecipe
from .datasets import open_tensors
from .shards import progress_report, shard_name, shard_samples, write, write_or_check_settings

FORMAT = "hiar-prompts-1"


class EncodedPrompts:
    """The stage "prompts": shards of ``text`` [n, L, text_dim], L tokens of the longest prompt, the others padded with
    zeros; the first one holds ``unconditional`` [1, L, text_dim] too.

    Raises:
        ValueError: no file of prompts, none in it; no text encoder in the folder.
    """

    def __init__(self, recipe: PromptsRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.prompts = _read(recipe.prompts)
        if not recipe.text_encoder:
            raise ValueError("recipe: text_encoder must be given: the folder of a Wan model")
        self.encoder = WanTextEncoder(recipe.text_encoder, device=device, dtype=getattr(torch, recipe.precision))

    def produce(self, folder: Path, rank: int, ranks: int, on_progress: Callable[[int, int], None]) -> str:
        """Write those of this process's shards that are missing.

        Raises:
            ValueError: the folder holds prompts of other settings. OSError: a file cannot be written.
        """
        negative = clean_prompt(self.recipe.negative)
        everything = [*self.prompts, negative]
        tokens = max(map(self.encoder.length, everything))
        settings = {
            "format": FORMAT,
            "count": len(self.prompts),
            "shard_size": self.recipe.shard_size,
            "tokens": tokens,
            "dtype": self.recipe.precision,
            "prompts": hashlib.sha256(json.dumps(everything).encode()).hexdigest(),
            "text_encoder": [[file.name, file.stat().st_size] for file in self.encoder.files.weights],
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_or_check_settings(folder, settings, "prompts", rank)
        mine = list(enumerate(shard_samples(len(self.prompts), self.recipe.shard_size)))[rank::ranks]
        done, total = 0, sum(len(samples) for _, samples in mine)
        for n, samples in mine:
            file = folder / f"{shard_name(n)}.safetensors"
            if _is_complete(file, len(samples), tokens):
                done += len(samples)
                on_progress(done, total)
                continue
            encoded = []
            for i in samples:
                encoded.append(self._encode(self.prompts[i], tokens))
                done += 1
                on_progress(done, total)
            tensors = {"text": torch.cat(encoded)}
            if n == 0:
                tensors["unconditional"] = self._encode(negative, tokens)
            write(file, pack_tensors(tensors, {"format": FORMAT}), rank)
        return progress_report(folder, "prompts", ".safetensors")

    def _encode(self, prompt: str, tokens: int) -> Tensor:
        prompt_embeds = self.encoder(prompt).cpu()
        return F.pad(prompt_embeds, (0, 0, 0, tokens - prompt_embeds.shape[1]))


def _read(path: str) -> list[str]:
    """The prompts of a file, cleaned."""
    if not path:
        raise ValueError("recipe: prompts must be given: a text file, one prompt on each line")
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: no readable text file of prompts: {error}") from error
    prompts = [clean for line in lines if (clean := clean_prompt(line))]
    if not prompts:
        raise ValueError(f"{path}: no prompts; expected one on each line")
    return prompts


def _is_complete(file: Path, samples: int, tokens: int) -> bool:
    """Whether a shard exists with all samples; one that was damaged later is written again."""
    if not file.is_file():
        return False
    try:
        with open_tensors(file) as opened:
            shape = opened.get_slice("text").get_shape()
    except ValueError:
        return False
    return shape[:2] == [samples, tokens]
