"""The messages of :mod:`.protocol` as a JSON schema, and the requests for whole videos as OpenAPI."""

from __future__ import annotations

import typing
from dataclasses import MISSING, fields
from typing import Annotated, Any

from ..version import package_version
from . import protocol
from .jobs import JobRequest
from .protocol import (
    CODES,
    FROM_CLIENT,
    FROM_SERVER,
    LARGEST_MESSAGE,
    VERSION,
    OneOf,
    ProtocolMessage,
    Stats,
    type_options,
)
from .store import STATUSES


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
    """The JSON schema of a dataclass whose fields have types as in :mod:`.protocol`."""
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
        else:
            least, most = ("minLength", "maxLength") if base is str else ("minimum", "maximum")
            of_type |= {least: limit.least, most: limit.most}
    return of_type


def openapi() -> dict[str, Any]:
    """What `/v1/openapi.json` says of the requests for whole videos, OpenAPI 3.1."""
    video = {"schema": {"$ref": "#/components/schemas/Video"}}
    one = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    missing = {"404": _error("no video has this id")}

    def get(summary: str, responses: dict[str, Any], parameters: list[Any] | None = None) -> dict[str, Any]:
        return {"summary": summary, "responses": responses, **({"parameters": parameters} if parameters else {})}

    def json_of(description: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": content or {"schema": {"type": "object"}}}}

    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hiar serve",
            "version": package_version(),
            "description": "Whole videos as jobs. Live video: the WebSocket /v1/realtime/video, whose messages "
            f"/v1/schema.json describes; a message has at most {LARGEST_MESSAGE} bytes.",
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/v1/videos": {
                "post": {
                    "summary": "Make a video",
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobRequest"}}},
                    },
                    "responses": {
                        "202": json_of("it waits for its turn; Location names it", video),
                        "400": _error("no JSON object, or a wrong field"),
                        "413": _error("a body that is too large"),
                        "422": _error("a video that the model cannot make"),
                        "503": _error("too many wait, or memory would not suffice: see Retry-After"),
                    },
                },
                "get": get("The newest videos", {"200": json_of("a list")}),
            },
            "/v1/videos/{id}": {
                "get": get("A video", {"200": json_of("how far it is", video), **missing}, one),
                "delete": get("Delete a video", {"204": {"description": "it is gone"}, **missing}, one),
            },
            "/v1/videos/{id}/content": {
                "get": get(
                    "The frames; ranges are served",
                    {"200": {"description": "an mp4", "content": {"video/mp4": {}}}, **missing,
                     "409": _error("it is not finished"), "410": _error("its file is not there any more")},
                    one,
                ),
            },
            "/v1/videos/{id}/record": {
                "get": get("How it was made", {"200": json_of("its record"), **missing,
                                               "409": _error("it is not finished")}, one),
            },
            "/v1/info": {"get": get("The model, and what a prompt may say", {"200": json_of("of the page")})},
            "/healthz": {"get": get("Whether the server works", {"200": json_of("yes"), "503": json_of("no")})},
            "/metrics": {"get": get("Figures for Prometheus", {"200": {"description": "text"}})},
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "JobRequest": object_schema(JobRequest),
                "Video": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string"},
                        "kind": {"enum": ["job", "saved"], "description": "asked for, or saved from a live video"},
                        "status": {"enum": list(STATUSES)},
                        "created": {"type": "number", "description": "seconds since 1970"},
                        "frames": {"type": "integer", "description": "made so far"},
                        "num_frames": {"type": ["integer", "null"]},
                        "seconds": {"type": ["number", "null"], "description": "length, once it is finished"},
                        "error": {"type": ["string", "null"]},
                        "url": {"type": ["string", "null"], "description": "of its content, once it is finished"},
                    },
                },
                "Error": {
                    "type": "object",
                    "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
                    "required": ["code", "message"],
                },
            },
        },
    }  # fmt: skip


def _error(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
