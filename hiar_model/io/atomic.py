"""Write files and folders atomically: under a temporary name beside the target, synced to disk, then renamed.

Whatever happens in between (an error, a full disk, Ctrl-C, a power cut), the target is either complete or as it was.
Where the target is a symbolic link, the file or folder that it names is written, and the link stays.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors, name the system's error."""
_LONGEST_STEM = 200  # bytes of a name, so that it stays legal with what is added to it
SPECIAL = "a device, a pipe or a socket, no file"


@contextmanager
def atomic(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path, at which the block writes a file or makes a folder; it is then renamed to ``target``.

    The path has the suffix of the target, if any. An existing file is replaced, an existing folder must be empty. If
    the block or the rename fails, nothing temporary is left.

    Raises:
        OSError: one line, ``cannot write TARGET: REASON``, also where a library reports a full disk in another way.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp(), "notes.txt")
    >>> with atomic(target) as partial:
    ...     written = partial.write_text("complete", encoding="utf-8")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('complete', 1)
    """
    with unpublished(target) as partial:
        yield partial
        publish(partial, Path(target))


@contextmanager
def unpublished(target: str | os.PathLike[str]) -> Iterator[Path]:
    """As :func:`atomic`, for a block that calls :func:`publish` itself, under a name that it finds last."""
    partial = temporary(Path(target))
    try:
        yield partial
    except _failures() as error:
        raise cannot_write(target, error) from error
    finally:
        discard(partial)


def _failures() -> tuple[type[Exception], ...]:
    """What writing raises: safetensors' own error too, once that library is in use."""
    library = sys.modules.get("safetensors")
    return (OSError, RuntimeError) if library is None else (OSError, RuntimeError, library.SafetensorError)


def atomic_write(target: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file atomically, text as UTF-8; OSError as :func:`atomic`."""
    with atomic(target) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def temporary(target: Path) -> Path:
    """A temporary name for a target: hidden, in the same folder so that it can be renamed, short however long the
    target's own name is. Of a link: in the folder of what it names. Every call has another name: in containers every
    process may be number 1, and threads share theirs.
    """
    file = behind_links(target)
    name = hashlib.blake2b(os.fsencode(file.name), digest_size=4).hexdigest()
    suffix = target.suffix if len(target.suffix) < 20 else ""
    return file.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}.partial{suffix}")


def publish(partial: Path, target: Path) -> None:
    """Sync a complete file or folder to disk and give it the target's name, or that of the file that a link names.

    Raises:
        OSError: it failed; also for a target that is a device, a pipe or a socket, which a rename would destroy.
    """
    target = behind_links(target)
    if is_special(target):
        raise OSError(errno.EINVAL, f"it is {SPECIAL}", str(target))
    if partial.is_dir():
        for path in sorted(partial.rglob("*")):
            sync(path)
        if target.is_dir():
            target.rmdir()  # fails unless it is empty
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)


def unused(target: Path, *, overwrite: bool, beside: Callable[[Path], Path] | None = None) -> Path:
    """Where to write what is finished: ``target``, or name-2, name-3, ... where another process has written one since
    it was checked, so that neither is lost.

    Args:
        overwrite: files may be replaced; a folder never is, unless it is empty.
        beside: names the file that goes with a target, which must be unused too.
    """

    def is_free(path: Path) -> bool:
        if path.is_dir():
            return not any(path.iterdir())
        return not os.path.exists(path)

    if is_free(target) or (overwrite and target.is_file()):
        return target
    name, suffix = (target.name, "") if target.is_dir() else (target.stem, target.suffix)
    stem = os.fsdecode(os.fsencode(name)[:_LONGEST_STEM]).encode(errors="ignore").decode()
    names = (target.with_name(f"{stem}-{number}{suffix}") for number in itertools.count(2))
    return next(path for path in names if is_free(path) and (beside is None or is_free(beside(path))))


def behind_links(target: Path) -> Path:
    """What a symbolic link names, through any number of them, whether it exists or not; any other path as it is."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def is_special(target: Path) -> bool:
    """Whether a device, a pipe or a socket has this name."""
    try:
        mode = target.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def discard(partial: Path) -> None:
    """Remove a temporary file or folder, if it is there; never raises."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _is_full(folder: Path) -> bool:
    """Whether its disk has less than 64 KiB left."""
    try:
        return shutil.disk_usage(folder).free < 1 << 16
    except OSError:
        return False


def cannot_write(target: str | os.PathLike[str], error: BaseException) -> OSError:
    """The error of one line for a target that could not be written, with the ``errno`` of the original."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    if reason is None and _is_full(Path(target).parent):  # torch.save: "unexpected pos 2091200 vs 2091088"
        number, reason = errno.ENOSPC, os.strerror(errno.ENOSPC)
    elif reason is None and "inline_container" in str(error):
        reason = "torch could not write it to its end: a full disk, a quota or a limit of file sizes"
    if number is None and (named := _OS_ERROR.search(str(error))) and os.name != "nt":
        number = int(named[1])
    reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
    wrapped = OSError(f"cannot write {os.fspath(target)}: {reason}")
    wrapped.errno = number
    return wrapped


def sync(path: Path) -> None:
    """Put a file or folder on disk, as far as its file system can."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync for this kind of file
            raise
    finally:
        os.close(descriptor)
