"""What a Wan video takes is compared with the memory that is free before anything is read: a system that runs out of
memory kills a process without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..config import SHIPPED, WAN
from ..io.weight_files import read_json
from ..models.text_encoder import find_text_encoder
from ..models.wan import Checkpoint, is_experts, is_wan_folder
from .fit import Asked, ask, subject, ways_to_fit
from .memory import Request, vae_part

SMALL = 10**9  # bytes of weights that are not worth a prediction
MEMINFO = "/proc/meminfo"
CGROUPS = (  # limit and use of a container, version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat"),
)  # fmt: skip


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process may still take there: of a GPU, or of memory and swap within the container's limit; None
    where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        rows = dict(line.split(":", 1) for line in Path(MEMINFO).read_text().splitlines())
        free = 1024 * sum(int(rows[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    for limit, used, stat in CGROUPS:
        try:
            kept = dict(line.split() for line in Path(stat).read_text().splitlines())
            files = int(kept.get("inactive_file", 0)) + int(kept.get("active_file", 0))  # given back when needed
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()) + files)
        except (OSError, ValueError):  # no such container, or "max"
            continue
    return max(free, 0)


@dataclass(frozen=True)
class Need:
    """A video on a device. On a CPU ``asked`` counts neither text encoder (``text``: how many numbers, of how many
    bytes each in the file) nor VAE: weights in the file's own dtype are mapped, which takes no memory that cannot be
    given back, and the VAE works in float32.
    """

    asked: Asked
    text: tuple[int, int] = (0, 0)

    def total(self) -> int:
        """Bytes at the highest."""
        return self.asked.memory().total + self._beside(self.asked.request)

    def _beside(self, r: Request) -> int:
        if r.device != "cpu":
            return 0
        settings, decoder = self.asked.subject.vae, 0
        if settings is not None:
            vae = vae_part(settings, r.height, r.width, r.rollout.frames_per_block, torch.float32, "cpu")
            decoder = vae.weights + max(vae.kept, vae.peak)
        numbers, size = self.text
        work = torch.bfloat16 if r.dtype == torch.float16 else r.dtype
        return decoder + (0 if work.itemsize == size else numbers * work.itemsize)

    def ways(self, limit: int) -> Iterator[tuple[str, int]]:
        """Options that fit and what they take, those that change the video least first."""
        r, said = self.asked.request, ""
        found = self
        if r.device == "cpu" and r.dtype in (torch.float32, torch.float64):
            said, r = "--dtype bfloat16 ", replace(r, dtype=torch.bfloat16)
            found = replace(self, asked=replace(self.asked, request=r))
            if (total := found.total()) <= limit:
                yield said.strip(), total
                return
        beside = found._beside(r)
        for change, memory in ways_to_fit(found.asked, limit - beside, 2) if beside < limit else ():
            yield f"{said}{change}", memory.total + beside
        (rows, columns), cell = r.config.patch_size[1:], WAN.spatial_compression
        for part in (3, 2, 1):
            height, width = (side * part // 4 // step * step for side, step in ((r.height, rows), (r.width, columns)))
            less = replace(found, asked=replace(found.asked, request=replace(r, height=height, width=width)))
            if min(height, width) and (total := less.total()) <= limit:
                yield f"{said}--height {cell * height} --width {cell * width}", total
                return


def require_memory(
    model: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    checkpoint: Checkpoint | None = None,
    offload: tuple[str, ...] = (),
    num_frames: int | None = None,
    order: str | None = None,
    kv_dtype: str | None = None,
    **options: Any,
) -> None:
    """Refuse a video that does not fit what is free on the device, before any weights are read.

    Args:
        model: a folder; whatever is no Wan folder, or small, is not looked at. options: of :func:`.fit.ask`.

    Raises:
        ValueError: one line: what it takes, what is free, the options that fit.
    """
    if not isinstance(model, str | os.PathLike) or os.fspath(model) in SHIPPED or not is_wan_folder(Path(model)):
        return
    folder, free = Path(model), free_bytes(device)
    one = _first_file(checkpoint)
    weighed = [folder, *([] if one is None else [Path(one)])]
    files = [f for path in weighed for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()]
    if free is None or sum(file.stat().st_size for file in files) < SMALL:
        return
    try:
        need = _need(folder, one, device, dtype, offload, kv_dtype, frames=num_frames, order=order, **options)
        total = need.total()
    except (ValueError, TypeError, OSError):
        return  # what is wrong is told by what reads it
    if total <= free:
        return
    found: dict[str, int] = {}
    for words, taken in need.ways(free):
        found.setdefault(words, taken)
        if len(found) == 3:
            break
    fits = "; ".join(f"{words} ({taken / 1e9:.1f} GB)" for words, taken in found.items())
    r, where = need.asked.request, "memory" if device.type == "cpu" else f"{device}'s memory"
    name = str(r.dtype).removeprefix("torch.")
    raise ValueError(
        f"{model}: this video takes about {total / 1e9:.1f} GB in {name} and {free / 1e9:.1f} GB of {where} are free; "
        + (f"these fit: {fits}" if fits else "no option makes it fit: hiar doctor --model says what takes how much")
    )


def _first_file(checkpoint: Checkpoint | None) -> str | None:
    if checkpoint is None or (isinstance(checkpoint, str | os.PathLike) and not is_experts(checkpoint)):
        return None if checkpoint is None else os.fspath(checkpoint)
    if isinstance(checkpoint, Mapping):
        return next(iter(checkpoint.values()), None)
    return os.fspath(checkpoint).split(",")[0].partition("=")[2]


def _need(
    folder: Path, one: str | None, device: torch.device, dtype: torch.dtype | None, offload: tuple[str, ...],
    kv_dtype: str | None, order: str | None, **options: Any,
) -> Need:  # fmt: skip
    about = subject(str(folder)) if one is None else subject(one)
    if one is not None:
        beside = _beside(folder)
        about = replace(about, text_encoder=beside[0], vae=beside[1])
    work = dtype or torch.bfloat16
    if isinstance(options.get("window_frames"), list):
        options["window_frames"] = tuple(options["window_frames"])
    options |= {"dtype": _name(work), "kv_dtype": kv_dtype,
                "order": order or "step_first"}  # fmt: skip
    if device.type == "cuda":
        return Need(ask(about, offload=offload, **options))
    without = replace(about, text_encoder=0)
    size = _itemsize(find_text_encoder(folder).weights[0])
    return Need(ask(without, device="cpu", vae_dtype="none", **options), (about.text_encoder // size, size))


def _itemsize(weights: Path) -> int:
    """Bytes of a number in a file of weights."""
    if weights.suffix != ".safetensors":
        return 2  # as published
    with safe_open(weights, "pt") as file:
        dtype = file.get_slice(next(iter(file.keys()))).get_dtype()
    return {"F64": 8, "F32": 4}.get(dtype, 2)


def _beside(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Bytes of a folder's text encoder, and the settings of its VAE, where it may have no transformer."""
    config = folder / "vae" / "config.json"
    return find_text_encoder(folder).nbytes, read_json(config) if config.is_file() else {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
