"""Load models by name or folder: toy models here, Wan folders in :mod:`hiar_model.models.wan`; save toy models.

A toy model's folder holds `model.safetensors` (the transformer's tensors under "transformer." and the published Wan
keys, the codec's under "codec.") and `config.json`:

    {"format": "hiar-toy", "transformer": {fields of WanConfig}, "world": {fields of WorldConfig},
     "rollout": {fields of RolloutConfig}, "fps": 12, "num_frames": 48, "train_frames": 12}

In files written before 0.2 "schedule" and single fields stand in place of "rollout"; they are read too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as pack_tensors
from torch import Tensor

from ..common.checks import one_line, path_like
from ..common.lora_file import LoraLike, lora_files
from ..common.settings import own_settings
from ..config import SHIPPED, ExecutionConfig, RolloutConfig, WanConfig, no_folder
from ..io.atomic import atomic, atomic_write
from ..io.video import Frames
from ..io.weight_files import check_keys, check_tensors, read_json, read_tensors
from ..toy.codec import ToyCodec
from ..toy.text import ToyTextEncoder
from ..toy.world import WorldConfig
from .checkpoint import TOY_FORMAT, TOY_TRANSFORMER
from .lora import AppliedLora, merged, read_loras
from .quantized_linear import quantize_layers
from .transformer import HiARTransformer
from .video_model import VideoModel, pick_device, pick_dtype
from .wan import Checkpoint, is_experts, is_wan_folder, load_wan

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TRANSFORMER, CODEC = TOY_TRANSFORMER, "codec."


@dataclass(frozen=True)
class ToyDecoder:
    """Decoder of toy models; frames are independent, so nothing is carried from block to block."""

    codec: ToyCodec

    def decode(self, latents: Tensor) -> Frames:
        """latents [1, f, C, h, w] -> uint8 [f, H, W, 3]."""
        return self.codec.to_uint8(self.codec.decode(latents.detach().float().cpu()))[0].numpy()


def model_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a shipped model's name or of a path; ValueError if there is no such folder."""
    if name_or_path != "":  # refused below, with the names of the shipped models
        path_like("model", name_or_path)
    name = os.fspath(name_or_path)
    if name in SHIPPED:
        package, inside = SHIPPED[name]
        folder = Path(str(resources.files(package))) / inside
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"the shipped model {name!r} is missing ({folder / WEIGHTS}): reinstall the package")
        return folder
    if Path(name).is_file():
        raise ValueError(
            f"model {name} is a file: give a folder as model, and weights of its transformer as checkpoint"
        )
    if not name or not Path(name).is_dir():
        raise ValueError(
            f"model {name!r} is neither a folder nor a shipped model; shipped: {', '.join(SHIPPED)}{no_folder(name)}"
        )
    return Path(name)


