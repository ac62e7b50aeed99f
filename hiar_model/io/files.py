"""Checks of files before work starts: pointers in place of files, names that cannot be written to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..common.checks import not_here, path_like
from .atomic import SPECIAL, behind_links, is_special

SESSION = "session.safetensors"  # its name in a folder
FILE_OPTIONS = (
    "--model", "--checkpoint", "--vae", "--lora", "--image", "--extend", "--last-frame", "--prompts", "--from-session",
)  # fmt: skip
"""Options of `hiar generate` that name input files."""
MODEL_FILES = ("*.safetensors", "*.pth", "*.pt", "*config.json", "*index.json", "*.model")
_UMASK = os.umask(0)
os.umask(_UMASK)
_STAND_INS = (  # the first bytes of a file, in lower case -> what it is instead of weights, a video, ...
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file itself; run `git lfs pull` there"),
    (b"version https://hawser.github.com/spec/", "a git-lfs pointer, not the file itself; run `git lfs pull` there"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself; run `git annex get` there"),
    (b"<!doctype html", "a web page, not the file itself; download it again"),
    (b"<html", "a web page, not the file itself; download it again"),
)


def file_sha256(file: Path) -> str:
    """Hexadecimal, of the bytes of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def refuse_stand_in(file: Path) -> None:
    """ValueError of one line for a git-lfs or git-annex pointer or a web page in place of the file itself.

    A file that cannot be read is left to the caller, who will report it, and so is a pipe, which can be read once.
    """
    if is_special(file):
        return
    try:
        with file.open("rb") as opened:
            head = opened.read(64).lstrip().lower()
    except OSError:
        return
    for start, description in _STAND_INS:
        if head.startswith(start):
            raise ValueError(f"{file}: {description}")


def as_text(words: str) -> str:
    """Words of the command line, or a name, as their bytes say in UTF-8, whatever the locale. In one that cannot read
    them (``LC_ALL=C``) Python leaves such bytes as lone surrogates, by which files are found. Others stay as they are.
    """
    try:
        return words.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return words


def as_name(text: str) -> str:
    """The inverse of :func:`as_text`: text from a file, as the name by which this process finds a file."""
    try:
        return os.fsdecode(text.encode("utf-8"))
    except UnicodeError:
        return text


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file that a person wrote, in UTF-8; in UTF-16 where a byte order mark says so, as editors and
    shells of Windows write it.

    Raises:
        OSError: it cannot be read. UnicodeDecodeError: it is neither. ValueError: as of :func:`refuse_stand_in`.
    """
    refuse_stand_in(Path(path))
    data = Path(path).read_bytes()
    text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_text(text: str, what: str) -> None:
    """ValueError of one line for text that came from bytes other than UTF-8, which cannot be written again."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise ValueError(f"{what} '{shown}' is not UTF-8 at character {error.start + 1}: give it in UTF-8") from error


def output_path(path: str | os.PathLike[str]) -> Path:
    """The path; ValueError of one line for what names no file on this machine."""
    if isinstance(path, str) and (reason := not_here(path)):
        raise ValueError(f"cannot write {path}: {reason}")
    return path_like("path", path)


def check_output(path: str | os.PathLike[str], beside: Sequence[Path] = ()) -> Path:
    """The path, if a file can be written there, and the files ``beside`` it; call it before any work starts.

    Raises:
        ValueError: one line: a parent that is no folder or not writable, a folder or device of that name, a link that
            names itself, a name that is too long or not UTF-8.
    """
    target = output_path(path)
    check_text(as_text(os.fspath(target)), "the name")
    try:
        parent = behind_links(target).parent
        if not parent.is_dir():
            raise ValueError(f"cannot write {target}: {parent} is no folder; make it first")
        for file in (target, *beside):
            try:
                if file.is_dir():
                    raise ValueError(f"cannot write {file}: it is a folder")
                if is_special(file):
                    raise ValueError(f"cannot write {file}: it is {SPECIAL}")
                os.stat(file)  # a link that names itself, a name that is too long
            except FileNotFoundError:
                pass
            except OSError as error:
                raise ValueError(f"cannot write {file}: {error.strerror or error}") from error
        _write_nothing(parent)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def check_folder(path: str | os.PathLike[str]) -> Path:
    """The path, if a folder is there or can be made there, and written into; call it before any work starts. Makes
    nothing.

    Raises:
        ValueError: one line: a file of that name or on the way there, a folder that is not writable, a name that is too
            long.
    """
    target = output_path(path)
    above = target.absolute()
    try:
        while not os.path.lexists(above):
            above = above.parent
        if not above.is_dir():
            raise ValueError(
                f"cannot write into {target}: {'it' if above == target.absolute() else above} is no folder"
            )
        _write_nothing(above)
    except OSError as error:
        raise ValueError(f"cannot write into {target}: {error.strerror or error}") from error
    return target


