"""ExecutionConfig: where and how a rollout runs, apart from what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.checks import DTYPE_NAMES, dtype_name, number_above_0, one_of, true_or_false, whole

ON_NAN = ("stop", "retry")
ATTENTION_IMPLS = (
    "auto", "reference", "sdpa", "cudnn", "flash", "flash-attn-2", "flash-attn-3", "flash-attn-4", "triton", "gluon",
)  # fmt: skip
"""Of :func:`hiar_kernels.attention`, whose module imports torch."""
KV_DTYPES = (*DTYPE_NAMES, "float8_e4m3fn")
ATTENTION_DTYPES = ("float8_e4m3fn",)
LINEAR_DTYPES = ("float8_e4m3fn", "int8")
FLOAT8_IMPLS = ("auto", "reference", "triton", "gluon")
"""Of :func:`hiar_kernels.attention_fp8`, which reads caches of float8_e4m3fn."""


@dataclass(frozen=True)
class ExecutionConfig:
    """Where and how a rollout runs. Only ``kv_dtype``, ``attention_dtype`` and ``linear_dtype`` change the result.

    Args:
        cuda_graph: capture each kind of forward as a CUDA graph at its first use and replay it afterwards; needs a CUDA
            device.
        mesh: the processes of the job, a ``DeviceMesh`` with axes step, head, replica
            (:func:`hiar_model.distributed.make_mesh`); None: this process alone. Along "step" each rank runs some of
            the denoising steps and latents go from one rank to the next (a pipeline; the last rank has the finished
            blocks); along "head" the ranks share every forward (Ulysses) and all have the blocks.
        steps_per_rank: number of steps of each rank of a pipeline, in order; None: the fastest split by ``costs``.
        costs: seconds of a pipeline's tasks (:func:`hiar_model.planning.measure_costs`); None: all tasks take the same.
        dedicated_decoder_rank: the last rank of a pipeline has no steps; it receives finished blocks and decodes them
            while the others compute.
        kv_dtype: name of the dtype of cached keys and values; None: that of the model. "float8_e4m3fn" (one scale per
            layer, head and frame) takes half the memory of bfloat16 and changes the latents.
        attention_dtype: name of the dtype of self-attention's products; None: that of the model. "float8_e4m3fn" rounds
            queries (one scale per token and head) and probabilities too and changes the latents; it needs ``kv_dtype``
            "float8_e4m3fn".
        linear_dtype: name of the dtype of the large linear layers; None: that of the model. "int8" and "float8_e4m3fn"
            quantise those of self-attention and feed-forward (one scale per output channel; activations: per token) and
            change the latents, int8 less. On CUDA int8 needs compute capability 8.0, e4m3 a bfloat16 model and 8.9.
            A model that is loaded with it has no full weights of these layers; of any other the rollout makes a copy.
        attention_impl: implementation of self-attention, of :func:`hiar_kernels.attention`; equal up to rounding.
            "auto": the fastest that was measured. Any other never falls back: it raises where it cannot run. Over
            caches of float8_e4m3fn: "auto", "reference", "triton", or with ``attention_dtype`` "gluon".
        on_nan: "stop": raise if latents are not finite, naming step, block, layer and implementation. "retry": first
            repeat the forward with the reference ops and continue if that is finite; waits for the device after every
            forward.
        keep_all_frames: cache every frame of the video instead of a window, without changing what is visible. Training
            reads them afterwards.
        autocast: compute in the caller's autocast context, as training does.
        timeout: seconds within which a fault of one rank ends the job, above 0; ten times as long for the first block.
        watchdog: a running :class:`hiar_model.distributed.watchdog.Watchdog` of the job; None: every iteration of a
            pipeline starts its own.

    Raises:
        ValueError: names the illegal value and the legal ones.

    Example:
        >>> ExecutionConfig(kv_dtype="float8_e4m3fn").cuda_graph
        False
    """

    cuda_graph: bool = False
    mesh: Any = None
    steps_per_rank: tuple[int, ...] | None = None
    costs: Any = None
    dedicated_decoder_rank: bool = False
    kv_dtype: str | None = None
    attention_dtype: str | None = None
    linear_dtype: str | None = None
    attention_impl: str = "auto"
    on_nan: str = "stop"
    keep_all_frames: bool = False
    autocast: bool = False
    timeout: float = 60.0
    watchdog: Any = None

    def __post_init__(self) -> None:
        for name in ("cuda_graph", "dedicated_decoder_rank", "keep_all_frames", "autocast"):
            object.__setattr__(self, name, true_or_false(name, getattr(self, name)))
        if self.mesh is not None and not hasattr(self.mesh, "mesh_dim_names"):
            raise ValueError(f"mesh must be None or a torch DeviceMesh, got {self.mesh!r}")
        one_of("attention_impl", self.attention_impl, ATTENTION_IMPLS)
        one_of("on_nan", self.on_nan, ON_NAN)
        object.__setattr__(self, "timeout", number_above_0("timeout", self.timeout))
        object.__setattr__(self, "kv_dtype", _checked_dtype("kv_dtype", self.kv_dtype, KV_DTYPES))
        object.__setattr__(self, "linear_dtype", _checked_dtype("linear_dtype", self.linear_dtype, LINEAR_DTYPES))
        products = _checked_dtype("attention_dtype", self.attention_dtype, ATTENTION_DTYPES)
        object.__setattr__(self, "attention_dtype", products)
        if products is not None and self.kv_dtype != products:
            got = "it is not set" if self.kv_dtype is None else f"got {self.kv_dtype}"
            raise ValueError(f"attention_dtype {products} needs kv_dtype {products}: {got}")
        if self.kv_dtype == "float8_e4m3fn" and self.attention_impl not in FLOAT8_IMPLS:
            legal = ", ".join(FLOAT8_IMPLS)
            raise ValueError(
                f"attention_impl must be one of {legal} with kv_dtype float8_e4m3fn, got {self.attention_impl!r}"
            )
        if self.kv_dtype == "float8_e4m3fn" and self.attention_impl == "gluon" and products is None:
            raise ValueError("attention_impl gluon with kv_dtype float8_e4m3fn needs attention_dtype float8_e4m3fn")
        split = self.steps_per_rank
        if split is not None:
            if not isinstance(split, Sequence) or isinstance(split, str):
                raise ValueError(
                    f"steps_per_rank must be a sequence with a number of steps for each rank, got {split!r}"
                )
            object.__setattr__(self, "steps_per_rank", tuple(whole("steps_per_rank", n, 0) for n in split))

    @property
    def dtypes(self) -> dict[str, Any]:
        """``kv_dtype``, ``attention_dtype`` and ``linear_dtype`` by name."""
        return {name: getattr(self, name) for name in ("kv_dtype", "attention_dtype", "linear_dtype")}


def _checked_dtype(name: str, dtype: Any, legal: Sequence[str]) -> str | None:
    """The name of a dtype, given as dtype or name."""
    if dtype is None:
        return None
    value = dtype_name(dtype)
    one_of(name, value, legal)
    return value
