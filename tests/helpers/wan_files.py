"""Small random Wan weights in every published layout, with the published file and key names; nothing is downloaded.

diffusers' and transformers' own classes write what they published; the original key names are made here. All layouts
hold the same tensors, so that whatever is loaded from one must equal what is loaded from another.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hiar_model.config import WanConfig
from hiar_model.models.transformer import HiARTransformer

WAN = WanConfig(dim=256, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_dim=32)
"""Heads of 128, 16 latent channels and 512 text tokens as published: a training file tells no more than shapes."""
PROMPT = "a red circle moving right"
TEXT_ENCODER, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"  # beside the weights, original layout
TOKENIZER = "google/umt5-xxl"
WEIGHTS = "diffusion_pytorch_model"

_WORDS = "a an the red green blue yellow circle square triangle moving right left up down slowly quickly cat dog on of"
_ORIGINAL_CONFIG = {  # what stands beside the published weights, with these sizes
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": WAN.dim, "eps": WAN.eps, "ffn_dim": WAN.ffn_dim,
    "freq_dim": WAN.freq_dim, "in_dim": WAN.in_channels, "model_type": "t2v", "num_heads": WAN.num_heads,
    "num_layers": WAN.num_layers, "out_dim": WAN.out_channels, "text_len": WAN.text_len,
}  # fmt: skip


@functools.lru_cache
def transformer(config: WanConfig = WAN, seed: int = 0) -> HiARTransformer:
    """A random model in which every tensor matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HiARTransformer(config)
        for p in model.parameters():
            p.data.normal_(std=0.5 if p.dim() != 2 else 1 / math.sqrt(p.shape[-1]))
            if p.dim() == 1:
                p.data.add_(1.0)
    return model.eval().requires_grad_(False)


def native_state(config: WanConfig = WAN, seed: int = 0) -> dict[str, Tensor]:
    """Published Wan keys -> tensors of :func:`transformer`."""
    return {key: value.clone() for key, value in transformer(config, seed).state_dict().items()}


@functools.lru_cache
def diffusers_transformer(config: WanConfig = WAN, seed: int = 0) -> Any:
    """diffusers' WanTransformer3DModel with the weights of :func:`transformer`, brought over by diffusers' own map."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers, eps=config.eps,
    )  # fmt: skip
    model.load_state_dict(convert_wan_transformer_to_diffusers(native_state(config, seed)))
    return model.eval().requires_grad_(False)


@functools.lru_cache
def text_encoder() -> Any:
    """transformers' UMT5EncoderModel; its width is WAN's text_dim."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": WAN.text_dim, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 384}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = UMT5EncoderModel(UMT5Config(**sizes))
        for p in model.parameters():
            p.data.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model.eval().requires_grad_(False)


@functools.lru_cache
def vae() -> Any:
    """diffusers' AutoencoderKLWan, narrow; 16 latent channels with the published means and deviations."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = AutoencoderKLWan(base_dim=8)
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.data.normal_(mean=1.0, std=0.2)
    return model.eval().requires_grad_(False)


def scheduler() -> Any:
    """diffusers' UniPCMultistepScheduler as published beside Wan 2.1 for 480 rows; the package does not read it."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def original_text_encoder_state() -> dict[str, Tensor]:
    """The text encoder's tensors under the keys of the published .pth file."""
    renamed = {
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding", "layer.0.SelfAttention": "attn",
        "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2",
    }  # fmt: skip
    state = {}
    for key, value in text_encoder().state_dict().items():
        if key == "shared.weight":  # the same tensor as the embedding
            continue
        name = key.removeprefix("encoder.").replace("embed_tokens", "token_embedding")
        name = name.replace("final_layer_norm", "norm").replace("block.", "blocks.")
        for new, old in renamed.items():
            name = name.replace(new, old)
        state[name] = value.clone()
    return state


