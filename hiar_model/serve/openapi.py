"""What `/v1/openapi.json` says of the requests for whole videos."""

from __future__ import annotations

from typing import Any

from ..version import package_version
from .jobs import JobRequest
from .protocol import LARGEST_MESSAGE
from .schema import object_schema
from .store import STATUSES


def openapi() -> dict[str, Any]:
    """The description, OpenAPI 3.1."""
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
                     "409": _error("it is not finished")},
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
