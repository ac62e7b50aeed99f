"""Training in processes of its own, for test_train_resume.py and test_train_distributed.py; and what they share.

python tests/helpers/train_job.py FOLDER RECIPE.json [SYNC]
    trains; a line "update N" for each; kill -9 of itself in the SYNC-th of the syncs to disk
torchrun --nproc-per-node 2 tests/helpers/train_job.py FOLDER CASES.json
    trains each {"name", "recipe", "stop", "signal"} in FOLDER/name, up to update "stop" if there is one; "signal" is
    [rank, update]: that rank alone gets a signal after that update; "apart": as on machines that share no disk, each
    rank has a FOLDER/name RANK of its own. results.json has how it ended on each rank
"""

from __future__ import annotations

import csv
import json
import math
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

from hiar_model.cli.train import ends_training
from hiar_model.common.keyed import keyed_generator
from hiar_model.config import wan
from hiar_model.toy.codec import ToyCodec
from hiar_model.train.config.reading import make_recipe
from hiar_model.train.engine import metrics
from hiar_model.train.engine.distributed import init_training
from hiar_model.train.engine.networks import make_network
from hiar_model.train.engine.trainer import Trainer
from hiar_model.train.stages.base import Inputs, UpdateStep, make_stage

PULL = "pull"  # recipe.teacher of runs whose stage is Pull

# A network that trains in no time.
wan._PRESETS["tiny"] = {
    "dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 32, "text_len": 8,
    "in_channels": 2, "out_channels": 2,
}  # fmt: skip
wan._PRESETS["least"] = {**wan._PRESETS["tiny"], "num_layers": 1}


class Pull:
    """A stage of two networks that regress noise of their own, sample by sample: cheap, with HiAR's update steps."""

    averaged = "student"

    def __init__(self, recipe: Any, device: torch.device) -> None:
        self.recipe = recipe
        self.trained = {name: make_network("least", seed=i) for i, name in enumerate(("critic", "student"))}
        self.frozen = {"teacher": make_network("least", seed=2).requires_grad_(False)}
        patches = self.frozen["teacher"].patch_embedding.weight  # as a file may have them
        patches.data = patches.data.to(memory_format=torch.channels_last_3d)
        self.calls: list[tuple[str, int, list[int]]] = []

    def inputs(self) -> Inputs:
        return Inputs()

    def update_steps(self, update: int) -> Sequence[UpdateStep]:
        return (UpdateStep("critic", 0, "critic 0"), UpdateStep("critic", 1, "critic 1"), UpdateStep("student"))

    def loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        self.calls.append((str(step), update, list(samples)))
        x = torch.stack([self.noise(update, str(step), sample) for sample in samples])
        prompt_embeds, times = torch.ones(len(samples), 1, 32), torch.full((len(samples),), 500.0)
        with torch.no_grad():
            target = self.frozen["teacher"](x, times, prompt_embeds)
        error = (self.trained[step.network](x, times, prompt_embeds) - target - x).square().mean(dim=(1, 2, 3, 4))
        return error.mean(), {"largest": error.detach().max(), "samples": float(len(samples))}

    def noise(self, update: int, step: str, sample: int) -> torch.Tensor:
        if self.recipe.seed < 0 and sample == 1:  # a seed for a sample that is not finite
            return torch.full((3, 2, 4, 4), torch.nan)
        return keyed_generator(self.recipe.seed, update, step, sample).normals(3, 2, 4, 4)

    def sample(self, update: int) -> None:
        return None

    def export(self, model: Any, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")
        return folder / "weights.pt"


def recipe(**values: Any) -> dict[str, Any]:
    """A recipe for :class:`Pull`, as a plain mapping: 6 updates of 4 samples, a state after every two."""
    optimizer = {"kind": "adamw", "lr": 3e-3, "warmup": 0.0}
    plain = {"stage": "hiar", "model": "tiny", "updates": 6, "batch_size": 4, "log_every": 1, "precision": "float32"}
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
    trainer = make_trainer(folder, values)
    trainer.run(on_update)
    return trainer


def make_trainer(folder: Path, values: dict[str, Any]) -> Trainer:
    parsed = make_recipe(values)
    context = init_training(parsed.scale, "cpu")
    stage = Pull(parsed, context.device) if values.get("teacher") == PULL else make_stage(parsed, context.device)
    return Trainer(parsed, stage, folder, context, say=lambda line: None)


def _die_in_sync(number: int) -> None:
    sync, calls = os.fsync, []
    metrics.PLOT_EVERY = math.inf  # whose syncs come by the clock

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


def _signal_after(case: dict[str, Any]) -> Any:
    """For Trainer.run: the end of the terminal there, for one of the ranks."""

    def on_update(done: int, numbers: Any) -> None:
        if [dist.get_rank(), done] == case["signal"]:
            signal.raise_signal(signal.SIGHUP)

    return on_update


def _case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """How it ended on this rank."""
    trainer = None
    folder = folder / (f"{case['name']} {dist.get_rank()}" if case.get("apart") else case["name"])
    try:
        on_update = _signal_after(case) if "signal" in case else stop_after(case.get("stop"))
        trainer = make_trainer(folder, case["recipe"])
        with ends_training(trainer):
            trainer.run(on_update)
        error = "ended" if trainer.stopped else ""
    except KeyboardInterrupt:
        error = "stopped"
    except (ValueError, FloatingPointError, OSError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    exported = trainer.export() if trainer is not None and trainer.update == trainer.recipe.updates else None
    return {"error": error, "exported": exported and str(exported), "update": trainer and trainer.update}


def _main() -> None:
    from toy_codec import fit_once

    ToyCodec.fit = fit_once  # type: ignore[method-assign,assignment]
    folder, path, *words = sys.argv[1:]
    values = json.loads(Path(path).read_text())
    if isinstance(values, dict):
        if words:
            _die_in_sync(int(words[0]))
        train(Path(folder), values, lambda update, numbers: print(f"update {update}", flush=True))
        return
    results: list[Any] = [None] * int(os.environ["WORLD_SIZE"])
    dist_results = {case["name"]: _case(Path(folder), case) for case in values}
    dist.all_gather_object(results, dist_results)
    if dist.get_rank() == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # an ordinary exit may abort in torch's teardown


if __name__ == "__main__":
    _main()