def original_vae_state() -> dict[str, Tensor]:
    """The VAE's tensors under the keys of the published .pth file; diffusers' converter leads back."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
             "conv_shortcut": "shortcut"}  # fmt: skip
    state = {}
    for key, value in vae().state_dict().items():
        side, _, rest = key.partition(".")
        if side in ("quant_conv", "post_quant_conv"):
            state[f"{'conv1' if side == 'quant_conv' else 'conv2'}.{rest}"] = value.clone()
            continue
        rest = re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", lambda m: f".{parts[m[1]]}.", rest)
        rest = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", rest)
        rest = re.sub(r"^mid_block\.attentions\.0", "middle.1", rest)
        rest = re.sub(r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", rest)
        rest = re.sub(r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", rest)
        rest = rest.replace("down_blocks.", "downsamples.").replace("conv_in.", "conv1.")
        state[f"{side}.{rest.replace('norm_out.', 'head.0.').replace('conv_out.', 'head.2.')}"] = value.clone()
    assert convert_wan_vae_to_diffusers(state).keys() == vae().state_dict().keys()
    return state


def write_tokenizer(folder: Path) -> Path:
    """A Unigram tokenizer of a few words and all printable ASCII, in the files that google/umt5-xxl has."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in _WORDS.split()]
    vocabulary += [(chr(code), -8.0) for code in range(33, 127)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    return folder


def write_original(
    folder: Path, shards: int = 1, *, parts: bool = True, dtype: torch.dtype | None = None, seed: int = 0
) -> Path:
    """A folder as Wan2.1-T2V-1.3B (one file) or -14B (shards and an index) is published.

    Args:
        parts: with text encoder, tokenizer and VAE; False: the transformer alone. dtype: of the transformer's tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_ORIGINAL_CONFIG))
    state = {key: value.to(dtype or value.dtype) for key, value in native_state(seed=seed).items()}
    if shards == 1:
        save_file(state, folder / f"{WEIGHTS}.safetensors", {"format": "pt"})
    else:
        mapping: dict[str, str] = {}
        for i in range(shards):
            name = f"{WEIGHTS}-{i + 1:05d}-of-{shards:05d}.safetensors"
            shard = {key: state[key] for key in list(state)[i::shards]}
            save_file(shard, folder / name, {"format": "pt"})
            mapping |= dict.fromkeys(shard, name)
        index = {"metadata": {"total_size": sum(v.nbytes for v in state.values())}, "weight_map": mapping}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    if parts:
        torch.save(original_text_encoder_state(), folder / TEXT_ENCODER)
        torch.save(original_vae_state(), folder / VAE)
        write_tokenizer(folder / TOKENIZER)
    return folder


def write_diffusers(folder: Path, shards: int = 1, *, parts: bool = True, seed: int = 0) -> Path:
    """A pipeline folder as Wan2.1-T2V-1.3B-Diffusers is published; arguments as for :func:`write_original`."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {
        "_class_name": "WanPipeline", "_diffusers_version": "0.33.0.dev0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    model = diffusers_transformer(WAN, seed)
    size = sum(value.nbytes for value in model.state_dict().values())
    model.save_pretrained(folder / "transformer", max_shard_size=size + 1 if shards == 1 else size // shards + 1)
    if parts:
        text_encoder().save_pretrained(folder / "text_encoder")
        write_tokenizer(folder / "tokenizer")
        vae().save_pretrained(folder / "vae")
        scheduler().save_pretrained(folder / "scheduler")
    return folder


def write_training(
    path: Path,
    networks: Mapping[str, int] | None = None,
    rename: Callable[[str], str] = "model.{}".format,
    config: WanConfig = WAN,
) -> Path:
    """A training checkpoint (HiAR, Self-Forcing, CausVid): network -> the seed of its weights, keys behind wrappers."""
    networks = {"generator": 1, "critic": 2, "generator_ema": 0} if networks is None else networks
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {n: {rename(key): v for key, v in native_state(config, s).items()} for n, s in networks.items()}
    torch.save(content, path)
    return path
