"""Checks of the command line before torch is imported; messages name options as they are typed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ..common import checks, environment
from ..common.image_file import image_files
from ..common.lora_file import lora_files
from ..config import SHIPPED, RolloutConfig, WanConfig, no_folder
from ..config.execution import ATTENTION_DTYPES, ATTENTION_IMPLS, KV_DTYPES, LINEAR_DTYPES, ON_NAN, ExecutionConfig
from ..config.rollout import KV_SOURCES, ON_PROMPT_CHANGE, ORDERS, several_orders
from ..io.atomic import unused
from ..io.files import read_text

CHOICES: dict[str, tuple[str, ...]] = {
    "order": ORDERS, "dtype": checks.DTYPE_NAMES, "kv_dtype": KV_DTYPES, "vae_dtype": (*checks.DTYPE_NAMES, "none"),
    "attention_impl": ATTENTION_IMPLS, "attention_dtype": ATTENTION_DTYPES, "linear_dtype": LINEAR_DTYPES,
    "on_nan": ON_NAN, "on_prompt_change": ON_PROMPT_CHANGE, "kv_source": KV_SOURCES, "offload": checks.OFFLOAD,
    "parallel": ("pipeline", "ulysses"),
    "to": ("native", "diffusers", "pt"), "world": ("plain", "varied", "free_speed"),
}  # fmt: skip
"""Legal values by option; each item of a list, or between commas, is checked."""
SHARED = ("generate", "train", "verify-parity")
"""Commands that several processes share."""
MINIMUM = {
    "num_frames": 1, "frames": 1, "steps": 1, "height": 1, "width": 1, "threads": 1, "nproc": 1, "batch": 1,
    "blocks": 1, "repeats": 1, "layers": 1, "speed": 1, "sink_frames": 0, "checkpoint_every": 0, "seeds": 0,
}  # fmt: skip
MOST = {
    **dict.fromkeys(MINIMUM, checks.MOST_FRAMES),
    **dict.fromkeys(("height", "width"), checks.MOST_SIDE), "batch": checks.MOST_BATCH,
    "steps": checks.MOST_STEPS, "threads": checks.MOST_THREADS, "nproc": checks.MOST_THREADS,
}  # fmt: skip
ABOVE_0 = ("timeout",)
TOGETHER = ("kv_dtype", "attention_dtype", "attention_impl")
"""Options that :class:`.ExecutionConfig` compares with each other."""
INPUT_FILES = {
    "generate": ("extend", "last_frame", "prompts", "vae", "from_session"), "compare": ("extend", "prompts", "vae"),
    "doctor": ("vae",), "serve": ("vae", "token_file"),
    "bench": ("compare",),
}  # fmt: skip
"""Options of a command that name files it reads."""


def check_choices(command: str, a: Namespace) -> None:
    """Validate arguments before loading the model.

    Raises:
        ValueError: one line: the option as it is typed, its value, the legal values, and the nearest of them.
    """
    for name, value in vars(a).items():
        several = value if isinstance(value, list) else [value]
        if value == [] and name != "overrides":
            raise ValueError(f"{option(name)} must hold something, got []")
        if name in CHOICES:
            words = [word for word in several if isinstance(word, str)]
            for word in ",".join(words).split(",") if words else ():
                _check_word(a, name, word.strip())
        for one in several if value is not None else ():
            if name in MINIMUM:
                checks.whole(option(name), one, MINIMUM[name], most=MOST.get(name))
            elif name == "window_frames" and isinstance(one, int):
                checks.whole(option(name), one, 1, most=checks.MOST_FRAMES)
            elif name in ABOVE_0:
                checks.number_above_0(option(name), one)
            elif name == "fps":
                checks.number_within(option(name), one, checks.SLOWEST, checks.FASTEST)
        if name == "lora":
            for file in lora_files(value):
                if not Path(file.path).exists():
                    raise ValueError(f"--lora {file.path}: no such file; expected FILE or FILE:SCALE")
        if name == "image":
            for image in image_files(value):
                if not Path(image.path).exists():
                    raise ValueError(f"--image {image.path}: no such file; expected FILE or FILE@FRAME")
        for file in several if name in INPUT_FILES.get(command, ()) and value is not None else ():
            if file != "" and not checks.path_like(option(name), file).exists():
                raise ValueError(f"{option(name)} {file}: no such file")
    for name in ("order", "num_frames") if command == "evaluate" else ():
        values = a[name] if isinstance(a[name], list) else []
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ValueError(f"{option(name)} must hold each once, got {twice[0]} {values.count(twice[0])} times")
    if a.get("device") and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", a.device):
        near = checks.nearest(a.device, ("auto", "cpu", "cuda"))
        raise ValueError(f"--device must be one of auto, cpu, cuda, cuda:1, ..., got {a.device!r}{near}")
    ExecutionConfig(**{name: a[name] for name in TOGETHER if a.get(name) is not None})
    if command == "compare" and a.order is not None:
        several_orders("order", a.order)
    if command == "train" and a.out == "":
        raise ValueError("--out must be the name of a folder, got ''")
    if command == "train" and not Path(a.recipe).is_file() and a.recipe not in (known := _recipes()):
        near = checks.nearest(a.recipe, known)
        raise ValueError(f"no recipe {a.recipe!r}: neither a file nor one of {', '.join(known)}{near}")
    if a.get("model") is not None:
        _check_model(command, a.model)


def _check_word(a: Namespace, name: str, word: str) -> None:
    narrow = [option(other) for other in ("kv_dtype", "attention_dtype", "linear_dtype") if other in a]
    if name == "dtype" and word.startswith("float8") and narrow:
        legal = ", ".join(CHOICES[name])
        raise ValueError(f"--dtype must be one of {legal}, got {word!r}; 8 bits are for {', '.join(narrow)}")
    checks.one_of(option(name), word, CHOICES[name])


def check_processes(command: str) -> None:
    """Refuse to do the work of a command once in each process of torchrun; `doctor` only looks, and may in each.

    Raises:
        ValueError: one line: the command, the processes, and the commands that share work.
    """
    if command not in (*SHARED, "doctor") and (processes := environment.world_size()) > 1:
        raise ValueError(
            f"{command} is for one process, torchrun started {processes} (WORLD_SIZE): start it without; "
            f"these share their work: {', '.join(SHARED)}"
        )


def overwrite_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist; else they are refused")


def refuse_existing(name: str, path: Path | None, overwrite: bool) -> None:
    """ValueError of one line for an output that would replace a file. ``name``: how messages call it."""
    if path is not None and path.is_file() and not overwrite:
        raise ValueError(f"{name} {path} exists: give another name, or --overwrite".lstrip())


def refuse_other_metadata(path: Path, video: str, values: Mapping[str, Any], overwrite: bool) -> None:
    """ValueError of one line for metadata beside a video that is to come, unless it is of a video of that name and says
    what the new one will say: ``values``, as far as they are known. How many frames there are is known at the end.
    """
    if overwrite or not path.is_file():
        return
    advice = "give another name, or --overwrite"
    try:
        before = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict) or before.get("file") != video or "frames" not in before:
        raise ValueError(f"{path} exists and is no metadata of {video}: {advice}")
    missing = object()
    for name, value in values.items():
        if name != "frames" and (was := before.get(name, missing)) != value:
            stored = "is not there" if was is missing else f"was {_short(was)}"
            raise ValueError(
                f"{path} exists and is of another video: {name} {stored}, now it is {_short(value)}: {advice}"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unused_now(path: Path, overwrite: bool) -> Path:
    """Where to write a result that is finished: :func:`.unused`, with a line on stderr if that is another name."""
    free = unused(path, overwrite=overwrite)
    if free != path:
        print(moved(path, free), file=sys.stderr)
    return free


def moved(path: Path, free: Path) -> str:
    return f"{path} was written by another process meanwhile: this result is {free}"


def rollout_options(a: Namespace) -> dict[str, Any]:
    """The arguments that are fields of RolloutConfig; what is "measured" is off until then."""
    values = {field.name: a[field.name] for field in fields(RolloutConfig) if field.name in a}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: False if value == "measured" else value for name, value in values.items()}


def check_effects(command: str, a: Namespace, defaults: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect beside the others, or with an empty value, as of a shell's variable that
    is not set, before any work. ``defaults``: of the command.

    Raises:
        ValueError: one line: the option, and what it needs.
    """
    typed = {name: value for name, value in vars(a).items() if value != defaults.get(name)}
    for name in defaults:
        if a.get(name) == "" and name != "out":
            raise ValueError(f"{option(name)} must hold something, got ''")
    for name, needed in _needed(command, a).items():
        if name in typed:
            got = "" if typed[name] is True else f", got {typed[name]}"
            raise ValueError(f"{option(name)} has no effect {needed}{got}")


