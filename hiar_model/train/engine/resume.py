"""Whether a run may go on from its state: the same recipe and the same content of what it reads; and what is said where
its losses are no longer to the bit those of a run without an interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.registry import SHIPPED
from ..config.reading import differences, recipe_keys
from ..config.recipe import HiARRecipe, TrainingRecipe
from .checksums import checksums
from .distributed import DistContext
from .metrics import LOSSES, last_logged
from .snapshots import Snapshots

STATES, MODEL, MODELS = "states", "model", "models"
INITIAL = ("init", "critic_init")
"""Weights that a run reads for its first update alone: later ones do not depend on what has become of the file."""
PATHS = (*INITIAL, "teacher", "data.folder", "trajectories", "forward_kl.trajectories")
"""Keys of a recipe that name files: where the content is the same, they may have moved."""


def check_resume(recipe: TrainingRecipe, folder: Path) -> None:
    """What can be known before any weights are read.

    Raises:
        ValueError: one line: the folder holds a run of another recipe; a state that cannot be read; what a run has
            achieved, but no state to go on from.
    """
    state = Snapshots(folder / STATES).newest()
    if state is None:
        _require_nothing_achieved(recipe, folder)
        return
    about = Snapshots(folder / STATES).about(state)
    changes = {key: values for key, values in _changes(recipe, folder, state, about).items() if key not in PATHS}
    _refuse(recipe, folder, about["update"], changes)


def without_lost_weights(recipe: TrainingRecipe, folder: Path) -> TrainingRecipe:
    """The recipe to make a stage of: without initial weights whose file has gone, where the folder's state has later
    ones.
    """
    if Snapshots(folder / STATES).newest() is None:
        return recipe
    lost = [key for key in INITIAL if (path := getattr(recipe, key, None)) and not _exists(path)]
    if isinstance(recipe, HiARRecipe) and recipe.critic_model not in (None, recipe.teacher_model):
        lost = [key for key in lost if key != "critic_init"]  # the teacher's would be of another size
    none: dict[str, Any] = dict.fromkeys(lost)
    return dataclasses.replace(recipe, **none)


def same_inputs(
    recipe: TrainingRecipe,
    folder: Path,
    state: Path,
    about: Mapping[str, Any],
    inputs: Mapping[str, str],
    initial: Callable[[], Mapping[str, str]],
) -> dict[str, str]:
    """The hashes that the next states of a run hold, if this state is one of it.

    Args:
        about: of the state. inputs: what is read now, hashes by key of the recipe. initial: those of the initial
            weights, which are read only where their path has changed.

    Raises:
        ValueError: one line: another recipe, or another content of what it names.
    """
    changes, stored = _changes(recipe, folder, state, about), about.get("inputs", {})
    if any(key in stored for key in changes if key in INITIAL):
        inputs = {**inputs, **initial()}
    for key in [key for key in changes if key in PATHS and key in stored]:
        before, now = changes.pop(key)
        if stored[key] != inputs.get(key):
            remark = " of another content" if now and _exists(now) else ", which is not there" if now else ""
            changes[key] = before, f"{now}{remark}"
    _refuse(recipe, folder, about["update"], changes)
    paths = {key: _value(recipe, key) for key in inputs}
    for key in (key for key in inputs if key not in INITIAL and key in stored and stored[key] != inputs[key]):
        raise ValueError(
            f"the content of {key} {paths[key]} has changed since {state} was saved (its hash was "
            f"{stored[key][:12]}, now {inputs[key][:12]}): put back what was there, or choose another --out"
        )
    return {**inputs, **stored}


def weights_hash(network: nn.Module) -> str:
    """Hexadecimal, of a network's parameters, however they are sharded. Every rank must call it."""
    sums = checksums({name: p.detach() for name, p in network.named_parameters()})
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def execution(context: DistContext, recipe: TrainingRecipe) -> dict[str, Any]:
    """Where and how a run executes, of which its roundings depend; call it with the run's own number of threads."""
    kind, processes = context.device.type, context.world_size
    name = torch.cuda.get_device_name(context.device) if kind == "cuda" else _processor()
    return {
        "processes": processes,
        "scale.shard": (recipe.scale.shard or processes) if processes > 1 else 1,
        "scale.micro_batch": max(map(len, context.micro_batches(recipe.batch_size, recipe.scale.micro_batch))),
        "device": f"{kind} ({name})",
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "torch": str(torch.__version__),
    }


def departures(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """A line that says why losses are not those of an uninterrupted run to the bit; None: nothing has changed."""
    changed = [f"{key} ({before[key]}, now {now[key]})" for key in now if key in before and before[key] != now[key]]
    if not changed:
        return None
    return f"from here on losses are not to the bit those of an uninterrupted run; changed: {', '.join(changed)}"


def _changes(recipe: TrainingRecipe, folder: Path, state: Path, about: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(before, now) by key, where a state is of another recipe; ValueError for another stage or version."""
    now, stored = recipe.to_dict(), about["recipe"]
    if stored.get("stage") != now["stage"]:
        raise ValueError(f"{folder} holds a run of the stage {stored.get('stage')}; choose another --out")
    if keys := recipe_keys(now) ^ recipe_keys(stored):
        other = f"another version, with other recipe keys ({', '.join(sorted(keys))})"
        raise ValueError(f"{state} was saved by {other}; choose another --out")
    changes = {key: (before, ours) for key, ours, before in differences(now, stored)}
    if recipe.updates >= about["update"] and recipe.has_constant_rates():
        changes.pop("updates", None)  # nothing before this update depends on them
    return changes


def _refuse(recipe: TrainingRecipe, folder: Path, update: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    if not changes:
        return
    values = ", ".join(f"{key} ({before}, now {now})" for key, (before, now) in changes.items())
    legal = ""
    if "updates" in changes:
        more = f"at least {update}" if recipe.has_constant_rates() else "others only where warmup and cooldown are 0"
        legal = f" (updates: {more})"
    raise ValueError(
        f"{folder} holds a run with another {values}; choose another --out, or give the former values{legal}"
    )


def _require_nothing_achieved(recipe: TrainingRecipe, folder: Path) -> None:
    """ValueError where a run from the start would replace the losses and models of one whose states are gone."""
    models = [path.name for path in (folder / MODELS).glob("update_*")] if (folder / MODELS).is_dir() else []
    numbers = [int(number) for name in models if (number := name.removeprefix("update_")).isdecimal()]
    reached, files = max([last_logged(folder / LOSSES), *numbers]), [LOSSES, MODEL, MODELS]
    has_model = (folder / MODEL).is_dir() and any((folder / MODEL).iterdir())
    if has_model or reached > recipe.scale.checkpoint_every:  # of fewer updates there need not be a state yet
        what = " and ".join(str(folder / name) for name in files if (folder / name).exists())
        raise ValueError(
            f"{folder} holds a run of {reached} updates but no state in {folder / STATES}, and would begin again: "
            f"copy the state there, move {what} away, or choose another --out"
        )


def _exists(path: str) -> bool:
    return path in SHIPPED or Path(path).exists()


def _value(recipe: TrainingRecipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
