"""The messages of the realtime protocol: what is accepted, and each way to be wrong, by its code."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from hiar_model.serve import protocol
from hiar_model.serve.protocol import CODES, FROM_CLIENT, FROM_SERVER, Refusal, parse
from hiar_model.serve.schema import schema

pytestmark = pytest.mark.cpu

STATS = protocol.Stats(12.0, 0.3, None, None, 0, 1 << 20, 1, 1)
EXAMPLES = [
    protocol.StartMessage(1, "a red circle", 7, "wavefront", 60, 32, 48, "webp"),
    protocol.StartMessage(1, resume="abc", after=3),
    protocol.ChangePrompt("a blue square"),
    protocol.Pause(),
    protocol.Play(),
    protocol.Seek(2),
    protocol.Fork(0, "ein grüner Kreis"),
    protocol.Ack(9),
    protocol.Save(),
    protocol.StopMessage(),
    protocol.BlockMessage(1, 0, 0, 3, 0, "a red circle", STATS),
    protocol.Progress([["denoise", 0, 7]], 7, 6),
    protocol.Ended("complete", 60),
    Refusal("busy", "no place", retry_after=3).message,
]

START = '{"type": "start", "v": 1'
MALFORMED = [
    (b"\x00\x01", "bad_message", "bytes"),
    ("", "bad_message", "JSON object"),
    ("{", "bad_message", "JSON object"),
    ("start", "bad_message", "JSON object"),
    ("null", "bad_message", "got null"),
    ("[]", "bad_message", "got []"),
    ('"start"', "bad_message", 'got "start"'),
    ("7", "bad_message", "got 7"),
    ("NaN", "bad_message", "NaN"),
    ('{"type": "pause"} {"type": "play"}', "bad_message", "JSON object"),
    ('{"type": "pause", "type": "play"}', "bad_message", "twice"),
    ('{"type": "seek", "block": Infinity}', "bad_message", "Infinity"),
    ("{'type': 'pause'}", "bad_message", "JSON object"),
    ("[" * 9000, "bad_message", "JSON object"),
    ('{"type": "seek", "block": ' + "9" * 5000 + "}", "bad_message", "JSON object"),
    ('{"type": "prompt", "text": "' + "x" * 20000 + '"}', "too_large", "16384 bytes"),
    ('{"type": "prompt", "text": "' + "ü" * 9000 + '"}', "too_large", "16384 bytes"),
    ("{}", "unknown_type", "got null"),
    ('{"type": null}', "unknown_type", "got null"),
    ('{"type": 1}', "unknown_type", "got 1"),
    ('{"type": ["start"]}', "unknown_type", "start, prompt"),
    ('{"type": "begin"}', "unknown_type", "start, prompt"),
    ('{"type": "Start"}', "unknown_type", "did you mean start?"),
    ('{"type": "block"}', "unknown_type", "start, prompt"),
    ('{"type": "start"}', "missing_field", "v is missing"),
    ('{"type": "start", "v": 2, "new": 1}', "wrong_version", "v must be 1, got 2"),
    ('{"type": "start", "v": "1"}', "wrong_version", 'got "1"'),
    ('{"type": "prompt"}', "missing_field", "text is missing"),
    ('{"type": "fork", "block": 1}', "missing_field", "prompt is missing"),
    ('{"type": "ack"}', "missing_field", "seq is missing"),
    ('{"type": "pause", "now": true}', "unknown_field", "it has none"),
    ('{"type": "seek", "blocks": 1}', "unknown_field", "did you mean block?"),
    (f'{START}, "\\u0000": 1}}', "unknown_field", "\\u0000"),
    (f'{START}, "\\ud800": 1}}', "unknown_field", "\\ud800"),
    ('{"type": "\\ud800"}', "unknown_type", "\\ud800"),
    (f'{START}, "order": "\\ud800"}}', "bad_value", "order must be one of"),
    (f'{START}, "prompt": 7}}', "bad_value", "prompt must be a string, got 7"),
    (f'{START}, "prompt": null}}', "bad_value", "prompt must be a string, got null"),
    (f'{START}, "prompt": ["a"]}}', "bad_value", "prompt must be a string"),
    (f'{START}, "prompt": "\\ud800"}}', "bad_value", "surrogate"),
    (f'{START}, "seed": -1}}', "bad_value", "seed must be from 0"),
    (f'{START}, "seed": 1.5}}', "bad_value", "whole number, got 1.5"),
    (f'{START}, "seed": true}}', "bad_value", "whole number, got true"),
    (f'{START}, "seed": "7"}}', "bad_value", "whole number"),
    (f'{START}, "seed": {10**17}}}', "bad_value", "seed must be from 0"),
    (f'{START}, "seed": 1e400}}', "bad_value", "whole number, got Infinity"),
    (f'{START}, "num_frames": 0}}', "bad_value", "num_frames must be from 1"),
    (f'{START}, "height": 99999}}', "bad_value", "height must be from 1"),
    (f'{START}, "width": {{}}}}', "bad_value", "a whole number or null"),
    (f'{START}, "order": "step_first"}}', "bad_value", "stream, wavefront, block_first"),
    (f'{START}, "order": "wavefrnt"}}', "bad_value", "did you mean wavefront?"),
    (f'{START}, "format": "avi"}}', "bad_value", "mp4, webp, jpeg"),
    (f'{START}, "resume": ""}}', "bad_value", "resume must have from 1"),
    (f'{START}, "resume": 7}}', "bad_value", "a string or null"),
    ('{"type": "prompt", "text": ""}', "bad_value", "text must have from 1"),
    ('{"type": "prompt", "text": "' + "x" * 2001 + '"}', "bad_value", "2000 characters, got 2001"),
    ('{"type": "seek", "block": -1}', "bad_value", "block must be from 0"),
    ('{"type": "seek", "block": null}', "bad_value", "whole number, got null"),
    ('{"type": "ack", "seq": [1]}', "bad_value", "whole number, got [1]"),
]  # fmt: skip


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.type)
def test_messages_survive_json(message):
    known = FROM_CLIENT if message.type in FROM_CLIENT else FROM_SERVER
    assert parse(message.to_json(), known) == message


def test_every_client_message_is_in_the_examples():
    assert FROM_CLIENT.keys() == {message.type for message in EXAMPLES} & FROM_CLIENT.keys()


@pytest.mark.parametrize(("text", "code", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_messages(text, code, words):
    with pytest.raises(Refusal) as refused:
        parse(text)
    assert refused.value.code == code and words in str(refused.value)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)
    assert parse(refused.value.message.to_json(), FROM_SERVER) == refused.value.message
    assert refused.value.message.to_json().encode()  # which half a surrogate pair has not


def problems(value: object, spec: dict, root: dict) -> list[str]:
    """Why a JSON schema refuses a value; of the words that ours uses, any other is an error."""
    known = {"$schema", "title", "description", "$defs", "oneOf", "anyOf", "$ref", "const", "type", "properties",
             "required", "additionalProperties", "default", "items", "enum", "minLength", "maxLength", "minimum",
             "maximum"}  # fmt: skip
    assert spec.keys() <= known, spec.keys() - known
    if "$ref" in spec:
        return problems(value, root["$defs"][spec["$ref"].rpartition("/")[2]], root)
    for several in ("oneOf", "anyOf"):
        if several in spec:
            fitting = [one for one in spec[several] if not problems(value, one, root)]
            return [] if len(fitting) == 1 or (several == "anyOf" and fitting) else [f"{len(fitting)} of {several}"]
    if "const" in spec and value != spec["const"]:
        return [f"{value!r} is not {spec['const']!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
             "null": type(None)}  # fmt: skip
    if "type" in spec and (not isinstance(value, kinds[spec["type"]]) or
                           (isinstance(value, bool) and spec["type"] in ("integer", "number"))):  # fmt: skip
        return [f"{value!r} is no {spec['type']}"]
    found = []
    if isinstance(value, dict):
        found += [f"lacks {name}" for name in spec["required"] if name not in value]
        found += [f"has {name}" for name in value if name not in spec["properties"]]
        for name, one in spec["properties"].items():
            found += problems(value[name], one, root) if name in value else []
    if isinstance(value, list):
        found += [problem for one in value for problem in problems(one, spec["items"], root)]
    if "enum" in spec and value not in spec["enum"]:
        found.append(f"{value!r} is none of {spec['enum']}")
    if isinstance(value, str) and not spec.get("minLength", 0) <= len(value) <= spec.get("maxLength", 10**9):
        found.append("length")
    if isinstance(value, int) and not spec.get("minimum", -(10**30)) <= value <= spec.get("maximum", 10**30):
        found.append("size")
    return found


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.type)
def test_the_schema_accepts_messages(message):
    assert problems(json.loads(message.to_json()), schema(), schema()) == []


def test_the_schema_refuses_what_the_parser_refuses():
    """All malformed messages that are JSON: the published schema and the server agree."""
    compared = 0
    for text, code, _ in MALFORMED:
        if code in ("bad_message", "too_large") or "\\ud800" in text or "1e400" in text:
            continue  # what no schema can say
        assert problems(json.loads(text), schema()["$defs"]["client"], schema()), text
        compared += 1
    assert compared > 30


def test_the_schema_is_json_and_names_all():
    published = json.loads(json.dumps(schema()))
    assert {one["const"] for one in published["$defs"]["codes"]["oneOf"]} == set(CODES)
    assert set(asdict(STATS)) == set(published["$defs"]["Stats"]["properties"])
