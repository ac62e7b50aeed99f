"""Prompts to embeddings: Wan's UMT5 text encoder, from either published layout, with its cleaning and its 512 tokens.

The published code pads the tokens to 512, masks the padding, and sets what comes out there to zero. A masked token
changes no other one, so only the prompt's own tokens are encoded and returned; the transformer counts what is missing
up to its text_len as zeros (:meth:`hiar_model.HiARTransformer.text_kv`), which take part in cross-attention as there.
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

from ..io.files import refuse_stand_in, save_tensors
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
    whole,
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
    """Where a model folder keeps its text encoder: ``layout`` "native" (one .pth file of published keys) or
    "transformers" (with a ``config``).
    """

    layout: str
    weights: tuple[Path, ...]
    tokenizer: Path
    config: Path | None

    @property
    def nbytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.weights)

    def identity(self, clean: str, dtype: torch.dtype | None) -> str:
        """Names an embedding: another prompt, file, time of writing or dtype has another name."""
        files = [*self.weights, *([self.config] if self.config else []), *sorted(self.tokenizer.iterdir())]
        stamps = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps([_CACHE_FORMAT, stamps, clean, str(dtype)]).encode()).hexdigest()


def find_text_encoder(folder: str | os.PathLike[str]) -> TextEncoderFiles:
    """The text encoder in a model folder, original or diffusers; no tensor is read.

    Raises:
        ValueError: one line: none there, or one half of it is missing.
    """
    source = Path(folder)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    there = [path for name in (WEIGHTS, NATIVE_WEIGHTS) if (path := source / name).exists()]
    only_one(there, f"the text encoder of {source}")
    if (source / WEIGHTS).is_dir():
        config, tokenizer = source / WEIGHTS / "config.json", source / TOKENIZER
        files = tuple(weight_files(source / WEIGHTS))
        if not config.is_file():
            raise ValueError(f"{config}: no such file; it tells the text encoder's sizes")
        found = TextEncoderFiles("transformers", files, tokenizer, config)
    elif (source / NATIVE_WEIGHTS).is_file():
        found = TextEncoderFiles("native", (source / NATIVE_WEIGHTS,), source / NATIVE_TOKENIZER, None)
    else:
        legal = f"{NATIVE_WEIGHTS} and {NATIVE_TOKENIZER}/, or {WEIGHTS}/ and {TOKENIZER}/"
        raise ValueError(f"{source}: no text encoder; expected {legal}")
    if not any((found.tokenizer / name).is_file() for name in (TOKENIZER_JSON, SPIECE)):
        raise ValueError(f"{found.tokenizer}: no tokenizer; expected {TOKENIZER_JSON} or {SPIECE} there")
    for file in (*found.weights, *sorted(found.tokenizer.iterdir())):
        refuse_stand_in(file)
    return found


def clean_prompt(prompt: str) -> str:
    """The published cleaning: broken Unicode mended, HTML entities resolved (twice), white space made single blanks."""
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is a string, got {type(prompt).__name__}")
    mended = _library("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(mended))).strip()


class WanTextEncoder:
    """Prompt -> [1, L, text_dim], L at most 512, the prompt's own tokens (see the module); made for VideoModel.

    Nothing is read before the first prompt that the cache does not know.

    Args:
        folder: a model folder, original or diffusers (:func:`find_text_encoder`).
        device: where it runs and what it returns lies. dtype: of weights and result, bfloat16, float32 or float64;
            None: of the weights in the file.
        offload: what becomes of the weights after each prompt: "cpu" moves them there, "free" drops them (they are
            read again when needed), None leaves them on the device.
        cache: folder of embeddings, made if missing; a prompt that was encoded with the same files and dtype is read
            from there. A torn entry is made again, one that cannot be written is a warning. None: no cache.
        on_stage: called with what is being done, in words, and the bytes of the weights.

    Raises:
        ValueError: one line: what is missing, unreadable or misshaped in the folder, an illegal option, a prompt that
            is no string, a package that is not installed.
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
        self._cache = None if cache is None else Path(cache)
        if self._cache is not None:
            try:
                self._cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{self._cache}: no folder for prompt embeddings: {error.strerror}") from error

    def __call__(self, prompt: str) -> Tensor:
        """The embedding of one prompt, [1, L, text_dim] on the device; a prompt of more than 512 tokens is cut, with a
        warning.
        """
        clean = clean_prompt(prompt)
        name = "" if self._cache is None else self.files.identity(clean, self.dtype)
        embedding = self._recall(name)
        if embedding is None:
            embedding = self._encode(clean)
            self._remember(name, clean, embedding)
        return embedding.to(self.device)

    def length(self, prompt: str) -> int:
        """How many tokens the embedding of a prompt has; no weights are read."""
        return self._tokens(clean_prompt(prompt)).shape[1]

    def loaded_on(self) -> torch.device | None:
        """Where the weights are now; None: not in memory."""
        return None if self._model is None else next(self._model.parameters()).device

    def _encode(self, clean: str) -> Tensor:
        ids = self._tokens(clean)
        if self._model is None:
            self.on_stage("reading the text encoder", self.files.nbytes)
            self._model = load_umt5(self.files, self.dtype, self.device)
        self._model.to(self.device)
        with torch.no_grad(), self._told():
            found = self._model(input_ids=ids.to(self.device)).last_hidden_state
        if self.offload == "cpu":
            self._model.to("cpu")
        elif self.offload == "free":
            self._model = None
        if self.offload is not None and self.device.type == "cuda":
            torch.cuda.empty_cache()  # in one piece for what comes next
        if not bool(found.isfinite().all()):
            raise ValueError(f"{self.files.weights[0]}: the embedding of {clean[:60]!r} is not finite; is it damaged?")
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Around encoding: which layer is being asked, for weights that are read from a disk meanwhile."""
        layers = self._model.encoder.block

        def hook(layer: int) -> Any:
            text = f"encoding the prompt: layer {layer} of {len(layers)}"
            return layers[layer - 1].register_forward_pre_hook(lambda *_: self.on_stage(text, self.files.nbytes))

        hooks = [hook(layer) for layer in range(1, len(layers) + 1)]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()

    def _tokens(self, clean: str) -> Tensor:
        """[1, L]"""
        if self._tokenizer is None:
            auto = _library("transformers").AutoTokenizer
            try:
                self._tokenizer = auto.from_pretrained(self.files.tokenizer, local_files_only=True)
            except Exception as error:  # whatever the library meets in a damaged folder
                raise ValueError(f"{self.files.tokenizer}: no readable tokenizer: {_first_line(error)}") from error
        ids = self._tokenizer(clean, add_special_tokens=True)["input_ids"]
        if len(ids) > MAX_TOKENS:
            ids = self._tokenizer(clean, add_special_tokens=True, truncation=True, max_length=MAX_TOKENS)["input_ids"]
            warnings.warn(f"the prompt is longer than {MAX_TOKENS} tokens: its end is left out", stacklevel=4)
        return torch.tensor([ids])

    def _recall(self, name: str) -> Tensor | None:
        if self._cache is None or not (file := self._cache / f"{name}.safetensors").is_file():
            return None
        try:
            found = read_tensors(file)[0]["embedding"]
        except (ValueError, KeyError):
            return None  # torn or foreign: made again
        legal = found.dim() == 3 and found.dtype == (self.dtype or found.dtype) and bool(found.isfinite().all())
        return found if legal else None

    def _remember(self, name: str, clean: str, embedding: Tensor) -> None:
        if self._cache is None:
            return
        try:
            with whole(self._cache / f"{name}.safetensors") as part:
                save_tensors({"embedding": embedding.cpu().contiguous()}, part, {"format": "pt", "prompt": clean})
        except OSError as error:
            warnings.warn(f"the prompt's embedding is not kept: {error}", stacklevel=3)


def load_umt5(
    files: TextEncoderFiles, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Any:
    """transformers' UMT5EncoderModel with the weights of either layout, in eval mode without gradients.

    Args:
        dtype: None: as in the file (the widest, should they differ). device: None: the CPU, where the files are mapped.

    Raises:
        ValueError: one line: unreadable, keys missing or unexpected (in the file's own names), a wrong shape.
    """
    library = _library("transformers")
    source = files.weights[0] if len(files.weights) == 1 else files.weights[0].parent
    state: dict[str, Any] = {}
    came: dict[str, Path] = {}
    for file in files.weights:
        content, _ = read_tensors(file)
        if not isinstance(content, Mapping):
            raise ValueError(f"{file}: holds a {type(content).__name__}, expected a state dict")
        add_tensors(state, content, file, came)
    check_tensors(state, source)
    if files.config is None:
        state = renamed(state, key_mapping.text_to_transformers, source)
        sizes, spell = _native_sizes(state, source), key_mapping.text_to_native
    else:
        sizes, spell = _told_sizes(files.config), None
        if "shared.weight" in state:  # the embedding under its second name
            state.setdefault(_EMBEDDING, state.pop("shared.weight"))
    try:
        with torch.device("meta"):
            model = library.UMT5EncoderModel(library.UMT5Config(**sizes))
    except Exception as error:  # the library's own checks of a config
        raise ValueError(f"{files.config or source}: no sizes of a UMT5 encoder: {_first_line(error)}") from error
    model.set_input_embeddings(model.encoder.embed_tokens)  # one tensor, not two that are equal
    expected = {key: value for key, value in model.state_dict().items() if key != "shared.weight"}
    check_keys(state, expected, source, spell)
    kept = reduce(torch.promote_types, {value.dtype for value in state.values()})
    model.load_state_dict({**state, "shared.weight": state[_EMBEDDING]}, assign=True)
    return model.to(device=device, dtype=dtype or kept).eval().requires_grad_(False)


def _native_sizes(state: Mapping[str, Tensor], source: Path) -> dict[str, int]:
    """All sizes of the encoder from its shapes; what is the same for every UMT5 is the library's default."""
    block = "encoder.block.0.layer.{}.weight"
    keys = (
        _EMBEDDING, block.format("0.SelfAttention.relative_attention_bias"), block.format("0.SelfAttention.q"),
        block.format("1.DenseReluDense.wi_0"),
    )  # fmt: skip
    lacking = [key_mapping.text_to_native(key) for key in keys if key not in state or state[key].dim() != 2]
    if lacking:
        found = some(map(key_mapping.text_to_native, state))
        raise ValueError(f"{source}: no UMT5 encoder: no matrix {', '.join(lacking)}; its keys: {found}")
    (vocabulary, width), (buckets, heads), (inner, _), (hidden, _) = (state[key].shape for key in keys)
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.block.")}
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": inner // max(heads, 1), "d_ff": hidden, "num_heads": heads,
        "num_layers": len(layers), "relative_attention_num_buckets": buckets,
    }  # fmt: skip


def _told_sizes(config: Path) -> dict[str, Any]:
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
