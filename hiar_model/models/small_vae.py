"""The small autoencoder of the taehv project for Wan 2.1, ``taew2_1``: its network, and its weights from disk.

Convolutions of single frames; in between, blocks that also see the frame before, so that a clip may go through in
pieces of any length. Latents are Wan's normalised ones: no mean and deviation are applied. Keys and sizes follow the
published file (https://github.com/madebyollin/taehv, revision 1f14a56); the ``super`` decoder, which the project has
for other models, is recognised by its keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.weight_files import check_keys, check_tensors, read_tensors, some, tensor_names
from .vae_weights import find_vae, is_full_vae

CHANNELS = 16  # of latents
STEP, CELL = 4, 8  # pixel frames of a latent frame; pixels of a latent along a side
SMALL = "SmallVAE"  # _class_name of its settings, beside diffusers' AutoencoderKLWan
EXPECTED = "taew2_1 (.pth or .safetensors), Wan2.1_VAE.pth, or diffusers' vae folder"
_KEY, _SUPER_KEY = "decoder.3.conv.0.weight", "decoder.1.conv.0.weight"
_SAME_LAYOUT = {"taehv": "Hunyuan Video", "taecvx": "CogVideoX", "taeos1_3": "Open-Sora 1.3"}  # by file name
_OTHERS = {  # latent channels -> what the taehv project has them for
    24: "taeh3", 32: "taehv1_5, of Hunyuan Video 1.5", 48: "taew2_2, of Wan 2.2 5B", 128: "taeltx, of LTX-2",
}  # fmt: skip


def _conv3(inputs: int, outputs: int, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, stride=stride)


class _Limit(nn.Module):
    """Keeps latents within 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block that sees a frame and the one before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Sequential(
            _conv3(2 * channels, channels), nn.ReLU(inplace=True),
            _conv3(channels, channels), nn.ReLU(inplace=True),
            _conv3(channels, channels),
        )  # fmt: skip

    def forward(self, x: Tensor, both: Tensor) -> Tensor:
        """x [N, C, h, w], and each frame with the one before it: both [N, 2C, h, w]."""
        return F.relu_(self.conv(both).add_(x))


