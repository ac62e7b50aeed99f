"""What 8 bits cost a network of Wan's shape with random weights, plain and with outliers: errors of its outputs.

    python -m bench.studies.eight_bits_errors      # prints the tables of docs/howto/run_in_8_bits.md; a minute

Wan's widths in small: heads of 128, a feed-forward 6 times as wide, 4 layers. Matrices are drawn so that outputs are as
large as inputs, and modulations are of order one, so that each layer counts (with Wan's own initialisation gates are
nearly 0 and no error would show). Outliers: about one channel in a hundred, 30 times as large, in one of three places
(`OUTLIERS`). Errors are relative to float32: root mean square of the difference over that of the float32 numbers.
The second table takes the error of the linear layers apart: float32 with only some of their numbers rounded
(`ROUNDED`), int8 beside e4m3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lib import report
from bench.lib.script import script
from bench.studies.eight_bits_drift import VARIANTS, inner_in_8_bits
from hiar_kernels import quantize_rows
from hiar_model import ExecutionConfig, HiARTransformer, RolloutConfig, WanConfig
from hiar_model.rollout import Rollout
from hiar_model.schedule.plan import Task

CONFIG = WanConfig(dim=512, ffn_dim=3072, num_heads=4, num_layers=4, freq_dim=256, text_dim=64, text_len=16)
ROLLOUT = RolloutConfig(order="stream", window_frames=12)
SIDE, PREFIX, NEW = 8, 9, 12  # latents of a frame's side; frames that are given, and made
FACTOR, EVERY = 30.0, 97  # of an outlier; channels from one to the next
HEADINGS = ("weights", "variant", "velocity %", "keys %", "latents %")


def random_model(config: WanConfig = CONFIG, seed: int = 0) -> HiARTransformer:
    """Without outliers, float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HiARTransformer(config)
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                p.data.normal_(std=0.5 if "modulation" in name else p[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def _of_inputs(model: HiARTransformer, outliers: slice) -> None:
    for block in model.blocks:
        block.modulation[:, [1, 4], outliers] += FACTOR  # scales of both norms


def _of_weights(model: HiARTransformer, outliers: slice) -> None:
    for block in model.blocks:
        for layer in (block.self_attn.qkv, block.self_attn.o, block.ffn[0], block.ffn[2]):
            layer.weight[:, outliers] *= FACTOR


def _of_keys(model: HiARTransformer, outliers: slice) -> None:
    for block in model.blocks:
        block.self_attn.norm_k.weight[outliers] *= FACTOR


OUTLIERS: dict[str, Callable[[HiARTransformer, slice], None]] = {
    "plain": lambda model, outliers: None,
    "outliers in activations": _of_inputs,
    "outliers in weights": _of_weights,
    "outliers in keys": _of_keys,
}


@dataclass(frozen=True)
class Outputs:
    """Of a rollout that continues given frames; the first two are the same computation on the same inputs, once.

    velocity       [B, T, patch] of the first denoise task
    keys           [B, T, H, D] of the given frames, of the last layer, as this task reads them
    latents        [B, F, C, H, W] of the new frames, after all steps of all blocks
    """

    velocity: Tensor
    keys: Tensor
    latents: Tensor

    def errors(self, exact: Outputs) -> list[float]:
        """Relative to those of float32."""
        return [
            float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
            for a, b in ((getattr(self, name), getattr(exact, name)) for name in self.__dataclass_fields__)
        ]


def outputs(model: HiARTransformer, execution: ExecutionConfig, rollout: RolloutConfig = ROLLOUT) -> Outputs:
    """Of one rollout from fixed frames, prompt and noise."""
    draw = torch.Generator().manual_seed(1)
    dtype, config = model.patch_embedding.weight.dtype, model.config
    prefix = torch.randn(1, PREFIX, config.in_channels, SIDE, SIDE, generator=draw).to(dtype)
    text = torch.randn(1, config.text_len, config.text_dim, generator=draw).to(dtype)
    seen: dict[str, Tensor] = {}

    def read_keys(task: Task, _: Tensor) -> None:
        if "keys" in seen:
            return
        cache, last, ring = making.cache, config.num_layers - 1, slice(0, 1)
        keys = cache.view(cache.k[last], ring, PREFIX).float()
        if cache.k_scales:
            scales = cache.view(cache.k_scales[last], ring, PREFIX)
            keys = keys * scales.repeat_interleave(cache.frame_tokens, 1)[..., None]
        seen["keys"] = keys.clone()  # later tasks overwrite them

    def read_velocity(_: Any, __: Any, velocity: Tensor) -> None:
        seen.setdefault("velocity", velocity.float().clone())

    hook = model.head.register_forward_hook(read_velocity)
    try:
        making = Rollout(
            model, text, rollout, execution, num_latent_frames=PREFIX + NEW, latent_size=(SIDE, SIDE), prefix=prefix
        )
        making.on_denoise = read_keys
        latents = torch.cat([block.latents for block in making], 1)
    finally:
        hook.remove()
    return Outputs(latents=latents.float(), **seen)


def rows(config: WanConfig = CONFIG) -> Iterator[list[str]]:
    """Cells of the table, as they are computed."""
    for weights, change in OUTLIERS.items():
        model = random_model(config)
        change(model, slice(7, None, EVERY))
        exact = outputs(model, ExecutionConfig())
        for variant, (dtype, options) in VARIANTS.items():
            if dtype != "float32":
                working = deepcopy(model).to(getattr(torch, dtype))
                working = inner_in_8_bits(working) if variant == "linear_inner" else working
                result = outputs(working, ExecutionConfig(**options))
                yield [weights, variant, *(f"{100 * error:.2f}" for error in result.errors(exact))]


def e4m3(x: Tensor) -> Tensor:
    """Rounded as the linear layers round: a scale for each row."""
    values, scale = quantize_rows(x)
    return values.float() * scale[..., None]


def int8(x: Tensor) -> Tensor:
    """The same with 255 equal steps."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (x / scale).round() * scale


Rounding = Callable[[Tensor], Tensor]


class RoundedLinear(nn.Linear):
    """A linear layer with rounded weights and inputs, computed in float32."""

    def __init__(self, linear: nn.Linear, weights: Rounding | None, inputs: Rounding | None) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight if weights is None else nn.Parameter(weights(linear.weight)), linear.bias
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self.inputs is None else self.inputs(x), self.weight, self.bias)


LAYERS = ("self_attn.qkv", "self_attn.o", "ffn.0", "ffn.2")
ROUNDED: tuple[tuple[str, Rounding | None, Rounding | None, str], ...] = (
    ("weights and activations", e4m3, e4m3, ""),
    ("weights", e4m3, None, ""),
    ("activations", None, e4m3, ""),
    ("int8 weights and activations", int8, int8, ""),
    *((f"only {name}", e4m3, e4m3, name) for name in LAYERS),
    *((f"only block {i}", e4m3, e4m3, f"blocks.{i}.") for i in range(CONFIG.num_layers)),
)
"""(name, rounding of weights, of activations, which layers: those with this in their name)"""


@torch.no_grad()
def rounded(model: HiARTransformer, weights: Rounding | None, inputs: Rounding | None, which: str) -> HiARTransformer:
    """A copy with rounded layers, of those that `linear_dtype` takes."""
    model = deepcopy(model)
    for name, layer in list(model.named_modules()):
        if name.startswith("blocks.") and name.endswith(LAYERS) and which in name:
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, RoundedLinear(layer, weights, inputs))
    return model


def rounded_rows(config: WanConfig = CONFIG) -> Iterator[list[str]]:
    """Cells of the second table. With outliers only what concerns all layers."""
    for weights, change in OUTLIERS.items():
        model = random_model(config)
        change(model, slice(7, None, EVERY))
        exact = outputs(model, ExecutionConfig())
        for name, *roundings, which in ROUNDED:
            if not which or weights == "plain":
                result = outputs(rounded(model, *roundings, which), ExecutionConfig())
                yield [weights, name, *(f"{100 * error:.2f}" for error in result.errors(exact))]


def main() -> None:
    """Print the tables and what was run."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    print("\n".join(report.table(HEADINGS, rows(), text_columns=2)))
    print("\n" + "\n".join(report.table(("weights", "rounded", *HEADINGS[2:]), rounded_rows(), text_columns=2)))
    c, r = CONFIG, ROLLOUT
    print(
        f"\nwidth {c.dim}, {c.num_layers} layers, {c.num_heads} heads of {c.head_dim}, {PREFIX} given and {NEW} new "
        f"latent frames of {SIDE}x{SIDE}, {len(r.steps)} steps, window {r.window_frames}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    script(main)
