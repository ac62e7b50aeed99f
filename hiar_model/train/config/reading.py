"""YAML and key=value to recipes: unknown keys and wrong types are refused by their full name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from ...io.files import load_yaml
from .recipe import RECIPES, Recipe


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package, such as "toy/hiar"."""
    root = resources.files("hiar_model.train") / "recipes"
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.yaml')}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name (shipped, such as "toy/hiar") or path (.yaml), with dotted ``overrides`` such as
    {"optimizer.lr": 1e-3}.

    Raises:
        ValueError: one line: no such recipe, an unknown key, a value of the wrong type.
    """
    shipped = shipped_recipes()
    if name in shipped:
        file = resources.files("hiar_model.train").joinpath("recipes", *f"{name}.yaml".split("/"))
        text = file.read_text(encoding="utf-8")
    elif Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {name} is not text in UTF-8: {error}") from error
    else:
        raise ValueError(f"no recipe {name!r}: neither a file nor one of {', '.join(shipped)}")
    try:
        values = load_yaml(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name} must be a mapping, got {values!r}")
    for key, value in (overrides or {}).items():
        *path, leaf = key.split(".")
        target = values
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ValueError(f"recipe: {part} of {key} is a value, not a section")
        target[leaf] = value
    return make_recipe(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe that a plain mapping describes, as :meth:`Recipe.to_dict` gives it; ValueError as load_recipe."""
    rest = dict(values)
    stage = rest.pop("stage", None)
    if stage not in RECIPES:
        near = difflib.get_close_matches(str(stage), RECIPES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"recipe: stage must be one of {', '.join(RECIPES)}, got {stage!r}{hint}")
    return build(RECIPES[stage], rest)


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two recipes, as plain mappings, differ; ``scale`` is left out."""
    found = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key, ...), theirs.get(key, ...)
        if prefix + key == "scale" or a == b:
            continue
        nested = isinstance(a, Mapping) and isinstance(b, Mapping)
        found += differing_keys(a, b, f"{prefix}{key}.") if nested else [prefix + key]
    return found


def build(kind: Any, values: Any) -> Any:
    """A ``kind``, a dataclass, from a mapping as YAML gives it.

    Raises:
        ValueError: one line: an unknown key and the nearest legal one, a value of the wrong type and the right type.
    """
    return _build(kind, values, "", list(dotted_keys(kind)))


def dotted_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every legal key of a recipe class, with the keys of its sections behind a dot."""
    for name, hint in _hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from dotted_keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _hints(kind: Any) -> dict[str, Any]:
    """Field -> type of a recipe class."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _build(kind: Any, values: Any, prefix: str, legal: list[str]) -> Any:
    """A recipe class from a mapping; refuses unknown keys and wrong types by their full name."""
    if not isinstance(values, dict):
        raise ValueError(f"recipe: {prefix.rstrip('.')} must be a section with keys, got {values!r}")
    hints, built = _hints(kind), {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"recipe: unknown key {prefix}{key}{_nearest(f'{prefix}{key}', legal)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            built[key] = _build(hint, value, f"{prefix}{key}.", legal)
        else:
            built[key] = _typed(f"{prefix}{key}", hint, value)
    return kind(**built)


def _nearest(key: str, legal: list[str]) -> str:
    near = difflib.get_close_matches(key, legal, 1, 0.7)
    leaf = key.rpartition(".")[2]
    near = near or [name for name in legal if name.rpartition(".")[2] == leaf]
    near = near or difflib.get_close_matches(key, legal, 1)
    return f"; did you mean {near[0]}?" if near else f"; legal: {', '.join(legal)}"


def _typed(name: str, hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint`` wants it, or a ValueError that says what would be right."""
    fits, found = _convert(hint, value)
    if not fits:
        raise ValueError(f"recipe: {name} must be {_described(hint)}, got {value!r}")
    return found


def _convert(hint: Any, value: Any) -> tuple[bool, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((found for found in (_convert(one, value) for one in inner) if found[0]), (False, None))
    if origin is Literal:
        return value in inner, value
    if origin is tuple:
        if not isinstance(value, list | tuple) or (inner[-1] is not ... and len(value) != len(inner)):
            return False, None
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        parts = [_convert(kind, part) for kind, part in zip(kinds, value, strict=True)]
        return all(fits for fits, _ in parts), tuple(found for _, found in parts)
    if hint is float and isinstance(value, str):  # YAML takes 2e-6, which has no dot, for a word
        try:
            return True, float(value)
        except ValueError:
            return False, None
    if hint is float and type(value) is int:
        return True, float(value)
    return type(value) is hint, value


def _described(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(one) for one in inner)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin is tuple:
        if inner[-1] is ...:
            one = _described(inner[0])
            return f"a list of ({one})" if " " in one else f"a list of {one}"
        return f"a list of {len(inner)} numbers"
    return "null" if hint is type(None) else hint.__name__
