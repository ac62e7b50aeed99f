"""Linear layers in 8 bits: weights e4m3 or int8 with a scale for each output channel, activations with one for each
token.

Of each block the projections of self-attention and the feed-forward; those of cross-attention, the embeddings and the
head stay as they are. The norms and the GELU before a layer write 8 bits directly
(:func:`hiar_kernels.ada_layer_norm_quantized`, :func:`hiar_kernels.quantize_rows`). The product of int8 is
:func:`hiar_kernels.int8_linear`. That of e4m3 is torch's scaled matrix product on the tensor cores of CUDA; elsewhere
the same arithmetic in float32, where products of two 8-bit numbers are exact.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiar_kernels import int8_linear, quantize_rows
from hiar_kernels.common.float8 import E4M3, widened

from ..common.checks import dtype_name
from ..config import WanConfig
from ..io.packed import CHUNK
from .threads import SMALL
from .transformer import HiARTransformer, QuantizedRows

Network = TypeVar("Network", bound=nn.Module)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LAYER = re.compile(r"(^|\.)(self_attn|ffn)\.\w+$")
_WEIGHT = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|ffn\.[02])\.weight")


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W and x in e4m3, summed in float32, or in int8, summed in int32.

    Args:
        linear: the layer whose weights are quantised; it stays as it is, the bias is shared.
        dtype: float8_e4m3fn or int8.

    Attributes:
        weight: of that dtype, [out, in]. weight_scale: float32 [out]. Both keep their dtypes whatever the model is cast
            to. bias: [out], in the dtype of the results.
    """

    weight: Tensor
    weight_scale: Tensor
    _wide: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = E4M3) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_weight(linear.weight.detach(), dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("_wide", None, persistent=False)
        self.bias = linear.bias
        # A LoRA branch: a hook that takes the input in full, with a scale that it follows.
        if "low_rank" in linear._modules:
            self.low_rank = linear.low_rank
            self._forward_hooks.update(linear._forward_hooks)

    @property
    def rows_dtype(self) -> torch.dtype:
        """What the input is quantised to: what the transformer looks for."""
        return self.weight.dtype

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """x [..., in] in any float dtype, or quantised already -> [..., out] in the dtype of the bias."""
        values, scales = x if isinstance(x, tuple) else quantize_rows(x, dtype=self.rows_dtype)
        if values.dtype == torch.int8:
            return int8_linear(values, scales, self.weight, self.weight_scale, self.bias)
        flat, row_scale = values.flatten(0, -2), scales.flatten()[:, None]
        if values.is_cuda:
            y = torch._scaled_mm(
                flat, self.weight.t(), scale_a=row_scale, scale_b=self.weight_scale[None], bias=self.bias,
                out_dtype=self.bias.dtype, use_fast_accum=False,
            )  # fmt: skip
        else:
            product = F.linear(widened(flat, torch.float32), self.wide_weight()).mul_(row_scale)
            y = torch.addcmul(self.bias.float(), product, self.weight_scale)
            y = y.to(self.bias.dtype)
        return y.unflatten(0, values.shape[:-1])

    def wide_weight(self) -> Tensor:
        """Weights e4m3 in float32, which a CPU multiplies; a small layer keeps them."""
        if self._wide is not None:
            return self._wide
        wide = widened(self.weight, torch.float32)
        if self.weight.numel() <= SMALL:
            self._wide = wide
        return wide

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Follow the model to another device, not to another dtype."""
        weight, scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        self.weight, self.weight_scale = weight.to(self.weight.device), scale.to(self.weight_scale.device)
        self._wide = None
        return self

    def extra_repr(self) -> str:
        dtype = dtype_name(self.rows_dtype)
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={dtype}"


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`hiar_kernels.quantize_rows` of a matrix [out, in], a few rows at a time: it works in float32."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values[part], scales[part] = quantize_rows(weight[part], dtype=dtype)
    return values, scales


_twins: WeakKeyDictionary[HiARTransformer, tuple[Any, HiARTransformer]] = WeakKeyDictionary()


def linear_dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of the large linear layers if they are in 8 bits, else None."""
    return next((module.rows_dtype for module in model.modules() if isinstance(module, QuantizedLinear)), None)


def quantized(model: HiARTransformer, dtype: torch.dtype = E4M3) -> HiARTransformer:
    """The model with linear layers in 8 bits, in evaluation mode: a copy that shares all other parameters. Asked again
    with the same weights it is the same copy; a model that is quantised already is returned itself.

    Raises:
        ValueError: the model is in other 8 bits, the GPU is too old, or for e4m3 CUDA weights that are not bfloat16, or
            sizes that its scaled product does not take.

    Example:
        >>> from hiar_model import WanConfig
        >>> config = WanConfig(dim=32, ffn_dim=64, num_layers=1, num_heads=2, in_channels=4, out_channels=4, text_dim=8)
        >>> quantized(HiARTransformer(config)).blocks[0].ffn[0]
        QuantizedLinear(in_features=32, out_features=64, dtype=float8_e4m3fn)
    """
    if (loaded := linear_dtype_of(model)) is not None:
        if loaded != dtype:
            raise ValueError(f"linear_dtype: the model was loaded in {dtype_name(loaded)}, got {dtype_name(dtype)}")
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                _check(name, module, dtype)
        return model
    layers = dict(large_layers(model))
    state = (dtype, *_state(model, [layer.weight for layer in layers.values()]))
    if model in _twins and _twins[model][0] == state:
        return _twins[model][1]
    _twins.pop(model, None)  # its memory first
    for name, layer in layers.items():
        _check(name, layer, dtype)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared |= {id(layer): QuantizedLinear(layer, dtype) for layer in layers.values()}  # in place of their copies
    twin = copy.deepcopy(model, shared).eval()
    _twins[model] = state, twin
    return twin


def _state(model: HiARTransformer, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Changes when a parameter is replaced, or a number of these weights changes, whoever wrote it: PEFT merges LoRA
    past torch's count of versions, and inference tensors have none. Reads the weights once, and waits for the device.
    """
    sums = [weight.detach().view(_BITS[weight.element_size()]).sum(dtype=torch.int64) for weight in weights]
    return *map(id, model.parameters()), *(0 if one.is_meta else int(one) for one in sums)


def quantize_layers(model: Network, dtype: torch.dtype = E4M3, device: torch.device | None = None) -> Network:
    """Quantise the large linear layers of a model or a block itself, one by one: of each, only the 8 bits stay.

    Args:
        dtype: float8_e4m3fn or int8. device: where a model on the meta device will run.

    Returns:
        ``model``.

    Raises:
        ValueError: as :func:`quantized`, before anything is changed.
    """
    layers = dict(large_layers(model))
    for name, layer in layers.items():
        _check(name, layer, dtype, device)
    for name in list(layers):
        model.set_submodule(name, QuantizedLinear(layers.pop(name), dtype))
    return model


def large_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name and layer of each linear layer that is quantised, those not in 8 bits yet."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _LAYER.search(name):
            yield name, module


def in_8_bits(key: str) -> bool:
    """Whether a native key of a transformer, q, k and v apart, is the weight of a layer that is quantised."""
    return _WEIGHT.fullmatch(key) is not None


def quantized_bytes(config: WanConfig, dtype: torch.dtype, on_cpu: bool) -> tuple[int, int]:
    """Bytes of the large linear layers of a transformer in 8 bits: weights, scales, and of e4m3 on a CPU what small
    layers keep in float32; and the count of their weights.
    """
    with torch.device("meta"):
        layers = [layer for _, layer in large_layers(HiARTransformer(replace(config, num_layers=1)))]
    sizes = [layer.weight.numel() for layer in layers]
    wide = sum(size for size in sizes if size <= SMALL) if on_cpu and dtype == E4M3 else 0
    scales = sum(layer.out_features for layer in layers)
    nbytes = sum(sizes) * dtype.itemsize + (wide + scales) * torch.float32.itemsize
    return config.num_layers * nbytes, config.num_layers * sum(sizes)


def _check(
    name: str, layer: nn.Linear | QuantizedLinear, dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Raise ValueError if the layer cannot be quantised, or CUDA's product cannot take it."""
    device = device or layer.weight.device
    if hasattr(layer.weight, "rewritten"):
        raise ValueError(cannot_follow(name))
    if device.type != "cuda":
        return
    option, needed = f"linear_dtype {dtype_name(dtype)}", (8, 9) if dtype == E4M3 else (8, 0)
    if torch.cuda.get_device_capability(device) < needed:
        gpu, least = torch.cuda.get_device_name(device), ".".join(map(str, needed))
        raise ValueError(f"{option} needs a GPU of compute capability {least} or newer, got {gpu}")
    if dtype != E4M3:
        return
    if layer.bias.dtype != torch.bfloat16:
        raise ValueError(f"{option} needs bfloat16 weights on CUDA, got {layer.bias.dtype}: pass dtype bfloat16")
    if layer.in_features % 16 or layer.out_features % 16:
        raise ValueError(
            f"{option} needs layers of multiples of 16, {name} has {layer.in_features} to {layer.out_features}"
        )


def cannot_follow(name: str) -> str:
    """The error of an adapter that changes all of a layer in 8 bits."""
    return (
        f"linear_dtype: layers in 8 bits cannot follow an adapter that changes all of {name}.weight: merge it into the "
        "weights (hiar convert --lora)"
    )
