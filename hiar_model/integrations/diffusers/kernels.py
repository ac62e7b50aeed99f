"""hiar_kernels inside diffusers' WanTransformer3DModel: attention, norms and RoPE, with the model's own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from torch import Tensor, nn

from hiar_kernels import (
    ada_layer_norm,
    attention,
    gated_residual,
    gated_residual_ada_layer_norm,
    gated_residual_layer_norm,
    qk_norm_rope,
    rms_norm,
)

from ...common.checks import one_of
from ...config.execution import ATTENTION_IMPLS

_TEXT_TOKENS = 512  # diffusers' code has this number too: image tokens stand before so many of the text
_APPLIED = "_hiar_kernels"  # attribute of a transformer


@dataclass
class AppliedKernels:
    """What :func:`apply_hiar_kernels` changed in a transformer; :meth:`remove` puts it back.

    Attributes:
        transformer: the model. attention_impl: of :func:`hiar_kernels.attention`. active: False once removed.
        frames, grid: frame ids [1, F] and (rows, columns) of tokens of the current forward.
    """

    transformer: Any
    attention_impl: str = "auto"
    active: bool = True
    frames: Tensor | None = None
    grid: tuple[int, int] = (1, 1)

    def remove(self) -> None:
        """Give the transformer its own code again; a second call changes nothing."""
        self.active = False
        hooks = self.transformer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
            del hooks[key]
            self.transformer._forward_pre_hooks_with_kwargs.pop(key, None)
        for module in self.transformer.modules():
            forward, processor = module.__dict__.get("forward"), getattr(module, "processor", None)
            if isinstance(forward, _Forward) and forward.applied is self:
                del module.forward  # hooks that took its place since then lead to it, and it to the class's
            if isinstance(processor, HiARWanAttnProcessor) and processor.applied is self:
                module.set_processor(processor.replaced)
        self.transformer.__dict__.pop(_APPLIED, None)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_single_layers(self.transformer)
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        frames, rows, columns = (n // p for n, p in zip(latents.shape[2:], self.transformer.config.patch_size))
        self.frames, self.grid = torch.arange(frames, device=latents.device)[None], (rows, columns)


def apply_hiar_kernels(transformer: Any, *, attention_impl: str = "auto") -> AppliedKernels:
    """Let hiar_kernels compute attention, norms, residuals and RoPE of diffusers' own Wan transformer, in place.

    Weights, configuration, state dict and call stay the same; so does the result, within the error of the dtype. Works
    for text-to-video, image-to-video, and per-token timesteps (Wan 2.2 TI2V); differentiable.

    Args:
        transformer: a diffusers WanTransformer3DModel, also of a WanPipeline, on any device.
        attention_impl: of :func:`hiar_kernels.attention`.

    Returns:
        What was changed, with a method ``remove()``. A second call returns the same, with this ``attention_impl``.

    Raises:
        ValueError: another kind of model, one that runs in context parallel, or one with processors of its own; one
            whose blocks are moved or cached by hooks already: those come after this call.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=16)
        >>> applied = apply_hiar_kernels(model)
        >>> applied.remove()
    """
    model = getattr(transformer, "_orig_mod", transformer)  # of torch.compile
    if not isinstance(model, WanTransformer3DModel):
        raise ValueError(f"transformer must be diffusers' WanTransformer3DModel, got {type(model).__name__}")
    one_of("attention_impl", attention_impl, ATTENTION_IMPLS)
    if _APPLIED in model.__dict__:
        model.__dict__[_APPLIED].attention_impl = attention_impl
        return model.__dict__[_APPLIED]
    for name, processor in model.attn_processors.items():
        if type(processor) is not transformer_wan.WanAttnProcessor:
            raise ValueError(f"{name} is a {type(processor).__name__}: expected diffusers' WanAttnProcessor")
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError("a transformer in context parallel keeps its own kernels: apply them without it")
    _refuse_single_layers(model)
    places = [(block, _block_forward) for block in model.blocks] + [(model.norm_out, _plain_norm)]
    for module, _ in places:
        if "forward" in module.__dict__:
            raise ValueError(
                f"the transformer's {type(module).__name__} has a forward of its own, as offloading and caching set: "
                "apply_hiar_kernels first, enable those afterwards"
            )
    applied = AppliedKernels(model, attention_impl)
    model.register_forward_pre_hook(applied._before_forward, with_kwargs=True)
    for module, ours in places:
        module.forward = _Forward(applied, module, ours)  # of this instance; its class keeps its own
    for block in model.blocks:
        for layer in (block.attn1, block.attn2):
            layer.set_processor(HiARWanAttnProcessor(applied, layer.processor))
    model.__dict__[_APPLIED] = applied
    return applied


def _refuse_single_layers(model: Any) -> None:
    """Refuse hooks that bring each layer to the device when it is called: the kernels read the weights of norms without
    calling them.
    """
    norm = model.blocks[0].attn1.norm_q
    hooks = getattr(norm, "_diffusers_hook", None)
    if norm.weight.is_meta or (hooks is not None and hooks.get_hook("group_offloading") is not None):
        raise ValueError(
            "hiar_kernels in a transformer whose layers are moved one by one (sequential offload, or group offload of "
            "leaf_level): offload the model, or groups of block_level"
        )


@dataclass(eq=False)
class _Forward:
    """The forward of one module: ours, or that of its class once the kernels are removed. A copy of the model has its
    own.
    """

    applied: AppliedKernels
    module: Any
    ours: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.applied.active:
            return self.ours(self.module, *args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class HiARWanAttnProcessor:
    """diffusers' WanAttnProcessor by hiar_kernels; made by :func:`apply_hiar_kernels`."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, applied: AppliedKernels, replaced: Any) -> None:
        self.applied, self.replaced = applied, replaced

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """hidden_states [B, T, C]; encoder_hidden_states [B, L, C], image tokens first; None: self-attention."""
        if self._parallel_config is not None:
            raise ValueError("a transformer in context parallel keeps its own kernels: remove() them first")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None with hiar_kernels: Wan's transformer has none")
        if encoder_hidden_states is None:
            out = self._attend(*self._rotated(attn, hidden_states))
            return attn.to_out[1](attn.to_out[0](out))
        image, text = None, encoder_hidden_states
        if attn.add_k_proj is not None:
            image, text = text[:, : text.shape[1] - _TEXT_TOKENS], text[:, text.shape[1] - _TEXT_TOKENS :]
        q = _heads(attn, rms_norm(attn.to_q(hidden_states), attn.norm_q.weight, eps=attn.norm_q.eps))
        k, v = attn.to_kv(text).chunk(2, -1) if attn.fused_projections else (attn.to_k(text), attn.to_v(text))
        out = self._attend(q, *_keys(attn, attn.norm_k, k, v))
        if image is not None:
            fused = attn.fused_projections
            k, v = attn.to_added_kv(image).chunk(2, -1) if fused else (attn.add_k_proj(image), attn.add_v_proj(image))
            out = out + self._attend(q, *_keys(attn, attn.norm_added_k, k, v))
        return attn.to_out[1](attn.to_out[0](out))

    def _rotated(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, D] of self-attention, q and k normalised and rotated."""
        qkv = attn.to_qkv(x) if attn.fused_projections else torch.cat([attn.to_q(x), attn.to_k(x), attn.to_v(x)], -1)
        assert self.applied.frames is not None
        frames = self.applied.frames.to(qkv.device)
        return qk_norm_rope(
            qkv, attn.norm_q.weight, attn.norm_k.weight, frames, num_heads=attn.heads, grid=self.applied.grid,
            eps=attn.norm_q.eps,
        )  # fmt: skip

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, impl=self.applied.attention_impl).flatten(2)


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1))


def _keys(attn: Any, norm: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _heads(attn, rms_norm(k, norm.weight, eps=norm.eps)), _heads(attn, v)


def _block_forward(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    """WanTransformerBlock.forward: x [B, T, C], temb [B, 6, C] or one for each token [B, T, 6, C]."""
    x, temb = hidden_states, temb if temb.ndim == 4 else temb[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table[:, None] + temb.float()).unbind(2)
    attended = block.attn1(ada_layer_norm(x, shift1, scale1, eps=block.norm1.eps), None, None, rotary_emb)
    if isinstance(block.norm2, nn.Identity):
        x = normed = gated_residual(x, attended, gate1)
    else:
        norm = block.norm2
        x, normed = gated_residual_layer_norm(x, attended, gate1, norm.weight, norm.bias, eps=norm.eps)
    crossed = block.attn2(normed, encoder_hidden_states, None, None)
    x, normed = gated_residual_ada_layer_norm(x, crossed, None, shift2, scale2, eps=block.norm3.eps)
    return gated_residual(x, block.ffn(normed), gate2)


def _plain_norm(norm: Any, x: Tensor) -> Tensor:
    """The last norm, which the model itself modulates."""
    zero = x.new_zeros(1, 1, x.shape[-1])
    return ada_layer_norm(x, zero, zero, eps=norm.eps)
