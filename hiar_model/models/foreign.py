"""Checkpoints of other kinds, known by their keys: adapters (LoRA, LoKr), image-to-video, VACE, fused projections,
other parts of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..io.weight_files import some

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which Lightning, DeepSpeed and scripts put a state dict, beside an optimiser's and counts."""
_FOREIGN = (  # part of a key -> what such a file is
    (r"lokr_", "a LoKr adapter, a kind of LoRA; merge it into a checkpoint first"),
    (r"\.hada_|loha_", "a LoHa adapter, a kind of LoRA; merge it into a checkpoint first"),
    (
        r"(^|[._])lora(_|$)|lora_[AB]\.|_lora(\.|$)",
        "a LoRA adapter; give it beside a checkpoint, as --lora, or merge it first, with hiar convert --lora",
    ),
    (r"lycoris_|\.(oft|boft)_", "an adapter of the LoRA family; merge it into a checkpoint first"),
    (
        r"\.diff(_b|_m)?$|\.set_weight$",
        "a file of differences from a checkpoint, as LoRA extractors write; give it beside that checkpoint, as --lora, "
        "or add them first, with hiar convert --lora",
    ),
    (r"vace_", "a VACE model; expected a text-to-video one"),
    (r"face_adapter|motion_encoder|pose_patch_embedding", "a Wan-Animate model; expected a text-to-video one"),
    (
        r"^img_emb\.|image_embedder|\.(k_img|v_img|norm_k_img)\.|\.(add_k_proj|add_v_proj|norm_added_k)\.",
        "an image-to-video model; expected a text-to-video one, which takes a first image as a clean first frame",
    ),
    (
        r"^(encoder|decoder)\.(conv1|conv_in|middle|mid_block|downsamples|down_blocks)\.",
        "a VAE; expected a transformer",
    ),
    (
        r"^(encoder\.block\.\d+\.layer\.|shared\.weight$|token_embedding\.)|^blocks\.\d+\.pos_embedding\.",
        "a text encoder; expected a transformer",
    ),
    (r"\.to_qkv\.|\.to_kv\.", "diffusers' layout with fused projections; call unfuse_qkv_projections() before saving"),
)


def foreign(keys: Iterable[str]) -> str | None:
    """If a key belongs to another kind of model: that key and what the file is, for an error; else None."""
    return kind_of_file(keys, _FOREIGN)


def kind_of_file(keys: Iterable[str], kinds: Iterable[tuple[str, str]], read: str | None = None) -> str | None:
    """What a key says about its file, as "KEY makes it KIND"; None: no key fits any of the kinds.

    Args:
        kinds: pairs of a pattern and what a file with such a key is, in order. read: what is read, for an error.
    """
    listed, legal = list(keys), "" if read is None else f", which is not read; legal: {read}"
    fitting = (f"{key} makes it {kind}{legal}" for pattern, kind in kinds for key in listed if re.search(pattern, key))
    return next(fitting, None)


def unwrapped(content: Mapping[str, Any], file: Path, networks: Sequence[str]) -> Mapping[str, Any]:
    """The state dict in a file that has it under one of :data:`WRAPPERS`; any that has tensors of its own as it is.

    Args:
        networks: other keys that are read, for the error.

    Raises:
        ValueError: groups, of which none or several can be meant.
    """
    groups = [key for key, value in content.items() if isinstance(value, Mapping)]
    if not groups or any(isinstance(value, Tensor) for value in content.values()):
        return content
    inside = [key for key in groups if key in WRAPPERS and content[key]]
    if len(inside) != 1:
        legal = ", ".join((*networks, *WRAPPERS))
        raise ValueError(f"{file}: holds groups, {some(groups)}; expected a state dict, or one under one of {legal}")
    return content[inside[0]]