def _needed(command: str, a: Namespace) -> dict[str, str]:
    """Options without effect, and why."""
    idle: dict[str, str] = {}
    if command in ("generate", "verify-parity"):
        processes = max(a.nproc, environment.world_size())
        if processes == 1 and a.parallel == "ulysses":
            idle["parallel"] = "in one process: give --nproc 2 or more"
        if a.parallel == "ulysses" or (processes == 1 and a.parallel is None):
            why = "without a pipeline: give --nproc 2 or more, or --parallel pipeline"
            idle |= dict.fromkeys(("steps_per_rank", "dedicated_decoder_rank", "resume", "checkpoint_every"), why)
            if processes == 1:
                idle["timeout"] = why
    if command in ("generate", "compare") and a.prompts is None and a.get("from_session") is None:
        session = ", or --from-session" if command == "generate" else ""
        idle["on_prompt_change"] = f"with one prompt: give --prompts{session}"
    if command == "doctor" and a.model in SHIPPED:
        idle |= dict.fromkeys(("offload", "vae", "vae_dtype"), f"on {a.model}, which has no text encoder and no VAE")
    if command == "bench" and a.compare is not None:
        others = (name for name in vars(a) if name not in ("compare", "config"))
        idle |= dict.fromkeys(others, "beside --compare, which reads two results")
    return idle


