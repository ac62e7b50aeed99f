"""Everything that decides a training run, as one immutable value."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..schedule import FlowSchedule
from .teacher_forcing import LevelMixture


@dataclass(frozen=True)
class OptimizerRecipe:
    """Muon for the matrices of the blocks, AdamW for everything else.

    Args:
        matrix_lr, other_lr: peak learning rates of the two. weight_decay: of the matrices.
        warmup, cooldown: shares of the run that the rate rises from 0, and falls to 0 at the end.
        clip_norm: largest gradient norm.
    """

    matrix_lr: float = 2e-3
    other_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.02
    cooldown: float = 0.4
    clip_norm: float = 1.0


@dataclass(frozen=True)
class ToyRecipe:
    """A run of ``hiar train toy``.

    Args:
        seed: of the weights, the data and the noise. threads: of torch on the CPU; 0 leaves torch's choice.
        iterations: optimiser updates. batch_size: clips in each. num_frames: frames of a clip.
        frames_per_block, window_frames, sink_frames: the block-causal rule. steps, shift: the noise schedule.
        levels: which noise levels are trained. from_start: share of clips that are a video's beginning.
        first_block_weight: of a video's first block in the loss: it must place its shape without any context.
        held_out_prompts: prompts never trained on, for evaluation. channels: of the codec's latents.
        ema: decay of the averaged weights, which are the ones exported. precision: "bfloat16" autocast or "float32".
        log_every, checkpoint_every: iterations.
    """

    model: str = "toy"
    seed: int = 0
    threads: int = 0
    iterations: int = 5000
    batch_size: int = 16
    num_frames: int = 12
    frames_per_block: int = 3
    window_frames: int | None = 12
    sink_frames: int = 0
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 2.0
    levels: LevelMixture = field(default_factory=LevelMixture)
    from_start: float = 0.4
    first_block_weight: float = 1.0
    held_out_prompts: int = 64
    codec_floor: float = 0.25
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema: float = 0.998
    precision: str = "bfloat16"
    log_every: int = 20
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        for name in ("iterations", "batch_size", "num_frames", "frames_per_block", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_frames % self.frames_per_block or self.num_frames < 2 * self.frames_per_block:
            raise ValueError(
                f"recipe: num_frames must be a multiple of frames_per_block {self.frames_per_block} and at least two "
                f"blocks, got {self.num_frames}"
            )
        for name in ("from_start", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"recipe: {name} must be in 0..1, got {getattr(self, name)}")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f"recipe: precision must be bfloat16 or float32, got {self.precision!r}")

    @property
    def schedule(self) -> FlowSchedule:
        """The noise schedule."""
        return FlowSchedule(self.steps, self.shift)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping, for the checkpoint and the model card."""
        return dataclasses.asdict(self)


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> ToyRecipe:
    """A recipe by name (shipped) or path (.yaml), with dotted ``overrides`` such as {"optimizer.matrix_lr": 1e-3}.

    Raises:
        ValueError: no such recipe, an unknown key, a value of the wrong type.
    """
    shipped = resources.files(__package__) / "recipes" / f"{name}.yaml"
    if shipped.is_file():
        text = shipped.read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        names = sorted(p.name.removesuffix(".yaml") for p in (resources.files(__package__) / "recipes").iterdir())
        raise ValueError(f"no recipe {name!r}: neither a file nor one of {', '.join(names)}")
    values = yaml.safe_load(text) or {}
    for key, value in (overrides or {}).items():
        *path, leaf = key.split(".")
        target = values
        for part in path:
            target = target.setdefault(part, {})
        target[leaf] = value
    return _build(ToyRecipe, values, "")


def _build(kind: Any, values: Any, prefix: str) -> Any:
    """A recipe dataclass from a mapping; refuses unknown keys and wrong types by their full name."""
    if not isinstance(values, dict):
        raise ValueError(f"recipe: {prefix or 'the file'} must be a mapping, got {values!r}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    built = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; legal: {', '.join(known)}"
            raise ValueError(f"recipe: unknown key {prefix}{key}{hint}")
        nested = {"levels": LevelMixture, "optimizer": OptimizerRecipe}.get(key)
        if nested is not None:
            built[key] = _build(nested, value, f"{prefix}{key}.")
            continue
        default = known[key].default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        listed = isinstance(default, tuple) and isinstance(value, list)
        unlimited = key == "window_frames" and value is None
        if type(value) is not type(default) and not listed and not unlimited:
            raise ValueError(f"recipe: {prefix}{key} must be {type(default).__name__}, got {value!r}")
        built[key] = value
    return kind(**built)
