"""The messages of :mod:`.protocol` as a JSON schema."""

from __future__ import annotations

import typing
from dataclasses import MISSING, fields
from typing import Annotated, Any

from . import protocol
from .protocol import CODES, FROM_CLIENT, FROM_SERVER, VERSION, Longest, OneOf, ProtocolMessage, Stats, type_options


def schema() -> dict[str, Any]:
    """The messages as a JSON schema (draft 2020-12): ``$defs`` of each, ``client`` and ``server`` of each direction."""
    kinds = {kind.__name__: kind for kind in (*FROM_CLIENT.values(), *FROM_SERVER.values(), Stats)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"hiar realtime video, version {VERSION}",
        "description": (protocol.__doc__ or "").partition("\n\n")[2],
        "oneOf": [{"$ref": "#/$defs/client"}, {"$ref": "#/$defs/server"}],
        "$defs": {
            "client": {"oneOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in FROM_CLIENT.values()]},
            "server": {"oneOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in FROM_SERVER.values()]},
            "codes": {"oneOf": [{"const": code, "description": meaning} for code, meaning in CODES.items()]},
            **{name: object_schema(kind) for name, kind in kinds.items()},
        },
    }


def object_schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON schema of a dataclass of this file."""
    hints = typing.get_type_hints(kind, include_extras=True)
    tag = {"type": {"const": kind.type}} if issubclass(kind, ProtocolMessage) else {}
    properties: dict[str, Any] = dict(tag)
    for f in fields(kind):
        properties[f.name] = {"const": VERSION} if f.name == "v" else _of_hint(hints[f.name])
        if f.default is not MISSING:
            properties[f.name]["default"] = f.default
    return {
        "type": "object",
        "description": kind.__doc__,
        "properties": properties,
        "required": [*tag, *(f.name for f in fields(kind) if f.default is MISSING)],
        "additionalProperties": False,
    }


def _of_hint(hint: Any) -> dict[str, Any]:
    options = type_options(hint)
    if len(options) > 1:
        return {"anyOf": [_of_hint(option) for option in options]}
    base, limits = (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())
    if typing.get_origin(base) is list:
        return {"type": "array", "items": _of_hint(typing.get_args(base)[0])}
    if base is Stats:
        return {"$ref": "#/$defs/Stats"}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    of_type: dict[str, Any] = {"type": names[base]}
    for limit in limits:
        if isinstance(limit, OneOf):
            of_type["enum"] = list(limit.values)
        elif isinstance(limit, Longest):
            of_type |= {"minLength": limit.least, "maxLength": limit.most}
        else:
            of_type |= {"minimum": limit.least, "maximum": limit.most}
    return of_type
