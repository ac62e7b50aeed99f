"""Files before they are read or written: what stands in place of one, and whether a name can be written to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

SESSION = "session.safetensors"  # in a folder that is given as a session
FILE_OPTIONS = ("--model", "--checkpoint", "--image", "--extend", "--prompts", "--from-session")
"""Options of `hiar generate` that name what it reads."""
_STAND_INS = (  # what a file begins with, in lower case -> what it is, where its name promises something else
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file itself; run `git lfs pull` there"),
    (b"version https://hawser.github.com/spec/", "a git-lfs pointer, not the file itself; run `git lfs pull` there"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself; run `git annex get` there"),
    (b"<!doctype html", "a web page, not the file itself; download it again"),
    (b"<html", "a web page, not the file itself; download it again"),
)


def refuse_stand_in(file: Path) -> None:
    """ValueError of one line for what stands where a file should: a git-lfs pointer, a web page. Any other file, and
    one that cannot be read, is left to whoever reads it.
    """
    try:
        with file.open("rb") as opened:
            begin = opened.read(64).lstrip().lower()
    except OSError:
        return
    for start, what in _STAND_INS:
        if begin.startswith(start):
            raise ValueError(f"{file}: {what}")


def check_text(text: str, what: str) -> None:
    """ValueError of one line for text that cannot be written down: it came from bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise ValueError(f"{what} '{shown}' is not UTF-8 at character {error.start + 1}: give it in UTF-8") from error


def temporary(target: Path, suffix: str = ".partial") -> Path:
    """The name that a file is written under: in the same folder, so that a rename is all that is left to do, and short,
    whatever the length of the target's own.
    """
    name = hashlib.blake2b(os.fsencode(target.name), digest_size=6).hexdigest()
    return target.with_name(f".{name}.{os.getpid()}{suffix}")


def check_output(path: str | os.PathLike[str], beside: Sequence[Path] = ()) -> Path:
    """The path, if a file can be written there, and those ``beside`` it. To be asked before any work starts.

    Raises:
        ValueError: one line: a parent that is no folder or cannot be written to, a folder in its place, a name that is
            too long or not UTF-8.
    """
    target = Path(path)
    check_text(os.fspath(target), "the name")
    try:
        if not target.parent.is_dir():
            raise ValueError(f"cannot write {target}: {target.parent} is no folder; make it first")
        for file in (target, *beside):
            try:
                if file.is_dir():
                    raise ValueError(f"cannot write {file}: it is a folder")
                os.lstat(file)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise ValueError(f"cannot write {file}: {error.strerror or error}") from error
        probe = temporary(target)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def seen_from(folder: Path, command: Sequence[str]) -> list[str]:
    """A command whose files are given by absolute paths, to be run in a folder: what lies in it is named from there, so
    that both may move together.
    """
    words, base = list(command), os.path.abspath(folder)
    for i, option in enumerate(words[:-1]):
        if option in FILE_OPTIONS and words[i + 1].startswith(os.path.join(base, "")):
            words[i + 1] = os.path.join(os.curdir, os.path.relpath(words[i + 1], base))
    return words


def in_folder(path: str | os.PathLike[str], name: str) -> Path:
    """The file that a path means: itself, or the one of that name in it if it is a folder."""
    return Path(path) / name if os.path.isdir(path) else Path(path)
