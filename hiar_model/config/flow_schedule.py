"""Noise levels of flow matching: the shifted linear schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..common.checks import MOST_STEPS, number_above_0, plain, whole

TRAIN_TIMESTEPS = MOST_STEPS  # timestep of the network = 1000 sigma; 0 is clean


def shift_sigma(sigma: float, shift: float) -> float:
    """a sigma / (1 + (a - 1) sigma), which moves the schedule towards noise for a > 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class FlowSchedule:
    """The denoising steps of a rollout.

    Args:
        steps: unshifted timesteps of the S steps, falling, in (0, 1000].
        shift: a of the shifted schedule sigma' = a sigma / (1 + (a - 1) sigma), above 0.

    Raises:
        ValueError: names the illegal value and the legal ones.

    Example:
        >>> FlowSchedule((1000, 500), shift=3).sigmas
        (1.0, 0.75, 0.0)
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0

    def __post_init__(self) -> None:
        steps = tuple(map(plain, self.steps)) if isinstance(self.steps, Iterable) else ()
        in_range = all(isinstance(s, int | float) and 0 < s <= TRAIN_TIMESTEPS for s in steps)
        if not steps or not in_range or not all(a > b for a, b in pairwise(steps)):
            got = list(steps) if isinstance(self.steps, Iterable) else self.steps
            raise ValueError(f"FlowSchedule: steps must fall within (0, {TRAIN_TIMESTEPS}], got {got}")
        number_above_0("FlowSchedule: shift", self.shift)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "shift", plain(self.shift))

    @classmethod
    def uniform(cls, num_steps: int, shift: float = 5.0) -> FlowSchedule:
        """``num_steps`` equally spaced steps: 4 gives (1000, 750, 500, 250)."""
        num_steps = whole("FlowSchedule: the number of steps", num_steps, 1, most=MOST_STEPS)
        return cls(tuple(TRAIN_TIMESTEPS * (num_steps - i) / num_steps for i in range(num_steps)), shift)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels [S + 1]; the last is 0."""
        return (*(shift_sigma(s / TRAIN_TIMESTEPS, self.shift) for s in self.steps), 0.0)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep inputs of the network [S]: 1000 sigma."""
        return tuple(TRAIN_TIMESTEPS * s for s in self.sigmas[:-1])

    def __len__(self) -> int:
        return len(self.steps)


def sigma_table(num_steps: int, shift: float) -> Sequence[float]:
    """linspace(1, 0, num_steps + 1)[:-1], shifted: sigmas of training (1000 steps) and of a teacher's ODE (48)."""
    return [shift_sigma(1 - i / num_steps, shift) for i in range(num_steps)]
