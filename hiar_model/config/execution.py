"""ExecutionConfig: where and how a rollout runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.checks import DTYPE_NAMES, number_above_0, one_of, whole

ON_NAN = ("stop", "retry")
KV_DTYPES = (*DTYPE_NAMES, "float8_e4m3fn")


@dataclass(frozen=True)
class ExecutionConfig:
    """Where and how a rollout runs. Nothing here changes a result, ``kv_dtype`` apart.

    Args:
        cuda_graph: capture each kind of forward as a CUDA graph the first time it occurs, and replay it after that;
            needs a CUDA device.
        mesh: the processes of the job, a ``DeviceMesh`` with axes named step, head, replica
            (:func:`hiar_model.distributed.make_mesh`); None: this process alone. Along "step" the denoising steps live
            on ranks and latents go from one to the next (a pipeline; its finished blocks come on the last rank); along
            "head" the ranks share every forward (Ulysses) and each makes all blocks.
        steps_per_rank: of a pipeline: how many steps each rank has, in order; None: the fastest split by ``costs``.
        costs: of a pipeline: seconds of the tasks (:func:`hiar_model.planning.measure_costs`); None: all the same.
        dedicated_decoder_rank: the last rank of a pipeline has no steps: it takes finished blocks, to decode them
            beside the others' work.
        kv_dtype: name of the dtype that keys and values are kept in. "float8_e4m3fn" (one scale for each layer, head
            and frame) takes half the memory of bfloat16 and changes the latents; None: the dtype of the model.
        on_nan: "stop": latents that are not finite end the rollout; the error names step, block, layer and
            implementation. "retry": repeat that forward with the reference ops and go on if the result is finite; then
            every forward waits for the device.
        keep_all_frames: the caches hold every frame of the video, not only a window of them; what is seen stays the
            same. Training reads them afterwards.
        autocast: compute in the caller's autocast, as training does; else it changes nothing.
        timeout: seconds within which a fault of one rank ends the job; a first block may take ten times that.
        watchdog: of a job, one that runs already (:class:`hiar_model.distributed.watchdog.Watchdog`); None: one is
            started for every iteration of a pipeline.

    Raises:
        ValueError: a value that is not legal, with the legal ones.
    """

    cuda_graph: bool = False
    mesh: Any = None
    steps_per_rank: tuple[int, ...] | None = None
    costs: Any = None
    dedicated_decoder_rank: bool = False
    kv_dtype: str | None = None
    on_nan: str = "stop"
    keep_all_frames: bool = False
    autocast: bool = False
    timeout: float = 60.0
    watchdog: Any = None

    def __post_init__(self) -> None:
        for name in ("cuda_graph", "dedicated_decoder_rank", "keep_all_frames", "autocast"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        one_of("on_nan", self.on_nan, ON_NAN)
        object.__setattr__(self, "timeout", number_above_0("timeout", self.timeout))
        object.__setattr__(self, "kv_dtype", _dtype_name(self.kv_dtype))
        split = self.steps_per_rank
        if split is not None:
            if not isinstance(split, Sequence) or isinstance(split, str):
                raise ValueError(f"steps_per_rank must be a number of steps for each rank, in order, got {split!r}")
            object.__setattr__(self, "steps_per_rank", tuple(whole("steps_per_rank", n, 0) for n in split))


def _dtype_name(dtype: Any) -> str | None:
    """Of a dtype or its name."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    one_of("kv_dtype", name, KV_DTYPES)
    return name
