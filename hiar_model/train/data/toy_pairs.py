"""Reads what a teacher of the toy world shows at the ends of its trajectories, from pixels."""

from __future__ import annotations

import os

from torch import Tensor

from ...toy.codec import ToyCodec
from ...toy.oracle import ToyOracle
from ...toy.prompt import (
    NEUTRAL,
    NULL_TOKEN,
    PROMPT_TOKENS,
    SLOT_OFFSETS,
    SLOTS,
    SPEED_SLOT,
    VOCABULARY_SIZE,
    ToyPrompt,
)
from ...toy.reading import Reading, Summary
from ...toy.world import WORLDS
from .trajectories import TrajectoryStore

BEGINNINGS, CONTINUING = "beginnings", "continuing clips"
_NEUTRAL_SPEED = SLOT_OFFSETS[SPEED_SLOT] + SLOTS["speed"].index(NEUTRAL)


def read_toy_pairs(folder: str | os.PathLike[str], world: str) -> dict[str, tuple[int, Summary]]:
    """How well the clean ends of a store's trajectories keep their prompts; for each kind of clip (number, means).

    Args:
        folder: of a stage ode_pairs of the toy, made with the codec that recipes have by default. world: that it was
            made in, by name.

    Raises:
        ValueError: no such world; no such store, or not one of the toy.
    """
    if world not in WORLDS:
        raise ValueError(f"world must be one of {', '.join(WORLDS)}, got {world!r}")
    store = TrajectoryStore(folder)
    channels = store.latent_shape[1]
    codec, oracle = ToyCodec.fit(channels=channels), ToyOracle(WORLDS[world])
    size = WORLDS[world].height, WORLDS[world].width
    if store.latent_shape[1:] != codec.latent_shape(*size):
        expected = list(codec.latent_shape(*size))
        raise ValueError(f"{folder}: its latents are {list(store.latent_shape)}, those of the toy end in {expected}")
    found: dict[str, list[Reading]] = {BEGINNINGS: [], CONTINUING: []}
    for i in range(len(store)):
        trajectory, text = store.batch([i])
        frames = codec.to_uint8(codec.decode(trajectory[:, -1]))[0]
        begins = not bool(text[:, PROMPT_TOKENS:].any())
        found[BEGINNINGS if begins else CONTINUING].append(oracle.evaluate(frames, _prompt(text[0], folder)))
    return {kind: (len(readings), Summary.of(readings)) for kind, readings in found.items() if readings}


def _prompt(text: Tensor, folder: str | os.PathLike[str]) -> ToyPrompt:
    """Back from word vectors [L, text_dim]; a speed that is not told is the neutral word."""
    words = text[:PROMPT_TOKENS]
    one_each = len(words) == PROMPT_TOKENS and bool(((words != 0).sum(1) == 1).all())
    tokens = words.argmax(1).tolist()
    if not one_each or max(tokens) >= VOCABULARY_SIZE:
        raise ValueError(f"{folder}: its text is no word vectors of the toy")
    if tokens[SPEED_SLOT] == NULL_TOKEN:
        tokens[SPEED_SLOT] = _NEUTRAL_SPEED
    return ToyPrompt.from_tokens(tokens)
