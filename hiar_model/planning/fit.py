"""Whether a video fits a GPU, and which options make it fit: `hiar doctor --model NAME|FOLDER`. Loads no weights.

:mod:`hiar_model.planning.memory` predicts the memory; this module builds its requests, searches, and prints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..common.checks import MOST_FRAMES, MOST_SIDE, dtype_name, whole
from ..config import SHIPPED, WAN, RolloutConfig, WanConfig
from ..config.execution import LINEAR_DTYPES
from ..config.rollout import BLOCKWISE
from ..io.files import refuse_stand_in
from ..io.weight_files import read_json, read_tensors
from ..models.kv_cache import E4M3
from .memory import ComponentMemory, Memory, Request, is_small, predict, vae_memory

SHOWN = 3  # suggestions
_MOST = 10**9  # of any unit: more is no size, and a float that is no number any more
_UNITS = {"": 10**9, "gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20, "tb": 10**12, "tib": 2**40}


def parse_size(size: str) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30), "500MB" or "24" (GB).

    Raises:
        ValueError: not a size.

    Example:
        >>> parse_size("24GiB")
        25769803776
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    unit = match[2].lower() if match else "?"
    number = float(match[1]) if match and unit in _UNITS else 0.0
    nbytes = round(number * _UNITS[unit]) if 0 < number < _MOST else 0
    if nbytes < 1:
        legal = "a size such as 24GB (24 x 10^9 bytes), 24GiB (24 x 2^30) or 80"
        raise ValueError(f"gpu_memory must be {legal}, got {size!r}")
    return nbytes


_ROLLOUT = RolloutConfig(window_frames=WAN.window_frames)


@dataclass(frozen=True)
class Subject:
    """The sizes of a model.

    size            (height, width) of its only latent size; None: any
    pixels, frames  spatial and temporal compression: pixels of a latent along a side, pixel frames of a latent frame
    text_encoder    bytes of its weights
    vae             diffusers' config, or :func:`.small_vae.vae_settings`; None: on the CPU, or missing
    missing         names of missing components
    quantised       whether the transformer's weights are dequantised when they are loaded
    large           how many matrices its large linear layers have
    as_they_are     by linear_dtype, of how many of them 8-bit layers take the bits of the file
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
    quantised: bool = False
    large: int = 0
    as_they_are: Mapping[str, int] = field(default_factory=dict)


def with_vae(about: Subject, path: str | os.PathLike[str]) -> Subject:
    """The same with another VAE than the folder's; ValueError for a file that holds none."""
    return replace(about, vae=vae_config(Path(path)), missing=tuple(name for name in about.missing if name != "VAE"))


def vae_config(path: Path) -> dict[str, Any]:
    """The settings of the VAE that a file or folder means: diffusers' config, or :func:`.small_vae.vae_settings`."""
    from ..models.small_vae import vae_kind, vae_settings

    file, kind = vae_kind(path)
    if kind == "small":
        return vae_settings(file)
    if file.suffix == ".safetensors" and (config := file.parent / "config.json").is_file():
        return read_json(config)  # beside the original layout it is the transformer's
    return {"base_dim": len(read_tensors(file)[0]["encoder.conv1.weight"])}


def subject(model: str) -> Subject:
    """The sizes of a configuration or shipped model by name, or of a folder or file of weights, which are not loaded.

    Raises:
        ValueError: one line: neither a known name nor known weights.
    """
    from ..models.registry import CONFIG, load_video_model

    published = [name for name in WanConfig.names() if name.startswith("wan")]
    if model in published:
        return Subject(model, WanConfig.from_name(model), text_encoder=2 * WAN.text_encoder_parameters, vae={})
    path = Path(model)
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if model in SHIPPED or config.get("format") == "hiar-toy":
        toy = load_video_model(model, "cpu")  # a few MB, without text encoder weights or VAE
        return Subject(
            model, toy.transformer.config, toy.rollout, toy.num_frames, "float32", toy.latent_size[1:],
            frames=toy.temporal_compression,
        )  # fmt: skip
    if not path.exists():
        names = ", ".join([*SHIPPED, *published])
        raise ValueError(f"model must be a name, file or folder, got {model!r}; names: {names}")
    return _on_disk(path)