def _recipes() -> list[str]:
    folder = Path(__file__).parents[1] / "train/recipes"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _check_model(command: str, model: str) -> None:
    if model in SHIPPED or (model and Path(model).exists()):
        return
    names = [*SHIPPED]
    if command in ("doctor", "warmup", "bench"):
        names += [name for name in WanConfig.names() if name not in SHIPPED]
    if model not in names:
        if model:
            checks.path_like("--model", model)
        what = "neither a folder nor a shipped model; shipped"
        if command in ("doctor", "warmup", "bench"):
            what = "no name, file or folder; names" if command == "doctor" else "neither a name nor a folder; names"
        hint = checks.nearest(model, names) or no_folder(model)
        raise ValueError(f"--model {model!r} is {what}: {', '.join(names)}{hint}")


def option(dest: str) -> str:
    """The option of an argument name, as it is typed."""
    return "--" + dest.replace("_", "-")


def as_typed(message: str, dests: Iterable[str]) -> str:
    """A message of the library with argument names replaced by options, as they are typed."""
    for dest in dests:
        # Only at the start, as names may be English words; those with _ anywhere but in a path, a name or an option.
        before = r"(?<![\w./'\"-])" if "_" in dest else r"^"
        message = re.sub(rf"{before}{dest}(?=[ =]|$)(?! [^ ]*[/'\"])", option(dest), message)
        said = rf"((?<= and )|(?<= takes no )|(?<= use )){dest}(?=,|$|( \S+)? exclude each other)"
        message = re.sub(said, option(dest), message)
    return message


