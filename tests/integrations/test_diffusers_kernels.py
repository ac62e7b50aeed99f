"""hiar_kernels inside diffusers' own Wan transformer: the same result within the error budget, until it is removed."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
import wan_files
from budget import assert_within_budget
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor
from wan_files import WAN

import hiar_kernels
from hiar_model.integrations.diffusers import apply_hiar_kernels, register_attention_backend
from hiar_model.models.key_mapping import to_native

pytestmark = pytest.mark.cpu

OPS = {
    "attention", "qk_norm_rope", "rms_norm", "ada_layer_norm", "gated_residual", "gated_residual_layer_norm",
    "gated_residual_ada_layer_norm",
}  # fmt: skip


def published(dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' model with random weights, all of which matter; a new one."""
    return copy.deepcopy(wan_files.diffusers_transformer()).to(dtype)


def other(**config: Any) -> Any:
    """Another kind of Wan transformer, random."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 40, "text_dim": 16,
             "freq_dim": 16, "in_channels": 4, "out_channels": 4}  # fmt: skip
    torch.manual_seed(5)
    model = WanTransformer3DModel(**sizes, **config)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """latents [2, 16, 3, 8, 6], timesteps [2], prompt [2, 512, text_dim]."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 3, 8, 6, generator=generator)
    text = F.pad(torch.randn(2, 7, WAN.text_dim, generator=generator), (0, 0, 0, WAN.text_len - 7))
    return latents.to(dtype), torch.tensor([937.5, 625.0]), text.to(dtype)


@torch.no_grad()
def run(model: Any, *args: Tensor, **more: Tensor) -> Tensor:
    return model(*args, **more, return_dict=False)[0]


def exact(model: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Our transformer in float64 on the same weights: diffusers' code computes its norms in float32 whatever it is."""
    network = copy.deepcopy(wan_files.transformer()).double()
    values = {k: v.double() for k, v in model.state_dict().items()}
    network.load_state_dict({to_native(key): value for key, value in values.items()})
    with torch.no_grad():
        return network(latents.double().transpose(1, 2), timesteps.double(), text.double()).transpose(1, 2)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_error_budget(dtype, impl):
    model, args = published(dtype), inputs(dtype)
    before = run(model, *args)
    applied = apply_hiar_kernels(model)
    with hiar_kernels.taken() as taken, hiar_kernels.prefer(impl):
        after = run(model, *args)
    assert {op for op, _ in taken} == OPS
    assert len([op for op, _ in taken if op == "attention"]) == 2 * WAN.num_layers
    assert not torch.equal(before, after), "another implementation rounds otherwise: were the kernels in use?"
    assert_within_budget(after, before, exact(model, *args))
    applied.remove()
    with hiar_kernels.taken() as taken:
        assert torch.equal(run(model, *args), before) and not taken


def test_what_applies_and_removes_leaves_nothing():
    model = published()
    keys, forward, processors = list(model.state_dict()), model.blocks[0].forward, dict(model.attn_processors)
    applied = apply_hiar_kernels(model)
    assert apply_hiar_kernels(model) is applied and list(model.state_dict()) == keys
    assert not set(map(id, processors.values())) & set(map(id, model.attn_processors.values()))
    applied.remove()
    applied.remove()
    assert model.blocks[0].forward == forward and model.attn_processors == processors
    assert not model._forward_pre_hooks and "forward" not in model.norm_out.__dict__
    assert apply_hiar_kernels(model) is not applied


@pytest.mark.parametrize("kind", ["per token", "image to video", "no cross_attn_norm", "fused projections"])
def test_other_kinds_of_wan(kind):
    """float32 against float32, sizes of a few units: 1e-5 is ten times the largest difference measured (1e-6)."""
    image = {"image_dim": 20, "added_kv_proj_dim": 24} if kind == "image to video" else {}
    model = other(cross_attn_norm=kind != "no cross_attn_norm", **image)
    if kind == "fused projections":
        model.fuse_qkv_projections()
        assert model.blocks[0].attn1.fused_projections
    generator = torch.Generator().manual_seed(4)
    draw = partial(torch.randn, generator=generator)
    args = [draw(2, 4, 3, 4, 6), torch.tensor([800.0, 300.0]), draw(2, 512, 16)]
    if kind == "per token":
        args[1] = torch.tensor([[0.0] * 6 + [700.0] * 12, [500.0] * 18])
    more = {"encoder_hidden_states_image": draw(2, 9, 20)} if image else {}
    expected = run(model, *args, **more)
    apply_hiar_kernels(model)
    with hiar_kernels.taken() as taken:
        found = run(model, *args, **more)
    assert len([op for op, _ in taken if op == "attention"]) == (6 if image else 4)
    assert float(expected.abs().max()) > 0.5 and float((found - expected).abs().max()) < 1e-5


def test_gradients():
    model, (latents, timesteps, _) = other(), (torch.randn(1, 4, 3, 4, 6), torch.tensor([500.0]), None)
    text = torch.randn(1, 512, 16)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(latents, timesteps, text, return_dict=False)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.enable_gradient_checkpointing()
    apply_hiar_kernels(model)
    found = gradients()
    assert len(found) == len(expected) == len(list(model.parameters()))
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).abs().max()) <= 1e-5 * (1 + float(two.abs().max()))


