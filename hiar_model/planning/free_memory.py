"""Compares the predicted memory of a Wan video with what is free, before weights are loaded: a system that runs out of
memory kills the process without a message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..common.checks import dtype_name
from ..config import SHIPPED, WAN
from ..io.weight_files import read_json
from ..models.checkpoint import CheckpointInfo, loading_bytes
from ..models.quantised import WORK
from ..models.text_encoder import find_text_encoder
from ..models.wan import Checkpoint, is_experts, is_wan_folder
from .fit import FitQuery, fit_query, options_that_fit, subject, with_vae
from .memory import Request, vae_memory

SMALL = 10**9  # bytes of weights below which nothing is checked
MEMINFO = "/proc/meminfo"
CGROUPS = (  # limit, use and statistics of a container, cgroups v2 and v1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat"),
)  # fmt: skip


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of a GPU, or of memory and swap within the container's limit; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = dict(line.split(":", 1) for line in Path(MEMINFO).read_text().splitlines())
        free = 1024 * sum(int(meminfo[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    for limit, used, stat in CGROUPS:
        try:
            stats = dict(line.split() for line in Path(stat).read_text().splitlines())
            files = int(stats.get("inactive_file", 0)) + int(stats.get("active_file", 0))  # reclaimable
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()) + files)
        except (OSError, ValueError):  # no such container, or "max"
            continue
    return max(free, 0)


@dataclass(frozen=True)
class Need:
    """The memory of a video on a device.

    On a CPU ``query`` counts neither the text encoder nor the VAE: weights in the file's own dtype are memory-mapped,
    which takes no memory that cannot be reclaimed, and the VAE works in float32. ``text_encoder``: (count, bytes each
    in the file) of its numbers.
    """

    query: FitQuery
    text_encoder: tuple[int, int] = (0, 0)

    def total(self) -> int:
        """Peak bytes."""
        return self.query.memory().total + self._on_cpu(self.query.request)

    def _on_cpu(self, r: Request) -> int:
        if r.device != "cpu":
            return 0
        settings, decoder = self.query.subject.vae, 0
        if settings is not None:
            vae = vae_memory(settings, r.height, r.width, r.rollout.frames_per_block, torch.float32, "cpu")
            decoder = vae.weights + max(vae.resident, vae.peak)
        numbers, size = self.text_encoder
        return decoder + (0 if r.dtype.itemsize == size else numbers * r.dtype.itemsize)

    def options(self, limit: int) -> Iterator[tuple[str, int]]:
        """Options that fit and their bytes, smallest change of the video first."""
        r, prefix = self.query.request, ""
        need = self
        if r.device == "cpu" and r.dtype in (torch.float32, torch.float64):
            prefix, r = "--dtype bfloat16 ", replace(r, dtype=torch.bfloat16)
            need = replace(self, query=replace(self.query, request=r))
            if (total := need.total()) <= limit:
                yield prefix.strip(), total
                return
        on_cpu = need._on_cpu(r)
        for change, memory in options_that_fit(need.query, limit - on_cpu, 2) if on_cpu < limit else ():
            yield f"{prefix}{change}", memory.total + on_cpu
        patch, cell = r.config.patch_size[1:], WAN.spatial_compression
        for quarters in (3, 2, 1):
            height, width = (side * quarters // 4 // p * p for side, p in zip((r.height, r.width), patch, strict=True))
            smaller = replace(need, query=replace(need.query, request=replace(r, height=height, width=width)))
            if min(height, width) and (total := smaller.total()) <= limit:
                yield f"{prefix}--height {cell * height} --width {cell * width}", total
                return


def require_free(nbytes: int, device: torch.device, what: str) -> None:
    """ValueError of one line if a device has not so many bytes free."""
    free = free_bytes(device)
    if free is not None and nbytes > free:
        where = "memory" if device.type == "cpu" else f"{device}'s memory"
        raise ValueError(f"{what} need {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB of {where} are free")


def require_memory(
    model: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    checkpoint: Checkpoint | None = None,
    vae: str | os.PathLike[str] | None = None,
    offload: tuple[str, ...] = (),
    num_frames: int | None = None,
    order: str | None = None,
    kv_dtype: str | None = None,
    beside: Sequence[str] = (),
    **options: Any,
) -> None:
    """Refuse a video that does not fit the free memory of the device, before any weights are read.

    Args:
        model: a Wan folder; anything else, and small models, are not checked. options: of :func:`.fit.fit_query`, such
            as ``attention_dtype``, ``linear_dtype`` and ``lora``.
        beside: the orders of further videos that are made of the same weights at the same time.

    Raises:
        ValueError: one line: the bytes needed, those free, and options that fit.
    """
    if not isinstance(model, str | os.PathLike) or os.fspath(model) in SHIPPED or not is_wan_folder(Path(model)):
        return
    folder, free = Path(model), free_bytes(device)
    one = _first_file(checkpoint)
    paths = [folder, *([] if one is None else [Path(one)])]
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()]
    if free is None or sum(file.stat().st_size for file in files) < SMALL:
        return
    try:
        need, *others = (
            _need(folder, one, device, dtype, offload, kv_dtype, vae=vae, frames=num_frames, order=each, **options)
            for each in (order, *beside)
        )
        more = sum(other.query.memory().own for other in others)
        total = need.total() + more
    except (ValueError, TypeError, OSError):
        return  # reported when it is loaded
    if total <= free:
        return
    fitting: dict[str, int] = {}
    for words, nbytes in need.options(free - more):
        fitting.setdefault(words, nbytes + more)
        if len(fitting) == 3:
            break
    fits = "; ".join(f"{words} ({nbytes / 1e9:.1f} GB)" for words, nbytes in fitting.items())
    r, where = need.query.request, "memory" if device.type == "cpu" else f"{device}'s memory"
    name = dtype_name(r.dtype)
    needs = "these videos need" if beside else "this video needs"
    raise ValueError(
        f"{model}: {needs} about {total / 1e9:.1f} GB in {name}, {free / 1e9:.1f} GB of {where} are free; "
        + (f"these fit: {fits}" if fits else "no option makes it fit: see hiar doctor --model")
    )


def require_memory_to_convert(info: CheckpointInfo, lora: bool = False) -> None:
    """Refuse to convert a large quantised checkpoint that does not fit the free memory once it is dequantised; others
    are memory-mapped. lora: whether adapters are merged.

    Raises:
        ValueError: one line: the bytes needed and those free.
    """
    free = free_bytes(torch.device("cpu"))
    needed = info.parameters * WORK.itemsize + loading_bytes(info.config, WORK, lora=lora)
    if info.quantised is not None and free is not None and needed >= SMALL and free < needed:
        raise ValueError(
            f"{info.files[0]}: dequantised to {dtype_name(WORK)} it takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "of memory are free"
        )


def _first_file(checkpoint: Checkpoint | None) -> str | None:
    if checkpoint is None or (isinstance(checkpoint, str | os.PathLike) and not is_experts(checkpoint)):
        return None if checkpoint is None else os.fspath(checkpoint)
    if isinstance(checkpoint, Mapping):
        return next(iter(checkpoint.values()), None)
    return os.fspath(checkpoint).split(",")[0].partition("=")[2]


def _need(
    folder: Path, one: str | None, device: torch.device, dtype: torch.dtype | None, offload: tuple[str, ...],
    kv_dtype: str | None, order: str | None, vae: str | os.PathLike[str] | None = None, **options: Any,
) -> Need:  # fmt: skip
    about = subject(str(folder)) if one is None else subject(one)
    if one is not None:
        text_encoder, own = _components(folder)
        about = replace(about, text_encoder=text_encoder, vae=own)
    about = about if vae is None else with_vae(about, vae)
    work = dtype or torch.bfloat16
    if isinstance(options.get("window_frames"), list):
        options["window_frames"] = tuple(options["window_frames"])
    options |= {"dtype": dtype_name(work), "kv_dtype": kv_dtype,
                "order": order or "step_first"}  # fmt: skip
    if device.type == "cuda":
        return Need(fit_query(about, offload=offload, **options))
    without = replace(about, text_encoder=0)
    size = _itemsize(find_text_encoder(folder).weights[0])
    return Need(fit_query(without, device="cpu", vae_dtype="none", **options), (about.text_encoder // size, size))


def _itemsize(weights: Path) -> int:
    """Bytes per number in a file of weights."""
    if weights.suffix != ".safetensors":
        return 2  # as published
    with safe_open(weights, "pt") as file:
        dtype = file.get_slice(next(iter(file.keys()))).get_dtype()
    return {"F64": 8, "F32": 4}.get(dtype, 2)


def _components(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Bytes of a folder's text encoder, and the config of its VAE; its transformer may be missing."""
    config = folder / "vae" / "config.json"
    return find_text_encoder(folder).nbytes, read_json(config) if config.is_file() else {}
