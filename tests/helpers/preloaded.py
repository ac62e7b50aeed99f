"""What the server of processes.py imports: what tests need and is long to import, once for all forks.

torch's optimizers import its compiler. Nothing of it becomes garbage, so that no fork looks through it: to look would
also copy its memory.
"""

from __future__ import annotations

import gc
import importlib

LOADED = [
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.launcher.api",
    "torch.utils.tensorboard", "numpy.random", "pytest", "hiar_model.cli", "hiar_model.rollout.executor",
    "hiar_model.pipelines.video_pipeline", "hiar_model.train.engine.trainer", "hiar_model.train.stages.base",
]  # fmt: skip

gc.disable()
try:
    for name in LOADED:
        importlib.import_module(name)
finally:
    gc.freeze()
    gc.enable()