def _on_disk(path: Path) -> Subject:
    from ..models.checkpoint import open_checkpoint
    from ..models.text_encoder import NATIVE_WEIGHTS, WEIGHTS, find_text_encoder
    from ..models.vae_weights import ORIGINAL, find_vae

    checkpoint = open_checkpoint(path)[1]  # memory-mapped, not read
    folder, missing, text_encoder, vae = path if path.is_dir() else path.parent, [], 0, None
    if any((folder / name).exists() for name in (WEIGHTS, NATIVE_WEIGHTS)):
        text_encoder = find_text_encoder(folder).nbytes
    else:
        missing.append("text encoder")
    if (folder / "vae" / "config.json").is_file():
        refuse_stand_in(find_vae(folder))
        vae = read_json(folder / "vae" / "config.json")
    elif (folder / ORIGINAL).is_file():
        vae = {"base_dim": len(read_tensors(folder / ORIGINAL)[0]["encoder.conv1.weight"])}
    else:
        missing.append("VAE")
    return Subject(
        str(checkpoint), checkpoint.config, checkpoint.window.apply(_ROLLOUT), size=grid_size(checkpoint.config),
        text_encoder=text_encoder, vae=vae, missing=tuple(missing),
        quantised=checkpoint.quantised is not None, large=checkpoint.large,
        as_they_are=checkpoint.as_they_are,
    )  # fmt: skip


@dataclass(frozen=True)
class FitQuery:
    """A video of a model, whose memory is predicted."""

    subject: Subject
    request: Request
    vae_dtype: torch.dtype | None  # None: no VAE on the device
    offload: tuple[str, ...] = ()
    lora: bool = False

    def memory(self) -> Memory:
        """The predicted memory."""
        vae, r = ComponentMemory(), self.request
        if self.subject.vae is not None and self.vae_dtype is not None and "vae" not in self.offload:
            size = (r.height, r.width, r.rollout.frames_per_block)
            vae = vae_memory(self.subject.vae, *size, self.vae_dtype, r.device)
        text_encoder = ComponentMemory(self.subject.text_encoder)
        quantised = self.subject.quantised
        return predict(r, text_encoder=text_encoder, vae=vae, offload=self.offload, quantised=quantised, lora=self.lora)


def fit_query(
    model: str | Subject,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    attention_dtype: str | None = None,
    linear_dtype: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    vae_dtype: str | None = None,
    offload: Sequence[str] = (),
    lora: bool = False,
    device: str = "cuda",
    **options: Any,
) -> FitQuery:
    """A query in pixels and pixel frames; None means the model's value.

    Args:
        vae: file or folder of another VAE than the model's. vae_dtype: None: bfloat16, of the small VAE float16.
        lora: whether adapters are merged into the weights.
        options: of :class:`Request`, and of :meth:`hiar_model.RolloutConfig.with_options`; ``order`` None: step_first.

    Raises:
        ValueError: one line with the illegal option, its value and the legal values.
    """
    height, width, frames = (
        None if value is None else whole(name, value, least, most=most)
        for name, value, least, most in (
            ("height", height, 1, MOST_SIDE),
            ("width", width, 1, MOST_SIDE),
            ("frames", frames, None, MOST_FRAMES),
        )
    )
    about = model if isinstance(model, Subject) else subject(model)
    about = about if vae is None else with_vae(about, vae)
    if about.size is not None:
        refuse_size(about.name, height, width)
    high, wide = about.size or _latent_size(about, height or WAN.size[0], width or WAN.size[1])
    of_rollout = {f.name: options.pop(f.name) for f in fields(RolloutConfig) if f.name in options}
    of_rollout["order"] = of_rollout.get("order") or "step_first"
    request = Request(
        about.config, high, wide, _latent_frames(about, about.num_frames if frames is None else frames),
        about.rollout.with_options(**of_rollout),
        dtype=_dtype("dtype", dtype or about.dtype), device=device,
        kv_dtype=None if kv_dtype is None else _dtype("kv-dtype", kv_dtype),
        attention_dtype=None if attention_dtype is None else _dtype("attention-dtype", attention_dtype),
        linear_dtype=None if linear_dtype is None else _dtype("linear-dtype", linear_dtype), **options,
    )  # fmt: skip
    own = "float16" if is_small(about.vae) else "bfloat16"
    on_gpu = None if vae_dtype == "none" else _dtype("vae-dtype", vae_dtype or own)
    return FitQuery(about, request, on_gpu, tuple(offload), lora)


def grid_size(config: WanConfig) -> tuple[int, int] | None:
    """(height, width) of the only latent frame that a network knows the positions of; None: it knows any."""
    if config.position_grid is None:
        return None
    height, width = (n * p for n, p in zip(config.position_grid, config.patch_size[1:], strict=True))
    return height, width


def refuse_size(name: str, height: int | None, width: int | None) -> None:
    """ValueError of one line for a size of a model that has one only."""
    for side, value in (("height", height), ("width", width)):
        if value is not None:
            about = name.partition(":")[0]  # of a file, whose name is its description
            raise ValueError(f"{side} must be left out: {about} makes frames of one size only, got {value}")


