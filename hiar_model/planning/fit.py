"""Whether a video fits a GPU, and what makes it fit: `hiar doctor --model NAME|FOLDER`. No weights are loaded.

The predictions are :mod:`hiar_model.planning.memory`'s; here is what they are asked, the search, and how it is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..common.checks import whole
from ..config import SHIPPED, WAN, RolloutConfig, WanConfig
from ..config.rollout import BLOCKWISE
from ..io.files import refuse_stand_in
from ..io.weight_files import read_json, read_tensors
from ..models.kv_cache import E4M3
from .memory import Memory, Part, Request, predict, vae_part

SHOWN = 3  # ways to fit
_UNITS = {"": 10**9, "gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20, "tb": 10**12, "tib": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30), "500MB" or "24" (GB).

    Raises:
        ValueError: no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].lower() if found else "?"
    size = round(float(found[1]) * _UNITS[unit]) if found and unit in _UNITS else 0
    if size < 1:
        raise ValueError(
            f"gpu-memory {text!r} is no size: give such as 24GB (24 x 10^9 bytes), 24GiB (24 x 2^30) or 80"
        )
    return size


_ROLLOUT = RolloutConfig(window_frames=WAN.window_frames)


@dataclass(frozen=True)
class Subject:
    """A model as far as its memory goes.

    size                 (height, width) of the one latent size it has, else None
    pixels, frames       pixels of a latent along a side, pixel frames of a latent frame
    text_encoder         bytes of its weights; vae: diffusers' settings, None: on the CPU, or not there
    missing              parts that were not found, in words
    """

    name: str
    config: WanConfig
    rollout: RolloutConfig = _ROLLOUT
    num_frames: int = WAN.num_frames
    dtype: str = "bfloat16"
    size: tuple[int, int] | None = None
    pixels: int = WAN.spatial_compression
    frames: int = WAN.temporal_compression
    text_encoder: int = 0
    vae: dict[str, Any] | None = None
    missing: tuple[str, ...] = ()


def subject(model: str) -> Subject:
    """By the name of a configuration or of a shipped model, or from a folder or file of weights, which are not loaded.

    Raises:
        ValueError: one line: neither a name nor weights that are known.
    """
    from ..models.registry import CONFIG, load_video_model

    published = [name for name in WanConfig.names() if name.startswith("wan")]
    if model in published:
        return Subject(model, WanConfig.from_name(model), text_encoder=2 * WAN.text_encoder_parameters, vae={})
    path = Path(model)
    told = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if model in SHIPPED or told.get("format") == "hiar-toy":
        toy = load_video_model(model, "cpu")  # some megabytes; its text encoder is a table, its codec stays on the CPU
        return Subject(
            model, toy.transformer.config, toy.rollout, toy.num_frames, "float32", toy.latent_size[1:],
            frames=toy.temporal_compression,
        )  # fmt: skip
    if not path.exists():
        raise ValueError(f"model {model!r} is no name, file or folder; names: {', '.join([*SHIPPED, *published])}")
    return _on_disk(path)


def _on_disk(path: Path) -> Subject:
    from ..models.checkpoint import read_checkpoint
    from ..models.text_encoder import NATIVE_WEIGHTS, WEIGHTS, find_text_encoder
    from ..models.vae_weights import ORIGINAL, find_vae

    found = read_checkpoint(path)[1]  # mapped, not read
    folder, missing, text, vae = path if path.is_dir() else path.parent, [], 0, None
    if any((folder / name).exists() for name in (WEIGHTS, NATIVE_WEIGHTS)):
        text = find_text_encoder(folder).nbytes
    else:
        missing.append("text encoder")
    if (folder / "vae" / "config.json").is_file():
        refuse_stand_in(find_vae(folder))
        vae = read_json(folder / "vae" / "config.json")
    elif (folder / ORIGINAL).is_file():
        vae = {"base_dim": len(read_tensors(folder / ORIGINAL)[0]["encoder.conv1.weight"])}
    else:
        missing.append("VAE")
    window, sink = found.window_frames or WAN.window_frames, found.sink_frames or 0
    return Subject(
        str(found), found.config, RolloutConfig(window_frames=window, sink_frames=sink), text_encoder=text, vae=vae,
        missing=tuple(missing),
    )  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A video of a model: what `hiar doctor` was asked, and what it may change."""

    subject: Subject
    request: Request
    vae_dtype: torch.dtype | None  # None: no VAE on the device
    offload: tuple[str, ...] = ()

    def memory(self) -> Memory:
        """Predicted."""
        vae, r = Part(), self.request
        if self.subject.vae is not None and self.vae_dtype is not None and "vae" not in self.offload:
            size = (r.height, r.width, r.rollout.frames_per_block)
            vae = vae_part(self.subject.vae, *size, self.vae_dtype, r.device)
        text = Part(self.subject.text_encoder)
        return predict(r, text_encoder=text, vae=vae, offload=self.offload)