class SuperMemoryBlock(MemoryBlock):
    """That of the super decoder: depthwise 7x7, then 1x1 convolutions, without a last ReLU."""

    def __init__(self, channels: int) -> None:
        nn.Module.__init__(self)
        self.channels, two = channels, 2 * channels
        self.conv = nn.Sequential(
            nn.Conv2d(two, two, 7, padding=3, groups=two, bias=False),
            nn.Conv2d(two, 2 * two, 1), nn.ReLU(inplace=True),
            nn.Conv2d(2 * two, channels, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor, both: Tensor) -> Tensor:
        return self.conv(both).add_(x)


class _Pool(nn.Module):
    """``frames`` frames to one."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels * frames, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, self.conv.in_channels, *x.shape[2:]))


class _Grow(nn.Module):
    """One frame to ``frames`` frames, then ``scale`` times as high and wide.

    The published layout enlarges first; the order does not matter to a 1x1 convolution and a repetition of pixels.
    """

    def __init__(self, channels: int, frames: int, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, channels * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        grown = self.conv(x).reshape(-1, self.conv.in_channels, *x.shape[2:])
        return grown if self.scale == 1 else F.interpolate(grown, scale_factor=float(self.scale))


class _Shuffle(nn.PixelShuffle):
    """Channels to pixels."""

    @property
    def scale(self) -> int:
        return self.upscale_factor


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = [_conv3(3, 64), nn.ReLU(inplace=True)]
    for frames in (2, 2, 1):
        layers += [_Pool(64, frames), _conv3(64, 64, bias=False, stride=2), *(MemoryBlock(64) for _ in range(3))]
    return nn.Sequential(*layers, _conv3(64, CHANNELS))


def _decoder() -> nn.Sequential:
    layers: list[nn.Module] = [_Limit(), _conv3(CHANNELS, 256), nn.ReLU(inplace=True)]
    for width, following, frames in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
        layers += [MemoryBlock(width) for _ in range(3)]
        layers += [nn.Identity(), _Grow(width, frames, 2), _conv3(width, following, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), _conv3(64, 3))


def _super_decoder() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(CHANNELS, 512, 1, bias=False)]
    for width, following, frames in ((512, 256, 1), (256, 128, 2), (128, 64, 2)):
        layers += [SuperMemoryBlock(width) for _ in range(3)]
        layers += [_conv3(width, 4 * following), nn.ReLU(inplace=True), _Shuffle(2), _Grow(following, frames)]
    return nn.Sequential(*layers, _conv3(64, 3))


class SmallVAE(nn.Module):
    """Encoder and decoder under the published keys; ``large``: with the super decoder.

    :class:`.small_stream.SmallDecoder` and ``SmallEncoder`` put clips through it.
    """

    use_tiling = False

    def __init__(self, large: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = _encoder(), _super_decoder() if large else _decoder()
        self.config = SimpleNamespace(
            z_dim=CHANNELS, latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
            scale_factor_temporal=STEP, scale_factor_spatial=CELL,
        )  # fmt: skip


def through(layers: nn.Sequential, x: Tensor, before: list[Tensor]) -> Tensor:
    """Frames through the encoder or decoder.

    Args:
        x: [B, f, C, h, w]; of the encoder a multiple of 4 frames.
        before: the last frame [B, C, h, w] that each memory block saw, zeros at the start of a clip; overwritten.
    """
    batch, blocks = x.shape[0], iter(before)
    x = x.flatten(0, 1)
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            frames, memory = x.unflatten(0, (batch, -1)), next(blocks)
            both = torch.cat([frames, torch.cat([memory[:, None], frames[:, :-1]], 1)], 2)
            memory.copy_(frames[:, -1])
            x = layer(x, both.flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1))


def memory_sizes(layers: nn.Sequential, height: int, width: int) -> list[tuple[int, int, int]]:
    """[C, h, w] of the frame that each memory block keeps, for frames of height x width."""
    sizes = []
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            sizes.append((layer.channels, height, width))
        elif isinstance(layer, nn.Conv2d):
            height, width = height // layer.stride[0], width // layer.stride[1]
        elif isinstance(layer, _Grow | _Shuffle):
            height, width = height * layer.scale, width * layer.scale
    return sizes


def load_small_vae(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
) -> SmallVAE:
    """The small autoencoder of a ``taew2_1`` file, in evaluation mode.

    Args:
        path: .pth or .safetensors. dtype: of weights and work; None: float16 on CUDA, as published, else float32.
        channels_last: memory format of weights and features (bench/vae/bench_vae.py measures both).

    Raises:
        ValueError: one line: no such file, a corrupt one, or what the file holds instead.

    Example:
        >>> from hiar_model.models.small_vae import load_small_vae
        >>> from hiar_model.models.small_stream import SmallDecoder
        >>> vae = load_small_vae("taew2_1.pth")  # doctest: +SKIP
        >>> SmallDecoder(vae).decode(torch.zeros(1, 3, 16, 60, 104)).shape  # doctest: +SKIP
        (9, 480, 832, 3)
    """
    file = Path(path)
    state, _ = read_tensors(file)
    if not isinstance(state, Mapping):
        raise ValueError(f"{file}: holds a {type(state).__name__}, expected a state dict of {EXPECTED}")
    check_tensors(state, file)
    _require_small(state, file)
    with torch.device("meta"):
        vae = SmallVAE(_SUPER_KEY in state)
    check_keys(state, vae.state_dict(), file)
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    vae.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    return vae.to(memory_format=memory_format).eval().requires_grad_(False)  # type: ignore[call-overload]


def vae_kind(path: str | Path) -> tuple[Path, str]:
    """The file of a VAE that a path means, and "small" or "full"; ValueError that says what it holds instead."""
    file = find_vae(Path(path))
    if file.suffix == ".safetensors":
        names = tensor_names(file)
    else:
        state, _ = read_tensors(file)  # memory-mapped
        if not isinstance(state, Mapping):
            raise ValueError(f"{file}: holds a {type(state).__name__}, expected a state dict of {EXPECTED}")
        names = [str(name) for name in state]
    if _KEY in names:
        return file, "small"
    if not is_full_vae(names):
        raise ValueError(f"{file}: holds {_what(names)}, expected a VAE of Wan 2.1: {EXPECTED}")
    return file, "full"


def vae_settings(file: Path) -> dict[str, Any]:
    """The settings of a small autoencoder, in the form of diffusers' config."""
    state, _ = read_tensors(file)
    _require_small(state, file)
    return {"_class_name": SMALL, "large": _SUPER_KEY in state}


def _require_small(state: Mapping[str, Tensor], file: Path) -> None:
    """Refuse the autoencoders of other models, and what is none."""
    if _KEY not in state:
        raise ValueError(f"{file}: holds {_what(state)}, expected the small VAE of Wan 2.1: taew2_1")
    if (model := _SAME_LAYOUT.get(file.stem)) is not None:
        raise ValueError(f"{file}: by its name the small VAE of {model}, whose latents differ; expected taew2_1")
    last = state.get("encoder.17.weight")
    if last is not None and len(last) != CHANNELS:
        other = _OTHERS.get(len(last), "of another model")
        raise ValueError(
            f"{file}: a small VAE of {len(last)} latent channels ({other}); expected taew2_1, of {CHANNELS}"
        )


def _what(names: Iterable[str]) -> str:
    """What a file holds, in words."""
    names = list(names)
    for words, marks in (
        ("a LoRA", ("lora_", ".lora")), ("the weights of a transformer", ("blocks.0.self_attn", "blocks.0.attn1")),
        ("the weights of a text encoder", ("token_embedding", "shared.weight")),
        ("another autoencoder", ("decoder.mid", "decoder.up")),
    ):  # fmt: skip
        if any(mark in name for name in names for mark in marks):
            return words
    return f"the keys {some(names)}" if names else "no tensors"