def _latent_size(about: Subject, height: int, width: int) -> tuple[int, int]:
    y, x = (about.pixels * p for p in about.config.patch_size[1:])
    if height < 1 or width < 1 or height % y or width % x:
        raise ValueError(f"height must be a multiple of {y} and width of {x} pixels, got {height}x{width}")
    return height // about.pixels, width // about.pixels


def _latent_frames(about: Subject, frames: int) -> int:
    block = about.rollout.frames_per_block
    latent, rest = divmod(frames - 1, about.frames)
    if frames > 0 and not rest and not (latent + 1) % block:
        return latent + 1
    below = max(0, (frames - 1) // about.frames + 1) // block * block
    near = [1 + (n - 1) * about.frames for n in (below, below + block) if n > 0]
    raise ValueError(
        f"frames must fill whole blocks of {block} latent frames: got {frames}, nearest {' or '.join(map(str, near))}"
    )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _dtype(option: str, name: str) -> torch.dtype:
    eight = {"float8_e4m3fn": E4M3}
    linear = {name: getattr(torch, name) for name in LINEAR_DTYPES}
    legal = {"kv-dtype": _DTYPES | eight, "attention-dtype": eight, "linear-dtype": linear}.get(option, _DTYPES)
    if name not in legal:
        raise ValueError(f"{option} must be one of {', '.join(legal)}, got {name!r}")
    return legal[name]


# The search for options that fit.

_DTYPES_OF_REQUEST = ("kv_dtype", "linear_dtype")


@dataclass(frozen=True)
class Change:
    """Changed options. Lower ``cost`` is better: one bit for each change, a higher bit for a worse one."""

    cost: int = 0
    options: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)  # of RolloutConfig, or kv_dtype, linear_dtype
    offload: tuple[str, ...] = ()

    def __add__(self, other: Change) -> Change:
        fields, offload = {**self.fields, **other.fields}, tuple(dict.fromkeys(self.offload + other.offload))
        return Change(self.cost + other.cost, self.options + other.options, fields, offload)

    def apply(self, query: FitQuery) -> FitQuery:
        """The query with these options."""
        request, fields = query.request, dict(self.fields)
        request = replace(request, **{name: fields.pop(name) for name in _DTYPES_OF_REQUEST if name in fields})
        request = replace(request, rollout=replace(request.rollout, **fields))
        return replace(query, request=request, offload=query.offload + self.offload)

    def __str__(self) -> str:
        others = [option for option in self.options if option != "--offload"]
        return " ".join(others + ([f"--offload {','.join(self.offload)}"] if self.offload else []))


def changes(query: FitQuery) -> list[list[Change]]:
    """Lists of alternatives, to combine one of each: first those that keep the video unchanged (offload the text
    encoder; order step_first, which finishes all blocks at the end; decode on the CPU), then e4m3 KV and int8 linear
    layers, whose errors are measured in docs/howto/run_in_8_bits.md, and last narrower windows.
    """
    r, rollout, none = query.request, query.request.rollout, Change()
    alternatives: list[list[Change]] = []
    if query.subject.text_encoder and "text" not in query.offload:
        alternatives.append([none, Change(1, ("--offload",), {}, ("text",))])
    if rollout.order in BLOCKWISE and r.num_frames is not None and rollout.kv_source == "own":
        alternatives.append([none, Change(2, ("--order step_first",), {"order": "step_first"})])
    if query.subject.vae is not None and query.vae_dtype is not None and "vae" not in query.offload:
        alternatives.append([none, Change(4, ("--offload",), {}, ("vae",))])
    if r.kv_dtype is None:
        alternatives.append([none, Change(8, ("--kv-dtype float8_e4m3fn",), {"kv_dtype": E4M3})])
    if r.linear_dtype is None and r.device == "cuda":
        alternatives.append([none, Change(16, ("--linear-dtype int8",), {"linear_dtype": torch.int8})])
    if not isinstance(window := rollout.window_frames, tuple):
        widest = min(window or r.num_frames or 0, r.num_frames or window or 0)
        narrow = [n for n in (12, 9, 6) if rollout.least_window <= n < widest]
        alternatives.append([none, *(Change(32 << i, (f"--window-frames {n}",), {"window_frames": n})
                              for i, n in enumerate(narrow))])  # fmt: skip
    return alternatives


def options_that_fit(query: FitQuery, limit: int, shown: int = SHOWN) -> list[tuple[Change, Memory]]:
    """Combinations of changes that fit, cheapest first; none contains another one."""
    fitting: list[tuple[Change, Memory]] = []
    combined = [sum(chosen, Change()) for chosen in product(*changes(query))]
    for change in sorted(combined, key=lambda one: one.cost):
        if any(_atoms(known) <= _atoms(change) for known, _ in fitting):
            continue
        memory = change.apply(query).memory()
        if memory.total <= limit:
            fitting.append((change, memory))
            if len(fitting) == shown:
                break
    return fitting


