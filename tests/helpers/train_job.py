"""Training in processes of its own, for test_train_resume.py and test_train_distributed.py; and what they share.

python tests/helpers/train_job.py FOLDER RECIPE.json [SYNC]
    trains; a line "update N" for each; kill -9 of itself in the SYNC-th of the syncs to disk
torchrun --nproc-per-node 2 tests/helpers/train_job.py FOLDER CASES.json
    trains each {"name", "recipe", "stop"} in FOLDER/name, up to update "stop" if there is one; found.json has what each
    rank met
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes
import torch
import torch.distributed as dist

from hiar_model import config
from hiar_model.common.keyed import keyed_generator
from hiar_model.train.config.reading import make_recipe
from hiar_model.train.engine.distributed import find_place
from hiar_model.train.engine.networks import make_network
from hiar_model.train.engine.trainer import Trainer
from hiar_model.train.stages.base import Turn, make_stage

PULL = "pull"  # recipe.teacher of runs whose stage is Pull

# A network that trains in no time.
config._PRESETS["tiny"] = {
    "dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 32, "text_len": 8,
    "in_channels": 2, "out_channels": 2,
}  # fmt: skip


class Pull:
    """A stage of two networks that are pulled to noise of their own, row by row: cheap, with turns as HiAR's."""

    averaged = "student"

    def __init__(self, recipe: Any, device: torch.device) -> None:
        self.recipe = recipe
        self.trained = {name: make_network("tiny", seed=i) for i, name in enumerate(("critic", "student"))}
        self.frozen = {"teacher": make_network("tiny", seed=2).requires_grad_(False)}
        self.asked: list[tuple[str, int, list[int]]] = []

    def turns(self, update: int) -> Sequence[Turn]:
        return (Turn("critic", 0, "critic 0"), Turn("critic", 1, "critic 1"), Turn("student"))

    def loss(self, turn: Turn, update: int, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        self.asked.append((str(turn), update, list(rows)))
        x = torch.stack([self.noise(update, str(turn), row) for row in rows])
        text, times = torch.ones(len(rows), 1, 32), torch.full((len(rows),), 500.0)
        with torch.no_grad():
            wanted = self.frozen["teacher"](x, times, text)
        error = (self.trained[turn.network](x, times, text) - wanted - x).square().mean(dim=(1, 2, 3, 4))
        return error.mean(), {"largest": error.detach().max(), "rows": float(len(rows))}

    def noise(self, update: int, turn: str, row: int) -> torch.Tensor:
        if self.recipe.seed < 0 and row == 1:  # a seed for a row that is not finite
            return torch.full((3, 2, 4, 4), torch.nan)
        return keyed_generator(self.recipe.seed, update, turn, row).normals(3, 2, 4, 4)

    def sample(self, update: int) -> None:
        return None

    def export(self, model: Any, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")
        return folder / "weights.pt"


def recipe(**values: Any) -> dict[str, Any]:
    """A recipe for :class:`Pull`, as a plain mapping: 8 updates of 4 rows, a state after every two."""
    optimizer = {"kind": "adamw", "lr": 3e-3, "warmup": 0.0}
    plain = {"stage": "hiar", "model": "tiny", "updates": 8, "batch_size": 4, "log_every": 1, "precision": "float32"}
    sections = {
        "optimizer": optimizer,
        "critic_optimizer": optimizer,
        "scale": {"checkpoint_every": 2, "threads": 1},
        "teacher": PULL,
    }
    return {**plain, **sections, **values}


def losses(folder: Path) -> list[dict[str, str]]:
    """The rows of loss.csv."""
    with (folder / "loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def command(folder: Path, values: Any, *words: object) -> list[str]:
    """The words that start this file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.json")
    path.write_text(json.dumps(values))
    return [str(Path(__file__)), str(folder), str(path), *map(str, words)]


def start(folder: Path, values: Any, *words: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    words = command(folder, values, *words)  # type: ignore[assignment]
    return processes.run(words) if ranks == 1 else processes.torchrun(ranks, *words)


def train(folder: Path, values: dict[str, Any], on_update: Any = None) -> Trainer:
    """In this process, to its end."""
    made = make_recipe(values)
    place = find_place(made.scale, "cpu")
    stage = Pull(made, place.device) if values.get("teacher") == PULL else make_stage(made, place.device)
    trainer = Trainer(made, stage, folder, place, say=lambda text: None)
    trainer.run(on_update)
    return trainer


def _die_in_sync(number: int) -> None:
    sync, calls = os.fsync, []

    def deadly(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = deadly


def stop_after(update: int | None) -> Any:
    """For Trainer.run: Ctrl-C there."""

    def on_update(done: int, numbers: Any) -> None:
        if done == update:
            raise KeyboardInterrupt

    return on_update


def _case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What this rank met."""
    trainer = None
    try:
        trainer = train(folder / case["name"], case["recipe"], stop_after(case.get("stop")))
        met = ""
    except KeyboardInterrupt:
        met = "stopped"
    except (ValueError, FloatingPointError, OSError) as error:
        met = f"{type(error).__name__}: {error}"
    exported = None if trainer is None else trainer.export()
    return {"met": met, "exported": None if exported is None else str(exported)}


def _main() -> None:
    folder, path, *words = sys.argv[1:]
    values = json.loads(Path(path).read_text())
    if isinstance(values, dict):
        if words:
            _die_in_sync(int(words[0]))
        train(Path(folder), values, lambda update, numbers: print(f"update {update}", flush=True))
        return
    found: list[Any] = [None] * int(os.environ["WORLD_SIZE"])
    here = {case["name"]: _case(Path(folder), case) for case in values}
    dist.all_gather_object(found, here)
    if dist.get_rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # an ordinary exit may abort in torch's teardown


if __name__ == "__main__":
    _main()
