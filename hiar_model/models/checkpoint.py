"""Load and save the transformer: any published weight layout in, the native one out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.checks import dtype_name, path_like
from ..common.lora_file import LoraLike, lora_files
from ..common.settings import own_settings
from ..config import SHIPPED, ExecutionConfig, WanConfig
from ..config.execution import LINEAR_DTYPES
from ..config.rollout import UNKNOWN_WINDOW, TrainedWindow
from ..io.atomic import atomic
from ..io.files import check_output, output_path, save_tensors
from ..io.packed import Packed, Scaled, temporary_bytes
from ..io.weight_files import (
    add_tensors,
    check_keys,
    check_tensors,
    only_one,
    parse_json,
    read_json,
    read_tensors,
    renamed,
    some,
    weight_files,
)
from . import key_mapping
from .foreign import foreign, unwrapped
from .lora import AppliedLora, Lora, changed_by, merged, read_loras
from .quantised import WORK, Quantisation, pack, unread
from .quantized_linear import in_8_bits, quantize_layers, quantize_weight
from .transformer import HiARTransformer
from .weight_check import WeightCheck

TOY_FORMAT, TOY_TRANSFORMER = "hiar-toy", "transformer."  # of a toy model's config.json; before keys of its file
CONFIG_KEY = "hiar_config"  # WanConfig as JSON in the header of the files we write
_PIPELINE, _EXPERT = "model_index.json", "transformer_2"  # of a diffusers folder
_NETWORKS = ("generator_ema", "generator", "critic")  # of a training checkpoint; the last one is never taken
_HEAD_DIM = 128  # of every published Wan model
_LARGEST_RANK = 512  # of LoRA whose memory is predicted


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint; ``str()`` of it is one line.

    Attributes:
        layout: "native", "diffusers" or "training" (:mod:`hiar_model.models.key_mapping`).
        network: the network that was loaded from a training file. others: the networks in it that were not.
        config: sizes of the transformer.
        dtypes: of its tensors, the most frequent first; of quantised ones the dtype that they are dequantised to.
        tensors, parameters: counts; q, k and v are separate tensors. nbytes: size of the tensors in the file, in bytes.
        files: the weight files.
        window: of a causal model's config.json.
        quantised: what is quantised, and in which dialect; None: nothing.
        large, as_they_are: matrices of the large linear layers, and by ``linear_dtype`` how many of them 8-bit layers
            take as they are in the file.
    """

    layout: str
    network: str | None
    others: tuple[str, ...]
    config: WanConfig
    dtypes: tuple[torch.dtype, ...]
    tensors: int
    parameters: int
    nbytes: int
    files: tuple[Path, ...]
    window: TrainedWindow = UNKNOWN_WINDOW
    quantised: Quantisation | None = None
    large: int = 0
    as_they_are: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.describe()

    def describe(self, linear_dtype: str | None = None) -> str:
        """One line; ``linear_dtype``: that it is loaded with."""
        c = self.config
        network = "" if self.network is None else f", network {self.network}"
        network += f" (left: {', '.join(self.others)})" if self.others else ""
        dtypes = " and ".join(map(dtype_name, self.dtypes))
        first, more = self.files[0], len(self.files) - 1
        sizes = self.window._asdict().items()
        window = ", ".join(f"{name} {frames}" for name, frames in sizes if frames is not None)
        window = f"; {window} latent frames by its config.json" if window else ""
        return (
            f"{self.layout} layout{network}: {c.num_layers} layers of width {c.dim}, {c.num_heads} heads; "
            f"{self.parameters:,} parameters in {self.tensors} tensors, {dtypes}, {self.nbytes / 1e9:.2f} GB in {first}"
            + (f" and {more} more" if more else "")
            + window
            + ("" if self.quantised is None else f"; {self.quantised}")
            + self._loading(linear_dtype)
        )

    def _loading(self, linear_dtype: str | None) -> str:
        if linear_dtype is not None:
            stored, large = self.as_they_are.get(linear_dtype, 0), self.large
            source = f"{stored} of {large} as they are in the file" if stored else "quantised layer by layer"
            rounded = ", the others quantised layer by layer" if 0 < stored < large else ""
            return f"; weights of large linear layers in {linear_dtype}: {source}{rounded}"
        if self.quantised is None:
            return ""
        dtype, beside = dtype_name(WORK), loading_bytes(self.config, WORK)
        return (
            f"; dequantised layer by layer to {dtype}: {self.parameters * WORK.itemsize / 1e9:.2f} GB and at most "
            f"{beside / 1e9:.2f} GB beside them"
        )


