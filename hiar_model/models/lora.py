"""LoRA: read adapters of a transformer in any published spelling, and merge them into its weights.

An adapter adds scale * alpha / rank * (up @ down) to a weight (Hu et al. 2021, arXiv:2106.09685). Merging works on the
published tensors, q, k and v apart; :mod:`.low_rank` keeps adapters beside the weights, with scales that can change.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.checks import finite_number, path_like
from ..common.lora_file import LoraFile
from ..io.weight_files import check_tensors, only_one, parse_json, read_json, read_tensors, renamed, some, weight_files
from . import lora_keys

_PEFT_CONFIG, _HEADER_CONFIG = "adapter_config.json", "lora_adapter_metadata"  # beside a file; in a header of diffusers
_REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # change the base weights when training starts


@dataclass(frozen=True, eq=False)
class Delta:
    """What an adapter adds to one tensor at scale 1: ``factor`` times up @ down, or times a tensor of its shape.

    Attributes:
        factor: alpha / rank; of a plain difference 1. down: [rank, ...]. up: [out, rank, ...].
        difference: in place of the two.
    """

    factor: float
    down: Tensor | None = None
    up: Tensor | None = None
    difference: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank; None: a plain difference."""
        return None if self.down is None else self.down.shape[0]

    def dense(self, like: Tensor) -> Tensor:
        """The whole difference, in the shape, dtype and on the device of ``like``."""
        if self.difference is not None:
            return self.difference.to(like, copy=True).mul_(self.factor)
        assert self.down is not None and self.up is not None
        return (self.up.to(like).flatten(1) @ self.down.to(like).flatten(1)).mul_(self.factor).view(like.shape)


@dataclass(frozen=True, eq=False)
class Lora:
    """The contents of a LoRA file.

    Attributes:
        path: of the file. sha256: of its bytes, hexadecimal. dialect: who spells keys like this.
        deltas: native key of the transformer (q, k, v apart) -> what is added to it.
        skipped: keys of a text encoder, which are left out.
    """

    path: Path
    sha256: str
    dialect: str
    deltas: Mapping[str, Sequence[Delta]]
    skipped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the file, without its suffix."""
        return self.path.stem

    def __str__(self) -> str:
        ranks = sorted({delta.rank for of in self.deltas.values() for delta in of if delta.rank is not None})
        low_rank = sum(any(delta.rank is not None for delta in of) for of in self.deltas.values())
        plain = sum(any(delta.rank is None for delta in of) for of in self.deltas.values())
        span = (
            "" if not ranks else f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}"
        )
        parts = [f"{low_rank} layers{span}"] if low_rank else []
        parts += [f"{plain} plain differences"] if plain else []
        text = f"; left out: {len(self.skipped)} keys of a text encoder ({some(self.skipped)})" if self.skipped else ""
        return f"LoRA {self.path}, {self.dialect} keys: {', '.join(parts)}{text}"


@dataclass(frozen=True)
class AppliedLora:
    """An adapter that a model has: its name, absolute path, the hash of its file, and its scale."""

    name: str
    path: str
    sha256: str
    scale: float

    @property
    def option(self) -> str:
        """As ``--lora`` takes it."""
        return str(LoraFile(self.path, self.scale))

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {"name": self.name, "sha256": self.sha256, "scale": self.scale, "file": self.path}


def read_lora(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> Lora:
    """Read and check a LoRA file against a transformer.

    Args:
        path: a .safetensors, .pt or .pth file, or a folder with one (PEFT, diffusers).
        tensors: native keys of the transformer -> tensors (also on the meta device), for names and shapes.

    Raises:
        ValueError: one line: no such file, a kind of adapter that is not read (DoRA, LoKr, ...), a key of no layer of
            this transformer, a wrong shape, half of a pair, numbers that are not finite.
    """
    source = path_like("lora", path)
    files = weight_files(source)
    only_one(files, f"the LoRA in {source}")
    file = files[0]
    content, header = read_tensors(file)
    state = _group(content, file)
    skipped = tuple(key for key in state if lora_keys.of_text_encoder(key))
    state = {key: value for key, value in state.items() if key not in skipped}
    if (what := lora_keys.refused(state)) is not None:
        raise ValueError(f"{file}: {what}")
    second = [key for key in state if lora_keys.SECOND_EXPERT in key]
    if second and len(second) < len(state):
        raise ValueError(f"{file}: holds adapters of two experts ({second[0]}, ...); give a file for one of them")
    check_tensors({key: value for key, value in state.items() if not key.endswith("alpha")}, file)
    names, parts = lora_keys.modules(tensors), dict[str, dict[str, Any]]()
    spelled: dict[str, str] = {}  # native module -> its name in the file
    unknown = []
    for key, value in state.items():
        parsed = lora_keys.parse(key)
        module = None if parsed is None else names.get(lora_keys.flat(parsed.module))
        if parsed is None or module is None:
            unknown.append(key)
            continue
        if parsed.part in parts.setdefault(module, {}):
            raise ValueError(f"{file}: {key} is there twice (as {module}, {parsed.part}); expected every tensor once")
        parts[module][parsed.part], spelled[module] = value, parsed.module
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} keys are of no layer of this transformer: {some(unknown)}")
    if not parts:
        raise ValueError(
            f"{file}: no adapter found: {'only keys of a text encoder' if skipped else 'it has no tensor'}"
        )
    config = _peft_config(file, header)
    deltas: dict[str, list[Delta]] = {}
    for module, of in parts.items():
        for key, delta in _deltas(module, of, _Alpha.of(of, config, spelled[module], file), file):
            _check_shape(key, delta, tensors, file)
            deltas.setdefault(key, []).append(delta)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Lora(file, digest, lora_keys.dialect(state), deltas, skipped)


def _group(content: Any, file: Path) -> dict[str, Any]:
    """The tensors of the file; of a training file those of the generator."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected the tensors of a LoRA")
    for name in lora_keys.TRAINING_GROUPS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    groups = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
    if groups:
        legal = " or ".join(lora_keys.TRAINING_GROUPS)
        raise ValueError(f"{file}: holds {some(groups)}, expected {legal}, or the tensors of a LoRA")
    return renamed(content, str, file)


