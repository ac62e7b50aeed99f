"""Names of the tensors and sizes of a Wan transformer, and of its text encoder's tensors, in each published layout.

native      the original Wan files: blocks.N.self_attn.q.weight, head.head.weight, ...; config.json: dim, num_heads, ...
diffusers   WanTransformer3DModel: blocks.N.attn1.to_q.weight, proj_out.weight, ...; config.json: num_attention_heads
transformers  UMT5EncoderModel, which published Wan folders call blocks.N.attn.q.weight, ... in a .pth file
training    native keys behind wrappers, in a .pt file of several networks (HiAR, Self-Forcing, CausVid)

Only names differ: all layouts store the same numbers in the same shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..common.checks import as_whole
from ..config import WanConfig
from ..config.rollout import UNKNOWN_WINDOW, TrainedWindow

NATIVE, DIFFUSERS, TRAINING = "native", "diffusers", "training"
WRAPPERS = {
    "module", "model", "diffusion_model",
    "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod",
}  # fmt: skip
"""Parts that DDP, training code, FSDP, activation checkpointing and torch.compile insert into keys."""

_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    **{
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
                           ("norm_q", "norm_q"), ("norm_k", "norm_k"))
    },
    "norm3": "norm2",  # the only affine one; each counts its norms in another order
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}  # fmt: skip
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}

_TEXT_TOP = {"token_embedding": "encoder.embed_tokens", "norm": "encoder.final_layer_norm"}
_TEXT_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TEXT_TOP_BACK = {theirs: ours for ours, theirs in _TEXT_TOP.items()}
_TEXT_BLOCK_BACK = {theirs: ours for ours, theirs in _TEXT_BLOCK.items()}

_KEY = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<name>.+?)(?P<kind>\.weight|\.bias)?")
_RENAMED = {"in_dim": "in_channels", "out_dim": "out_channels"}  # native config.json -> WanConfig
_ABOUT_OTHERS = {"model_type", "window_size", "qk_norm", "cross_attn_norm", "quantization_config"}
"""Native keys that fix no size; how tensors are quantised is read from the tensors."""
CAUSAL, _OF_WINDOW = "CausalWanModel", ("local_attn_size", "sink_size")  # as Self-Forcing's code writes them
_DIFFUSERS_SIZES = ("patch_size", "in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim", "num_layers", "eps")
_DIFFUSERS_OTHERS = {
    "num_attention_heads", "attention_head_dim", "cross_attn_norm", "qk_norm", "image_dim", "added_kv_proj_dim",
    "rope_max_seq_len", "pos_embed_seq_len", "quantization_config",
}  # fmt: skip


def plain(key: str) -> str:
    """The key without the parts in ``WRAPPERS``."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether plain keys are in diffusers' layout."""
    return any(key.startswith("condition_embedder.") or ".attn1." in key for key in keys)


def to_diffusers(key: str) -> str:
    """Native key -> diffusers' key; any other key is returned as it is.

    >>> to_diffusers("blocks.0.self_attn.q.weight")
    'blocks.0.attn1.to_q.weight'
    """
    return _rename(key, _TOP, _BLOCK)


def to_native(key: str) -> str:
    """The inverse of :func:`to_diffusers`."""
    return _rename(key, _TOP_BACK, _BLOCK_BACK)


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = _KEY.fullmatch(key)
    if match is None:
        return key
    table = block if match["block"] else top
    return f"{match['block'] or ''}{table.get(match['name'], match['name'])}{match['kind'] or ''}"


def text_to_transformers(key: str) -> str:
    """Key of Wan's text encoder file -> transformers' key; any other key is returned as it is."""
    return _rename_text(key, "blocks", "encoder.block", _TEXT_TOP, _TEXT_BLOCK)


def text_to_native(key: str) -> str:
    """The inverse of :func:`text_to_transformers`."""
    return _rename_text(key, "encoder.block", "blocks", _TEXT_TOP_BACK, _TEXT_BLOCK_BACK)


