"""Networks of a run: created from random or stored weights, and gathered from their shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...common.keyed import KeyedGenerator, keyed_generator
from ...common.settings import own_settings
from ...config import WanConfig
from ...models.checkpoint import load_transformer
from ...models.registry import CONFIG, SHIPPED, TOY_FORMAT, load_video_model
from ...models.transformer import HiARTransformer
from .distributed import is_first


@own_settings()
def make_network(
    model: str,
    *,
    seed: int,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> HiARTransformer:
    """A float32 network in training mode. Only rank 0 reads weights: on other ranks it is on the meta device until
    :func:`.distributed.shard` fills it.

    Args:
        model: size, a name that WanConfig knows. seed: of random weights.
        weights: None: random; else the folder or name of a toy model, or a checkpoint that load_transformer reads.

    Raises:
        ValueError: weights that cannot be read, or of another size; on every process alike.
    """
    config = WanConfig.from_name(model)
    device = device if is_first() else "meta"
    if weights is None:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
            network = HiARTransformer(config)
        _initialise(network, seed)
    else:
        if os.fspath(weights) in SHIPPED or _is_toy(Path(weights)):
            network = load_video_model(weights, "cpu", "float32").transformer
        else:
            network = load_transformer(Path(weights), dtype=torch.float32, device=device)
        if network.config != config:
            raise ValueError(f"{os.fspath(weights)} has the size {network.config}, the recipe's {model} is {config}")
    return network.to(device).train().requires_grad_(True)


def frozen(network: HiARTransformer, dtype: torch.dtype | None = None) -> HiARTransformer:
    """The same network in evaluation mode, without gradients, converted to ``dtype``; None: as it is."""
    return network.to(dtype=dtype).eval().requires_grad_(False)


@torch.no_grad()
def gather(weights: Mapping[str, Tensor], config: WanConfig) -> HiARTransformer | None:
    """A plain network on the CPU from named parameters, sharded or not; None on ranks other than 0.

    Every rank must call it.
    """
    first = is_first()
    if first:
        with torch.device("meta"):
            network = HiARTransformer(config)
        parameters = dict(network.to_empty(device="cpu").named_parameters())
    for name, value in weights.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            parameters[name].copy_(full)
    return network.eval().requires_grad_(False) if first else None


def _is_toy(folder: Path) -> bool:
    config = folder / CONFIG
    return config.is_file() and TOY_FORMAT in config.read_text(encoding="utf-8", errors="replace")


def _initialise(network: HiARTransformer, seed: int) -> None:
    """As torch initialises layers, but each parameter keyed by (seed, its name). Gates and the head start at zero
    (adaLN-Zero, arXiv 2212.09748): every block begins as the identity.
    """
    if network.patch_embedding.weight.is_meta:
        return

    def key(name: str) -> KeyedGenerator:
        return keyed_generator(seed, "weights", name)

    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv3d):
                bound = layer.weight[0].numel() ** -0.5
                for kind, own in layer.named_parameters():
                    own.copy_((2 * key(f"{name}.{kind}").uniform(*own.shape) - 1) * bound)
        if network.position_embedding is not None:
            table = network.position_embedding
            table.copy_(key("position_embedding").normals(*table.shape) / table.shape[-1] ** 0.5)
        last, head = network.time_projection[-1], network.head
        assert isinstance(last, torch.nn.Linear)
        head.modulation.copy_(key("head.modulation").normals(*head.modulation.shape) / network.config.dim**0.5)
        zeros = [last.weight, last.bias, head.head.weight, head.head.bias]
        for gate in (*zeros, *(block.modulation for block in network.blocks)):
            gate.zero_()  # type: ignore[operator]
