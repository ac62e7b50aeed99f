"""The exact prompt grammar of the toy world, and its tokenizer.

    [a|an|the] [small|large] COLOUR SHAPE moving DIRECTION [slowly|fast]

A prompt is five attributes, one token each, always in the order of `SLOTS`; a size or a speed that is not
mentioned is the neutral word "medium" and still has its token. Token 0 is the null word that fills every slot of
the unconditional prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.keyed import Generator, draw_whole
from ..common.settings import own_settings

NEUTRAL = "medium"
SIZES = ("small", NEUTRAL, "large")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "plus")
DIRECTIONS = ("right", "up and right", "up", "up and left", "left", "down and left", "down", "down and right")
"""Counter-clockwise from the right, 45 degrees apart."""
SPEEDS = ("slowly", NEUTRAL, "fast")

SLOTS: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
}
NULL_TOKEN = 0
VOCABULARY: tuple[tuple[str, str], ...] = (
    ("null", ""),
    *((slot, word) for slot, words in SLOTS.items() for word in words),
)
"""(slot, word) of every token id."""
VOCABULARY_SIZE = len(VOCABULARY)
PROMPT_TOKENS = len(SLOTS)
SPEED_SLOT = list(SLOTS).index("speed")
SLOT_OFFSETS: tuple[int, ...] = tuple(
    1 + sum(len(words) for words in list(SLOTS.values())[:slot]) for slot in range(PROMPT_TOKENS)
)
"""First token id of each slot: token = offset + index of the word in its list."""

_ARTICLES = ("a", "an", "the")
_VERTICAL = ("up", "down")
_HORIZONTAL = ("left", "right")
_STEPS = (*_HORIZONTAL, *_VERTICAL)
_HYPHENATED = {
    spelling: f"{vertical} and {horizontal}"
    for vertical in _VERTICAL
    for horizontal in _HORIZONTAL
    for spelling in (f"{vertical}-{horizontal}", f"{horizontal}-{vertical}")
}
GRAMMAR = "[a] [small|large] COLOUR SHAPE moving DIRECTION [slowly|fast]"


@dataclass(frozen=True)
class ToyPrompt:
    """The attributes of one prompt; every field is a word of its list, anything else raises ValueError."""

    colour: str
    shape: str
    direction: str
    size: str = NEUTRAL
    speed: str = NEUTRAL

    def __post_init__(self) -> None:
        for slot, words in SLOTS.items():
            if getattr(self, slot) not in words:
                raise ValueError(f"unknown {slot} {getattr(self, slot)!r}; legal: {', '.join(words)}")

    def text(self) -> str:
        """Canonical form, e.g. "an orange circle moving up and right slowly"; `parse` inverts it."""
        words = [self.colour, self.shape, "moving", self.direction]
        if self.size != NEUTRAL:
            words.insert(0, self.size)
        if self.speed != NEUTRAL:
            words.append(self.speed)
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    def tokens(self) -> list[int]:
        """The five token ids, in the order of `SLOTS`."""
        values = (getattr(self, slot) for slot in SLOTS)
        return [
            offset + words.index(value)
            for offset, words, value in zip(SLOT_OFFSETS, SLOTS.values(), values, strict=True)
        ]

    @staticmethod
    def from_tokens(tokens: Sequence[int]) -> ToyPrompt:
        """Inverse of `tokens`; ValueError if a token is null or stands in the wrong slot."""
        if len(tokens) != PROMPT_TOKENS:
            raise ValueError(f"a toy prompt has {PROMPT_TOKENS} tokens, got {len(tokens)}")
        attributes = {}
        for slot, token in zip(SLOTS, tokens, strict=True):
            if not 0 <= token < VOCABULARY_SIZE or VOCABULARY[token][0] != slot:
                raise ValueError(f"token {token} is no {slot}")
            attributes[slot] = VOCABULARY[token][1]
        return ToyPrompt(**attributes)


class _Words:
    """A cursor over the words of one prompt that knows how to complain in one line."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.words = prompt.lower().strip().removesuffix(".").split()
        self.next = 0

    def peek(self) -> str | None:
        return self.words[self.next] if self.next < len(self.words) else None

    def take(self, legal: Iterable[str]) -> str | None:
        """The next word if it is legal (and step over it), else None."""
        word = self.peek()
        if word is None or word not in legal:
            return None
        self.next += 1
        return word

    def need(self, part: str, legal: Sequence[str], also: str = "") -> str:
        word = self.take(legal)
        if word is None:
            raise self.error(part, legal, also)
        return word

    def error(self, part: str, legal: Sequence[str], also: str = "") -> ValueError:
        word = self.peek()
        wrong = f"{part} is missing" if word is None else f"{_shorten(word)!r} is no legal {part}"
        where = f"prompt {_shorten(self.prompt)!r}: {wrong} (word {self.next + 1})"
        return ValueError(f"{where}; {part}: {', '.join(legal)}{also}; the grammar is {GRAMMAR}")


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse(prompt: str) -> ToyPrompt:
    """Attributes of a prompt. Case, extra blanks, the article and one final period do not matter; a diagonal may be
    written "up and right", "up right" or "up-right", in either order. Outside the grammar: ValueError of one line
    that names the wrong word or the missing part, and the legal words."""
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, got {type(prompt).__name__}")
    words = _Words(prompt)
    if not words.words:
        raise ValueError(
            f"the prompt is empty; the grammar is {GRAMMAR}; colour: {', '.join(COLOURS)}; shape: {', '.join(SHAPES)}; "
            f"direction: {', '.join(DIRECTIONS)}"
        )
    words.take(_ARTICLES)
    spoken_sizes = [size for size in SIZES if size != NEUTRAL]
    spoken_speeds = [speed for speed in SPEEDS if speed != NEUTRAL]
    size = words.take(spoken_sizes) or NEUTRAL
    also = f" (before it, if wanted, a size: {', '.join(spoken_sizes)})" if size == NEUTRAL else ""
    colour = words.need("colour", COLOURS, also)
    shape = words.need("shape", SHAPES)
    words.need("verb", ("moving",))
    direction = _parse_direction(words)
    speed = words.take(spoken_speeds) or NEUTRAL
    if words.peek() is not None:
        part, legal = ("speed", spoken_speeds) if speed == NEUTRAL else ("word after the speed", ["none"])
        raise words.error(part, legal)
    return ToyPrompt(colour, shape, direction, size, speed)


