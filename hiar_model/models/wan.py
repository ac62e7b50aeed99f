"""Load a published Wan folder, original or diffusers layout: transformer, UMT5 text encoder and VAE.

    Wan2.1-T2V-1.3B/                            Wan2.1-T2V-1.3B-Diffusers/
      config.json                                 model_index.json
      diffusion_pytorch_model*.safetensors        transformer/
      models_t5_umt5-xxl-enc-bf16.pth             text_encoder/
      google/umt5-xxl/                            tokenizer/
      Wan2.1_VAE.pth                              vae/

A ``checkpoint`` replaces the folder's transformer, which may then be missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.checks import OFFLOAD, one_of, path_like
from ..common.lora_file import LoraFile
from ..config import WAN, FlowSchedule, RolloutConfig
from ..config.rollout import TrainedWindow
from ..io.files import file_sha256
from .checkpoint import CheckpointInfo, load_transformer
from .convert import TensorsDigest
from .experts import load_experts, parse_experts
from .lora import AppliedLora
from .small_stream import SmallDecoder, SmallEncoder
from .small_vae import load_small_vae, vae_kind
from .text_encoder import NATIVE_WEIGHTS, WEIGHTS, WanTextEncoder
from .transformer import HiARTransformer
from .vae import StreamingDecoder, StreamingEncoder, load_vae
from .vae_weights import ORIGINAL
from .video_model import Decoder, Encoder, VideoModel

Checkpoint = str | os.PathLike[str] | Mapping[str, str]
"""A file or folder of weights, or experts: "0-1=high.pt,2-3=low.pt" or {"0-1": "high.pt", ...}."""


def is_wan_folder(folder: Path) -> bool:
    """Whether the folder has any part of a published Wan folder."""
    parts = ("model_index.json", NATIVE_WEIGHTS, ORIGINAL, WEIGHTS, "vae")
    return any((folder / name).exists() for name in parts) or any(folder.glob("diffusion_pytorch_model*"))


def load_wan(
    folder: Path,
    *,
    device: torch.device,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    linear_dtype: str | None = None,
    checkpoint: Checkpoint | None = None,
    steps: int | None = None,
    own_steps: Iterable[int] | None = None,
    vae: str | os.PathLike[str] | None = None,
    offload: Sequence[str] = (),
    prompt_cache: str | os.PathLike[str] | None = None,
    lora: Sequence[LoraFile] = (),
    on_checkpoint: Callable[[str], None] | None = None,
    on_stage: Callable[[str, int], None] | None = None,
) -> VideoModel:
    """Load a Wan folder: 480x832 pixels, 81 frames, 16 fps, 4 steps of shift 5, blocks of 3 and a window of 21 latent
    frames; window and sink of the config.json, if it is a causal model's.

    Args:
        name: of the model; None: the folder. dtype: of weights and computation; None: bfloat16. The text encoder, and
            the VAE on CUDA, cannot run in float16 and use bfloat16 then; on the CPU the VAE runs in float32.
        linear_dtype: of :func:`hiar_model.load_transformer`.
        checkpoint: the transformer's weights: whatever :func:`hiar_model.load_transformer` reads, or experts.
        steps: number of steps, spread evenly; None: 1000, 750, 500, 250.
        own_steps: the steps of this rank of a pipeline, which loads only their experts; None: all.
        vae: file or folder of another VAE than the folder's: Wan's own, or the small one, taew2_1 (float16 on CUDA).
        offload: "text": move the text encoder to the CPU after each prompt; "vae": run the VAE on the CPU.
        prompt_cache: folder of prompt embeddings, see :class:`WanTextEncoder`.
        lora: files to merge into the transformer, into every expert.
        on_checkpoint: called with one line about each transformer and each LoRA that is loaded.
        on_stage: called with what is being read or encoded, in words, and the bytes of its weights.

    Raises:
        ValueError: one line: a part that is missing, corrupt or of a wrong shape, parts that do not fit.
    """
    for part in offload:
        one_of("offload", part, OFFLOAD)
    schedule = FlowSchedule() if steps is None else FlowSchedule.uniform(steps, FlowSchedule().shift)
    dtype = dtype or torch.bfloat16
    beside = torch.bfloat16 if dtype == torch.float16 else dtype
    # Small files first: an error in them is reported before the large ones are read.
    files = _experts(checkpoint, len(schedule))
    text = WanTextEncoder(
        folder,
        device=device,
        dtype=beside,
        offload="cpu" if "text" in offload else None,
        cache=prompt_cache,
        on_stage=on_stage,
    )
    on_cpu = "vae" in offload or device.type == "cpu"
    pixels = _pixels(folder if vae is None else vae, beside, torch.device("cpu") if on_cpu else device)

    loras: list[AppliedLora] = []  # the same for each expert; a file may stand there twice
    windows: dict[TrainedWindow, str | os.PathLike[str]] = {}  # -> checkpoint

    def load(path: str | os.PathLike[str]) -> HiARTransformer:
        is_first = not loras

        def merged(lora: AppliedLora, note: str) -> None:
            if is_first:
                loras.append(lora)
                if on_checkpoint is not None:
                    on_checkpoint(note)

        def check(info: CheckpointInfo) -> None:
            channels, needed = pixels.config.z_dim, (info.config.in_channels, info.config.out_channels)
            if needed != (channels, channels):
                raise ValueError(
                    f"{path}: takes {needed[0]} channels and makes {needed[1]}, the VAE {pixels.file} has {channels}: "
                    "expected a text-to-video model"
                )
            windows.setdefault(info.window, path)
            if len(windows) > 1:
                (window, sink), other = next(iter(windows.items()))
                raise ValueError(
                    f"experts: the config.json of {path} says window {info.window.window} and sink "
                    f"{info.window.sink}, that of {other} {window} and {sink}; steps share one window"
                )
            if on_checkpoint is not None:
                on_checkpoint(info.describe(linear_dtype))
            if on_stage is not None:
                on_stage("reading the transformer", info.nbytes)

        return load_transformer(
            Path(path), dtype=dtype, device=device, linear_dtype=linear_dtype, lora=lora, on_checkpoint=check,
            on_lora=merged, on_tensor=digest.add if files is None else None,
        ).requires_grad_(False)  # fmt: skip

    digest = TensorsDigest()

    if files is None:
        experts, transformer = None, load(folder if checkpoint is None else checkpoint)  # type: ignore[arg-type]
        identity = digest.hexdigest()
    else:
        experts = tuple(load_experts(files, load, own_steps))
        transformer = next(filter(None, experts))
        identity = _identity(files)
    rollout = RolloutConfig(
        schedule.steps, schedule.shift, frames_per_block=WAN.frames_per_block, window_frames=WAN.window_frames
    )
    cell = pixels.config.scale_factor_spatial
    rows, columns = (cell * patch for patch in transformer.config.patch_size[1:])
    options = {
        "checkpoint": _as_option(checkpoint),
        "vae": "" if vae is None else os.path.abspath(vae),
        "offload": ",".join(offload),
        "steps": "" if steps is None else str(steps),
    }
    return VideoModel(
        name=name or os.fspath(folder),
        transformer=transformer,
        experts=experts,
        rollout=next(iter(windows)).apply(rollout),
        fps=WAN.fps,
        num_frames=WAN.num_frames,
        train_frames=WAN.num_frames,
        latent_size=(pixels.config.z_dim, WAN.size[0] // cell, WAN.size[1] // cell),
        weights_sha256=identity,
        text_encoder=text,
        new_decoder=pixels.new_decoder,
        new_encoder=pixels.new_encoder,
        decoded_by={"vae": pixels.kind, "file": pixels.file.name, "sha256": file_sha256(pixels.file)},
        temporal_compression=pixels.config.scale_factor_temporal,
        spatial_compression=cell,
        size_step=(rows, columns),
        options={option: value for option, value in options.items() if value},
        merged_loras=tuple(loras),
    )


@dataclass(frozen=True)
class _Pixels:
    """A VAE: ``kind`` "full" or "small"."""

    kind: str
    file: Path
    config: Any
    new_decoder: Callable[[], Decoder]
    new_encoder: Callable[[], Encoder]


def _pixels(path: str | os.PathLike[str], dtype: torch.dtype, device: torch.device) -> _Pixels:
    """Load the VAE that a path means; on a CPU in float32."""
    file, kind = vae_kind(Path(path))
    if kind == "small":
        small = load_small_vae(file, device=device)
        return _Pixels(
            kind, file, small.config, lambda: SmallDecoder(small, own_stream=True), lambda: SmallEncoder(small)
        )
    full = load_vae(file, dtype=torch.float32 if device.type == "cpu" else dtype, device=device)
    return _Pixels(
        kind, file, full.config, lambda: StreamingDecoder(full, own_stream=True), lambda: StreamingEncoder(full)
    )


def is_experts(checkpoint: Checkpoint | None) -> bool:
    """Whether a checkpoint names experts."""
    if isinstance(checkpoint, str):
        return "=" in checkpoint and not Path(checkpoint).exists()
    return isinstance(checkpoint, Mapping)


def _experts(checkpoint: Checkpoint | None, steps: int) -> tuple[str, ...] | None:
    """The expert file of each step; None if there are no experts."""
    if not is_experts(checkpoint):
        return None
    files = parse_experts(checkpoint, steps)  # type: ignore[arg-type]
    missing = [file for file in files if not path_like("experts", file).exists()]
    if missing:
        raise ValueError(f"experts: {missing[0]}: no such file or folder")
    return files


def _identity(files: Sequence[str]) -> str:
    """Hash of names, sizes and times: the same for all ranks of a pipeline, none of which reads all files."""
    stamps = [(Path(file).name, (stat := Path(file).stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _as_option(checkpoint: Checkpoint | None) -> str:
    """The checkpoint as a command-line option with absolute paths."""
    if checkpoint is None:
        return ""
    if not is_experts(checkpoint):
        return os.path.abspath(checkpoint)  # type: ignore[arg-type]
    parts = checkpoint.split(",") if isinstance(checkpoint, str) else map("=".join, checkpoint.items())  # type: ignore[union-attr]
    pairs = [part.partition("=") for part in parts]
    return ",".join(f"{steps}={os.path.abspath(file)}" for steps, _, file in pairs)