def _rename_text(key: str, prefix: str, new_prefix: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.fullmatch(rf"(?:{re.escape(prefix)}\.(\d+)\.)?(.+)\.weight", key)
    if match is None or match[2] not in (top if match[1] is None else block):
        return key
    return f"{top[match[2]]}.weight" if match[1] is None else f"{new_prefix}.{match[1]}.{block[match[2]]}.weight"


def read_sizes(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Fields of WanConfig from a config.json: Wan's, diffusers', or our own.

    Raises:
        ValueError: one line: another class, unknown keys (names the known ones), values of a wrong type.
    """
    if "num_attention_heads" in values or values.get("_class_name") == "WanTransformer3DModel":
        return _diffusers_sizes(values, file)
    name = values.get("_class_name", "WanModel")
    if name not in ("WanModel", CAUSAL):
        raise ValueError(f"{file}: describes a {name}, expected WanModel, {CAUSAL} or WanTransformer3DModel")
    others = {*_ABOUT_OTHERS, *(_OF_WINDOW if name == CAUSAL else ())}
    sizes = {_RENAMED.get(k, k): v for k, v in values.items() if not k.startswith("_") and k not in others}
    _check_known(sizes, {f.name for f in fields(WanConfig)}, file, set(_RENAMED))
    return sizes


def read_window(values: Mapping[str, Any], file: Path) -> TrainedWindow:
    """Of a config.json; ``local_attn_size`` -1 says nothing. ValueError of one line for illegal numbers."""
    if values.get("_class_name") != CAUSAL:
        return UNKNOWN_WINDOW
    local, sink = (values.get(key) for key in _OF_WINDOW)
    for key, value, least in (("local_attn_size", local, 1), ("sink_size", sink, 0)):
        legal = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if value is not None and not legal and (key, value) != ("local_attn_size", -1):
            more = ", or -1" if key == "local_attn_size" else ""
            raise ValueError(f"{file}: {key} must be a whole number of at least {least}{more}, got {value!r}")
    return TrainedWindow(None if local == -1 else local, sink)


def _diffusers_sizes(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    name = values.get("_class_name", "WanTransformer3DModel")
    if name != "WanTransformer3DModel":
        raise ValueError(f"{file}: describes a {name}, expected a WanTransformer3DModel")
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    _check_known(values, {*_DIFFUSERS_SIZES, *_DIFFUSERS_OTHERS}, file)
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if values.get(key) is not None:
            raise ValueError(f"{file}: {key} {values[key]!r} makes it an image-to-video model; expected null")
    sizes = {key: values[key] for key in _DIFFUSERS_SIZES if values.get(key) is not None}
    heads, width = values.get("num_attention_heads"), values.get("attention_head_dim")
    for key, value in (("num_attention_heads", heads), ("attention_head_dim", width)):
        if value is not None and as_whole(value) is None:
            raise ValueError(f"{file}: sizes must be numbers: {key} is {value!r}")
    if heads is not None:
        sizes["num_heads"] = heads
        if width is not None:
            sizes["dim"] = heads * width
    return sizes


def _check_known(keys: Iterable[str], known: set[str], file: Path, also: Iterable[str] = ()) -> None:
    unknown = sorted(set(keys) - known)
    if unknown:
        raise ValueError(f"{file}: unknown {', '.join(unknown)}; known: {', '.join(sorted({*known, *also}))}")


def native_config(config: WanConfig, window: TrainedWindow = UNKNOWN_WINDOW) -> dict[str, Any]:
    """The config.json of a native folder. ``rope_theta``, unknown to Wan's class, is written only if not the default.

    Args:
        window: with a number in it the model is a causal one.
    """
    values = config.to_dict()
    for theirs, ours in _RENAMED.items():
        values[theirs] = values.pop(ours)
    if config.rope_theta == WanConfig.rope_theta:
        del values["rope_theta"]
    if window != UNKNOWN_WINDOW:
        values |= dict(zip(_OF_WINDOW, (window.window or -1, window.sink or 0), strict=True))
        return {"_class_name": CAUSAL, "model_type": "t2v", **values}
    return {"_class_name": "WanModel", "model_type": "t2v", **values}


def diffusers_config(config: WanConfig) -> dict[str, Any]:
    """The config.json of a diffusers transformer folder; ValueError for a size that diffusers has no name for."""
    for name in ("position_grid", "rope_theta", "text_len"):
        if (value := getattr(config, name)) != (default := getattr(WanConfig, name)):
            raise ValueError(f"diffusers' layout has no {name}: it means {default}, the model has {value}")
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0",  # the first that knows the class
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