def _parse_direction(words: _Words) -> str:
    hyphenated = words.take(_HYPHENATED)
    if hyphenated is not None:
        return _HYPHENATED[hyphenated]
    first = words.take(_STEPS)
    if first is None:
        raise words.error("direction", DIRECTIONS)
    others = _HORIZONTAL if first in _VERTICAL else _VERTICAL
    joined = words.take(("and",))
    second = words.take(others)
    if second is None:
        if joined:
            raise words.error(f'direction after "{first} and"', others)
        return first
    return f"{first} and {second}" if first in _VERTICAL else f"{second} and {first}"


def encode(prompt: str | ToyPrompt) -> list[int]:
    """The five token ids of a prompt; ValueError if it is outside the grammar."""
    return (prompt if isinstance(prompt, ToyPrompt) else parse(prompt)).tokens()


def all_prompts() -> list[ToyPrompt]:
    """Every prompt of the grammar, in a fixed order."""
    return [ToyPrompt(**dict(zip(SLOTS, words, strict=True))) for words in itertools.product(*SLOTS.values())]


@own_settings()
def random_tokens(count: int, generator: Generator, pool: Tensor | None = None) -> Tensor:
    """`count` uniform prompts as token ids, int64 [count, PROMPT_TOKENS]; from the rows of `pool` [P, PROMPT_TOKENS]
    where given."""
    if pool is not None:
        return pool[draw_whole(generator, len(pool), count)]
    columns = [
        offset + draw_whole(generator, len(words), count)
        for offset, words in zip(SLOT_OFFSETS, SLOTS.values(), strict=True)
    ]
    return torch.stack(columns, dim=1)


@own_settings()
def split_prompts(held_out: int = 64, seed: int = 0) -> tuple[list[ToyPrompt], list[ToyPrompt]]:
    """(prompts to train on, `held_out` prompts to keep for the measurement): a fixed shuffle of `all_prompts`."""
    prompts = all_prompts()
    if not 0 <= held_out < len(prompts):
        raise ValueError(f"held_out must be in 0..{len(prompts) - 1}, got {held_out}")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[i] for i in sorted(order[held_out:])], [prompts[i] for i in order[:held_out]]


@own_settings()
def token_table(prompts: Sequence[str | ToyPrompt]) -> Tensor:
    """Token ids of several prompts, int64 [len(prompts), PROMPT_TOKENS]."""
    return torch.tensor([encode(prompt) for prompt in prompts], dtype=torch.int64).reshape(-1, PROMPT_TOKENS)
