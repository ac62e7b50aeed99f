"""Models on disk by one name: the toy model's folder, here, and Wan's (:mod:`hiar_model.models.wan`).

The toy model's folder holds `model.safetensors` (the transformer's tensors under the published Wan keys behind
"transformer.", the codec's behind "codec.") and `config.json`:

    {"format": "hiar-toy", "transformer": {fields of WanConfig}, "world": {fields of WorldConfig},
     "rollout": {fields of RolloutConfig}, "fps": 12, "num_frames": 48, "train_frames": 12}

Files of before 0.2 have the schedule and single fields in place of "rollout"; they are read too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor

from ..common.settings import own_settings
from ..config import SHIPPED, RolloutConfig, WanConfig
from ..io.files import refuse_stand_in
from ..io.video import Frames
from ..toy.codec import ToyCodec
from ..toy.text import ToyTextEncoder
from ..toy.world import WorldConfig
from .checkpoint import TOY_FORMAT, TOY_TRANSFORMER
from .transformer import HiARTransformer
from .video_model import VideoModel, pick_device, pick_dtype
from .wan import Checkpoint, is_wan_folder, load_wan

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TRANSFORMER, CODEC = TOY_TRANSFORMER, "codec."


@dataclass(frozen=True)
class ToyDecoder:
    """The toy's codec looks at single frames: nothing is kept between blocks."""

    codec: ToyCodec

    def decode(self, latents: Tensor) -> Frames:
        """latents [1, f, C, h, w] -> uint8 [f, H, W, 3]."""
        return self.codec.to_uint8(self.codec.decode(latents.detach().float().cpu()))[0].numpy()


def model_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a shipped model or of a path; ValueError if there is none."""
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
        raise ValueError(f"model {name!r} is neither a folder nor a shipped model; shipped: {', '.join(SHIPPED)}")
    return Path(name)


@own_settings()
def load_video_model(
    name_or_path: str | os.PathLike[str] = "toy",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    steps: int | None = None,
    own_steps: Sequence[int] | None = None,
    offload: Sequence[str] = (),
    prompt_cache: str | os.PathLike[str] | None = None,
    on_found: Callable[[str], None] | None = None,
    on_stage: Callable[[str, int], None] | None = None,
) -> VideoModel:
    """A shipped model by name, or one from a folder: of Wan, original or diffusers, or of :func:`save_toy_model`.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ... dtype: of the weights and the work; None: float32, but bfloat16 for
            Wan.
        checkpoint, steps, own_steps, offload, prompt_cache, on_found, on_stage: of :func:`.wan.load_wan`; the
            toy model takes none of them.

    Raises:
        ValueError: one line that names the first thing that is missing, corrupt or of the wrong shape.
    """
    device, wanted = pick_device(device), pick_dtype(dtype)
    folder = model_folder(name_or_path)
    name = os.fspath(name_or_path)
    if is_wan_folder(folder):
        return load_wan(
            folder, name=name, device=device, dtype=wanted, checkpoint=checkpoint, steps=steps, own_steps=own_steps,
            offload=offload, prompt_cache=prompt_cache, on_found=on_found, on_stage=on_stage,
        )  # fmt: skip
    for option, value in (("checkpoint", checkpoint), ("offload", offload), ("prompt_cache", prompt_cache)):
        if value:
            raise ValueError(f"model {name} is no Wan folder: it takes no {option}, got {value!r}")
    settings = _read_config(folder / CONFIG)
    refuse_stand_in(folder / WEIGHTS)
    try:
        blob = (folder / WEIGHTS).read_bytes()
        tensors = load_tensors(blob)
    except OSError as error:
        raise ValueError(f"cannot read {folder / WEIGHTS}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is corrupt: {error}") from error
    try:
        return _build(name, settings, tensors, hashlib.sha256(blob).hexdigest(), device, wanted or torch.float32)
    except (ValueError, TypeError) as error:  # TypeError: a value in config.json of the wrong kind
        raise ValueError(f"{folder}: {error}") from error


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
    _check_tensors(groups[TRANSFORMER], transformer.state_dict())
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


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError that names the first tensor that is missing, unexpected, of another shape, or not of floats."""
    for key in [*expected, *found]:
        name = TRANSFORMER + key
        if key not in found:
            raise ValueError(f"tensor {name} is missing")
        if key not in expected:
            raise ValueError(f"unexpected tensor {name}")
        if found[key].shape != expected[key].shape:
            raise ValueError(f"tensor {name} is {list(found[key].shape)}, expected {list(expected[key].shape)}")
        if not found[key].is_floating_point():
            raise ValueError(f"tensor {name} is {found[key].dtype}, expected floats")


def _read_config(path: Path) -> dict[str, Any]:
    """The mapping of config.json, with exactly the keys that are known."""
    refuse_stand_in(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {error}") from error
    if not isinstance(values, dict) or values.get("format") != TOY_FORMAT:
        raise ValueError(f'{path}: format must be "{TOY_FORMAT}"')
    if "rollout" not in values and set(values) >= _OLD:
        values = _with_rollout(values)
    _same_keys(path, values, ["format", *_NESTED, *_PLAIN])
    for key, kind in _NESTED.items():
        if not isinstance(values[key], dict):
            raise ValueError(f"{path}: {key} must be an object")
        _same_keys(path, values[key], [f.name for f in dataclasses.fields(kind)], f"{key}.", all_needed=False)
    return values


_NESTED: dict[str, Any] = {"transformer": WanConfig, "world": WorldConfig, "rollout": RolloutConfig}
_PLAIN = ("fps", "num_frames", "train_frames")
_OLD = {"schedule", "frames_per_block", "window_frames", "sink_frames"}


def _with_rollout(values: dict[str, Any]) -> dict[str, Any]:
    """The mapping of a config.json of before 0.2, as it is written now."""
    values = dict(values)
    rollout = {name: values.pop(name) for name in ("frames_per_block", "window_frames", "sink_frames")}
    rollout |= values.pop("schedule") | {"kv_source": values.pop("cache_source", "own")}
    order = values.pop("order", None)
    return values | {"rollout": rollout | ({} if order is None else {"order": order})}


def _same_keys(
    path: Path,
    values: Mapping[str, Any],
    known: list[str],
    prefix: str = "",
    all_needed: bool = True,
    also: Sequence[str] = (),
) -> None:
    for key in values:
        if key not in known and key not in also:
            raise ValueError(f"{path}: unknown key {prefix}{key}; known: {', '.join([*known, *also])}")
    for key in known if all_needed else ():
        if key not in values:
            raise ValueError(f"{path}: key {prefix}{key} is missing")


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
    """Write a folder that :func:`load_video_model` reads; returns it.

    A new folder appears whole or not at all; in an existing one each file is replaced at once.

    Args:
        rollout: how it was trained to be rolled out.
        num_frames: of a video if nothing is said; None: four times ``train_frames``.
        dtype: of the transformer's tensors in the file; the codec's are small and stay float32.

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
    # What cannot be loaded must not be written.
    text = json.dumps(settings, indent=2) + "\n"
    _build(str(target), json.loads(text), tensors, "", torch.device("cpu"), torch.float32)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        (partial / WEIGHTS).write_bytes(pack_tensors(tensors))
        (partial / CONFIG).write_text(text, encoding="utf-8")
        if target.is_dir():
            for name in (WEIGHTS, CONFIG):
                os.replace(partial / name, target / name)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