@dataclass(frozen=True)
class _Alpha:
    """Of one module: ``alpha`` None is the rank; with ``root`` it is divided by the root of the rank (rsLoRA)."""

    alpha: float | None
    root: bool = False

    @classmethod
    def of(cls, parts: Mapping[str, Any], config: Mapping[str, Any], module: str, file: Path) -> _Alpha:
        """From the tensor of the file, else from PEFT's configuration."""
        if "alpha" in parts:
            value = parts["alpha"]
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            return cls(finite_number(f"{file}: alpha of {module}", value))
        alpha = config.get("lora_alpha")
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):  # as PEFT reads it
                alpha = value
                break
        return cls(
            None if alpha is None else finite_number(f"{file}: alpha of {module}", alpha),
            bool(config.get("use_rslora")),
        )

    def factor(self, rank: int) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.root else rank)


def _peft_config(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration beside an adapter, or in the header of a file of diffusers; empty: neither is there."""
    beside = file.parent / _PEFT_CONFIG
    if beside.is_file() and file.stem in ("adapter_model", "pytorch_lora_weights"):
        values, source = read_json(beside), beside
    elif _HEADER_CONFIG in header:
        packed = parse_json(header[_HEADER_CONFIG], file)
        values = {
            key.removeprefix("transformer."): value for key, value in packed.items() if key.startswith("transformer.")
        }
        source = file
    else:
        return {}
    if (kind := values.get("peft_type", "LORA")) not in ("LORA", None):
        raise ValueError(f"{source}: describes an adapter of kind {kind}, expected LORA")
    if values.get("use_dora"):
        raise ValueError(f"{source}: use_dora makes it a DoRA adapter, which is not read; legal: {lora_keys.READ}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REBASED):
        raise ValueError(
            f"{source}: init_lora_weights {start!r} changes the base weights; convert it to LoRA with PEFT"
        )
    return values


def _deltas(module: str, parts: Mapping[str, Any], alpha: _Alpha, file: Path) -> Iterable[tuple[str, Delta]]:
    """Native key -> delta, for the parts of one module."""
    down, up = parts.get("down"), parts.get("up")
    if (down is None) != (up is None):
        there, gone = ("down (lora_A)", "up (lora_B)") if up is None else ("up (lora_B)", "down (lora_A)")
        raise ValueError(f"{file}: {module} has {there} but no {gone}")
    for part, value in parts.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise ValueError(f"{file}: {module}, {part}: numbers that are not finite")
    own = module if module.endswith("modulation") or module == "position_embedding" else f"{module}.weight"
    factor = 1.0
    if down is not None and up is not None:
        if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
            raise ValueError(f"{file}: {module}: down is {list(down.shape)} and up {list(up.shape)}, of different rank")
        factor = alpha.factor(down.shape[0])
        yield own, Delta(factor, down, up)
    elif not {"diff", "diff_b"} & parts.keys():
        raise ValueError(f"{file}: {module} has {', '.join(parts)} alone, expected lora_A and lora_B with it")
    if "up_bias" in parts:
        yield f"{module}.bias", Delta(factor, difference=parts["up_bias"])
    for part, key in (("diff", own), ("diff_b", f"{module}.bias")):
        if part in parts:
            yield key, Delta(1.0, difference=parts[part])


def _check_shape(key: str, delta: Delta, tensors: Mapping[str, Any], file: Path) -> None:
    if key not in tensors:
        raise ValueError(f"{file}: changes {key}, which this transformer has not")
    shape = list(tensors[key].shape)
    if delta.difference is not None:
        got = list(delta.difference.shape)
        fits = got == shape
    else:
        assert delta.down is not None and delta.up is not None
        got = [delta.up.shape[0], *delta.down.shape[1:]]
        if any(n != 1 for n in delta.up.shape[2:]):
            raise ValueError(f"{file}: {key}: up is {list(delta.up.shape)}, expected [out, rank] and sizes of 1")
        fits = got == shape or (len(got) == 2 and got[0] == shape[0] and got[1] == math.prod(shape[1:]))
    if not fits:
        raise ValueError(f"{file}: wrong shape: its {key} is {got}, that of this transformer {shape}")


def changed_by(loras: Iterable[tuple[Lora, float]], key: str) -> bool:
    """Whether one of the adapters changes the tensor of this native key."""
    return any(key in lora.deltas for lora, _ in loras)


def merged(
    state: Mapping[str, Tensor], loras: Sequence[tuple[Lora, float]], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A copy of a state dict with adapters added to it, each tensor summed in float32 (float64) and rounded once.

    Args:
        state: native keys -> tensors, q, k, v apart, also some of a transformer's; those that no adapter changes are
            shared. loras: with scales.
        dtype: of the changed tensors; None: unchanged.

    Raises:
        ValueError: a tensor that is not finite after that.
    """
    result = dict(state)
    for key in {key: None for lora, _ in loras for key in lora.deltas if key in state}:
        old = state[key]
        final = dtype or old.dtype
        total = old.detach().to(torch.promote_types(torch.promote_types(old.dtype, final), torch.float32), copy=True)
        if not total.is_meta:
            for lora, scale in loras:
                for delta in lora.deltas.get(key, ()):
                    total.add_(delta.dense(total), alpha=scale)
        result[key] = rounded = total.to(final)
        if not rounded.is_meta and not bool(rounded.isfinite().all()):
            names = " and ".join(f"{lora.path} at scale {scale:g}" for lora, scale in loras if key in lora.deltas)
            raise ValueError(f"{key} is not finite in {final} with {names}")
    return result


def read_loras(
    files: Sequence[LoraFile], tensors: Mapping[str, Any]
) -> tuple[list[tuple[Lora, float]], tuple[AppliedLora, ...], list[str]]:
    """Read adapters of a transformer (:func:`read_lora`): each with its scale, a record and a line of each."""
    loras = [(read_lora(file.path, tensors), file.scale) for file in files]
    notes = [f"{lora}; merged at scale {scale:g}" for lora, scale in loras]
    return loras, tuple(applied_lora(lora, scale) for lora, scale in loras), notes


def applied_lora(lora: Lora, scale: float, name: str | None = None) -> AppliedLora:
    """The record of an adapter."""
    return AppliedLora(name or lora.name, os.path.abspath(lora.path), lora.sha256, scale)