@own_settings()
def load_video_model(
    name_or_path: str | os.PathLike[str] = "toy",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    *,
    linear_dtype: str | None = None,
    checkpoint: Checkpoint | None = None,
    steps: int | None = None,
    own_steps: Sequence[int] | None = None,
    vae: str | os.PathLike[str] | None = None,
    offload: str | Sequence[str] = (),
    prompt_cache: str | os.PathLike[str] | None = None,
    lora: LoraLike | Sequence[LoraLike] | None = None,
    on_checkpoint: Callable[[str], None] | None = None,
    on_stage: Callable[[str, int], None] | None = None,
) -> VideoModel:
    """Load a shipped model by name, or a model folder: Wan's original or diffusers layout, or :func:`save_toy_model`'s.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ... dtype: of weights and computation; None: bfloat16 for Wan, float32
            for toy models.
        linear_dtype: "float8_e4m3fn" or "int8": load the large linear layers in 8 bits and in no other form, for
            rollouts with this ``linear_dtype`` (:func:`.load_transformer`).
        lora: LoRA files to merge into the transformer: paths, "path:scale" or (path, scale).
        on_checkpoint: called with one line about each transformer (Wan) and each LoRA.
        checkpoint, steps, own_steps, vae, offload, prompt_cache, on_stage: for Wan folders, see
            :func:`.wan.load_wan`.

    Raises:
        ValueError: one line that names the first part that is missing, corrupt or of a wrong shape.

    >>> model = load_video_model("toy", "cpu")
    >>> model.pixel_size, model.num_frames, model.encode_text("a red circle moving right").shape
    ((32, 32), 48, torch.Size([1, 5, 32]))
    """
    device, dtype = pick_device(device), pick_dtype(dtype)
    linear_dtype = ExecutionConfig(linear_dtype=linear_dtype).linear_dtype  # checked, by name
    folder = model_folder(name_or_path)
    name, files = os.fspath(name_or_path), lora_files(lora)
    of_wan = {"checkpoint": checkpoint, "vae": vae, "offload": offload, "prompt_cache": prompt_cache}
    for option in (option for option, value in of_wan.items() if value == ""):
        raise ValueError(f"{option} must hold something, got ''; None: without it")
    for option, path in (("vae", vae), ("prompt_cache", prompt_cache)):
        if path is not None:
            path_like(option, path)
    if checkpoint is not None and not is_experts(checkpoint):
        path_like("checkpoint", checkpoint)
    offload = [offload] if isinstance(offload, str) else list(offload)
    for option, function in (("on_checkpoint", on_checkpoint), ("on_stage", on_stage)):
        if function is not None and not callable(function):
            raise ValueError(f"{option} must be a function or None, got {one_line(function)}")
    if is_wan_folder(folder):
        return load_wan(
            folder, name=name, device=device, dtype=dtype, linear_dtype=linear_dtype, checkpoint=checkpoint,
            steps=steps, own_steps=own_steps, vae=vae, offload=offload, prompt_cache=prompt_cache, lora=files,
            on_checkpoint=on_checkpoint, on_stage=on_stage,
        )  # fmt: skip
    for option, value in of_wan.items():
        if value:
            raise ValueError(f"model {name} is no Wan folder: it takes no {option}, got {value!r}")
    if not (folder / CONFIG).exists():
        inside = [path for path in sorted(folder.glob("*")) + sorted(folder.glob("snapshots/*")) if is_wan_folder(path)]
        if inside:
            raise ValueError(f"model {name}: no model there, but in {inside[0]}: give that folder")
    settings = _read_config(folder / CONFIG)
    tensors, _ = read_tensors(folder / WEIGHTS)
    with (folder / WEIGHTS).open("rb") as file:
        sha256 = hashlib.sha256(file.read()).hexdigest()
    loras: tuple[AppliedLora, ...] = ()
    if files:
        own = {key.removeprefix(TRANSFORMER): x for key, x in tensors.items() if key.startswith(TRANSFORMER)}
        adapters, loras, notes = read_loras(files, own)
        state = merged(own, adapters, dtype or torch.float32)
        tensors = {**tensors, **{TRANSFORMER + key: x for key, x in state.items()}}
        for note in notes if on_checkpoint is not None else ():
            on_checkpoint(note)  # type: ignore[misc]
    try:
        model = _build(name, settings, tensors, sha256, device, dtype or torch.float32)
    except (ValueError, TypeError) as error:  # TypeError: a value in config.json of a wrong type
        raise ValueError(f"{folder}: {error}") from error
    if linear_dtype is not None:
        quantize_layers(model.transformer, getattr(torch, linear_dtype))
    return dataclasses.replace(model, merged_loras=loras)