def explained(message: str, parser: ArgumentParser, words: Sequence[str]) -> str:
    """A message of argparse or jsonargparse in terms of the command line."""
    command = next((word for word in words if word in _subparsers(parser)), None)
    actions = (_subparsers(parser)[command] if command else parser)._actions
    typed = {action.dest: _typed(action, words) for action in actions}
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        missing = [name.strip().rpartition(".")[2] for name in match[1].split(",")]
        helps = {action.dest: action.help for action in actions}
        return "required: " + "; ".join(f"{typed.get(name, name)} ({helps.get(name)})" for name in missing)
    if match := re.match(r'Parser key "([\w.]+)": ?(.*)', message, re.DOTALL):
        dest, reason = match[1].rpartition(".")[2], match[2]
        value = re.findall(r"(?:Given value|Got value): (.*)", reason)
        helped = next((action.help for action in actions if action.dest == dest), None)
        kinds = re.findall(r"Expected a <class '(\w+)'>", reason)
        if "Union" not in reason and kinds and value:
            named = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
            return f"{typed.get(dest, option(dest))} must be {named.get(kinds[0], kinds[0])}, got {value[-1].strip()!r}"
        if value:
            return f"{typed.get(dest, option(dest))} cannot be {value[-1].strip()!r}: {helped}"
        return f"{typed.get(dest, option(dest))}: {reason}"
    if match := re.match(r"unrecognized arguments: (.*)", message):
        known = [name for action in actions for name in action.option_strings]
        near = [checks.nearest(word.partition("=")[0], known) for word in match[1].split() if word.startswith("-")]
        return message + next(filter(None, near), "") + _misplaced(command, match[1]) + _loose(command, match[1], known)
    if match := re.fullmatch(r"argument (\S+): expected (one argument|\d+ arguments)", message):
        helped = next((action.help for action in actions if match[1].split("/")[0] in action.option_strings), None)
        is_switch = any(getattr(a, "_typehint", 0) is bool for a in actions if match[1] in a.option_strings)
        return f"{message}{' of true, false' if is_switch else ''}: {helped}"
    if message.startswith("ambiguous option: --prompt could"):
        return f'--prompt is no option; the prompt stands by itself, in quotes: hiar {command} "a cat" -o cat.mp4'
    if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        return message + checks.nearest(match[1], re.findall(r"[\w-]+", match[2]))
    return message


def options_of(parser: ArgumentParser, command: str) -> dict[str, Any]:
    """The names of a command's options, and their defaults; its other words are not typed with dashes."""
    return {action.dest: action.default for action in _subparsers(parser)[command]._actions if action.option_strings}


def _subparsers(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    choices = next((a.choices for a in parser._actions if getattr(a, "_name_parser_map", None)), None)
    return dict(choices or {})


def _typed(action: Any, words: Sequence[str]) -> str:
    """The name of an option as it was typed, else all its names; for a positional, its name in the help."""
    names = action.option_strings
    if not names:
        return str(action.metavar or action.dest.upper())
    used = [name for name in names if any(word == name or word.startswith(f"{name}=") for word in words)]
    return used[0] if used else "/".join(names)


def _loose(command: str | None, words: str, options: Sequence[str]) -> str:
    """Words behind the prompt are those of a prompt without quotes; elsewhere a word may be a model."""
    if words.startswith("-"):
        return ""
    if command in ("generate", "compare"):
        return f'; put the prompt in quotes: hiar {command} "a red circle moving right" -o red.mp4'
    word = words.split()[0]
    return f"; a model is given as --model {word}" if "--model" in options and "=" not in word else ""


def _misplaced(command: str | None, words: str) -> str:
    """A hint: argparse before Python 3.12 takes no key=value after an option; and keys of a recipe have no dashes."""
    if any("=" in word and not word.startswith("-") for word in words.split()):
        return "; key=value must come right after the recipe, before options"
    if command == "train" and words.startswith("--"):
        return "; keys of a recipe are written key=value, without dashes, such as updates=100"
    return ""
