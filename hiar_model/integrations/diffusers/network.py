"""The network of a rollout on the weights of diffusers' WanTransformer3DModel, and that model from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ...config import WanConfig
from ...io.weight_files import some
from ...models.checkpoint import CheckpointInfo, as_8_bits, full_tensor, open_checkpoint
from ...models.key_mapping import diffusers_config, read_sizes, to_diffusers, to_native
from ...models.quantized_linear import QuantizedLinear, in_8_bits, linear_dtype_of, quantize_layers
from ...models.transformer import HiARTransformer
from ...models.weight_check import WeightCheck

_QKV, _SCALE = ("to_q", "to_k", "to_v"), "_scale"


class SharedNetwork:
    """A :class:`hiar_model.HiARTransformer` on the weights of a WanTransformer3DModel, renewed when those have moved.

    Both use the same memory: the projections to q, k and v become views of one tensor. Only the few tensors that
    diffusers keeps in float32 beside weights of a smaller dtype are copied, in that dtype, each time.
    """

    def __init__(self) -> None:
        self._network: HiARTransformer | None = None
        self._seen: tuple[Any, ...] = ()
        self._copies: list[tuple[Tensor, Tensor]] = []  # copy, weight

    def of(self, transformer: Any) -> HiARTransformer:
        """The network of a transformer, in eval mode, without gradients.

        Raises:
            ValueError: another kind of transformer, or weights that are not there, quantised, or have LoRA beside them.
        """
        model = _model(transformer)
        if self._network is None or self._seen != _places(model):
            self._network = None  # its memory first
            self._copies = []
            self._network = share_weights(model)
            self._copies = _copies(self._network, model)
            self._seen = _places(model)
        with torch.no_grad():
            for copy, weight in self._copies:  # written to past torch's count of versions, as PEFT does
                copy.copy_(weight)
        return self._network


def _model(transformer: Any) -> Any:
    model = getattr(transformer, "_orig_mod", transformer)  # of torch.compile
    if not isinstance(model, WanTransformer3DModel):
        raise ValueError(f"transformer must be diffusers' WanTransformer3DModel, got {type(model).__name__}")
    return model


def _places(model: Any) -> tuple[Any, ...]:
    """Changes whenever a weight is replaced, moved, cast or written to by torch."""
    places = (
        (x.data_ptr(), x.dtype, x.device, 0 if x.is_inference() else x._version) if not x.is_meta else ()
        for x in _tensors(model).values()
    )
    return (id(model), *places)


def _tensors(model: Any) -> dict[str, Tensor]:
    """The parameters, and weights and scales of layers in 8 bits."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors |= {f"{name}.weight": module.weight, f"{name}.weight{_SCALE}": module.weight_scale}
    return tensors


def _spelled(key: str) -> str:
    """diffusers' key for a native one, also for scales."""
    return to_diffusers(key.removesuffix(_SCALE)) + (_SCALE if key.endswith(_SCALE) else "")


def empty_network(transformer: Any) -> HiARTransformer:
    """The network of a transformer, on the meta device: sizes alone.

    Raises:
        ValueError: as :meth:`SharedNetwork.of`.
    """
    model = _model(transformer)
    config = WanConfig.from_dict(read_sizes(dict(model.config), Path("transformer")))
    with torch.device("meta"):
        network = HiARTransformer(config)
    if (dtype := linear_dtype_of(model)) is not None:
        quantize_layers(network, dtype)
    _check(_tensors(model), {_spelled(key) for key in network.state_dict()})
    return network


