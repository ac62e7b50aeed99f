"""Prompts to embeddings: Wan's UMT5 text encoder, from either published layout, with Wan's prompt cleaning.

Wan's code pads the tokens to 512, masks the padding and sets its embeddings to zero. A masked token changes no other
one, so only the prompt's own tokens are encoded and returned. The transformer counts zeros for the missing ones
(:meth:`hiar_model.HiARTransformer.embed_prompt`), which take part in cross-attention as in Wan's code.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.checks import path_like
from ..common.settings import own_settings
from ..io.atomic import atomic
from ..io.files import check_text, refuse_stand_in, save_tensors
from ..io.weight_files import (
    add_tensors,
    check_keys,
    check_tensors,
    only_one,
    read_json,
    read_tensors,
    renamed,
    some,
    weight_files,
)
from . import key_mapping

MAX_TOKENS = 512
NATIVE_WEIGHTS, NATIVE_TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
WEIGHTS, TOKENIZER = "text_encoder", "tokenizer"  # folders of a diffusers pipeline
TOKENIZER_JSON, SPIECE = "tokenizer.json", "spiece.model"  # either is a whole tokenizer
OFFLOADS = (None, "cpu", "free")
DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # float16 overflows in this network
_CACHE_FORMAT = 1
_EMBEDDING = "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class TextEncoderFiles:
    """Files of a text encoder. ``layout``: "native" (one .pth file, Wan's keys) or "transformers" (with a config)."""

    layout: str
    weights: tuple[Path, ...]
    tokenizer: Path
    config: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights on disk."""
        return sum(file.stat().st_size for file in self.weights)

    def identity(self, clean: str, dtype: torch.dtype | None) -> str:
        """Cache key of an embedding: of the prompt, the dtype, and the files' names, sizes and times."""
        files = [*self.weights, *([self.config] if self.config else []), *sorted(self.tokenizer.iterdir())]
        stamps = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps([_CACHE_FORMAT, stamps, clean, str(dtype)]).encode()).hexdigest()


