"""What is wrong with a command line is told at once, before torch is imported, with the options as they were typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ..common import checks
from ..config import SHIPPED, WanConfig
from ..config.execution import KV_DTYPES, ON_NAN
from ..config.rollout import KV_SOURCES, ON_PROMPT_CHANGE, ORDERS

CHOICES: dict[str, tuple[str, ...]] = {
    "order": ORDERS, "dtype": checks.DTYPE_NAMES, "kv_dtype": KV_DTYPES, "vae_dtype": (*checks.DTYPE_NAMES, "none"),
    "on_nan": ON_NAN, "on_prompt_change": ON_PROMPT_CHANGE, "kv_source": KV_SOURCES, "offload": checks.OFFLOAD,
    "parallel": ("pipeline", "ulysses"),
    "to": ("native", "diffusers", "pt"), "world": ("plain", "varied", "free_speed"),
}  # fmt: skip
"""By the name of the option; one in a list, or between commas, is checked like one alone."""
LEAST = {
    "num_frames": 1, "steps": 1, "height": 1, "width": 1, "threads": 1, "nproc": 1, "batch": 1, "blocks": 1,
    "layers": 1, "parts": 1, "sink_frames": 0, "checkpoint_every": 0, "seeds": 0,
}  # fmt: skip
ABOVE_0 = ("fps", "timeout")
READ = {"generate": ("image", "extend", "prompts", "from_session"), "bench-report": ("stage_times", "measured")}
"""Files that a command reads."""


def check_choices(command: str, a: Namespace) -> None:
    """What can be told without a model.

    Raises:
        ValueError: one line: the option as it is typed, what it was given, what is legal, the nearest of that.
    """
    for name, value in vars(a).items():
        several = value if isinstance(value, list) else [value]
        if name in CHOICES:
            words = [word for word in several if isinstance(word, str)]
            for word in ",".join(words).split(",") if words else ():
                checks.one_of(option(name), word.strip(), CHOICES[name])
        for one in several if value is not None else ():
            if name in LEAST:
                checks.whole(option(name), one, LEAST[name])
            elif name in ABOVE_0:
                checks.number_above_0(option(name), one)
        if name in READ.get(command, ()) and value is not None and not Path(value).exists():
            raise ValueError(f"{option(name)} {value}: no such file")
    if a.get("device") and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", a.device):
        near = checks.nearest(a.device, ("auto", "cpu", "cuda"))
        raise ValueError(f"--device must be one of auto, cpu, cuda, cuda:1, ..., got {a.device!r}{near}")
    if command == "train" and not Path(a.recipe).is_file() and a.recipe not in (known := _recipes()):
        near = checks.nearest(a.recipe, known)
        raise ValueError(f"no recipe {a.recipe!r}: neither a file nor one of {', '.join(known)}{near}")
    if a.get("model") is not None:
        _check_model(command, a.model)


def _recipes() -> list[str]:
    folder = Path(__file__).parents[1] / "train/recipes"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _check_model(command: str, model: str) -> None:
    if model in SHIPPED or (model and Path(model).exists()):
        return
    names = [*SHIPPED]
    if command in ("doctor", "warmup", "profile"):
        names += [name for name in WanConfig.names() if name not in SHIPPED]
    if model not in names:
        what = "neither a folder nor a shipped model; shipped"
        if command in ("doctor", "warmup", "profile"):
            what = "no name, file or folder; names" if command == "doctor" else "no known configuration; known"
        raise ValueError(f"--model {model!r} is {what}: {', '.join(names)}{checks.nearest(model, names)}")


def option(dest: str) -> str:
    """As it is typed."""
    return "--" + dest.replace("_", "-")


def as_typed(message: str, dests: Iterable[str]) -> str:
    """A message of the library, whose arguments are the command's options: with their names as they are typed."""
    for dest in dests:
        # At the beginning, or, where no word of English is like it, anywhere but in a path, a name or an option.
        place = r"(?<![\w./'\"-])" if "_" in dest else r"^"
        message = re.sub(rf"{place}{dest}(?=[ =]|$)(?! [^ ]*[/'\"])", option(dest), message)
    return message


def explained(message: str, parser: ArgumentParser, words: Sequence[str]) -> str:
    """What argparse and jsonargparse say, in the words of the command line."""
    command = next((word for word in words if word in _subparsers(parser)), None)
    actions = (_subparsers(parser)[command] if command else parser)._actions
    typed = {action.dest: _typed(action, words) for action in actions}
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        missing = [name.strip().rpartition(".")[2] for name in found[1].split(",")]
        helps = {action.dest: action.help for action in actions}
        return "required: " + "; ".join(f"{typed.get(name, name)} ({helps.get(name)})" for name in missing)
    if found := re.match(r'Parser key "([\w.]+)": ?(.*)', message, re.DOTALL):
        dest, said = found[1].rpartition(".")[2], found[2]
        value = re.findall(r"(?:Given value|Got value): (.*)", said)
        helped = next((action.help for action in actions if action.dest == dest), None)
        kinds = re.findall(r"Expected a <class '(\w+)'>", said)
        if "Union" not in said and kinds and value:
            named = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
            return f"{typed.get(dest, option(dest))} must be {named.get(kinds[0], kinds[0])}, got {value[-1].strip()!r}"
        if value:
            return f"{typed.get(dest, option(dest))} cannot be {value[-1].strip()!r}: {helped}"
        return f"{typed.get(dest, option(dest))}: {said}"
    if found := re.match(r"unrecognized arguments: (.*)", message):
        known = [name for action in actions for name in action.option_strings]
        near = [checks.nearest(word.partition("=")[0], known) for word in found[1].split() if word.startswith("-")]
        return message + next(filter(None, near), "") + _misplaced(found[1])
    if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        return message + checks.nearest(found[1], re.findall(r"[\w-]+", found[2]))
    return message


def _subparsers(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    choices = next((a.choices for a in parser._actions if getattr(a, "_name_parser_map", None)), None)
    return dict(choices or {})


def _typed(action: Any, words: Sequence[str]) -> str:
    """The name of an option that stands on the command line, else all its names; of a word that of the help."""
    names = action.option_strings
    if not names:
        return str(action.metavar or action.dest.upper())
    used = [name for name in names if any(word == name or word.startswith(f"{name}=") for word in words)]
    return used[0] if used else "/".join(names)


def _misplaced(words: str) -> str:
    """argparse before Python 3.12 takes no key=value behind an option: say where it goes."""
    wrong = any("=" in word and not word.startswith("-") for word in words.split())
    return "; key=value stands right behind the recipe, before options" if wrong else ""
