"""Standard output and error of a command: nothing that happens to them ends its work."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..common import environment

FAILED, READER_GONE = 1, 141  # 141: as of a process that SIGPIPE ends


class _UnfailingStream:
    """A stream that never fails: its first error is remembered, and what is said from then on is lost."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self.stream.write(text))
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.error = self.error or error
        with suppress(OSError, ValueError):  # a stream without a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # what is still buffered goes there
            os.close(null)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """How to print what the stream's encoding lacks: bytes of a name that the locale could not read as they were, other
    characters as \\u20ac.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if 0xDC80 <= ord(letter) <= 0xDCFF and sys.getfilesystemencoding() != "utf-8":
        return letter.encode("ascii", "surrogateescape"), error.start + 1
    return letter.encode("ascii", "backslashreplace").decode(), error.start + 1


@contextmanager
def kept_streams() -> Iterator[None]:
    """Context in which a full disk behind stdout or stderr, or a reader that is gone, ends nothing."""
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _UnfailingStream(before[0]), _UnfailingStream(before[1])
    codecs.register_error(_escape.__name__, _escape)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors=_escape.__name__)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def status(code: int) -> int:
    """The exit status of a command that would end with ``code``: another if its output was lost, with a line on stderr
    that says why.
    """
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None or code:
        return code
    environment.claim_error_report()  # the process that started this one need not say more
    if error.errno == errno.EPIPE:
        return READER_GONE
    print(f"hiar: cannot write standard output: {error.strerror or error}; all else is done", file=sys.stderr)
    return FAILED


def _open_closed() -> None:
    """Where the caller has closed stdin, stdout or stderr, nothing is read and what is said is lost; and no file that
    is written gets their number, under which libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  (for good)
