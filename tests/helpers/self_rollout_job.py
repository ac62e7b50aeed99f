"""What test_train_rollout.py runs under torchrun: a self-rollout of a sharded student, against a whole one.

torchrun --nproc-per-node 2 tests/helpers/self_rollout_job.py RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_model import SIZE, TEXT, make_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hiar_model.config import FlowSchedule, RolloutConfig
from hiar_model.train.config.recipe import ScaleRecipe
from hiar_model.train.engine.distributed import init_training, reshard, shard, unsharded
from hiar_model.train.engine.self_rollout import SelfRollout

STEPS, FRAMES = 3, 12


class Collectives(TorchDispatchMode):
    """Counts what the processes exchange, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def students() -> tuple:
    """The same weights whole, and sharded from the first process, of which alone they are."""
    whole, sharded = (make_model().double().requires_grad_(True) for _ in range(2))
    context = init_training(ScaleRecipe(), "cpu")
    if context.rank:
        sharded = sharded.to("meta")
    shard(sharded, context, "float32", trained=True)
    return whole, sharded


def case(exit_step: int, **options) -> dict:
    """Twice the same update, of both students."""
    prompt_embeds, wrong, exchanged = TEXT.double(), [], []
    config = RolloutConfig(FlowSchedule.uniform(STEPS).steps, window_frames=6, **options)
    whole, sharded = students()
    for seed in range(2):
        results = []
        for model in (whole, sharded):
            model.zero_grad()
            rollout = SelfRollout(model, config)
            run = partial(rollout.run, seed=seed)
            with Collectives() as of_rollout:
                batch = unsharded(model, run, prompt_embeds, FRAMES, (SIZE["height"], SIZE["width"]), exit_step)
            is_whole = not any(isinstance(p, DTensor) for p in model.parameters())
            with Collectives() as of_step:
                x0 = rollout.predict(batch, prompt_embeds)
                x0.square().mean().backward()
            reshard(model)
            is_sharded = all(isinstance(p, DTensor) for p in model.parameters())
            results.append((batch, x0.detach(), is_whole and is_sharded == (model is sharded)))
            exchanged.append([dict(of_rollout.counts), dict(of_step.counts)])
        (expected, x0, _), (batch, other, states) = results
        same = [torch.equal(expected.inputs, batch.inputs), torch.equal(x0, other), states]
        same += [torch.equal(a.k, b.k) for a, b in zip(expected.contexts, batch.contexts, strict=True)]
        wrong += [] if all(same) else [f"seed {seed}: {same}"]
        for (name, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            if not torch.allclose(q.grad.full_tensor(), p.grad, rtol=1e-12, atol=1e-14):
                wrong.append(f"seed {seed}: gradient of {name}")
    return {"wrong": wrong, "exchanged": exchanged}


def not_broadcast() -> list[str]:
    """Names of weights that differ from the first process's."""
    whole, sharded = students()
    pairs = zip(whole.named_parameters(), sharded.parameters(), strict=True)
    return [name for (name, p), q in pairs if not torch.equal(q.full_tensor(), p)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {
        "matched": case(1),
        "clean": case(2, order="block_first"),
        "broadcast": not_broadcast(),
    }
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # an ordinary exit after FSDP now and then aborts