def _write_nothing(folder: Path) -> None:
    """OSError if no file can be made there. This one has no name, where the system can do that: whenever the process is
    ended, nothing stays.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def lock(path: Path) -> ExitStack:
    """Hold the file or folder until what is returned is closed. BlockingIOError if another holds it; where the system
    has no such locks (Windows, some network file systems) nothing is held.
    """
    until_closed = ExitStack()
    try:
        import fcntl
    except ImportError:
        return until_closed
    descriptor = os.open(path, os.O_RDONLY)
    until_closed.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        until_closed.close()
        if isinstance(error, BlockingIOError):
            raise
    return until_closed


def check_picture(path: str | os.PathLike[str] | None) -> Path | None:
    """:func:`check_output` of a .png; ValueError for another suffix. None stays None."""
    if path is not None and Path(path).suffix.lower() != ".png":
        raise ValueError(f"cannot write {os.fspath(path)}: a plot is a PNG, legal: name.png")
    return None if path is None else check_output(path)


def require_apart(written: Mapping[str, Path | None], read: Mapping[str, str | Path | None]) -> None:
    """ValueError of one line if two outputs are one file, or an output is a file that is read, or part of a model whose
    folder is read. By the options that name them; links are followed.
    """
    names: dict[str, str] = {}
    for option, path in written.items():
        if path is None:
            continue
        other = names.setdefault(os.path.realpath(path), option)
        if other != option:
            raise ValueError(f"{option} and {other} are one file, {path}: give two names")
    for option, source in read.items():
        for file in () if source is None else (Path(source), *_model_files(Path(source))):
            if other := names.get(os.path.realpath(file), ""):
                raise ValueError(f"{other} would replace {file}, which {option} reads: give another name")


def _model_files(folder: Path) -> Iterator[Path]:
    """Weights and their settings in a folder, and in the folders of its components."""
    for name in MODEL_FILES if folder.is_dir() else ():
        yield from folder.glob(name)
        yield from folder.glob(f"*/{name}")


def save_tensors(tensors: dict[str, Any], path: str | os.PathLike[str], header: Mapping[str, str]) -> None:
    """Write a safetensors file that others may read as any other file; the library's own are for the owner alone."""
    from safetensors.torch import save_file

    save_file(tensors, path, dict(header))
    os.chmod(path, 0o666 & ~_UMASK)


def is_time(value: object) -> bool:
    """Whether it is text such as 1:30, of which YAML 1.1, and so jsonargparse, makes the number 90."""
    return isinstance(value, str) and re.fullmatch(r"[-+]?\d[\d_]*(:\d+)+(\.[\d_]*)?", value.strip()) is not None


def _without_pairs(text: str) -> str:
    """JSON with each character of more than 16 bits as itself: JSON writes it as two escapes, which YAML refuses."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    pair = r"(?<!\\)((?:\\\\)*)\\u([dD][89abAB]..)\\u([dD][c-fC-F]..)"
    return re.sub(pair, lambda x: x[1] + chr(0x10000 + (int(x[2], 16) - 0xD800 << 10) + int(x[3], 16) - 0xDC00), text)


def load_yaml(text: str, typed: bool = True) -> Any:
    """What a YAML or JSON text says; a key that stands twice in one mapping is an error, not the last one's. What only
    YAML 1.1 takes for a number stays text: 010 is not 8, and 1:30 not 90.

    Args:
        typed: False: each value is the text that stands there: "yes", not True.

    Raises:
        yaml.YAMLError: it is neither, or lists and mappings stand in each other thousands of times.
    """
    import yaml

    base: Any = yaml.SafeLoader if typed else yaml.BaseLoader

    class Loader(base):
        def construct_number(self, node: Any) -> Any:
            if is_time(node.value) or re.match(r"[-+]?0[0-7_]", node.value):
                return node.value
            return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen and isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return super().construct_mapping(node, deep)

    for kind in ("int", "float") if typed else ():
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)
    try:
        return yaml.load(_without_pairs(text), Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None
    except TypeError as error:  # a list as a key
        raise yaml.YAMLError(str(error)) from error


def seen_from(folder: Path, command: Sequence[str]) -> list[str]:
    """A command with absolute paths, to be run in ``folder``: input files in that folder get relative paths, so that
    the folder can be moved.
    """
    words, base = list(command), os.path.abspath(folder)
    for i, option in enumerate(words[:-1]):
        if option in FILE_OPTIONS and words[i + 1].startswith(os.path.join(base, "")):
            words[i + 1] = os.path.join(os.curdir, os.path.relpath(words[i + 1], base))
    return words


def in_folder(path: str | os.PathLike[str], name: str) -> Path:
    """The file of that name if the path is a folder, else the path."""
    place = path_like("path", path)
    return place / name if os.path.isdir(place) else place
