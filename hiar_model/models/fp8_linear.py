"""Linear layers in 8 bits: weights e4m3 with a scale for each output channel, activations with one for each token.

Of each block the projections of self-attention and the feed-forward; those of cross-attention, the embeddings and the
head stay as they are. The norms and the GELU before a layer write 8 bits directly
(:func:`hiar_kernels.ada_layer_norm_fp8`, :func:`hiar_kernels.quantize_rows`). On CUDA the product is torch's scaled
matrix product on the tensor cores; elsewhere the same arithmetic in float32, where products of two 8-bit numbers are
exact.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiar_kernels import quantize_rows
from hiar_kernels.common.float8 import E4M3

from .transformer import Float8Input, HiARTransformer

LINEAR_DTYPE = "float8_e4m3fn"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Float8Linear(nn.Module):
    """y = x W^T + b with W and x in e4m3, summed in float32.

    Args:
        linear: the layer whose weights are quantised; it stays as it is, the bias is shared.

    Attributes:
        weight: e4m3 [out, in]. weight_scale: float32 [out]. bias: [out], in the dtype of the results.
    """

    float8 = True  # what the transformer looks for
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias
        self._wide: Tensor | None = None
        if (
            "low_rank" in linear._modules
        ):  # a LoRA branch: a hook that takes the input in full, with a scale that it follows
            self.low_rank = linear.low_rank
            self._forward_hooks.update(linear._forward_hooks)

    def forward(self, x: Tensor | Float8Input) -> Tensor:
        """x [..., in] in any float dtype, or quantised already -> [..., out] in the dtype of the bias."""
        values, scales = x if isinstance(x, tuple) else quantize_rows(x)
        flat, row_scale = values.flatten(0, -2), scales.flatten()[:, None]
        if values.is_cuda:
            y = torch._scaled_mm(
                flat, self.weight.t(), scale_a=row_scale, scale_b=self.weight_scale[None], bias=self.bias,
                out_dtype=self.bias.dtype, use_fast_accum=False,
            )  # fmt: skip
        else:
            if self._wide is None:
                self._wide = self.weight.float()
            product = F.linear(widened(flat, torch.float32), self._wide)
            y = torch.addcmul(self.bias.float(), product * row_scale, self.weight_scale)
            y = y.to(self.bias.dtype)
        return y.unflatten(0, values.shape[:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


_twins: WeakKeyDictionary[HiARTransformer, tuple[Any, HiARTransformer]] = WeakKeyDictionary()


def is_quantized(model: HiARTransformer) -> bool:
    """Whether the linear layers are in 8 bits."""
    return any(isinstance(module, Float8Linear) for module in model.modules())


def quantized(model: HiARTransformer) -> HiARTransformer:
    """The model with linear layers in 8 bits, in evaluation mode: a copy that shares all other parameters. Asked again
    with the same weights it is the same copy; a model that is quantised already is returned itself.

    Raises:
        ValueError: CUDA weights that are not bfloat16, or sizes that its scaled product does not take.

    Example:
        >>> from hiar_model import WanConfig
        >>> config = WanConfig(dim=32, ffn_dim=64, num_layers=1, num_heads=2, in_channels=4, out_channels=4, text_dim=8)
        >>> quantized(HiARTransformer(config)).blocks[0].ffn[0]
        Float8Linear(in_features=32, out_features=64)
    """
    if is_quantized(model):
        return model
    layers = {name: module for name, module in model.named_modules() if _takes_8_bits(module, name)}
    state = _state(model, [layer.weight for layer in layers.values()])
    if model in _twins and _twins[model][0] == state:
        return _twins[model][1]
    _twins.pop(model, None)  # its memory first
    for name, layer in layers.items():
        _check(name, layer)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared |= {id(layer): Float8Linear(layer) for layer in layers.values()}  # in place of their copies
    twin = copy.deepcopy(model, shared).eval()
    _twins[model] = state, twin
    return twin


def _state(model: HiARTransformer, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Changes when a parameter is replaced, or a number of these weights changes, whoever wrote it: PEFT merges LoRA
    past torch's count of versions, and inference tensors have none. Reads the weights once, and waits for the device.
    """
    sums = [weight.detach().view(_BITS[weight.element_size()]).sum(dtype=torch.int64) for weight in weights]
    return *map(id, model.parameters()), *(0 if one.is_meta else int(one) for one in sums)


def float8_bytes(model: HiARTransformer, wide: bool) -> int:
    """Bytes of :func:`quantized`'s layers beside the model's: weights and scales. ``wide``: on a CPU also the weights
    in float32, which it multiplies.
    """
    layers = [module for name, module in model.named_modules() if _takes_8_bits(module, name)]
    of_weight = E4M3.itemsize + (torch.float32.itemsize if wide else 0)
    numbers = sum(layer.weight.numel() for layer in layers)
    return numbers * of_weight + sum(len(layer.weight) for layer in layers) * torch.float32.itemsize


def _takes_8_bits(module: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and name.startswith("blocks.") and (".self_attn." in name or ".ffn." in name)


def _check(name: str, layer: nn.Linear) -> None:
    """Raise ValueError if the layer cannot be quantised, or CUDA's product cannot take it."""
    if hasattr(layer.weight, "rewritten"):
        raise ValueError(
            f"linear_dtype {LINEAR_DTYPE} cannot follow an adapter that changes all of {name}.weight: merge it "
            "into the weights (hiar convert --lora)"
        )
    if not layer.weight.is_cuda:
        return
    if layer.weight.dtype != torch.bfloat16:
        raise ValueError(
            f"linear_dtype {LINEAR_DTYPE} needs bfloat16 weights on CUDA, got {layer.weight.dtype}: pass dtype bfloat16"
        )
    if torch.cuda.get_device_capability(layer.weight.device) < (8, 9):
        device = torch.cuda.get_device_name(layer.weight.device)
        raise ValueError(f"linear_dtype {LINEAR_DTYPE} needs a GPU of compute capability 8.9 or newer, got {device}")
    if layer.in_features % 16 or layer.out_features % 16:
        raise ValueError(
            f"linear_dtype {LINEAR_DTYPE} needs layers of multiples of 16, {name} has {layer.in_features} to "
            f"{layer.out_features}"
        )


def widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values e4m3 in a wider dtype: exact. On a CPU from a table of all 256, five times as fast as torch's cast."""
    if values.device.type != "cpu":
        return values.to(dtype)
    index = values.view(torch.uint8).flatten().int()
    return torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype).index_select(0, index).view(values.shape)
