"""Experts, weights for each noise level: which checkpoint serves which denoising steps, and loading them.

A :class:`.Rollout` takes one model, or one for each step; nothing else knows about experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .transformer import HiARTransformer

_STEPS = re.compile(r"(\d+)(?:-(\d+))?")


def parse_experts(mapping: str | Mapping[str, str], steps: int) -> tuple[str, ...]:
    """The checkpoint file of each step.

    Args:
        mapping: for example "0-1=high.pt,2-3=low.pt" or {"0-1": "high.pt", "2-3": "low.pt"}; step 0 is the noisiest.
        steps: how many the schedule has.

    Raises:
        ValueError: names the part that cannot be parsed, or the step that is outside the schedule, missing, or there
            twice.

    >>> parse_experts("0-1=high.pt,2-3=low.pt", 4)
    ('high.pt', 'high.pt', 'low.pt', 'low.pt')
    """
    if isinstance(mapping, str):
        parts = [part.partition("=") for part in mapping.split(",")]
        broken = next(("".join(part) for part in parts if not part[1]), None)
        if broken is not None:
            raise ValueError(f"experts: {broken!r} is not STEPS=FILE, such as 0-1=high.pt,2-3=low.pt")
        pairs = [(key.strip(), file.strip()) for key, _, file in parts]
    else:
        pairs = [(str(key).strip(), str(file).strip()) for key, file in mapping.items()]
    file_of: dict[int, str] = {}
    for key, file in pairs:
        match = _STEPS.fullmatch(key)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"experts: {key!r} is no range of steps, such as 0-1 or 2")
        if not file:
            raise ValueError(f"experts: steps {key} have no file; write {key}=weights.pt")
        for step in range(first, last + 1):
            if step >= steps:
                raise ValueError(
                    f"experts: step {step} ({key}={file}) is outside the schedule, steps are 0-{steps - 1}"
                )
            if step in file_of:
                raise ValueError(f"experts: step {step} has two files, {file_of[step]} and {file}")
            file_of[step] = file
    missing = [step for step in range(steps) if step not in file_of]
    if missing:
        raise ValueError(f"experts: step {missing[0]} has no file; give one for each of the steps 0-{steps - 1}")
    return tuple(file_of[step] for step in range(steps))


def steps_of_rank(split: Sequence[int], rank: int) -> range:
    """The steps of one rank of a pipeline. split: steps of each rank."""
    if not 0 <= rank < len(split):
        raise ValueError(f"rank must be in 0..{len(split) - 1}, got {rank}")
    first = sum(split[:rank])
    return range(first, first + split[rank])


def load_experts(
    files: Sequence[str], load: Callable[[str], HiARTransformer], steps: Iterable[int] | None = None
) -> list[HiARTransformer | None]:
    """A model for each step, None where this process has no tasks; each file is loaded once.

    Args:
        files: of each step (:func:`parse_experts`). load: for example :func:`hiar_model.load_transformer`.
        steps: of this process (:func:`steps_of_rank`); None: all. A rank without steps, which only receives finished
            blocks, gets the last step's model, from which a rollout reads sizes and the device.

    Raises:
        ValueError: a step outside the schedule, or two files of different sizes; names them.
    """
    own = list(range(len(files)) if steps is None else steps) or [len(files) - 1]
    outside = [step for step in own if not 0 <= step < len(files)]
    if outside:
        raise ValueError(f"experts: this rank has step {outside[0]}, there are steps 0-{len(files) - 1}")
    loaded: dict[str, HiARTransformer] = {}
    for step in own:
        if files[step] not in loaded:
            loaded[files[step]] = load(files[step])
    first, *others = loaded
    for file in others:
        if loaded[file].config != loaded[first].config:
            raise ValueError(
                f"experts: {file} is {loaded[file].config}, {first} is {loaded[first].config}; steps share their caches"
            )
    return [loaded[files[step]] if step in own else None for step in range(len(files))]
