"""Text encoder of the toy world: fixed word vectors, nothing learned.

The transformer's own text MLP learns what the words mean, so a word needs no more than a vector of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.settings import own_settings
from .prompt import NULL_TOKEN, PROMPT_TOKENS, SPEED_SLOT, VOCABULARY_SIZE, ToyPrompt, token_table


class ToyTextEncoder:
    """Prompts to orthogonal word vectors, float32 [B, PROMPT_TOKENS, text_dim].

    The vector of token i is sqrt(text_dim) at place i: root mean square 1, like the output of a normalised text
    encoder, and never a zero row, which would mean padding. With `free_speed` the null word stands for the speed.
    """

    @own_settings()
    def __init__(self, text_dim: int = VOCABULARY_SIZE, free_speed: bool = False) -> None:
        """ValueError if `text_dim` has no room for the vocabulary."""
        if text_dim < VOCABULARY_SIZE:
            raise ValueError(f"text_dim must be at least the vocabulary size {VOCABULARY_SIZE}, got {text_dim}")
        self.text_dim, self.free_speed = text_dim, free_speed
        self.vectors = torch.eye(VOCABULARY_SIZE, text_dim) * math.sqrt(text_dim)

    def encode(self, prompts: Sequence[str | ToyPrompt]) -> Tensor:
        """[len(prompts), PROMPT_TOKENS, text_dim]; ValueError for a prompt outside the grammar."""
        if isinstance(prompts, str):
            raise TypeError("encode takes a list of prompts, got one string")
        return self.encode_tokens(token_table(prompts))

    @own_settings()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids int [..., PROMPT_TOKENS] -> float32 [..., PROMPT_TOKENS, text_dim], on the device of the ids."""
        if self.free_speed:
            tokens = tokens.clone()
            tokens[..., SPEED_SLOT] = NULL_TOKEN
        return self.vectors.to(tokens.device)[tokens]

    @own_settings()
    def unconditional(self, batch: int = 1) -> Tensor:
        """The null prompt of classifier-free guidance, [batch, PROMPT_TOKENS, text_dim]."""
        return self.encode_tokens(torch.full((batch, PROMPT_TOKENS), NULL_TOKEN))
