"""The messages of `/v1/realtime/video`, version 1: what a client may send, what it gets, why it is refused.

Each message is a JSON object with a "type", one dataclass here; :mod:`.schema` publishes them all as a JSON schema. A
:class:`BlockMessage` is followed by one binary message: the eight bytes of its ``seq``, big-endian, then the frames.
Imports no torch and no server, so a client may use it too.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, NamedTuple

from ..common.checks import MOST_FRAMES, nearest, one_of
from ..config.rollout import ORDERS

VERSION = 1
LONGEST_PROMPT = 2000
"""Characters of a prompt."""
LARGEST_MESSAGE = 16384
"""Bytes of a message from a client."""
MOST_SEED = 2**53 - 1
"""The largest whole number that every JSON reader keeps."""
FORMATS = ("mp4", "webp", "jpeg")
LIVE_ORDERS = tuple(order for order in ORDERS if order != "step_first")

CODES = {
    "bad_message": "no JSON object, or not text",
    "too_large": f"a message above {LARGEST_MESSAGE} bytes",
    "unknown_type": "a type that is none of the client's messages",
    "missing_field": "a field without a default is not there",
    "unknown_field": "a field that the message does not have",
    "bad_value": "a field of the wrong kind, or outside its limits",
    "wrong_version": f"v is not {VERSION}",
    "bad_prompt": "a prompt that the model cannot show",
    "bad_video": "a size, length or order that the model cannot make",
    "not_started": "a message before start",
    "already_started": "a second start",
    "unknown_session": "no session has this token: it never had, was not kept so long, or is damaged",
    "cannot_resume": "this server cannot go on with the session, which waits for one that can: try again",
    "no_such_block": "a block before the first, or one that has not been made yet",
    "nothing_yet": "nothing to save: no block has been made",
    "busy": "all places are taken, or memory would not suffice: try again after retry_after seconds",
    "too_many": "too many connections or messages of one client",
    "too_slow": "the client did not start, or did not read, in time",
    "disk_full": "the server cannot write",
    "shutting_down": "the server is being stopped",
    "failed": "the video failed; the server's log says why",
}
"""Code of a refusal -> its meaning."""


class Refusal(ValueError):
    """A request that is refused: a code of ``CODES`` and one line.

    closes: whether the connection ends with it. retry_after: seconds, where trying again may help. about: type of the
    client's message.
    """

    def __init__(
        self, code: str, message: str, *, closes: bool = False, retry_after: int | None = None, about: str | None = None
    ) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code, self.closes, self.retry_after, self.about = code, closes, retry_after, about

    @property
    def message(self) -> Refused:
        """What the client gets."""
        return Refused(self.code, str(self), self.closes, self.retry_after, self.about)


class Within(NamedTuple):
    """Limits of a number, or of the characters of a string."""

    least: int
    most: int


class OneOf(NamedTuple):
    """Legal values."""

    values: tuple[str, ...]


Prompt = Annotated[str, Within(1, LONGEST_PROMPT)]
Seed = Annotated[int, Within(0, MOST_SEED)]
Frames = Annotated[int, Within(1, MOST_FRAMES)]
Pixels = Annotated[int, Within(1, 16384)]
Number = Annotated[int, Within(0, MOST_SEED)]
After = Annotated[int, Within(-1, MOST_SEED)]
Token = Annotated[str, Within(1, 200)]
TaskList = list[list[str | int]]
"""Tasks as [kind, step, block], such as ["denoise", 0, 7]."""
PromptList = list[list[int | str]]
"""Prompts as [block, frame, prompt_index, prompt], such as [7, 21, 1, "a blue square"]."""


class ProtocolMessage:
    """A message; its ``type`` is the name in JSON."""

    type: ClassVar[str]

    def __init_subclass__(cls, type: str) -> None:
        cls.type = type

    def to_json(self) -> str:
        """The text that is sent."""
        return json.dumps({"type": self.type, **asdict(self)}, ensure_ascii=False)  # type: ignore[call-overload]


# Client to server


@dataclass(frozen=True)
class StartMessage(ProtocolMessage, type="start"):
    """Start a video, or go on with one: the first message of a connection.

    v               version of the protocol
    prompt          what to show; "" only with ``resume``
    seed            of all noise
    order           of the tasks; null: the one that suits the server
    num_frames      length in frames; null: endless
    height, width   in pixels; null: the model's
    format          of the frames
    resume          token of a session whose connection was lost; all else but ``after`` is then ignored
    after           seq of the last chunk that arrived whole, or that need not come again; -1: none. Those behind it are
                    sent (again), of acked ones the last few. null: the last one acked
    """

    v: int
    prompt: Annotated[str, Within(0, LONGEST_PROMPT)] = ""
    seed: Seed = 0
    order: Annotated[str, OneOf(LIVE_ORDERS)] | None = None
    num_frames: Frames | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    format: Annotated[str, OneOf(FORMATS)] = "mp4"
    resume: Token | None = None
    after: After | None = None


@dataclass(frozen=True)
class ChangePrompt(ProtocolMessage, type="prompt"):
    """Another prompt, from the first block on that has not begun: :class:`PromptScheduled` says which."""

    text: Prompt


@dataclass(frozen=True)
class Pause(ProtocolMessage, type="pause"):
    """Make no more blocks until :class:`Play`."""


@dataclass(frozen=True)
class Play(ProtocolMessage, type="play"):
    """Go on after :class:`Pause`."""


@dataclass(frozen=True)
class Seek(ProtocolMessage, type="seek"):
    """Go on from an earlier block; the same prompts give the same frames again."""

    block: Number


@dataclass(frozen=True)
class Fork(ProtocolMessage, type="fork"):
    """Go on from an earlier block with another prompt; later changes of the prompt are forgotten."""

    block: Number
    prompt: Prompt


@dataclass(frozen=True)
class Ack(ProtocolMessage, type="ack"):
    """The client has played the chunk ``seq`` and all before it, or wants more all the same. No more than ``window``
    chunks are made ahead of it.
    """

    seq: Number


@dataclass(frozen=True)
class Save(ProtocolMessage, type="save"):
    """Write the video so far as an mp4, with its record; :class:`Saved` says where."""


@dataclass(frozen=True)
class StopMessage(ProtocolMessage, type="stop"):
    """End the session: nothing of it is kept."""


# Server to client


@dataclass(frozen=True)
class ReadyMessage(ProtocolMessage, type="ready"):
    """The session is there; :class:`BlockMessage` messages follow.

    session, token     its public name, and what resumes it: keep it secret
    model, prompt, seed, order, steps, format, fps, num_frames   of the video; num_frames null: endless
    width, height      of the frames that are sent
    frames_per_block   frames of a block; the first one may have fewer
    mime, init         of an mp4: for MediaSource, and the bytes before the first chunk in base64; else null
    window             chunks that the server makes ahead of the last :class:`Ack`
    keep               seconds that the session is kept without a connection
    resumed, playing, block   whether it went on, is not paused, and the next block to come
    plan               groups of tasks from the start of the video, in order, for a drawing
    scheduled          the prompt of the next chunk and those that come later, as [block, frame, prompt_index, prompt]
    """

    v: int
    session: str
    token: str
    model: str
    prompt: str
    seed: int
    order: str
    steps: int
    format: str
    fps: float
    num_frames: int | None
    width: int
    height: int
    frames_per_block: int
    mime: str | None
    init: str | None
    window: int
    keep: float
    resumed: bool
    playing: bool
    block: int
    plan: list[TaskList]
    scheduled: PromptList


@dataclass(frozen=True)
class Stats:
    """Live figures of a session.

    fps             frames made per second, over the last blocks
    first_chunk_s   seconds from start to the first chunk
    p50, p99        seconds between chunks while the client kept up, over the last 500; null before the second
    misses          chunks that came after the client had played all before them
    memory          bytes of the whole server process
    queue           chunks sent and not acked
    sessions        of the server
    """

    fps: float
    first_chunk_s: float
    p50: float | None
    p99: float | None
    misses: int
    memory: int
    queue: int
    sessions: int


@dataclass(frozen=True)
class BlockMessage(ProtocolMessage, type="block"):
    """A chunk: ``frames`` frames from ``first_frame`` on; one binary message follows at once.

    Its payload, behind the eight bytes of ``seq``: for "mp4" a fragment that begins with a key frame, whose time is
    first_frame / fps; else each frame as four bytes of length, big-endian, and the picture.
    """

    seq: int
    block: int
    first_frame: int
    frames: int
    prompt_index: int
    prompt: str
    stats: Stats


@dataclass(frozen=True)
class PromptScheduled(ProtocolMessage, type="prompt_scheduled"):
    """A prompt takes effect at a block, which starts with this frame."""

    block: int
    frame: int
    prompt_index: int
    prompt: str


@dataclass(frozen=True)
class Progress(ProtocolMessage, type="progress"):
    """The group of tasks that ran last, the last block that has begun (-1: none), and how many are finished."""

    tasks: TaskList
    started: int
    finished: int


@dataclass(frozen=True)
class Moved(ProtocolMessage, type="moved"):
    """After :class:`Seek` or :class:`Fork`: the next chunk is this block, with this prompt; what the client has from
    ``frame`` on is of the past.
    """

    block: int
    frame: int
    prompt_index: int
    why: Annotated[str, OneOf(("seek", "fork"))]
    prompt: str


@dataclass(frozen=True)
class StateMessage(ProtocolMessage, type="state"):
    """Whether blocks are made: after :class:`Pause` and :class:`Play`."""

    playing: bool


@dataclass(frozen=True)
class Saved(ProtocolMessage, type="saved"):
    """The video so far is at ``url``; its record is there too, with "record" in place of "content"."""

    url: str
    frames: int
    seconds: float


@dataclass(frozen=True)
class Ended(ProtocolMessage, type="ended"):
    """No more chunks come: the video has all its frames, the client stopped it, or the server ends.

    resume: the session goes on when the server was started again; ask for it as after a lost connection.
    """

    reason: Annotated[str, OneOf(("complete", "stopped", "drained"))]
    frames: int
    resume: bool = False


@dataclass(frozen=True)
class Refused(ProtocolMessage, type="refused"):
    """A message was refused: a code, one line, whether the connection ends, when to try again, in seconds, and the type
    of the message, if it is known.
    """

    code: Annotated[str, OneOf(tuple(CODES))]
    message: str
    closes: bool = False
    retry_after: int | None = None
    about: str | None = None


FromClient = StartMessage | ChangePrompt | Pause | Play | Seek | Fork | Ack | Save | StopMessage
FROM_CLIENT: dict[str, type[ProtocolMessage]] = {kind.type: kind for kind in typing.get_args(FromClient)}
FROM_SERVER: dict[str, type[ProtocolMessage]] = {
    kind.type: kind
    for kind in (ReadyMessage, BlockMessage, PromptScheduled, Progress, Moved, StateMessage, Saved, Ended, Refused)
}  # fmt: skip


def parse(text: str | bytes, messages: dict[str, type[ProtocolMessage]] = FROM_CLIENT) -> Any:
    """The message of a text.

    Raises:
        Refusal: what is wrong with it, and the legal values.

    >>> parse('{"type": "seek", "block": 3}')
    Seek(block=3)
    """
    if isinstance(text, bytes):
        raise Refusal("bad_message", "a message is text, got bytes")
    if len(text) > LARGEST_MESSAGE or len(text.encode("utf-8", "surrogatepass")) > LARGEST_MESSAGE:
        raise Refusal("too_large", f"a message has at most {LARGEST_MESSAGE} bytes, got {len(text)} characters")
    try:
        values = json.loads(text, parse_constant=_no_number, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise Refusal("bad_message", f"a message is a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise Refusal("bad_message", f"a message is a JSON object, got {_shown(values)}")
    name = values.pop("type", None)
    if not isinstance(name, str) or name not in messages:
        near = nearest(name, messages) if isinstance(name, str) else ""
        raise Refusal("unknown_type", f"type must be one of {', '.join(messages)}, got {_shown(name)}{near}")
    try:
        return build(messages[name], values)
    except Refusal as refusal:
        refusal.about = name
        raise


def build(kind: type[Any], values: dict[str, Any]) -> Any:
    """An object of a dataclass of this file from the values of its fields; :class:`Refusal` names the wrong one."""
    hints = typing.get_type_hints(kind, include_extras=True)
    known = {f.name: f for f in fields(kind)}
    if kind is StartMessage and values.get("v", VERSION) != VERSION:  # first: all else may have changed
        raise Refusal("wrong_version", f"v must be {VERSION}, got {_shown(values['v'])}")
    for name in values:
        if name not in known:
            near = nearest(name, known)
            legal = f"legal: {', '.join(known)}" if known else "it has none"
            raise Refusal("unknown_field", f"unknown field {_shown(name)}, {legal}{near}")
    values = dict(values)
    for name, f in known.items():
        if name in values and hints[name] is Stats and isinstance(values[name], dict):
            values[name] = build(Stats, values[name])
        elif name in values:
            _check(name, values[name], hints[name])
        elif f.default is MISSING:
            raise Refusal("missing_field", f"{name} is missing")
    return kind(**values)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _no_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a field stands twice")
    return values


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check(name: str, value: Any, hint: Any) -> None:
    """Refusal unless a JSON value is of a type."""
    options = type_options(hint)
    if value is None and type(None) in options:
        return
    hint = next(option for option in options if option is not type(None))
    base, limits = (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())
    legal = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", Stats: "an object"}.get(
        base, "a list"
    )
    right = isinstance(value, (int, float) if base is float else typing.get_origin(base) or base)
    if not right or (isinstance(value, bool) and base is not bool):
        raise Refusal("bad_value", f"{name} must be {legal}{' or null' * (len(options) > 1)}, got {_shown(value)}")
    for limit in limits:
        if isinstance(limit, OneOf):
            try:
                one_of(name, value, limit.values)
            except ValueError as error:
                raise Refusal("bad_value", str(error)) from None
            continue
        size, verb, unit = (len(value), "have", " characters") if base is str else (value, "be", "")
        if not limit.least <= size <= limit.most:
            raise Refusal("bad_value", f"{name} must {verb} from {limit.least} to {limit.most}{unit}, got {size}")
    if base is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise Refusal("bad_value", f"{name} is no Unicode text: it has half a surrogate pair") from None


def type_options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of any other, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
