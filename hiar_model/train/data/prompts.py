"""Prompts to embeddings on disk, once for all stages: :class:`.datasets.PromptData` reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as pack_tensors
from torch import Tensor

from ...io.files import refuse_stand_in
from ...models.text_encoder import WanTextEncoder, clean_prompt
from ..config.recipe import PromptsRecipe
from .datasets import open_tensors
from .shards import agree, shard_name, shard_rows, shared_out, write

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
        """Make this process's shards that are not there yet.

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
        agree(folder, settings, "prompts", rank)
        mine = list(enumerate(shard_rows(len(self.prompts), self.recipe.shard_size)))[rank::ranks]
        done, in_all = 0, sum(len(rows) for _, rows in mine)
        for n, rows in mine:
            file = folder / f"{shard_name(n)}.safetensors"
            if _is_whole(file, len(rows), tokens):
                done += len(rows)
                on_progress(done, in_all)
                continue
            found = []
            for i in rows:
                found.append(self._encode(self.prompts[i], tokens))
                done += 1
                on_progress(done, in_all)
            tensors = {"text": torch.cat(found)}
            if n == 0:
                tensors["unconditional"] = self._encode(negative, tokens)
            write(file, pack_tensors(tensors, {"format": FORMAT}), rank)
        return shared_out(folder, "prompts", ".safetensors")

    def _encode(self, prompt: str, tokens: int) -> Tensor:
        found = self.encoder(prompt).cpu()
        return F.pad(found, (0, 0, 0, tokens - found.shape[1]))


def _read(path: str) -> list[str]:
    """The prompts of a file, cleaned."""
    if not path:
        raise ValueError("recipe: prompts must be given: a text file, one prompt on each line")
    refuse_stand_in(Path(path))
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: no readable text file of prompts: {error}") from error
    prompts = [clean for line in lines if (clean := clean_prompt(line))]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; expected one on each line")
    return prompts


def _is_whole(file: Path, samples: int, tokens: int) -> bool:
    """A file is renamed once it is whole; one that was cut short later is made again."""
    if not file.is_file():
        return False
    try:
        with open_tensors(file) as opened:
            shape = opened.get_slice("text").get_shape()
    except ValueError:
        return False
    return shape[:2] == [samples, tokens]
