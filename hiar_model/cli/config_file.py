"""`--config`: a command's options in YAML or JSON, as `--print_config` writes them, or the metadata of a video."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from ..common.checks import nearest, path_like
from ..io.files import is_time, load_yaml, read_text
from ..version import require_noise

if TYPE_CHECKING:
    from ..models.video_model import VideoModel


BETWEEN_COMMAS = ("offload", "gpu_memory")
"""Options that take several words between commas; in a file these may be a list."""


class ConfigFile(ActionConfigFile):
    """Options from a file; those on the command line take precedence, in any order."""

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Any, dest: str, value: Any) -> None:
        """Apply the file's options below those already set."""
        try:
            values = _options(parser, path_like("--config", value, "file"))
        except ValueError as error:
            raise TypeError(error) from error
        known = [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]
        flags = [action.dest for action in parser._actions if action.nargs == 0]
        for key, chosen in values.items():
            if key not in known and key == "stage":
                raise TypeError(f"{value} is a recipe, no options of this command; hiar train {value} trains by it")
            if key not in known:
                raise TypeError(f"{value}: unknown key {key}{nearest(key, known)}")
            if key in flags and not isinstance(chosen, bool):
                raise TypeError(f"{value}: {key} must be true or false, got {chosen!r}")
        ActionConfigFile.apply_config(parser, cfg, dest, as_yaml(values))
        cfg[dest][-1] = value
        for key, chosen in values.items():
            if is_time(chosen) and not isinstance(cfg.get(key), str):
                raise TypeError(f"{value}: {key} must be a number, got {chosen!r}")


def as_yaml(values: Mapping[str, Any]) -> str:
    """JSON that YAML reads as it is: a character of more than 16 bits is one escape in YAML, and two in JSON, which are
    none of YAML. All in ASCII: jsonargparse first looks for a file of this name, in whatever letters the locale has.
    """

    def escaped(character: re.Match[str]) -> str:
        code = ord(character[0])
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return re.sub(r"[^\x00-\x7e]", escaped, json.dumps(values, default=str, ensure_ascii=False))


def refuse_times(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """ValueError of one line for a typed 1:30 of which a number was made."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        chosen = options.get(name.lstrip("-").replace("-", "_"), "")
        if is_time(typed := value if equals else following) and not isinstance(chosen, str):
            raise ValueError(f"{name} must be a number, got {typed!r}")


def config_first(words: Sequence[str]) -> list[str]:
    """Move `--config FILE` right after the command, so that typed options take precedence, in any order."""
    files: list[str] = []
    rest = list(words)
    for i in reversed(range(len(rest))):
        if rest[i] == "--config" or rest[i].startswith("--config="):
            span = slice(i, i + 1 + (rest[i] == "--config"))
            if span.stop > len(rest):
                continue  # argparse reports the missing file
            files[:0], rest[span] = rest[span], []
    command = next((i for i, word in enumerate(rest, 1) if not word.startswith("-")), 0)
    return [*rest[:command], *files, *rest[command:]]


def other_weights(a: Namespace, model: VideoModel) -> Iterator[str]:
    """A line for each `--config` that is the metadata of a video made by other weights, or by another LoRA of the
    same name.
    """
    sha256, loras = model.weights_sha256, {lora.name: lora.sha256 for lora in model.loras}
    for path in filter(None, a.get("config") or []):
        values = load_yaml(read_text(Path(path))) or {}  # a pipe has been read to its end
        if (before := values.get("weights_sha256", sha256)) != sha256:
            yield f"{path}: made by weights {str(before)[:12]}, now {sha256[:12]}: this will be another video"
        for lora in values.get("lora") or [] if "weights_sha256" in values else []:
            was, now = str(lora.get("sha256")), loras.get(str(lora.get("name")))
            if now is not None and now != was:
                yield f"{path}: made by LoRA {lora['name']} {was[:12]}, now {now[:12]}: this will be another video"


class OptionalPositional(argparse.Action):
    """A positional argument that may be missing, and then does not override the config file."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the value."""
        if values is not None or namespace.get(self.dest) is None:
            setattr(namespace, self.dest, values)


class _Typed(list[str]):
    """Values of the command line, which replace those of a file."""


class Repeated(argparse.Action):
    """An option that may be given several times; its values are a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add the value to those typed before."""
        before = namespace.get(self.dest)
        setattr(namespace, self.dest, _Typed([*(before if isinstance(before, _Typed) else ()), values]))


def _options(parser: ArgumentParser, path: Path) -> dict[str, Any]:
    """The options in a file, by their names with underscores."""
    try:
        text = read_text(path)
        values = load_yaml(text)
    except OSError as error:
        raise TypeError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TypeError(f"{path} is neither YAML nor JSON: {error}") from error
    except ValueError as error:  # no file of options, but what stands in for one
        raise TypeError(error) from error
    if values is None:
        raise TypeError(f"{path} is empty, or all of it a comment: it must hold key: value lines")
    if not isinstance(values, dict):
        raise TypeError(f"{path} must hold key: value lines, got {type(values).__name__}")
    if "command" in values and "weights_sha256" in values:
        return _from_metadata(parser, values, path)
    if "weights_sha256" in values and "rollout" in values:
        whose = "its prompts, weights or LoRA scales are of a program"
        raise TypeError(f"{path} is the metadata of a video that no command makes: {whose}")
    options: dict[str, Any] = {}
    as_written = load_yaml(text, typed=False)
    textual = {action.dest for action in parser._actions if str in (action.type, getattr(action, "_typehint", None))}
    for key, value in values.items():
        if (name := str(key).replace("-", "_")) in options:
            raise TypeError(f"{path}: {name} and {key} are one option")
        written = as_written[key]
        if name in BETWEEN_COMMAS and isinstance(value, list):
            value = written = ",".join(map(str, written))
        if name in textual and isinstance(value, (list, dict)):
            raise TypeError(f"{path}: {name} must be one text, got {value!r}")
        is_text = name in textual and value is not None  # a prompt may be "no", "1:30"
        options[name] = written if is_text else value
    if (more := options.pop("config", None)) is not None:
        raise TypeError(f"{path}: config must not stand in a file of options, got {more!r}")
    return options


def _from_metadata(parser: ArgumentParser, metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of the command that reproduces a video, without its output path."""
    command = metadata["command"]
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError as error:
        raise TypeError(f"{path}: its command cannot be read: {error}") from error
    maker = words[1] if words[1:2] == ["compare"] else "generate"
    if words[:2] != ["hiar", maker] or parser.prog.split()[-1] not in (maker, "hiar"):
        raise TypeError(f"{path} is the metadata of a video, for hiar {maker} only")
    try:
        require_noise(str(path), metadata.get("noise"))
    except ValueError as error:
        raise TypeError(error) from error
    if unfit := {"--config", "--print_config", "--help", "-h"} & {word.partition("=")[0] for word in words}:
        raise TypeError(f"{path}: its command has {min(unfit)}, which no video is made by")
    try:
        values = parser.parse_args(words[2:], _skip_validation=True).as_dict()
    except argparse.ArgumentError as error:
        raise TypeError(f"{path}: its command is not one of this version: {error}") from error
    defaults = parser.get_defaults(skip_validation=True).as_dict()
    return {key: value for key, value in values.items() if key not in ("config", "out") and value != defaults.get(key)}
