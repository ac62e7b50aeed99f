"""How often an update waits for the device: once for each optimiser step, when its metrics are read."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from tiny_stages import make, write_files

from hiar_model.rollout.readback import Readback
from hiar_model.train.engine.trainer import Trainer

pytestmark = pytest.mark.cpu

T = torch.Tensor
READS = {
    T.item, T.tolist, T.cpu, T.numpy, T.nonzero, T.equal, T.allclose, torch.equal, torch.allclose, torch.nonzero,
    T.__bool__, T.__int__, T.__float__, T.__index__, T.__format__, T.__contains__,
}  # fmt: skip


class OnDevice(torch.Tensor):
    """Stands for a tensor on an accelerator: what is computed from it is one too, and reads by the host are kept."""

    reads: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in READS:
            cls.reads.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def move(network: torch.nn.Module) -> None:
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(p.detach().as_subclass(OnDevice), p.requires_grad))


@pytest.mark.parametrize("name", ["teacher", "ode_init", "hiar"])
def test_every_optimiser_step_waits_once(tmp_path, monkeypatch, name):
    """Whatever the number of micro-batches. Here the rollout looks at every task: on an accelerator it does not."""
    monkeypatch.setattr(Readback, "numbers", lambda self: [True] * len(self.host))
    more = {"critic_updates": 2} if name == "hiar" else {}
    stage = make(write_files(tmp_path), name, scale={"threads": 1, "micro_batch": 1}, **more)
    for network in (*stage.trained.values(), *stage.frozen.values()):
        move(network)
    trainer = Trainer(stage.recipe, stage, tmp_path / "run", say=lambda line: None)
    steps = len(stage.update_steps(0))
    for _ in range(2):
        OnDevice.reads.clear()
        trainer._update()
        assert OnDevice.reads == ["tolist"] * steps
