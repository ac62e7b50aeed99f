"""What a teacher of the toy world shows at the ends of its trajectories, read from pixels.

python -m bench.studies.toy_pairs runs/toy/ode_pairs --world varied
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor

from bench.lib import report
from bench.lib.script import script
from hiar_model.common.checks import one_of
from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import (
    NEUTRAL,
    NULL_TOKEN,
    PROMPT_TOKENS,
    SLOT_OFFSETS,
    SLOTS,
    SPEED_SLOT,
    VOCABULARY_SIZE,
    ToyPrompt,
)
from hiar_model.toy.reading import Reading, Summary
from hiar_model.toy.world import WORLDS
from hiar_model.train.data.trajectories import TrajectoryStore

BEGINNINGS, CONTINUING = "beginnings", "continuing clips"
_NEUTRAL_SPEED = SLOT_OFFSETS[SPEED_SLOT] + SLOTS["speed"].index(NEUTRAL)


def read_toy_pairs(folder: str | os.PathLike[str], world: str) -> dict[str, tuple[int, Summary]]:
    """How well the clean ends of a store's trajectories keep their prompts: for each kind of clip (number, means).

    Args:
        folder: of a stage ode_pairs of the toy with the recipes' default codec. world: its name.

    Raises:
        ValueError: an unknown world; no such store, or not one of the toy.
    """
    one_of("world", world, WORLDS)
    store = TrajectoryStore(folder)
    codec, oracle = ToyCodec.fit(channels=store.latent_shape[1]).for_size(WORLDS[world]), ToyOracle(WORLDS[world])
    size = WORLDS[world].height, WORLDS[world].width
    if store.latent_shape[1:] != codec.latent_shape(*size):
        expected = list(codec.latent_shape(*size))
        raise ValueError(f"{folder}: its latents are {list(store.latent_shape)}, those of the toy end in {expected}")
    readings: dict[str, list[Reading]] = {BEGINNINGS: [], CONTINUING: []}
    for i in range(len(store)):
        trajectory, prompt_embeds = store.batch([i])
        frames = codec.to_uint8(codec.decode(trajectory[:, -1]))[0]
        kind = CONTINUING if bool(prompt_embeds[:, PROMPT_TOKENS:].any()) else BEGINNINGS
        readings[kind].append(oracle.evaluate(frames, _prompt(prompt_embeds[0], folder)))
    return {kind: (len(some), Summary.of(some)) for kind, some in readings.items() if some}


def _prompt(prompt_embeds: Tensor, folder: str | os.PathLike[str]) -> ToyPrompt:
    """The prompt of word vectors [L, text_dim]; a speed that is left open is the neutral word."""
    words = prompt_embeds[:PROMPT_TOKENS]
    one_each = len(words) == PROMPT_TOKENS and bool(((words != 0).sum(1) == 1).all())
    tokens = words.argmax(1).tolist()
    if not one_each or max(tokens) >= VOCABULARY_SIZE:
        raise ValueError(f"{folder}: its text is not word vectors of the toy")
    if tokens[SPEED_SLOT] == NULL_TOKEN:
        tokens[SPEED_SLOT] = _NEUTRAL_SPEED
    return ToyPrompt.from_tokens(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of a stage ode_pairs")
    parser.add_argument("--world", default="varied", choices=sorted(WORLDS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for kind, (number, means) in read_toy_pairs(a.folder, a.world).items():
        shares = (means.colour, means.shape, means.valid, means.direction)
        cells.append([kind, str(number), *(f"{100 * share:.1f}" for share in shares), f"{means.speed_ratio:.2f}"])
    headings = ("the teacher's", "number", "colour %", "shape %", "valid %", "direction %", "speed/truth")
    print("\n".join(report.table(headings, cells)))


if __name__ == "__main__":
    script(main)