def find_text_encoder(folder: str | os.PathLike[str]) -> TextEncoderFiles:
    """Find the text encoder in a model folder, original or diffusers; reads no tensor.

    Raises:
        ValueError: one line: no text encoder, or its weights, config or tokenizer is missing.
    """
    source = path_like("folder", folder, "folder")
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    layouts = [path for name in (WEIGHTS, NATIVE_WEIGHTS) if (path := source / name).exists()]
    only_one(layouts, f"the text encoder of {source}")
    if (source / WEIGHTS).is_dir():
        config, tokenizer = source / WEIGHTS / "config.json", source / TOKENIZER
        weights = tuple(weight_files(source / WEIGHTS))
        if not config.is_file():
            raise ValueError(f"{config}: no such file; the text encoder's sizes stand there")
        files = TextEncoderFiles("transformers", weights, tokenizer, config)
    elif (source / NATIVE_WEIGHTS).is_file():
        files = TextEncoderFiles("native", (source / NATIVE_WEIGHTS,), source / NATIVE_TOKENIZER, None)
    else:
        legal = f"{NATIVE_WEIGHTS} and {NATIVE_TOKENIZER}/, or {WEIGHTS}/ and {TOKENIZER}/"
        raise ValueError(f"{source}: no text encoder; expected {legal}")
    if not any((files.tokenizer / name).is_file() for name in (TOKENIZER_JSON, SPIECE)):
        raise ValueError(f"{files.tokenizer}: no tokenizer; expected {TOKENIZER_JSON} or {SPIECE} there")
    for file in (*files.weights, *sorted(files.tokenizer.iterdir())):
        refuse_stand_in(file)
    return files


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as Wan's code does: fix broken Unicode, unescape HTML twice, collapse white space."""
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is a string, got {type(prompt).__name__}")
    check_text(prompt, "the prompt")
    mended = _library("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(mended))).strip()


class WanTextEncoder:
    """Wan's text encoder (UMT5): prompt -> embedding [1, L, text_dim], L at most 512 (padding: see the module).

    The weights are loaded at the first prompt that is not in the cache. Architecture: Chung et al. 2023,
    arXiv:2304.09151; weights and prompt cleaning: Wan Team 2025, arXiv:2503.20314.

    Args:
        folder: a model folder, original or diffusers (:func:`find_text_encoder`).
        device: of the computation and the embedding. dtype: of both, bfloat16, float32 or float64; None: the file's.
        offload: what happens to the weights after each prompt: "cpu" moves them to the CPU, "free" drops them until the
            next prompt, None leaves them on the device.
        cache: folder of embeddings, created if missing. A prompt that was encoded with the same files and dtype is read
            from it. A corrupt entry is computed again; one that cannot be written is a warning. None: no cache.
        on_stage: called with the current activity, in words, and the bytes of the weights.

    Raises:
        ValueError: one line: a part of the folder that is missing, unreadable or of a wrong shape, an unknown option, a
            prompt that is no string, a package that is not installed.

    ::

        encode = WanTextEncoder("Wan2.1-T2V-1.3B", device="cuda", offload="cpu", cache="embeddings")
        prompt_embeds = encode("A cat surfs.")  # [1, L, 4096], bfloat16
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        offload: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        on_stage: Callable[[str, int], None] | None = None,
    ) -> None:
        if offload not in OFFLOADS:
            raise ValueError(f"unknown offload {offload!r} of the text encoder; legal: None, 'cpu', 'free'")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"the text encoder cannot run in {dtype}; legal: {', '.join(map(str, DTYPES))}")
        self.files = find_text_encoder(folder)
        if not (self.files.tokenizer / TOKENIZER_JSON).is_file():
            for package in ("sentencepiece", "google.protobuf"):  # what reads spiece.model
                _library(package)
        self.device, self.dtype, self.offload = torch.device(device), dtype, offload
        self.on_stage = on_stage or (lambda text, nbytes: None)
        self._tokenizer: Any = None
        self._model: Any = None
        self._cache = None if cache is None else path_like("cache", cache, "folder")
        if self._cache is not None:
            try:
                self._cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{self._cache}: no folder for prompt embeddings: {error.strerror}") from error

    @own_settings()
    def __call__(self, prompt: str) -> Tensor:
        """The embedding of one prompt, [1, L, text_dim] on the device; more than 512 tokens are cut, with a warning."""
        clean = clean_prompt(prompt)
        name = "" if self._cache is None else self.files.identity(clean, self.dtype)
        embedding = self._read_cache(name)
        if embedding is None:
            embedding = self._encode(clean)
            self._write_cache(name, clean, embedding)
        return embedding.to(self.device)

    @own_settings()
    def length(self, prompt: str) -> int:
        """The number of tokens of a prompt; loads no weights."""
        return self._tokens(clean_prompt(prompt)).shape[1]

    def loaded_on(self) -> torch.device | None:
        """The device that the weights are on; None if they are not loaded."""
        return None if self._model is None else next(self._model.parameters()).device

    def _encode(self, clean: str) -> Tensor:
        ids = self._tokens(clean)
        if self._model is None:
            self.on_stage("reading the text encoder", self.files.nbytes)
            self._model = load_umt5(self.files, self.dtype, self.device)
        self._model.to(self.device)
        with torch.no_grad(), self._reporting_layers():
            embedding = self._model(input_ids=ids.to(self.device)).last_hidden_state
        if self.offload == "cpu":
            self._model.to("cpu")
        elif self.offload == "free":
            self._model = None
        if self.offload is not None and self.device.type == "cuda":
            torch.cuda.empty_cache()  # unfragmented memory for the next model
        if not bool(embedding.isfinite().all()):
            raise ValueError(f"{self.files.weights[0]}: the embedding of {clean[:60]!r} is not finite; is it damaged?")
        return embedding

    @contextmanager
    def _reporting_layers(self) -> Iterator[None]:
        """Report each layer to ``on_stage`` while encoding, which may read memory-mapped weights from a slow disk."""
        layers = self._model.encoder.block

        def hook(layer: int) -> Any:
            text = f"encoding the prompt: layer {layer} of {len(layers)}"
            return layers[layer - 1].register_forward_pre_hook(lambda *_: self.on_stage(text, self.files.nbytes))

        hooks = [hook(layer) for layer in range(1, len(layers) + 1)]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _tokens(self, clean: str) -> Tensor:
        """Token ids, int64 [1, L]."""
        if self._tokenizer is None:
            auto = _library("transformers").AutoTokenizer
            try:
                self._tokenizer = auto.from_pretrained(self.files.tokenizer, local_files_only=True)
            except Exception as error:  # the library raises many types for a damaged folder
                raise ValueError(f"{self.files.tokenizer}: no readable tokenizer: {_first_line(error)}") from error
        ids = self._tokenizer(clean, add_special_tokens=True)["input_ids"]
        if len(ids) > MAX_TOKENS:
            ids = self._tokenizer(clean, add_special_tokens=True, truncation=True, max_length=MAX_TOKENS)["input_ids"]
            warnings.warn(f"the prompt is longer than {MAX_TOKENS} tokens: its end is left out", stacklevel=4)
        return torch.tensor([ids])

    def _read_cache(self, name: str) -> Tensor | None:
        if self._cache is None or not (file := self._cache / f"{name}.safetensors").is_file():
            return None
        try:
            embedding = read_tensors(file)[0]["embedding"]
        except (ValueError, KeyError):
            return None  # corrupt or of another program: computed again
        legal = embedding.dim() == 3 and embedding.dtype == (self.dtype or embedding.dtype)
        return embedding if legal and bool(embedding.isfinite().all()) else None

    def _write_cache(self, name: str, clean: str, embedding: Tensor) -> None:
        if self._cache is None:
            return
        try:
            with atomic(self._cache / f"{name}.safetensors") as partial:
                save_tensors({"embedding": embedding.cpu().contiguous()}, partial, {"format": "pt", "prompt": clean})
        except OSError as error:
            warnings.warn(f"the prompt's embedding is not cached: {error}", stacklevel=3)


def load_umt5(
    files: TextEncoderFiles, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Any:
    """transformers' UMT5EncoderModel with the weights of either layout, in eval mode without gradients.

    Args:
        dtype: None: as in the files (the widest, if they differ). device: None: the CPU, memory-mapped.

    Raises:
        ValueError: one line: unreadable, missing or unexpected keys (in the file's own names), a wrong shape.
    """
    library = _library("transformers")
    source = files.weights[0] if len(files.weights) == 1 else files.weights[0].parent
    state: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for file in files.weights:
        content, _ = read_tensors(file)
        if not isinstance(content, Mapping):
            raise ValueError(f"{file}: holds a {type(content).__name__}, expected a state dict")
        add_tensors(state, content, file, origin)
    check_tensors(state, source)
    if files.config is None:
        state = renamed(state, key_mapping.text_to_transformers, source)
        sizes, spell = _native_sizes(state, source), key_mapping.text_to_native
    else:
        sizes, spell = _config_sizes(files.config), None
        if "shared.weight" in state:  # the same tensor under another name
            state.setdefault(_EMBEDDING, state.pop("shared.weight"))
    try:
        with torch.device("meta"):
            model = library.UMT5EncoderModel(library.UMT5Config(**sizes))
    except Exception as error:  # the library raises many types for a bad config
        raise ValueError(f"{files.config or source}: no sizes of a UMT5 encoder: {_first_line(error)}") from error
    model.set_input_embeddings(model.encoder.embed_tokens)  # one tensor, not two that are equal
    expected = {key: value for key, value in model.state_dict().items() if key != "shared.weight"}
    check_keys(state, expected, source, spell)
    file_dtype = reduce(torch.promote_types, {value.dtype for value in state.values()})
    model.load_state_dict({**state, "shared.weight": state[_EMBEDDING]}, assign=True)
    return model.to(device=device, dtype=dtype or file_dtype).eval().requires_grad_(False)


def _native_sizes(state: Mapping[str, Tensor], source: Path) -> dict[str, int]:
    """Sizes of the encoder from its tensor shapes; the others are the library's defaults, the same for every UMT5."""
    block = "encoder.block.0.layer.{}.weight"
    keys = (
        _EMBEDDING, block.format("0.SelfAttention.relative_attention_bias"), block.format("0.SelfAttention.q"),
        block.format("1.DenseReluDense.wi_0"),
    )  # fmt: skip
    lacking = [key_mapping.text_to_native(key) for key in keys if key not in state or state[key].dim() != 2]
    if lacking:
        actual = some(map(key_mapping.text_to_native, state))
        raise ValueError(f"{source}: no UMT5 encoder: no matrix {', '.join(lacking)}; its keys: {actual}")
    (vocabulary, width), (buckets, heads), (inner, _), (hidden, _) = (state[key].shape for key in keys)
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.block.")}
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": inner // max(heads, 1), "d_ff": hidden, "num_heads": heads,
        "num_layers": len(layers), "relative_attention_num_buckets": buckets,
    }  # fmt: skip


def _config_sizes(config: Path) -> dict[str, Any]:
    values = read_json(config)
    if values.get("model_type") != "umt5":
        raise ValueError(f"{config}: model_type is {values.get('model_type')!r}, expected 'umt5'")
    return values


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"the text encoder needs {name} ({error}): pip install 'hiar-kernels[wan]'") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