class OwnProcessor:
    """Of a user."""


def test_refusals():
    with pytest.raises(ValueError, match="transformer must be diffusers' WanTransformer3DModel, got Linear"):
        apply_hiar_kernels(torch.nn.Linear(2, 2))
    model = other()
    model.blocks[1].attn2.set_processor(OwnProcessor())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn2\.processor is a OwnProcessor: expected diffusers'"):
        apply_hiar_kernels(model)
    model = other()
    apply_hiar_kernels(model)
    attn, x = model.blocks[0].attn1, torch.randn(1, 6, 24)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        attn(x, None, torch.ones(1, 6))
    model.blocks[0].attn1.processor._parallel_config = object()  # as enable_parallelism sets it
    with pytest.raises(ValueError, match="in context parallel keeps its own kernels: remove"):
        attn(x)
    with pytest.raises(ValueError, match="attention_impl must be one of auto, reference, .* got 'warp'"):
        apply_hiar_kernels(other(), attention_impl="warp")


# Beside what else replaces a module's forward


def small_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(1, 4, 2, 4, 6, generator=generator),
        torch.tensor([700.0]),
        torch.randn(1, 512, 16, generator=generator),
    )


def test_removed_below_offloading():
    """Offloading takes the place of our forward: it has to stay when the kernels go."""
    model, args = other(), small_inputs()
    expected = run(model, *args)
    applied = apply_hiar_kernels(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with hiar_kernels.taken() as taken:
        assert float((run(model, *args) - expected).abs().max()) < 1e-5
    assert len([op for op, _ in taken if op == "attention"]) == 4
    hooked = [block.forward for block in model.blocks]
    applied.remove()
    assert [block.forward for block in model.blocks] == hooked
    with hiar_kernels.taken() as taken:
        assert torch.equal(run(model, *args), expected) and not taken


def test_not_on_top_of_offloading():
    """There our forward would be called without the weights that the hook brings."""
    model = other()
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="WanTransformerBlock has a forward of its own.*apply_hiar_kernels first"):
        apply_hiar_kernels(model)


@pytest.mark.parametrize("kind", ["group", "sequential"])
def test_layers_that_are_moved_one_by_one(kind):
    model = other()
    apply_hiar_kernels(model)
    if kind == "group":
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match="layers are moved one by one .*: offload the model, or groups of block_level"):
        run(model, *small_inputs())


def test_a_copy_is_on_its_own():
    model, args = other(), small_inputs()
    expected = run(model, *args)
    apply_hiar_kernels(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].scale_shift_table.mul_(3)
    assert float((run(twin, *args) - expected).abs().max()) > 1e-3
    apply_hiar_kernels(twin).remove()
    for one, attentions in ((twin, 0), (model, 4)):
        with hiar_kernels.taken() as taken:
            run(one, *args)
        assert len([op for op, _ in taken if op == "attention"]) == attentions
    assert float((run(model, *args) - expected).abs().max()) < 1e-5


def test_a_second_call_sets_the_implementation():
    model = other()
    applied = apply_hiar_kernels(model)
    assert apply_hiar_kernels(model, attention_impl="reference") is applied
    with hiar_kernels.taken() as taken:
        run(model, *small_inputs())
    assert {impl for op, impl in taken if op == "attention"} == {"reference"}


# The attention backend


def test_as_an_attention_backend():
    model, args = published(), inputs()
    expected = run(model, *args)
    name = register_attention_backend()
    assert name == register_attention_backend() == AttentionBackendName(name).value == "hiar"
    try:
        model.set_attention_backend(name)
        with hiar_kernels.taken() as taken, hiar_kernels.prefer("reference"):
            found = run(model, *args)
        assert taken == [("attention", "reference")] * 2 * WAN.num_layers
        assert_within_budget(found, expected, exact(model, *args))
    finally:
        model.set_attention_backend("native")  # diffusers sets the default of all models; a reset leaves that
    with hiar_kernels.taken() as taken:
        assert torch.equal(run(model, *args), expected) and not taken


def test_the_backends_protocol():
    q, k = torch.randn(2, 1, 6, 2, 16).unbind()
    with attention_backend(register_attention_backend()):
        causal = dispatch_attention_fn(q, k, k, is_causal=True, scale=0.3)
        with pytest.raises(ValueError, match='"hiar" has no attn_mask: choose another for this model, as "native"'):
            dispatch_attention_fn(q, k, k, attn_mask=torch.ones(6, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match='"hiar" has no enable_gqa'):
            dispatch_attention_fn(q, k[:, :, :1], k[:, :, :1], enable_gqa=True)
        with pytest.raises(ValueError, match='"hiar" has no dropout_p'):
            dispatch_attention_fn(q, k, k, dropout_p=0.1)
    with attention_backend("native"):
        expected = dispatch_attention_fn(q, k, k, is_causal=True, scale=0.3)
    assert float((causal - expected).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="must be one of the following"):
        other().set_attention_backend("nobody")