@own_settings()
def load_transformer(
    path: str | Path,
    config: WanConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    linear_dtype: str | None = None,
    lora: LoraLike | Sequence[LoraLike] | None = None,
    on_lora: Callable[[AppliedLora, str], None] | None = None,
    on_checkpoint: Callable[[CheckpointInfo], None] | None = None,
    on_tensor: Callable[[str, Tensor], None] | None = None,
) -> HiARTransformer:
    """Load a transformer from a checkpoint, in eval mode.

    Args:
        path: name of a shipped model ("toy", "scenes"), or a toy model's folder; a .safetensors, .pth, .pt, .bin or
            .gguf file; an index of shards (``*.safetensors.index.json``, ``*.bin.index.json``); or a folder with an
            index, .safetensors shards, .pth / .pt files, shards or a file of .bin, or a .gguf file, in this order of
            preference. Of a diffusers pipeline folder (``model_index.json``) its ``transformer/`` is read.
            Keys are the published Wan ones or diffusers', with any of the prefixes :data:`.key_mapping.WRAPPERS`. Of a
            training checkpoint with several networks, ``generator_ema`` is loaded, else ``generator``.
        config: sizes. None: from the header of a file that this package wrote, else from ``config.json`` beside the
            weights (Wan's, diffusers', or :meth:`WanConfig.to_dict`), else from the tensor shapes. If no file says,
            num_heads is dim / 128, as in every published model, and text_len and eps are WanConfig's defaults.
        dtype: of the weights; None: as in the file (the widest, if they differ), of a quantised file bfloat16.
            Quantised weights (:mod:`.quantised`) are dequantised block by block, on the device, and then they are
            plain weights.
        device: None: the CPU, where the file is memory-mapped. "meta": check the file without reading the weights.
        linear_dtype: of :class:`hiar_model.ExecutionConfig`: the large linear layers are made in 8 bits, one matrix
            at a time, and exist in no other form; those of the file that are of this dtype with one scale, or one for
            each row, as they are. Rollouts of the model are in 8 bits then.
        lora: LoRA files to merge into the weights (:data:`.LoraLike`), each sum rounded once.
            on_lora: called with a record of each, and a line about it.
        on_checkpoint: called with a description of the checkpoint before the weights are read.
        on_tensor: called with each native key and tensor, by sorted keys; of layers in 8 bits, as it is before that.

    Raises:
        ValueError: one line: no such file, unreadable, another kind of model, missing or unexpected keys, a wrong shape
            (actual and expected), tensors that are not floating point, quantised weights of a kind that is not read
            or whose scales are wrong.

    >>> model = load_transformer("toy", on_checkpoint=lambda info: print(info.layout, info.config.num_layers, "layers"))
    native 6 layers
    """
    linear_dtype = ExecutionConfig(linear_dtype=linear_dtype).linear_dtype  # checked, by name
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be None or a floating torch.dtype, such as torch.bfloat16, got {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    state, info = open_checkpoint(path, config)
    if on_checkpoint is not None:
        on_checkpoint(info)
    loras, applied, notes = read_loras(lora_files(lora), state)
    for one, note in zip(applied, notes, strict=True):
        if on_lora is not None:
            on_lora(one, note)
    with torch.device("meta"):
        model = HiARTransformer(info.config)
    final = dtype or (WORK if info.quantised is not None else reduce(torch.promote_types, info.dtypes))
    eight = None if linear_dtype is None else getattr(torch, linear_dtype)
    if eight is not None:
        quantize_layers(model.to(final), eight, torch.device(device or "cpu"))
    if device is not None and torch.device(device).type == "meta":
        return model.to(dtype=final).eval()
    check = WeightCheck(path) if info.quantised is not None else None
    for place, names in _parts(sorted(state)).items():  # so that only one part is there twice: q, k, v apart and fused
        part: dict[str, Tensor] = {}
        for name in names:
            stored, key = state.pop(name), name.removeprefix(f"{place}.")
            part[key] = full = full_tensor(name, stored, check, loras, final, device or "cpu")
            if on_tensor is not None:
                on_tensor(name, full)
            if eight is not None and in_8_bits(name):
                as_it_is = None if changed_by(loras, name) else stored
                part[key], part[f"{key}_scale"] = as_8_bits(as_it_is, full, eight)
        model.get_submodule(place).load_state_dict(part, strict=False, assign=True)
    if check is not None:
        check.finish()
    return model.eval()


def as_8_bits(stored: Any, full: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [out, in] and scales [out] of a layer in 8 bits: those of the file if it has such, else of ``full``.

    Args:
        stored: of :func:`open_checkpoint`; None: not as it is. full: the tensor, dequantised, on the device.
        dtype: float8_e4m3fn or int8.
    """
    by_rows = stored.by_rows(dtype) if isinstance(stored, Scaled) else None
    if by_rows is None:
        return quantize_weight(full, dtype)
    weight, scale = by_rows
    return weight.to(full.device), scale.to(full.device)


def _parts(names: Iterable[str]) -> dict[str, list[str]]:
    """The keys of each block, and under "" all others."""
    parts: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"blocks\.\d+", name)
        parts.setdefault(block[0] if block else "", []).append(name)
    return parts


def loading_bytes(config: WanConfig, dtype: torch.dtype, eight_bits: bool = False, lora: bool = False) -> int:
    """Bytes that a quantised checkpoint takes at most while it is loaded, beside its dequantised weights: q, k and v of
    a block before they are fused, and what is being dequantised or merged.

    Args:
        eight_bits: what any checkpoint takes beside large linear layers in 8 bits: q, k and v in 8 bits, the largest
            of them in full, and what is being quantised.
        lora: adapters of rank 512 and below are merged: of the largest matrix what is dequantised, the sum, and what an
            adapter adds to it.
    """
    rows = max(6 * config.dim, config.ffn_dim)  # of the largest matrix: time_projection's, or a feed-forward's
    merging = (3 * rows * config.dim + _LARGEST_RANK * (rows + config.dim)) * max(4, dtype.itemsize) if lora else 0
    if eight_bits:
        largest = config.dim * max(config.dim, config.ffn_dim)
        return 3 * config.dim**2 + max(largest * dtype.itemsize + temporary_bytes(largest), merging)
    return 3 * config.dim**2 * dtype.itemsize + max(temporary_bytes(), merging)


def full_tensor(
    name: str,
    stored: Any,
    check: WeightCheck | None,
    loras: Sequence[tuple[Lora, float]] = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """A tensor of :func:`open_checkpoint`, dequantised, with LoRA merged, each sum rounded once.

    Args:
        check: sees the tensor, if there is one. dtype: None: bfloat16 for what was quantised, all else as it is.

    Raises:
        ValueError: one line that names a layer whose scales are wrong, or that is not finite with LoRA.
    """
    quantised, changed = isinstance(stored, Packed), changed_by(loras, name)
    final = dtype or (WORK if quantised else stored.dtype)
    if quantised:
        try:
            tensor = stored.dequantise(torch.float32 if changed else final, device)
        except ValueError as error:
            raise ValueError(f"{check.source}: {error}" if check is not None else str(error)) from error
    else:
        tensor = stored if changed else stored.to(device, final)
    if check is not None:
        check.see(name, tensor, quantised)
    return merged({name: tensor}, loras, final)[name].to(device) if changed else tensor


def full_tensors(
    state: Mapping[str, Any], info: CheckpointInfo, source: str | Path, loras: Sequence[tuple[Lora, float]] = ()
) -> dict[str, Tensor]:
    """:func:`full_tensor` of all that :func:`open_checkpoint` gives for ``source``, checked if they were quantised."""
    check = WeightCheck(source) if info.quantised is not None else None
    tensors = {name: full_tensor(name, stored, check, loras) for name, stored in state.items()}
    if check is not None:
        check.finish()
    return tensors


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """The state dict of a checkpoint under native keys, memory-mapped where the format allows, and its description.

    ``path`` and errors are :func:`load_transformer`'s. The keys are exactly those of a HiARTransformer. Quantised
    tensors are dequantised, to bfloat16.
    """
    state, info = open_checkpoint(path)
    return full_tensors(state, info, path), info


def open_checkpoint(path: str | Path, config: WanConfig | None = None) -> tuple[dict[str, Any], CheckpointInfo]:
    """As :func:`read_checkpoint`, with quantised tensors as they are, :class:`.Packed`. Reads scales, no weights."""
    source = _transformer_path(path_like("path", path))
    state, sizes, headers, files, networks = _read_all(source)
    if (what := foreign(state) or unread(state)) is not None:
        raise ValueError(f"{source}: {what}")
    state, quantised = pack(state, headers, source)
    check_tensors({key: value for key, value in state.items() if not isinstance(value, Packed)}, source)
    diffusers = key_mapping.is_diffusers(state)
    if diffusers:
        state = renamed(state, key_mapping.to_native, source)
    spell = key_mapping.to_diffusers if diffusers else None
    window = UNKNOWN_WINDOW
    if config is None:
        config, window = _find_config(source, state, sizes)
    with torch.device("meta"):
        expected = HiARTransformer(config).state_dict()
    check_keys(state, expected, source, spell)
    dtypes = [WORK if isinstance(value, Packed) else value.dtype for value in state.values()]
    large = [value for key, value in state.items() if in_8_bits(key)]
    scaled = [value for value in large if isinstance(value, Scaled)]
    info = CheckpointInfo(
        layout=key_mapping.TRAINING if networks else key_mapping.DIFFUSERS if diffusers else key_mapping.NATIVE,
        network=networks[0] if networks else None,
        others=tuple(networks[1:]),
        config=config,
        dtypes=tuple(sorted(set(dtypes), key=lambda dtype: (-dtypes.count(dtype), str(dtype)))),
        tensors=len(state),
        parameters=sum(value.numel() for value in state.values()),
        nbytes=sum(value.nbytes for value in state.values()),
        files=tuple(files),
        window=window,
        quantised=quantised,
        large=len(large),
        as_they_are={
            name: sum(value.by_rows(getattr(torch, name)) is not None for value in scaled) for name in LINEAR_DTYPES
        },
    )
    return state, info


def save_transformer(model: HiARTransformer, path: str | Path) -> None:
    """Write the weights atomically to a .safetensors file under the published Wan keys, with the config in its header.

    Raises:
        ValueError: another suffix, or what :func:`.check_output` refuses. OSError: it cannot be written.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "transformer.safetensors")
    >>> save_transformer(load_transformer("toy"), file)
    >>> load_transformer(file).config == load_transformer("toy").config
    True
    """
    target = output_path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: weights are written as .safetensors, got {target.suffix or 'no suffix'!r}")
    check_output(target)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a HiARTransformer, got {type(model).__name__}")
    state = {key_mapping.plain(key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic(target) as partial:
        save_tensors(state, partial, file_header(model.config))


def file_header(config: WanConfig) -> dict[str, str]:
    """Header of the .safetensors files that this package writes."""
    return {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}


def _transformer_path(source: Path) -> Path:
    """The folder of a shipped model's or a diffusers pipeline's transformer; any other path as it is."""
    if str(source) in SHIPPED and not source.exists():
        package, inside = SHIPPED[str(source)]
        return Path(str(resources.files(package))) / inside
    index = source / _PIPELINE
    if not index.is_file():
        return source
    values = read_json(index)
    if not str(values.get("_class_name")).startswith("Wan"):
        raise ValueError(f"{index}: describes a {values.get('_class_name')}, expected a WanPipeline")
    parts = [name for name in ("transformer", _EXPERT) if isinstance(values.get(name), list) and values[name][0]]
    if len(parts) > 1:
        raise ValueError(f"{source}: holds two experts; give the path of one: {source / parts[0]}, {source / parts[1]}")
    if not parts or not (source / parts[0]).is_dir():
        raise ValueError(f"{source}: has {_PIPELINE}, but no folder transformer")
    outside = sorted(source.glob("diffusion_pytorch_model*.safetensors"))[:1]
    only_one([*outside, source / parts[0]], f"the transformer of {source}")
    return source / parts[0]


def _read_all(source: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str], list[Path], list[str]]:
    """The tensors of all files under plain keys, the sizes in our own header, all headers, the files, and the networks
    of a training file, the loaded one first.
    """
    state: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    headers: dict[str, str] = {}
    networks: list[str] = []
    origin: dict[str, Path] = {}
    files, toy = weight_files(source), toy_sizes(source)
    for file in files:
        content, header = read_tensors(file)
        if toy is not None and isinstance(content, Mapping):  # "codec.*" is not part of the transformer
            inside = {key: value for key, value in content.items() if key.startswith(TOY_TRANSFORMER)}
            if inside:  # and not another file beside the toy's
                content, sizes = {key.removeprefix(TOY_TRANSFORMER): value for key, value in inside.items()}, toy
        taken, names = _network(content, file)
        networks += [name for name in names if name not in networks]
        if isinstance(content, Mapping) and isinstance(content.get(CONFIG_KEY), str):
            header = {CONFIG_KEY: content[CONFIG_KEY]}
            taken = {key: value for key, value in taken.items() if key != CONFIG_KEY}
        if CONFIG_KEY in header:
            sizes = parse_json(header[CONFIG_KEY], file)
        headers |= header
        add_tensors(state, renamed(taken, lambda key: key_mapping.plain(str(key)), file), file, origin)
    if not state:
        raise ValueError(f"{source}: no weights found: it has no tensor")
    return state, sizes, headers, files, networks


def toy_sizes(source: Path) -> dict[str, Any] | None:
    """The transformer sizes in a toy model's folder, or that of a file; None for any other folder."""
    beside = (source if source.is_dir() else source.parent) / "config.json"
    values = read_json(beside) if beside.is_file() else {}
    sizes = values.get("transformer") if values.get("format") == TOY_FORMAT else None
    return sizes if isinstance(sizes, dict) else None


def _network(content: Any, file: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict to load, and the names of a training checkpoint's networks, the loaded one first."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a state dict")
    networks = [name for name in _NETWORKS if isinstance(content.get(name), Mapping) and content[name]]
    if not networks:
        groups = [key for key, value in content.items() if isinstance(value, Mapping)]
        if (what := foreign(groups)) is not None:
            raise ValueError(f"{file}: {what}")
        return unwrapped(content, file, _NETWORKS[:-1]), []
    if networks[0] == _NETWORKS[-1]:
        raise ValueError(f"{file}: holds a {networks[0]} only, expected {' or '.join(_NETWORKS[:-1])}")
    return content[networks[0]], networks


def _find_config(source: Path, state: Mapping[str, Tensor], header: dict[str, Any]) -> tuple[WanConfig, TrainedWindow]:
    """Sizes from our own header, config.json or the shapes; window and sink if config.json has them."""
    beside = (source if source.is_dir() else source.parent) / "config.json"
    written: dict[str, Any] = {}
    window = UNKNOWN_WINDOW
    if header:
        beside, written = source, header
    elif beside.is_file():
        values = read_json(beside)
        written, window = key_mapping.read_sizes(values, beside), key_mapping.read_window(values, beside)
    values = {**_infer(state), **written}
    if "num_heads" not in values and isinstance(dim := values.get("dim"), int):
        if dim % _HEAD_DIM:
            raise ValueError(f"{source}: dim {dim} is no multiple of {_HEAD_DIM}: pass config= with num_heads")
        values["num_heads"] = dim // _HEAD_DIM
    lacking = [name for name in ("dim", "ffn_dim", "num_layers") if name not in values]
    if lacking:
        raise ValueError(f"{source}: no Wan transformer: no key gives {', '.join(lacking)}; its keys: {some(state)}")
    try:
        return WanConfig.from_dict(values), window
    except TypeError as error:
        raise ValueError(f"{beside if written else source}: sizes must be numbers: {error}") from error
    except ValueError as error:
        raise ValueError(f"{beside if written else source}: {error}") from error


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes from tensor shapes; keys that are missing or have another rank are ignored."""

    def shape(key: str, dims: int) -> tuple[int, ...] | None:
        return tuple(state[key].shape) if key in state and state[key].dim() == dims else None

    values: dict[str, Any] = {}
    if patch := shape("patch_embedding.weight", 5):
        values |= {"dim": patch[0], "in_channels": patch[1], "patch_size": patch[2:]}
        if (head := shape("head.head.weight", 2)) and math.prod(patch[2:]):
            values["out_channels"] = head[0] // math.prod(patch[2:])
    elif bias := shape("patch_embedding.bias", 1):
        values["dim"] = bias[0]  # so that the weight is named as missing: writers of GGUF leave its 5 dimensions out
    if ffn := shape("blocks.0.ffn.0.weight", 2):
        values["ffn_dim"] = ffn[0]
    if text := shape("text_embedding.0.weight", 2):
        values["text_dim"] = text[1]
    if time := shape("time_embedding.0.weight", 2):
        values["freq_dim"] = time[1]
    layers = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    if layers:
        values["num_layers"] = min(max(layers) + 1, len(state))  # whatever number one stray key has
    return values
