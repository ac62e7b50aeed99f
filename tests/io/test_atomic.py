"""The target of an atomic write is complete or as it was, whatever happens; nothing temporary stays behind an error."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from altered import altered
from safetensors import SafetensorError

from hiar_model.io import atomic as module
from hiar_model.io.atomic import atomic, atomic_write, temporary, unused

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(target: Path, text: str) -> None:
    """A file, or a folder with one in it where the name has no suffix."""
    with atomic(target) as partial:
        assert (
            partial.parent == target.parent
            and partial.name.startswith(".")
            and f".{os.getpid()}." in partial.name
            and partial.suffix == (target.suffix or ".partial")
        )
        if target.suffix:
            partial.write_text(text)
        else:
            (partial / "inner").mkdir(parents=True)
            (partial / "inner" / "a.txt").write_text(text)


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_a_new_target(tmp_path, name):
    write(tmp_path / name, "new")
    assert contents(tmp_path) == {name if name == "a.txt" else "a/inner/a.txt": b"new"}


def test_an_existing_target(tmp_path):
    atomic_write(tmp_path / "a.txt", "ä")
    assert contents(tmp_path) == {"a.txt": b"\xc3\xa4"}
    atomic_write(str(tmp_path / "a.txt"), b"new")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new")
    expected = {"a.txt": b"new", "empty/inner/a.txt": b"new"}
    assert contents(tmp_path) == expected
    with pytest.raises(OSError, match="cannot write .*empty: Directory not empty"):
        write(tmp_path / "empty", "newer")
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("name", ["a.txt", "a"])
@pytest.mark.parametrize("there", [True, False])
def test_what_links_name_is_written_and_the_links_stay(tmp_path, name, there):
    (tmp_path / "links").mkdir()
    (tmp_path / "disk").mkdir()
    file, first, second = tmp_path / "disk" / "blob", tmp_path / "links" / f"1{name}", tmp_path / "links" / name
    second.symlink_to(f"1{name}")
    first.symlink_to("../disk/blob")
    if there:
        file.write_text("old") if name == "a.txt" else file.mkdir()
    with atomic(second) as partial:
        assert partial.parent == file.parent and partial.suffix == (second.suffix or ".partial")
        if name == "a":
            partial.mkdir()
        (partial if name == "a.txt" else partial / "b.txt").write_text("new")
    assert first.is_symlink() and second.is_symlink()
    assert contents(tmp_path / "disk") == {"blob" if name == "a.txt" else "blob/b.txt": b"new"}
    assert len(list((tmp_path / "disk").iterdir())) == 1


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("pipe.txt")
    for name in ("pipe.txt", "link.txt"):
        with pytest.raises(OSError, match=rf"^cannot write .*{name}: it is a device"):
            atomic_write(tmp_path / name, "new")
    assert (tmp_path / "pipe.txt").is_fifo() and len(list(tmp_path.iterdir())) == 2


ERRORS = {
    "full disk": (FULL, "No space left on device"),
    "full disk in safetensors": (
        SafetensorError("I/O error: No space left (os error 28)\nmore"),
        "I/O error: No space",
    ),
    "full disk in torch": (RuntimeError("PytorchStreamWriter failed"), "PytorchStreamWriter failed"),
    "another error": (ZeroDivisionError("1 / 0"), None),
    "Ctrl-C": (KeyboardInterrupt(), None),
}


def test_a_full_disk_that_a_library_calls_something_else(tmp_path, monkeypatch):
    """torch.save on a disk of 2 MB says: unexpected pos 2091200 vs 2091088."""
    full = altered(shutil, disk_usage=lambda folder: SimpleNamespace(free=4096))
    monkeypatch.setattr(module, "shutil", full)
    with (
        pytest.raises(OSError, match=r"cannot write .*a\.pt: No space left on device") as refused,
        atomic(tmp_path / "a.pt"),
    ):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2091200 vs 2091088")
    assert refused.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    monkeypatch.undo()  # a quota, or `ulimit -f`: the disk itself has room
    with pytest.raises(OSError, match=r"a\.pt: torch could not write it to its end: a full disk, a quota or"):
        with atomic(tmp_path / "a.pt"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")
    with pytest.raises(OSError, match=r"a\.pt: Permission denied$"), atomic(tmp_path / "a.pt"):  # which says what it is
        raise PermissionError(errno.EACCES, "Permission denied")


def test_the_number_of_an_error_that_a_library_in_rust_names(tmp_path):
    """By it a server knows that the disk is full, and waits."""
    with pytest.raises(OSError, match="I/O error: No space left") as refused, atomic(tmp_path / "a.safetensors"):
        raise ERRORS["full disk in safetensors"][0]
    assert refused.value.errno == errno.ENOSPC


@pytest.mark.parametrize("name", ["a.txt", "a"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["block", "sync", "rename"])
def test_a_failure_leaves_the_target_as_it_was(tmp_path, monkeypatch, name, error, where):
    raised, reason = ERRORS[error]

    def fail(*_: object) -> None:
        raise raised

    if name == "a.txt":
        (tmp_path / name).write_text("old")
    before = contents(tmp_path)
    if where != "block":
        monkeypatch.setattr(module, "os", altered(os, **{{"sync": "fsync", "rename": "replace"}[where]: fail}))
    with pytest.raises(type(raised) if reason is None else OSError) as caught, atomic(tmp_path / name) as partial:
        if name == "a":
            partial.mkdir()
        (partial if name == "a.txt" else partial / "b.txt").write_text("half")
        if where == "block":
            raise raised
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before)
    if reason is not None:
        line = str(caught.value)
        assert line.startswith(f"cannot write {tmp_path / name}: {reason}") and "\n" not in line
        assert caught.value.errno == (errno.ENOSPC if "No space" in str(raised) else None)


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path):
    """In a container every process may be number 1; its folder of frames was refused ever after."""
    partial = temporary(tmp_path / "a")
    partial.mkdir()
    (partial / "old.txt").write_text("old")
    with atomic(tmp_path / "a") as fresh:
        fresh.mkdir()
        (fresh / "new.txt").write_text("new")
    assert contents(tmp_path / "a") == {"new.txt": b"new"}
    assert contents(partial) == {"old.txt": b"old"}, "another process may be at work there"


def test_two_at_once_that_write_one_target(tmp_path):
    """As threads do: neither has the other's temporary file, and who ends last is there."""
    with atomic(tmp_path / "a.txt") as first, atomic(tmp_path / "a.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert contents(tmp_path) == {"a.txt": b"first"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a", "猫" * 80 + ".mp4"], ids=["file", "folder", "long"])
