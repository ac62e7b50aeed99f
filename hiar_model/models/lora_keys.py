"""Names in LoRA files: which tensor of the transformer a key is about, in every published spelling.

diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight
PEFT        base_model.model.blocks.0.self_attn.q.lora_A.default.weight; alpha in adapter_config.json beside it
kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
ComfyUI     diffusion_model.blocks.0.self_attn.q.lora_down.weight, .diff, .diff_b
native      blocks.0.self_attn.q.lora_A.weight
training    {"generator_lora": {"base_model.model.model.blocks.0...lora_A.weight": ...}} in a .pt file
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from . import key_mapping
from .foreign import kind_of_file

TRAINING_GROUPS = ("generator_lora", "lora")
"""Groups of a training file that hold adapters of the generator; the critic's is not taken."""
SECOND_EXPERT = "transformer_2."
_LEADING = re.compile(
    r"^(?:(?:base_model|transformer_2|transformer|generator|unet|pipe|dit)\.|(?:lora_unet|lora_transformer|lycoris)_+)+"
)
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoders?\b|text_encoder_?\d|lora_te\d*_|te\d*\.|cond_stage)"
)
_PARTS = (  # how a key ends -> what it holds
    ("down", r"[._](?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight"),
    ("up", r"[._](?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight"),
    ("up_bias", r"\.(?:lora_B|lora_up)(?:\.\w+)?\.bias"),
    ("alpha", r"\.(?:lora_)?alpha"),
    ("diff", r"\.diff"),
    ("diff_b", r"\.diff_b"),
)
_PART = tuple((part, re.compile(f"(.+?){ending}")) for part, ending in _PARTS)
_REFUSED = (  # part of a key -> the kind of adapter
    (r"dora_scale|lora_magnitude_vector", "a DoRA adapter"),
    (r"lokr_", "a LoKr adapter"),
    (r"\.hada_|loha_", "a LoHa adapter"),
    (r"[._](oft|boft|coft)_", "an OFT adapter"),
    (r"lora_mid|\.lora_mid\.", "a LoRA of convolutions in Tucker form (lora_mid)"),
    (r"\.set_weight$|modules_to_save|\.reshape_weight$", "an adapter with whole layers in it"),
    (r"\.(w_norm|b_norm)$", "a LyCORIS adapter of norms"),
    (r"vera_lambda|\.ia3_|lora_embedding_", "an adapter of another kind than LoRA"),
    (r"k_img|v_img|img_emb|add_[kv]_proj|image_embedder", "a LoRA of an image-to-video model"),
)
READ = "LoRA (lora_A and lora_B, or lora_down and lora_up) and plain differences (.diff, .diff_b)"


class LoraKey(NamedTuple):
    """What a key says: the module by its name in the file, and ``part``: down, up, up_bias, alpha, diff or diff_b."""

    module: str
    part: str


def of_text_encoder(key: str) -> bool:
    """Whether a key belongs to an adapter of the text encoder."""
    return _TEXT_ENCODER.match(key) is not None


def refused(keys: Iterable[str]) -> str | None:
    """If a key belongs to an adapter of a kind that is not read: that key and the kind, for an error; else None."""
    return kind_of_file(keys, _REFUSED, READ)


def parse(key: str) -> LoraKey | None:
    """The module and the part of a key, without what the writer put before the module; None for any other key.

    >>> parse("transformer.blocks.0.attn1.to_q.lora_A.weight")
    LoraKey(module='blocks.0.attn1.to_q', part='down')
    >>> parse("lora_unet_blocks_0_self_attn_q.alpha")
    LoraKey(module='blocks_0_self_attn_q', part='alpha')
    """
    for part, pattern in _PART:
        if match := pattern.fullmatch(key):
            name = match[1]
            while (bare := _LEADING.sub("", key_mapping.plain(name))) != name:  # wrappers stand in any order
                name = bare
            return LoraKey(name, part)
    return None


def modules(keys: Iterable[str]) -> dict[str, str]:
    """Every spelling of the modules of a transformer, with _ for dots, -> its native name; parameters that belong to no
    module (``modulation``) stand for themselves.

    Args:
        keys: native keys of the transformer.
    """
    names: dict[str, str] = {}
    for key in keys:
        module = key.removesuffix(".weight").removesuffix(".bias")
        for spelling in (module, key_mapping.to_diffusers(key).removesuffix(".weight").removesuffix(".bias")):
            names[flat(spelling)] = module
    return names


def flat(name: str) -> str:
    """A name as kohya writes it."""
    return name.replace(".", "_")


def dialect(keys: Iterable[str]) -> str:
    """Who writes such keys."""
    listed = list(keys)
    for start, name in (("lora_unet_", "kohya"), ("diffusion_model.", "ComfyUI"), ("base_model.", "PEFT")):
        if any(key.startswith(start) for key in listed):
            return name
    return "diffusers" if any(key.startswith("transformer") or ".attn1." in key for key in listed) else "native"