def ask(
    model: str | Subject,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    window_frames: int | None | str | tuple[int | None, ...] = "model",
    sink_frames: int | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    order: str = "step_first",
    fuse_cache_denoise: bool = False,
    vae_dtype: str | None = None,
    offload: Sequence[str] = (),
    device: str = "cuda",
    **options: Any,
) -> Asked:
    """The request in pixels; what is None is as the model says. ``options``: those of :class:`Request`.

    Raises:
        ValueError: one line that names what is wrong and what is legal.
    """
    height, width, frames, steps, sink_frames = (
        None if value is None else whole(name, value, least)
        for name, value, least in (("height", height, 1), ("width", width, 1), ("frames", frames, None),
                                   ("steps", steps, 1), ("sink-frames", sink_frames, 0))
    )  # fmt: skip
    about = model if isinstance(model, Subject) else subject(model)
    if about.size is not None and (height, width) != (None, None):
        raise ValueError(f"{about.name} has one size: give no height and no width")
    high, wide = about.size or _latent_size(about, height or WAN.size[0], width or WAN.size[1])
    rollout = about.rollout if steps is None else about.rollout.with_steps(steps)
    if window_frames != "model":
        rollout = replace(rollout, window_frames=window_frames)  # type: ignore[arg-type]
    if sink_frames is not None:
        rollout = replace(rollout, sink_frames=sink_frames)
    request = Request(
        about.config, high, wide, _latent_frames(about, about.num_frames if frames is None else frames),
        replace(rollout, order=order, fuse_cache_denoise=fuse_cache_denoise),
        dtype=_dtype("dtype", dtype or about.dtype), device=device,
        kv_dtype=None if kv_dtype is None else _dtype("kv-dtype", kv_dtype), **options,
    )  # fmt: skip
    return Asked(about, request, None if vae_dtype == "none" else _dtype("vae-dtype", vae_dtype or "bfloat16"),
                 tuple(offload))  # fmt: skip


def _latent_size(about: Subject, height: int, width: int) -> tuple[int, int]:
    rows, columns = (about.pixels * p for p in about.config.patch_size[1:])
    if height < 1 or width < 1 or height % rows or width % columns:
        raise ValueError(f"height must be a multiple of {rows} and width of {columns} pixels, got {height}x{width}")
    return height // about.pixels, width // about.pixels


def _latent_frames(about: Subject, frames: int) -> int:
    block = about.rollout.frames_per_block
    latent, rest = divmod(frames - 1, about.frames)
    if frames > 0 and not rest and not (latent + 1) % block:
        return latent + 1
    below = max(0, (frames - 1) // about.frames + 1) // block * block
    near = [1 + (n - 1) * about.frames for n in (below, below + block) if n > 0]
    raise ValueError(
        f"frames must fill whole blocks of {block} latent frames: got {frames}, "
        f"nearest {' or '.join(map(str, near))}"
    )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _dtype(option: str, name: str) -> torch.dtype:
    legal = {**_DTYPES, "float8_e4m3fn": E4M3} if option == "kv-dtype" else _DTYPES
    if name not in legal:
        raise ValueError(f"{option} must be one of {', '.join(legal)}, got {name!r}")
    return legal[name]


# What makes it fit.


@dataclass(frozen=True)
class Change:
    """Options that differ from what was asked, cheapest first by ``cost``: a higher bit is a worse change."""

    cost: int = 0
    options: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)  # of the rollout, or of the request
    offload: tuple[str, ...] = ()

    def __add__(self, other: Change) -> Change:
        fields, offload = {**self.fields, **other.fields}, tuple(dict.fromkeys(self.offload + other.offload))
        return Change(self.cost + other.cost, self.options + other.options, fields, offload)

    def made(self, asked: Asked) -> Asked:
        """The request with these options."""
        request, fields = asked.request, dict(self.fields)
        if "kv_dtype" in fields:
            request = replace(request, kv_dtype=fields.pop("kv_dtype"))
        request = replace(request, rollout=replace(request.rollout, **fields))
        return replace(asked, request=request, offload=asked.offload + self.offload)

    def __str__(self) -> str:
        kept = [option for option in self.options if not option.startswith("--offload")]
        return " ".join(kept + ([f"--offload {','.join(self.offload)}"] if self.offload else []))


def changes(asked: Asked) -> list[list[Change]]:
    """Alternatives that may be combined, one of each list: first those that leave the video as it is (the text encoder
    leaves; all blocks of a step before the next step, shown at the end; decoding on the CPU), then e4m3 keys, whose
    error is measured in docs/memory.md, and last narrower windows.
    """
    r, rollout, none = asked.request, asked.request.rollout, Change()
    found = []
    if asked.subject.text_encoder and "text" not in asked.offload:
        found.append([none, Change(1, ("--offload",), {}, ("text",))])
    if rollout.order in BLOCKWISE and r.num_frames is not None and rollout.kv_source == "own":
        found.append([none, Change(2, ("--order step_first",), {"order": "step_first"})])
    if asked.subject.vae is not None and asked.vae_dtype is not None and "vae" not in asked.offload:
        found.append([none, Change(4, ("--offload",), {}, ("vae",))])
    if r.kv_dtype is None:
        found.append([none, Change(8, ("--kv-dtype float8_e4m3fn",), {"kv_dtype": E4M3})])
    if not isinstance(window := rollout.window_frames, tuple):
        widest = min(window or r.num_frames or 0, r.num_frames or window or 0)
        narrow = [n for n in (12, 9, 6) if rollout.sink_frames + rollout.frames_per_block <= n < widest]
        found.append([none, *(Change(16 << i, (f"--window-frames {n}",), {"window_frames": n})
                              for i, n in enumerate(narrow))])  # fmt: skip
    return found