def share_weights(model: Any) -> HiARTransformer:
    """See :class:`SharedNetwork`."""
    network = empty_network(model)
    theirs = _tensors(model)
    names = {_spelled(key): key for key in network.state_dict()}
    kinds = {key: value.dtype for key, value in theirs.items() if key.endswith(_SCALE) or f"{key}{_SCALE}" in theirs}
    dtype = model.patch_embedding.weight.dtype  # of all but layers in 8 bits
    state: dict[str, Tensor] = {}
    for i in range(len(model.blocks)):
        for kind in ("weight", "bias", f"weight{_SCALE}"):
            keys = [f"blocks.{i}.attn1.{part}.{kind}" for part in _QKV]
            if keys[0] in theirs:
                parts = [theirs.pop(key) for key in keys]
                state[f"blocks.{i}.self_attn.qkv.{kind}"] = _fused(parts, kinds.get(keys[0], dtype))
    state |= {names[key]: value.detach().to(kinds.get(key, dtype)) for key, value in theirs.items()}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _copies(network: HiARTransformer, model: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of a network that are not in the memory of the transformer's weights, each beside its weight."""
    theirs = dict(model.named_parameters())
    pairs = ((value, theirs.get(to_diffusers(key))) for key, value in network.state_dict().items())
    return [(own, weight) for own, weight in pairs if weight is not None and own.data_ptr() != weight.data_ptr()]


def _fused(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One tensor of three, which become views of it if they have its dtype."""
    fused = torch.cat([part.detach().to(dtype) for part in parts])
    if all(part.dtype == dtype for part in parts):
        for part, view in zip(parts, fused.chunk(len(parts)), strict=True):
            part.data = view
    return fused


def _check(theirs: dict[str, Tensor], names: set[str]) -> None:
    if lora := [key for key in theirs if ".lora_" in key or ".base_layer." in key]:
        raise ValueError(
            f"transformer: {lora[0]}: a LoRA beside the weights; merge it: fuse_lora(), then unload_lora_weights()"
        )
    if any(".to_qkv." in key for key in theirs):
        raise ValueError("transformer: its projections are fused; call transformer.unfuse_qkv_projections()")
    for what, keys in (("missing", names - theirs.keys()), ("unexpected", theirs.keys() - names)):
        if keys:
            raise ValueError(f"transformer: {what} {some(sorted(keys))}")
    for key, value in theirs.items():
        if value.is_meta:
            raise ValueError(
                f"transformer: {key} is not in memory: enable_model_cpu_offload() keeps whole models together, "
                "sequential offload does not"
            )
        if f"{key}{_SCALE}" not in theirs and (not value.is_floating_point() or value.dtype.itemsize < 2):
            raise ValueError(f"transformer: {key} is {value.dtype}: quantised weights are not read here")


def load_wan_transformer(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, linear_dtype: str | None = None
) -> tuple[Any, CheckpointInfo]:
    """diffusers' WanTransformer3DModel from whatever :func:`hiar_model.load_transformer` reads, in eval mode.

    Args:
        dtype: of the weights, but those that diffusers keeps in float32; of what it reads, a quantised file is
            dequantised. linear_dtype: of :func:`hiar_model.load_transformer`: large linear layers are
            :class:`.QuantizedLinear` then.

    Raises:
        ValueError: one line: what ``load_transformer`` refuses, and sizes that diffusers has no name for.
    """
    state, info = open_checkpoint(Path(path))
    values = {key: value for key, value in diffusers_config(info.config).items() if not key.startswith("_")}
    with torch.device("meta"):
        model = WanTransformer3DModel(**values)
    config = model.config
    model.rope = type(model.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)

    def cast(key: str, value: Tensor) -> Tensor:
        exact = any(part in key.split(".") for part in model._keep_in_fp32_modules)
        return value.to(torch.float32 if exact else dtype)

    eight = None if linear_dtype is None else getattr(torch, linear_dtype)
    if eight is not None:
        for name, module in list(model.named_modules()):
            if in_8_bits(to_native(f"{name}.weight")):
                model.set_submodule(name, QuantizedLinear(module, eight))
    check = WeightCheck(path) if info.quantised is not None else None
    tensors: dict[str, Tensor] = {}
    for key in list(state):
        stored, name = state.pop(key), to_diffusers(key)
        tensors[name] = full = cast(name, full_tensor(key, stored, check))
        if eight is not None and in_8_bits(key):
            tensors[name], tensors[f"{name}{_SCALE}"] = as_8_bits(stored, full, eight)
    if check is not None:
        check.finish()
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False), info
