"""Recipes from YAML and key=value, parsed by jsonargparse; a mistake is one line with the full key."""

from __future__ import annotations

import dataclasses
import functools
import re
import types as type_kinds
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from ...common.checks import nearest, one_of
from ...io.files import is_time, load_yaml, read_text
from .recipe import RECIPES, REPORTS, REPORTS_OF, SKIPS, Recipe


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
            text = read_text(name)
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {name} is not text in UTF-8: {error}") from error
    else:
        raise ValueError(f"no recipe {name!r}: neither a file nor one of {', '.join(shipped)}")
    try:
        values = load_yaml(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name} must be a mapping, got {values!r}")
    return make_recipe({**_flat(values), **(overrides or {})})


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a plain mapping, nested or with dotted keys (:meth:`Recipe.to_dict`); ValueError as load_recipe."""
    flat = _flat(values)
    stage = flat.pop("stage", None)
    one_of("recipe: stage", stage, RECIPES)
    kind = RECIPES[stage]
    types = dict(field_types(kind))
    sections = {key.rpartition(".")[0] for key in types} - {""}
    for key, value in flat.items():
        if key in sections:
            raise ValueError(f"recipe: {key} must be a section with keys, got {value!r}")
        if key not in types:
            raise ValueError(f"recipe: unknown key {key}{_suggestion(key, types)}")
        if is_time(value) and not {str} & {types[key], *typing.get_args(types[key])}:
            raise ValueError(f"recipe: {key} must be {_described(types[key])}, got {value!r}")
        if value is None and type(None) not in typing.get_args(types[key]):  # which jsonargparse lets pass
            raise ValueError(f"recipe: {key} must be {_described(types[key])}, got None")
    try:
        parsed = _parser(stage).parse_object(flat, defaults=False)  # which are the dataclasses' own
    except ArgumentError as error:
        match = re.search(r'key "([\w.]+)"', str(error))
        if match is None:
            raise ValueError(f"recipe: {' '.join(str(error).split())}") from error
        key = match[1]
        raise ValueError(f"recipe: {key} must be {_described(types[key])}, got {flat[key]!r}") from error
    return _built(kind(), parsed.as_dict())


@functools.cache
def _parser(stage: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RECIPES[stage])
    return parser


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, our value, theirs) where two recipes, as plain mappings, would learn something else; None where one
    lacks the key. The section ``scale``, :data:`.recipe.REPORTS` and :data:`.recipe.SKIPS` are left out.
    """
    a, b = _flat(ours), _flat(theirs)
    free = (*REPORTS, *SKIPS, *REPORTS_OF.get(ours.get("stage", ""), ()))
    keys = [key for key in {**a, **b} if not key.startswith("scale.") and key not in free]
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key, ...) != b.get(key, ...)]


def recipe_keys(values: Mapping[str, Any]) -> set[str]:
    """The dotted keys of a recipe, as a plain mapping, without its section ``scale``."""
    return {key for key in _flat(values) if not key.startswith("scale.")}


def field_types(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every field of a recipe class and its sections."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from field_types(hint, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def _built(default: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass with parsed values; what its validation says gets the name of the section in front."""
    values = {
        name: _built(getattr(default, name), value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
    }
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:
        raise ValueError(f"recipe: {prefix}{error}") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        more = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        if twice := flat.keys() & more.keys():  # in a section, and with dots
            raise ValueError(f"recipe: the key {min(twice)} stands twice")
        flat |= more
    return flat


def _suggestion(key: str, legal: Mapping[str, Any]) -> str:
    same_name = [name for name in legal if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_name:
        return nearest(key, same_name) or f"; did you mean {same_name[0]}?"
    return nearest(key, legal) or f"; legal: {', '.join(legal)}"


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _described(hint: Any) -> str:
    """The values of a type as a person writes them: "a whole number", "[a number, ...]", "a number or null"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else _described(part) for part in parts)}]"
    if origin in (typing.Union, type_kinds.UnionType):
        return " or ".join(map(_described, parts))
    return str(hint).replace("typing.", "")
