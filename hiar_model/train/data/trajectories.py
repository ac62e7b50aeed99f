"""A teacher's ODE trajectories on disk: made by any number of ranks, resumable, checked when they are read.

    settings.json              what is being made; a run with other settings is refused
    shard-00003.safetensors    trajectory [n, P, F, C, H, W] float32, text [n, L, text_dim]
    shard-00003.json           samples, size and sha256 of that shard, written after it
    manifest.json              the settings, the levels of the points and all of the above; written when all are there

Sample i is a function of (seed, i), and shard k holds samples k * shard_size and following: who makes a shard changes
nothing. Files have a temporary name until they are whole. They are float32, because the target of the forward KL is a
chord between two points, which multiplies their error by up to 25.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from ...common.keyed import keyed_generator
from ...common.settings import own_settings
from ...version import NOISE
from ..losses.teacher import Network, ode_plan, ode_trajectory
from .datasets import FLOATS, Prompts, open_tensors
from .shards import agree, read_json, shard_name, shard_rows, unfinished, write, write_json

MANIFEST = "manifest.json"
FORMAT = "hiar-trajectories-1"
CHECKS = ("sha256", "size")
_STAGE = "trajectories"  # of the keys of prompts and noise


@own_settings(autocast=True)
def generate_trajectories(
    teacher: Network,
    data: Prompts,
    folder: str | os.PathLike[str],
    *,
    count: int,
    shard_size: int = 16,
    batch_size: int = 4,
    seed: int = 0,
    steps: int = 48,
    shift: float = 8.0,
    guidance: float = 6.0,
    points: Sequence[int] = (0, 12, 24, 36, -1),
    teacher_sha256: str | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make those of this rank's shards (every ``world_size``-th) that are not there yet, or not as they were written.

    Ranks do not talk to each other; whichever finds all shards there writes the manifest. Each holds the whole teacher.

    Args:
        teacher: the network, in the dtype that it runs in; or call this under autocast.
        data: of prompts, and of the shape of a clip. folder: of the store.
        count: samples in all. shard_size: samples of a file. batch_size: samples made at once, twice as many rows under
            guidance; decides nothing but the rounding.
        seed: of prompts and noise. steps, shift, guidance, points: of :func:`.teacher.ode_trajectory`.
        teacher_sha256: what the teacher is known by; None: :func:`weights_sha256`.
        device: of the teacher. on_progress: told (samples done, samples in all) of this rank.

    Raises:
        ValueError: a number out of range; the folder holds trajectories made with other settings, which are named.
        FloatingPointError: a trajectory is not finite; nothing is written of its shard.
        OSError: a file cannot be written (a full disk); shards that were whole stay.
    """
    for name, value in (("count", count), ("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if teacher_sha256 is None:
        if not isinstance(teacher, nn.Module):
            raise ValueError("teacher_sha256 must be given for a teacher that is no torch module")
        teacher_sha256 = weights_sha256(teacher)
    empty = data.unconditional()
    settings = {
        "format": FORMAT,
        "count": count,
        "shard_size": shard_size,
        "seed": seed,
        "noise": NOISE,
        "steps": steps,
        "shift": float(shift),
        "guidance": float(guidance),
        "points": list(ode_plan(steps, shift, points).kept),
        "latent_shape": list(data.latent_shape),
        "dtype": "F32",
        "text_shape": list(empty.shape[1:]),
        "text_dtype": {dtype: name for name, dtype in FLOATS.items()}[empty.dtype],
        "data": data.fingerprint,
        "teacher": teacher_sha256,
        "autocast": _autocast(torch.device(device).type),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    agree(target, settings, "trajectories", rank)

    shards = dict(enumerate(shard_rows(count, shard_size)))
    mine = [n for n in shards if n % world_size == rank]
    done, in_all = 0, sum(len(shards[n]) for n in mine)

    def tell(samples: int) -> None:
        nonlocal done
        done += samples
        if on_progress is not None:
            on_progress(done, in_all)

    for n in mine:
        about = target / f"{shard_name(n)}.json"
        if _is_good(target, about, settings):
            tell(len(shards[n]))
            continue
        # Until it is made again no rank may take the store for finished.
        for old in (about, *target.glob(f".{shard_name(n)}.*.partial")):
            old.unlink(missing_ok=True)
        made = []
        for first in range(0, len(shards[n]), batch_size):
            samples = shards[n][first : first + batch_size]
            noise = torch.stack([_noise(seed, i, data.latent_shape) for i in samples]).to(device)
            text = data.prompts(seed, _STAGE, 0, samples)
            trajectory = ode_trajectory(
                teacher,
                noise,
                text.to(device),
                empty.to(device),
                steps=steps,
                shift=shift,
                guidance=guidance,
                points=points,
            ).cpu()
            if not bool(trajectory.isfinite().all()):
                raise FloatingPointError(f"a trajectory of samples {list(samples)} ({shard_name(n)}) is not finite")
            made.append((trajectory, text))
            tell(len(samples))
        trajectories, texts = (torch.cat(parts).contiguous() for parts in zip(*made, strict=True))
        blob = pack_tensors({"trajectory": trajectories, "text": texts}, {"format": FORMAT})
        write(target / f"{shard_name(n)}.safetensors", blob, rank)
        told = {"samples": len(shards[n]), "size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        write_json(about, {"file": f"{shard_name(n)}.safetensors", **told}, rank)

    found = [target / f"{shard_name(n)}.json" for n in shards]
    if all(about.exists() for about in found):
        sigmas = ode_plan(steps, shift, points).point_sigmas
        manifest = {**settings, "sigmas": sigmas, "shards": [read_json(about) for about in found]}
        write_json(target / MANIFEST, manifest, rank)


class TrajectoryStore:
    """The trajectories of a folder, random access.

    Args:
        folder: that :func:`generate_trajectories` has finished.
        skip_corrupt: leave out shards that are not as they were written, with a warning that names each; the store is
            then shorter. False: the first of them is an error.
        check: "sha256" reads every file once; "size" trusts the bytes if their number and the header are right.

    Raises:
        ValueError: nothing there, unfinished, or a corrupt shard, by name; with ``skip_corrupt``: no good one is left.
    """

    def __init__(self, folder: str | os.PathLike[str], *, skip_corrupt: bool = False, check: str = "sha256") -> None:
        if check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            nothing = f"{self.folder}: holds no trajectories; expected {MANIFEST}"
            raise ValueError(unfinished(self.folder, ".json", finished=False) or nothing)
        self.manifest = read_json(self.folder / MANIFEST)
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{self.folder / MANIFEST}: format must be {FORMAT}, got {self.manifest.get('format')!r}")
        for key in ("sigmas", "points", "latent_shape", "dtype", "text_shape", "text_dtype", "shards"):
            if key not in self.manifest:
                raise ValueError(f"{self.folder / MANIFEST}: key {key} is missing")
        self._files: list[Path] = []
        self._places: list[tuple[int, int]] = []  # (file, row in it) of every sample
        for told in self.manifest["shards"]:
            fault = _fault(self.folder, told, self.manifest, whole=check == "sha256")
            if fault is None:
                self._places += [(len(self._files), row) for row in range(told["samples"])]
                self._files.append(self.folder / told["file"])
            elif skip_corrupt:
                warnings.warn(f"{fault}: left out with its {told['samples']} samples", stacklevel=2)
            else:
                raise ValueError(f"{fault}; make it again, or leave it out with skip_corrupt")
        if not self._places:
            raise ValueError(f"{self.folder}: every shard is corrupt")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the points [P], falling."""
        return tuple(self.manifest["sigmas"])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(F, C, H, W) of a point."""
        return tuple(self.manifest["latent_shape"])

    @own_settings(autocast=True)
    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(trajectory [b, P, F, C, H, W] float32, text [b, L, text_dim] in the dtype of the data) of some samples.

        Raises:
            ValueError: an index outside of 0..len - 1; a file that cannot be read any more, by name.
        """
        rows: list[tuple[Tensor, Tensor]] = []
        for index in indices:
            if not 0 <= index < len(self):
                raise ValueError(f"{self.folder}: no sample {index}, legal: 0..{len(self) - 1}")
            number, row = self._places[index]
            with open_tensors(self._files[number]) as opened:
                rows.append(tuple(opened.get_slice(key)[row : row + 1] for key in ("trajectory", "text")))
        trajectories, texts = zip(*rows, strict=True)
        return torch.cat(trajectories), torch.cat(texts)

    def sample(self, seed: int, stage: str, update: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """:meth:`batch` of random samples, one for each row, keyed like all data of training."""
        generators = (keyed_generator(seed, stage, update, row, "trajectory") for row in rows)
        return self.batch([int(g.whole(len(self))) for g in generators])


def weights_sha256(model: nn.Module) -> str:
    """Of the names, dtypes, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _autocast(device_type: str) -> str | None:
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")


def _noise(seed: int, sample: int, shape: Sequence[int]) -> Tensor:
    return keyed_generator(seed, _STAGE, sample, "noise").normals(*shape)


def _is_good(folder: Path, about: Path, settings: Mapping[str, Any]) -> bool:
    try:
        return _fault(folder, read_json(about), settings) is None
    except ValueError:  # nothing there, or no JSON
        return False


def _fault(folder: Path, told: Mapping[str, Any], settings: Mapping[str, Any], whole: bool = True) -> str | None:
    """What is wrong with a shard, by its name; None if it is as ``told`` says and as the settings want it."""
    file = folder / str(told.get("file"))
    if not file.is_file():
        return f"{file}: is missing"
    if (size := file.stat().st_size) != told.get("size"):
        return f"{file}: has {size} bytes, expected {told.get('size')}"
    shapes = {
        "trajectory": ([told.get("samples"), len(settings["points"]), *settings["latent_shape"]], settings["dtype"]),
        "text": ([told.get("samples"), *settings["text_shape"]], settings["text_dtype"]),
    }
    try:
        with open_tensors(file) as opened:
            for key, (shape, dtype) in shapes.items():
                if key not in opened.keys():  # noqa: SIM118
                    return f"{file}: key {key} is missing"
                found = opened.get_slice(key)
                if (found.get_shape(), found.get_dtype()) != (shape, dtype):
                    return f"{file}: {key} is {found.get_shape()} {found.get_dtype()}, expected {shape} {dtype}"
    except ValueError as error:
        return str(error)
    if whole:
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while part := content.read(1 << 22):
                digest.update(part)
        if digest.hexdigest() != told.get("sha256"):
            return f"{file}: its sha256 is {digest.hexdigest()}, expected {told.get('sha256')}"
    return None
