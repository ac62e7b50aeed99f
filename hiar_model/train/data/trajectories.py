"""A teacher's ODE trajectories on disk: written by any number of ranks, resumable, checked when they are read.

    settings.json              how they are made; a run with other settings is refused
    shard-00003.safetensors    trajectory [n, P, F, C, H, W] float32, text [n, L, text_dim]
    shard-00003.json           samples, size and sha256 of that shard, written after it
    manifest.json              the settings, the levels of the points and all of the above; written last

Sample i is a function of (seed, i), and shard k holds samples k * shard_size and following, whichever rank makes it.
Files are written atomically. They are float32, because the target of the forward KL is a chord between two points,
which multiplies their error by up to 25.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from ...common.checks import dtype_name
from ...common.keyed import keyed_generator
from ...common.settings import own_settings
from ...io.weight_files import read_json
from ...version import NOISE
from ..losses.teacher import Network, ode_plan, ode_trajectory
from .datasets import FLOATS, Prompts, open_tensors
from .shards import shard_name, shard_samples, unfinished, write, write_json, write_or_check_settings

MANIFEST = "manifest.json"
FORMAT = "hiar-trajectories-1"
CHECKS = ("sha256", "size")
_STAGE = "trajectories"  # in the keys of prompts and noise


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
    """Write those of this rank's shards (every ``world_size``-th) that are missing or damaged.

    Ranks do not communicate; whichever sees all shards writes the manifest. Each holds the whole teacher.

    Args:
        teacher: the network, in the dtype that it runs in; or call this under autocast.
        data: of prompts, and of the shape of a clip. folder: of the store.
        count: samples in all. shard_size: samples of a file. batch_size: samples made at once (forwards of twice as
            many under guidance); changes only the rounding.
        seed: of prompts and noise. steps, shift, guidance, points: of :func:`.teacher.ode_trajectory`.
        teacher_sha256: identifies the teacher in the settings; None: :func:`weights_sha256`.
        device: of the teacher. on_progress: called with (samples done, samples in all) of this rank.

    Raises:
        ValueError: a number out of range; the folder holds trajectories made with other settings, which are named.
        FloatingPointError: a trajectory is not finite; its shard is not written.
        OSError: a file cannot be written (a full disk); finished shards are kept.
    """
    for name, value in (("count", count), ("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if teacher_sha256 is None:
        if not isinstance(teacher, nn.Module):
            raise ValueError("teacher_sha256 must be given for a teacher that is not a torch module")
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
        "points": list(ode_plan(steps, shift, points).points),
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
    write_or_check_settings(target, settings, "trajectories", rank)

    shards = dict(enumerate(shard_samples(count, shard_size)))
    mine = [n for n in shards if n % world_size == rank]
    done, total = 0, sum(len(shards[n]) for n in mine)

    def report(samples: int) -> None:
        nonlocal done
        done += samples
        if on_progress is not None:
            on_progress(done, total)

    for n in mine:
        about = target / f"{shard_name(n)}.json"
        if _is_good(target, about, settings):
            report(len(shards[n]))
            continue
        # Until it is written again no rank may take the store for finished.
        for old in (about, *target.glob(f".{shard_name(n)}.*.partial")):
            old.unlink(missing_ok=True)
        batches = []
        for first in range(0, len(shards[n]), batch_size):
            samples = shards[n][first : first + batch_size]
            noise = torch.stack([_noise(seed, i, data.latent_shape) for i in samples]).to(device)
            prompt_embeds = data.prompts(seed, _STAGE, 0, samples)
            trajectory = ode_trajectory(
                teacher,
                noise,
                prompt_embeds.to(device),
                empty.to(device),
                steps=steps,
                shift=shift,
                guidance=guidance,
                points=points,
            ).cpu()
            if not bool(trajectory.isfinite().all()):
                raise FloatingPointError(f"a trajectory of samples {list(samples)} ({shard_name(n)}) is not finite")
            batches.append((trajectory, prompt_embeds))
            report(len(samples))
        trajectories, prompt_embeds = (torch.cat(parts).contiguous() for parts in zip(*batches, strict=True))
        blob = pack_tensors({"trajectory": trajectories, "text": prompt_embeds}, {"format": FORMAT})
        write(target / f"{shard_name(n)}.safetensors", blob, rank)
        shard = {"samples": len(shards[n]), "size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        write_json(about, {"file": f"{shard_name(n)}.safetensors", **shard}, rank)

    descriptions = [target / f"{shard_name(n)}.json" for n in shards]
    if all(about.exists() for about in descriptions):
        sigmas = ode_plan(steps, shift, points).point_sigmas
        manifest = {**settings, "sigmas": sigmas, "shards": [read_json(about) for about in descriptions]}
        write_json(target / MANIFEST, manifest, rank)


class TrajectoryStore:
    """The trajectories of a folder, random access.

    Args:
        folder: of a finished :func:`generate_trajectories`.
        skip_corrupt: leave out damaged shards, with a warning that names each; the store is then shorter. False: the
            first of them is an error.
        check: "sha256" reads every file once; "size" trusts the bytes if their number and the header are right.
        together: all processes of torch's default group open it at once, each reads its share of the files, and what
            one of them finds all say.

    Raises:
        ValueError: the folder is empty, unfinished or has a damaged shard, by name; ``skip_corrupt``: all are damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        skip_corrupt: bool = False,
        check: str = "sha256",
        together: bool = False,
    ) -> None:
        if check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            empty = f"{self.folder}: no trajectories; expected {MANIFEST}"
            raise ValueError(unfinished(self.folder, ".json", finished=False) or empty)
        self.manifest = read_json(self.folder / MANIFEST)
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{self.folder / MANIFEST}: format must be {FORMAT}, got {self.manifest.get('format')!r}")
        for key in ("sigmas", "points", "latent_shape", "dtype", "text_shape", "text_dtype", "shards"):
            if key not in self.manifest:
                raise ValueError(f"{self.folder / MANIFEST}: key {key} is missing")
        self._files: list[Path] = []
        self._index: list[tuple[int, int]] = []  # (file, row in it) of every sample
        faults = self._faults(hash_content=check == "sha256", together=together)
        for shard, fault in zip(self.manifest["shards"], faults, strict=True):
            if fault is None:
                self._index += [(len(self._files), row) for row in range(shard["samples"])]
                self._files.append(self.folder / shard["file"])
            elif skip_corrupt:
                warnings.warn(f"{fault}: left out with its {shard['samples']} samples", stacklevel=2)
            else:
                raise ValueError(f"{fault}; make it again, or leave it out with skip_corrupt")
        if not self._index:
            raise ValueError(f"{self.folder}: every shard is corrupt")

    def _faults(self, *, hash_content: bool, together: bool) -> list[str | None]:
        """What is wrong with each shard, or None."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if together and dist.is_initialized() else (0, 1)
        faults = [
            _fault(self.folder, shard, self.manifest, hash_content and n % ranks == rank)
            for n, shard in enumerate(self.manifest["shards"])
        ]
        if ranks == 1:
            return faults
        of_all: list[list[str | None]] = [[]] * ranks
        dist.all_gather_object(of_all, faults)
        return [next(filter(None, one), None) for one in zip(*of_all, strict=True)]

    def __len__(self) -> int:
        return len(self._index)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the points [P], falling."""
        return tuple(self.manifest["sigmas"])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(F, C, H, W) of a point."""
        return tuple(self.manifest["latent_shape"])

    @property
    def settings_sha256(self) -> str:
        """Of the settings that the trajectories are made with, the teacher's hash among them."""
        settings = {key: value for key, value in self.manifest.items() if key not in ("sigmas", "shards")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> str:
        """How many are used, and a hash of their bytes."""
        names = {file.name for file in self._files}
        sums = [shard["sha256"] for shard in self.manifest["shards"] if shard["file"] in names]
        return f"{len(sums)} of {hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:12]}"

    def is_of(self, data: Prompts) -> bool:
        """Whether the trajectories have been made with this data, whatever the number of its frames."""
        alike = copy.copy(data)
        alike.latent_shape = self.latent_shape  # type: ignore[misc,assignment]
        return alike.fingerprint == self.manifest.get("data")

    @own_settings(autocast=True)
    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(trajectory [b, P, F, C, H, W] float32, prompt_embeds [b, L, text_dim] in the dtype of the data) of samples.

        Raises:
            ValueError: an index outside of 0..len - 1; a file that cannot be read any more, by name.
        """
        samples: list[tuple[Tensor, Tensor]] = []
        for index in indices:
            if not 0 <= index < len(self):
                raise ValueError(f"{self.folder}: no sample {index}, legal: 0..{len(self) - 1}")
            number, row = self._index[index]
            with open_tensors(self._files[number]) as opened:
                samples.append(tuple(opened.get_slice(key)[row : row + 1] for key in ("trajectory", "text")))
        trajectories, prompt_embeds = zip(*samples, strict=True)
        return torch.cat(trajectories), torch.cat(prompt_embeds)

    def sample(self, seed: int, stage: str, update: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """:meth:`batch` of random trajectories, one for each sample of an update, keyed like all data of training."""
        generators = (keyed_generator(seed, stage, update, sample, "trajectory") for sample in samples)
        return self.batch([int(g.whole(len(self))) for g in generators])


def weights_sha256(model: nn.Module) -> str:
    """Hash of the names, dtypes, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _autocast(device_type: str) -> str | None:
    if not torch.is_autocast_enabled(device_type):
        return None
    return dtype_name(torch.get_autocast_dtype(device_type))


def _noise(seed: int, sample: int, shape: Sequence[int]) -> Tensor:
    return keyed_generator(seed, _STAGE, sample, "noise").normals(*shape)


def _is_good(folder: Path, about: Path, settings: Mapping[str, Any]) -> bool:
    try:
        return _fault(folder, read_json(about), settings) is None
    except ValueError:  # missing, or not JSON
        return False


def _fault(
    folder: Path, shard: Mapping[str, Any], settings: Mapping[str, Any], hash_content: bool = True
) -> str | None:
    """What is wrong with a shard, by its name; None if its file matches its description and the settings."""
    file = folder / str(shard.get("file"))
    if not file.is_file():
        return f"{file}: is missing"
    if (size := file.stat().st_size) != shard.get("size"):
        return f"{file}: has {size} bytes, expected {shard.get('size')}"
    shapes = {
        "trajectory": ([shard.get("samples"), len(settings["points"]), *settings["latent_shape"]], settings["dtype"]),
        "text": ([shard.get("samples"), *settings["text_shape"]], settings["text_dtype"]),
    }
    try:
        with open_tensors(file) as opened:
            for key, (shape, dtype) in shapes.items():
                if key not in opened.keys():  # noqa: SIM118
                    return f"{file}: key {key} is missing"
                stored = opened.get_slice(key)
                if (stored.get_shape(), stored.get_dtype()) != (shape, dtype):
                    return f"{file}: {key} is {stored.get_shape()} {stored.get_dtype()}, expected {shape} {dtype}"
    except ValueError as error:
        return str(error)
    if hash_content:
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while part := content.read(1 << 22):
                digest.update(part)
        if digest.hexdigest() != shard.get("sha256"):
            return f"{file}: its sha256 is {digest.hexdigest()}, expected {shard.get('sha256')}"
    return None
