"""The environment variables that hiar_model uses. They are read here and nowhere else.

| variable | meaning | default | legal values |
|---|---|---|---|
| WORLD_SIZE | processes of the job, set by torchrun | 1 | whole numbers from 1 |
| RANK | this process among them, set by torchrun | 0 | 0 to WORLD_SIZE - 1 |
| LOCAL_RANK | this process on its machine, which picks the GPU; set by torchrun | 0 | whole numbers from 0 |
| WANDB_PROJECT | Weights & Biases project that `hiar train` logs to | unset: none | any name |
| OMP_NUM_THREADS | CPU threads of torch, which reads it; `--nproc` makes it 1 if unset | unset | whole numbers from 1 |
| TORCH_ELASTIC_SHUTDOWN_TIMEOUT | seconds for processes to end in; `--nproc` makes it 120 | 30 | whole numbers from 0 |
| HIAR_ERROR_FILE | set by `--nproc`: exists once one of its processes has printed an error | unset | a path |

An empty value counts as unset. hiar_kernels reads HIAR_NVTX, HIAR_BUILD_CUDA and HIAR_CUDA_ARCHS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def world_size() -> int:
    """Processes of the job; ValueError for a value that is no whole number of at least 1."""
    return _whole("WORLD_SIZE", 1, 1)


def rank() -> int:
    """This process among those of the job; ValueError for a value outside 0..:func:`world_size` - 1."""
    value = _whole("RANK", 0, 0)
    if value >= world_size():
        raise ValueError(f"RANK must be below WORLD_SIZE {world_size()}, got {value}")
    return value


def local_rank() -> int:
    """This process among those of the machine; ValueError for a value that is no whole number of at least 0."""
    return _whole("LOCAL_RANK", 0, 0)


def under_torchrun() -> bool:
    """Whether torchrun, or our own launcher, started this process."""
    return bool(os.environ.get("LOCAL_RANK"))


def wandb_project() -> str | None:
    """The Weights & Biases project to log to; None: none."""
    return os.environ.get("WANDB_PROJECT") or None


def error_file() -> Path | None:
    """The file that a process of ``--nproc`` creates when it prints its error; None: no launcher of ours waits."""
    value = os.environ.get("HIAR_ERROR_FILE")
    return Path(value) if value else None


def claim_error_report() -> bool:
    """Take it on to print the error, so that no other process of our launcher does: creates :func:`error_file`. False:
    another one has. True too where there is no such launcher, or it has ended at a second Ctrl-C, with its folder.
    """
    file = error_file()
    try:
        if file is not None:
            file.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher's folder has gone, or its disk is full
        pass
    return True


@contextmanager
def for_children(error_file: Path) -> Iterator[None]:
    """Inside, started processes find ``error_file``, and one CPU thread each unless OMP_NUM_THREADS says otherwise.
    The launcher leaves them time to finish an update of training. Behind it the variables are as they were: the
    caller may be a program of its own, or a notebook.
    """
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    before = {name: os.environ.get(name) for name in (*defaults, "HIAR_ERROR_FILE")}
    os.environ.update({**defaults, **{name: value for name, value in before.items() if value is not None}})
    os.environ["HIAR_ERROR_FILE"] = str(error_file)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _whole(name: str, default: int, least: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"the environment variable {name} must be a whole number of at least {least}, got {value!r}")
    return int(value)
