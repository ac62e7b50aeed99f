"""Networks of a run: made anew or from weights, and put together again where they are sharded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..bundle import CONFIG, SHIPPED, TOY_FORMAT, load_video_model
from ..checkpoint import load_transformer
from ..config import WanConfig
from ..transformer import HiARTransformer
from .distributed import is_first


def make_network(
    model: str,
    *,
    seed: int,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> HiARTransformer:
    """A float32 network in training mode. Of joined processes only the first one reads weights: for the others it is on
    the meta device, and :func:`.distributed.shard` fills it.

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
            torch.manual_seed(seed)
            network = HiARTransformer(config)
        _initialise(network)
    else:
        if os.fspath(weights) in SHIPPED or _is_toy(Path(weights)):
            network = load_video_model(weights, "cpu", "float32").transformer
        else:
            network = load_transformer(Path(weights), dtype=torch.float32, device=device)
        if network.config != config:
            raise ValueError(f"{os.fspath(weights)} has the size {network.config}, the recipe's {model} is {config}")
    return network.to(device).train().requires_grad_(True)


def frozen(network: HiARTransformer, dtype: torch.dtype | None = None) -> HiARTransformer:
    """The same network in evaluation mode, without gradients, in ``dtype`` if that is given."""
    return network.to(dtype=dtype).eval().requires_grad_(False)


def whole(weights: Mapping[str, Tensor], config: WanConfig) -> HiARTransformer | None:
    """A plain network on the CPU from named parameters, sharded or not; None on ranks but the first.

    Every rank must call it.
    """
    first = is_first()
    if first:
        with torch.device("meta"):
            network = HiARTransformer(config)
        network = network.to_empty(device="cpu")
        places = dict(network.named_parameters())
    for name, value in weights.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            with torch.no_grad():
                places[name].copy_(full)
    return network.eval().requires_grad_(False) if first else None


def _is_toy(folder: Path) -> bool:
    config = folder / CONFIG
    return config.is_file() and TOY_FORMAT in config.read_text(encoding="utf-8", errors="replace")


def _initialise(network: HiARTransformer) -> None:
    """Gates and the head start at zero (adaLN-Zero, arXiv 2212.09748): every block begins as the identity."""
    last = network.time_projection[-1]
    assert isinstance(last, torch.nn.Linear)
    zeros = [last.weight, last.bias, network.head.head.weight, network.head.head.bias]
    with torch.no_grad():
        for parameter in (*zeros, *(block.modulation for block in network.blocks)):
            parameter.zero_()  # type: ignore[operator]