def test_a_name_that_was_taken_meanwhile(tmp_path, name, overwrite):
    target, beside = tmp_path / name, lambda path: path.with_name(path.name + ".json")
    assert unused(target, overwrite=overwrite) == target
    if name != "a":
        target.write_text("old")
    else:
        target.mkdir()
        assert unused(target, overwrite=overwrite) == target
        (target / "frame.png").touch()
    if overwrite and name != "a":
        assert unused(target, overwrite=True) == target
        return
    second = unused(target, overwrite=overwrite)
    assert second.name.endswith("-2" + target.suffix) and second.name[0] == name[0]
    beside(second).touch()
    third = unused(target, overwrite=overwrite, beside=beside)
    assert third.name.endswith("-3" + target.suffix)
    beside(third).touch()  # the name is not too long


@pytest.mark.parametrize("folder", ["missing", "file.txt"])
def test_a_target_that_cannot_be_written_is_one_line(tmp_path, folder):
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(OSError, match=rf"^cannot write .*{folder}.a\.txt: (No such file|Not a directory)[\w ]*$"):
        atomic_write(tmp_path / folder / "a.txt", "new")
    assert contents(tmp_path) == {"file.txt": b"old"}


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:  # root may write everywhere, so no mode bits
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match=r"^cannot write .*a\.txt: Permission denied$"):
        atomic_write(tmp_path / "a.txt", "new")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_before_the_rename_leaves_the_target_as_it_was(tmp_path, call):
    (tmp_path / "a.txt").write_text("old")
    code = (
        "import os, signal, sys; from hiar_model.io.atomic import atomic_write\n"
        f"os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(sys.argv[1], 'new')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.read_text() for p in tmp_path.iterdir() if ".partial" in p.name] == ["new"]


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else "?")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(module, "os", altered(os, fsync=synced, replace=renamed))
    write(tmp_path / "a", "new")
    partial = calls[-3]
    assert ".partial" in partial
    if sys.platform == "linux":
        opened = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert not [file for file in opened if file.startswith(str(tmp_path))], "none stays open"
        assert calls == [f"{partial}/inner", f"{partial}/inner/a.txt", partial, "rename", str(tmp_path)]


def test_a_file_system_without_fsync(tmp_path, monkeypatch):
    def unsupported(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(module, "os", altered(os, fsync=unsupported))
    atomic_write(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {"a.txt": b"new"}