def _atoms(change: Change) -> set[str]:
    return {option for option in change.options if option != "--offload"} | set(change.offload)


# Output.


def lines(query: FitQuery, limits: Sequence[int] = ()) -> Iterator[str]:
    """Markdown: memory by component, the total, and for each GPU size whether it fits or what makes it fit."""
    about, r, memory = query.subject, query.request, query.memory()
    rollout, kv = r.rollout, "" if r.kv_dtype is None else f", keys in {dtype_name(r.kv_dtype)}"
    kv += "" if r.attention_dtype is None else f", products of attention in {dtype_name(r.attention_dtype)}"
    kv += "" if r.linear_dtype is None else f", linear layers in {dtype_name(r.linear_dtype)}"
    window = "all" if rollout.window_frames is None else rollout.window_frames
    batch = f", {r.batch} videos at once" if r.batch > 1 else ""
    yield (
        f"{about.name}: latents {r.num_frames} x {r.height}x{r.width}, {len(rollout.steps)} steps, "
        f"order {rollout.order}"
        f"{', fused' if rollout.fuse_cache_denoise else ''}, window {window}, {dtype_name(r.dtype)}{kv}{batch}"
    )
    yield ""
    yield "| part | GB (10^9 bytes) | |"
    yield "|---|---:|---|"
    for name, nbytes, note in _rows(query, memory):
        yield f"| {name} | {_gb(nbytes)} | {note} |"
    yield f"| **peak** | **{_gb(memory.total)}** | {memory.when} |"
    if about.missing:
        yield ""
        yield f"Not counted because missing: {', '.join(about.missing)}."
    for limit in limits:
        yield ""
        yield from _verdict(query, memory, limit)


def _rows(query: FitQuery, memory: Memory) -> Iterator[tuple[str, int, str]]:
    r = query.request
    weights = "weights" + (", dequantised" if query.subject.quantised else "")
    loading = "temporary: q, k and v of a block apart, and what is being dequantised"
    if r.linear_dtype is not None:
        weights = f"weights, those of large linear layers in {dtype_name(r.linear_dtype)}"
        stored, large = query.subject.as_they_are.get(dtype_name(r.linear_dtype), 0), query.subject.large
        weights += f": {stored} of {large} matrices as they are in the file" if stored else ""
        loading = "temporary: a matrix in full, and q, k and v of a block apart"
    yield "transformer", memory.transformer, weights
    if memory.loading:
        yield "loading it", memory.loading, loading
    if query.subject.text_encoder:
        note = "weights; offloaded after the prompt is encoded" if "text" in query.offload else "weights"
        yield "text encoder", memory.text_encoder.weights, note
    if query.subject.vae is not None and query.vae_dtype is not None and "vae" in query.offload:
        yield "VAE", 0, "on the CPU"
    elif memory.vae.weights:
        small = is_small(query.subject.vae)
        yield "VAE", memory.vae.weights, f"weights, {dtype_name(query.vae_dtype)}{', the small one' if small else ''}"
        note = "stay from block to block" + (", with the captured call's" if small else "")
        yield "VAE features", memory.vae.resident, note
    rings = f"{memory.rings} x {_gb(memory.caches // memory.rings)}" if memory.rings > 1 else "1 for all steps in turn"
    yield "caches", memory.caches, f"keys and values, {rings}"
    if memory.scratch:
        yield "keys of one layer", memory.scratch, f"converted to {dtype_name(r.dtype)}"
    if memory.workspaces:
        yield "workspaces", memory.workspaces, "of cuBLAS, 32 MiB per stream"
    yield "prompt", memory.prompt, "its KV in every layer, modulation, buffers"
    yield "latents", memory.latents, "in flight"
    yield "a task", memory.activations, "in the graphs' private pool" if memory.captured else "temporary"
    if memory.vae.weights:
        yield "decoding", memory.vae.peak, "temporary"


def _verdict(query: FitQuery, memory: Memory, limit: int) -> Iterator[str]:
    if memory.total <= limit:
        yield f"{_gb(limit)} GB: fits, {_gb(limit - memory.total)} GB left."
        return
    yield f"{_gb(limit)} GB: does not fit, {_gb(memory.total - limit)} GB missing."
    suggestions = options_that_fit(query, limit)
    if not suggestions:
        yield "No option makes it fit; a smaller picture, a shorter video or more GPUs may."
        return
    yield "Options that fit, smallest change first:"
    for change, needed in suggestions:
        yield f"- `{change}`: {_gb(needed.total)} GB, {needed.when}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f}"
