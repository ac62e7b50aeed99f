"""Files before they are read or written: what stands in place of one, and whether a name can be written to."""

from __future__ import annotations

from pathlib import Path

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