def ways_to_fit(asked: Asked, limit: int, shown: int = SHOWN) -> list[tuple[Change, Memory]]:
    """Combinations of changes that fit, cheapest first; none of them contains another one whole."""
    found: list[tuple[Change, Memory]] = []
    combined = [sum(chosen, Change()) for chosen in product(*changes(asked))]
    for change in sorted(combined, key=lambda one: one.cost):
        if any(set(_parts(known)) <= set(_parts(change)) for known, _ in found):
            continue
        memory = change.made(asked).memory()
        if memory.total <= limit:
            found.append((change, memory))
            if len(found) == shown:
                break
    return found


def _parts(change: Change) -> list[str]:
    return [option for option in change.options if option != "--offload"] + list(change.offload)


# How it is told.


def lines(asked: Asked, limits: Sequence[int] = ()) -> Iterator[str]:
    """Markdown: the parts, the total, and for each size of a GPU whether that fits or what makes it fit."""
    about, r, memory = asked.subject, asked.request, asked.memory()
    rollout, kept = r.rollout, "" if r.kv_dtype is None else f", keys in {_name(r.kv_dtype)}"
    window = "all" if rollout.window_frames is None else rollout.window_frames
    batch = f", {r.batch} videos at once" if r.batch > 1 else ""
    yield (
        f"{about.name}: latents {r.num_frames} x {r.height}x{r.width}, {len(rollout.steps)} steps, "
        f"order {rollout.order}"
        f"{', fused' if rollout.fuse_cache_denoise else ''}, window {window}, {_name(r.dtype)}{kept}{batch}"
    )
    yield ""
    yield "| part | GB (10^9 bytes) | |"
    yield "|---|---:|---|"
    for name, nbytes, note in _rows(asked, memory):
        yield f"| {name} | {_gb(nbytes)} | {note} |"
    yield f"| **peak** | **{_gb(memory.total)}** | {memory.when} |"
    if about.missing:
        yield ""
        yield f"Not counted, for it is not there: {', '.join(about.missing)}."
    for limit in limits:
        yield ""
        yield from _verdict(asked, memory, limit)


def _rows(asked: Asked, memory: Memory) -> Iterator[tuple[str, int, str]]:
    r = asked.request
    yield "transformer", memory.transformer, "weights"
    if asked.subject.text_encoder:
        leaves = "weights; leaves when the prompt is read" if "text" in asked.offload else "weights"
        yield "text encoder", memory.text_encoder.weights, leaves
    if asked.subject.vae is not None and asked.vae_dtype is not None and "vae" in asked.offload:
        yield "VAE", 0, "on the CPU"
    elif memory.vae.weights:
        yield "VAE", memory.vae.weights, f"weights, {_name(asked.vae_dtype)}"
        yield "VAE features", memory.vae.kept, "kept from block to block"
    rings = f"{memory.rings} x {_gb(memory.caches // memory.rings)}" if memory.rings > 1 else "1 for all steps in turn"
    yield "caches", memory.caches, f"keys and values, {rings}"
    if memory.scratch:
        yield "keys of one layer", memory.scratch, f"read back into {_name(r.dtype)}"
    if memory.workspaces:
        yield "workspaces", memory.workspaces, "of matrix products, 32 MiB a stream"
    yield "prompt", memory.prompt, "its keys in every layer, modulation, buffers"
    yield "latents", memory.latents, "in flight"
    yield "a visit", memory.activations, "of its graphs, kept" if memory.captured else "beside all that, for a moment"
    if memory.vae.weights:
        yield "decoding", memory.vae.peak, "beside all that, for a moment"


def _verdict(asked: Asked, memory: Memory, limit: int) -> Iterator[str]:
    if memory.total <= limit:
        yield f"{_gb(limit)} GB: fits, {_gb(limit - memory.total)} GB are left."
        return
    yield f"{_gb(limit)} GB: does not fit, {_gb(memory.total - limit)} GB are missing."
    ways = ways_to_fit(asked, limit)
    if not ways:
        yield "Nothing that can be changed here makes it fit; a smaller picture, a shorter video or more GPUs may."
        return
    yield "What makes it fit, first what changes least:"
    for change, found in ways:
        yield f"- `{change}`: {_gb(found.total)} GB, {found.when}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