def _build(
    name: str, values: dict[str, Any], tensors: dict[str, Tensor], sha256: str, device: torch.device, dtype: torch.dtype
) -> VideoModel:
    config = WanConfig.from_dict(values["transformer"])
    world = WorldConfig(**_frozen(values["world"]))
    rollout = RolloutConfig.from_dict(values["rollout"])
    with torch.device("meta"):
        transformer = HiARTransformer(config)
    groups: dict[str, dict[str, Tensor]] = {TRANSFORMER: {}, CODEC: {}}
    for key, tensor in tensors.items():
        prefix = key.partition(".")[0] + "."
        if prefix not in groups:
            raise ValueError(f"unexpected tensor {key}; expected {TRANSFORMER}* and {CODEC}*")
        groups[prefix][key.removeprefix(prefix)] = tensor
    check_tensors(groups[TRANSFORMER], Path(WEIGHTS))
    check_keys(groups[TRANSFORMER], transformer.state_dict(), Path(WEIGHTS), lambda key: TRANSFORMER + key)
    codec = ToyCodec.from_state(groups[CODEC])
    if codec.channels != config.in_channels:
        raise ValueError(f"the codec has {codec.channels} channels, the transformer takes {config.in_channels}")
    transformer.load_state_dict({k: v.to(device, dtype) for k, v in groups[TRANSFORMER].items()}, assign=True)
    text = ToyTextEncoder(config.text_dim, world.free_speed)
    return VideoModel(
        name=name,
        transformer=transformer.eval().requires_grad_(False),
        rollout=rollout,
        fps=values["fps"],
        num_frames=values["num_frames"],
        train_frames=values["train_frames"],
        latent_size=codec.latent_shape(world.height, world.width),
        weights_sha256=sha256,
        text_encoder=lambda prompt: text.encode([prompt]),
        new_decoder=lambda: ToyDecoder(codec),
        new_encoder=lambda: codec,
        spatial_compression=codec.cell,
        world=world,
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The contents of config.json; ValueError for keys that are missing or unknown."""
    values = read_json(path)
    if values.get("format") != TOY_FORMAT:
        raise ValueError(f'{path}: format must be "{TOY_FORMAT}"')
    if "rollout" not in values and "schedule" in values:
        values = _with_rollout(values)
    keys = ["format", *_NESTED, *_PLAIN]
    _check_known(path, values, keys)
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{path}: key {missing[0]} is missing")
    for key, kind in _NESTED.items():
        if not isinstance(values[key], dict):
            raise ValueError(f"{path}: {key} must be an object")
        _check_known(path, values[key], [f.name for f in dataclasses.fields(kind)], f"{key}.")
    return values


_NESTED: dict[str, Any] = {"transformer": WanConfig, "world": WorldConfig, "rollout": RolloutConfig}
_PLAIN = ("fps", "num_frames", "train_frames")


def _with_rollout(values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json written before 0.2, in today's form."""
    values = dict(values)
    rollout = values.pop("schedule") | {"kv_source": values.pop("cache_source", "own")}
    rollout |= {f.name: values.pop(f.name) for f in dataclasses.fields(RolloutConfig) if f.name in values}
    if rollout.get("order", "") is None:
        del rollout["order"]
    return values | {"rollout": rollout}


def _check_known(path: Path, values: Mapping[str, Any], known: list[str], prefix: str = "") -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {prefix}{key}; known: {', '.join(known)}")


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    """JSON lists as the tuples that frozen dataclasses hold."""

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return {key: freeze(value) for key, value in values.items()}


@own_settings()
def save_toy_model(
    folder: str | os.PathLike[str],
    transformer: HiARTransformer,
    codec: ToyCodec,
    *,
    rollout: RolloutConfig,
    train_frames: int = 12,
    num_frames: int | None = None,
    fps: float = 12,
    world: WorldConfig | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a model folder that :func:`load_video_model` reads, and return it.

    A new folder is written atomically, an existing one file by file.

    Args:
        rollout: the configuration that it was trained for. train_frames: pixel frames of the training clips.
        num_frames: default length of a video; None: four times ``train_frames``. fps: frames per second.
        dtype: of the transformer's tensors in the file; the codec's stay float32.

    Raises:
        ValueError: weights that are not finite in ``dtype``, settings that do not fit together.
        OSError: the folder cannot be written.
    """
    target, world = Path(folder), world or WorldConfig()
    settings = {
        "format": TOY_FORMAT,
        "transformer": transformer.config.to_dict(),
        "world": dataclasses.asdict(world),
        "rollout": rollout.to_dict(),
        "fps": fps,
        "num_frames": 4 * train_frames if num_frames is None else num_frames,
        "train_frames": train_frames,
    }
    tensors = {CODEC + name: value.detach().cpu().contiguous() for name, value in codec.state_dict().items()}
    for name, value in transformer.state_dict().items():
        tensors[TRANSFORMER + name] = value.detach().to("cpu", dtype).contiguous()
        if not bool(tensors[TRANSFORMER + name].isfinite().all()):
            raise ValueError(f"{TRANSFORMER}{name} is not finite in {dtype}: not written to {target}")
    # Never write what cannot be loaded.
    text = json.dumps(settings, indent=2) + "\n"
    _build(str(target), json.loads(text), tensors, "", torch.device("cpu"), torch.float32)
    files = {WEIGHTS: pack_tensors(tensors), CONFIG: text.encode()}
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        for name, content in files.items():
            atomic_write(target / name, content)
    else:
        with atomic(target) as partial:
            partial.mkdir()
            for name, content in files.items():
                (partial / name).write_bytes(content)
    return target
