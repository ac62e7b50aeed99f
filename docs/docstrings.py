"""Our docstrings as mkdocstrings reads them: an example is a section, and each argument has a line of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import griffe

ARGUMENTS = re.compile(r"^( *)(Args|Attributes):\n((?:\1 +.*\n?|\n(?=\1 +\S))+)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`[~.]?([^`]+)`")


def readable(text: str, names: Collection[str]) -> str:
    """A docstring with "Examples:" for "Example:", and "a: one. b: two." as two entries.

    >>> print(readable("Args:\\n    a: one; None: two. b, c: three\\n        lines.", ("a", "b", "c")))
    Args:
        a: one; None: two.
        b, c: three lines.
    """
    name = "|".join(map(re.escape, names)) or r"(?!)"
    following = re.compile(rf"(?<=[.;]) (?=(?:(?:{name}), )*(?:{name}): )")

    def entries(match: re.Match[str]) -> str:
        lines: list[str] = []
        for line in match[3].splitlines():
            if len(line) - len(line.lstrip()) > len(match[1]) + 4 and lines:
                lines[-1] += " " + line.strip()
            elif line.strip():
                lines.append(line.strip())
        body = "\n".join(f"{match[1]}    {entry}" for line in lines for entry in following.split(line))
        return f"{match[1]}{match[2]}:\n{body}\n\n"

    text = ARGUMENTS.sub(entries, text.replace("\nExample:\n", "\nExamples:\n"))
    return ROLE.sub(r"`\1`", text).rstrip()


class Docstrings(griffe.Extension):
    """Applies `readable` to a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for thing in objects(pkg):
            if thing.docstring is not None:
                thing.docstring.value = readable(thing.docstring.value, parameters(thing))


def objects(thing: griffe.Object) -> Iterator[griffe.Object]:
    yield thing
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            yield from objects(member)


def parameters(thing: griffe.Object) -> set[str]:
    if isinstance(thing, griffe.Function):
        return {parameter.name.lstrip("*") for parameter in thing.parameters}
    if isinstance(thing, griffe.Class):
        made = thing.members.get("__init__")
        return {*thing.members, *(parameters(made) if isinstance(made, griffe.Function) else ())}
    return set()
