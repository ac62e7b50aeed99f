"""Host code that the attention launchers share: argument checks, kernel arguments, tile sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common.aot import Case
from ..common.shapes import HEAD_DIM
from ..common.triton_loader import architecture
from .inputs import LARGEST_FRAME, TRITON_HEAD_DIMS, AttentionInputs, window_list
from .mask import BlockCausal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONAL = ("context_k", "context_v", "q_frames", "kv_frames", "context_frames", "windows", "counts", "frames")
RULE = ("frame_tokens", "frames_per_block", "first_frame", "origin", "sink_frames", "sink_end")


@dataclass(frozen=True)
class Tile:
    """Tile sizes and launch options of a kernel.

    Attributes:
        q, kv: queries and keys of a tile. masked: width of a tile with a mask.
        warps, stages: of one program; stages of the loop's software pipeline.
        num_splits: into how many ranges the keys are cut (forward); 0: as many as fill the device.
    """

    q: int
    kv: int
    warps: int
    stages: int
    masked: int = 0
    num_splits: int = 0

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_Q": self.q, "BLOCK_KV": self.kv} | ({"BLOCK_MASKED": self.masked} if self.masked else {})

    def options(self) -> dict[str, int]:
        return {**self.constexprs(), "num_warps": self.warps, "num_stages": self.stages}


# By architecture (0: the interpreter), at head_dim 128 in 16 bits: what compiles without spills in Triton 3.6, 3.7
# and 3.8 and fits the chip. sm_90: the fastest on an NVIDIA H200, 2026-11-27, torch 2.11.0+cu130, Triton 3.6.0, by
# bench/ops/sweep_attention.py (dq beside a context spills 8 bytes in 3.6 and 3.8); the others were never measured.
FORWARD = {
    0: Tile(16, 32, 4, 1, 16),
    80: Tile(128, 32, 8, 3, 16),
    90: Tile(128, 64, 8, 3, 32),  # visit 1.932 ms, pair 3.980; by tensor descriptors 2.585, 4.472; 128x128 2.594, 4.749
    100: Tile(128, 32, 8, 3, 16),
    120: Tile(128, 64, 8, 2, 16),
}
DQ = {
    0: Tile(16, 32, 4, 1, 16),
    80: Tile(128, 32, 8, 2, 16),
    90: Tile(64, 64, 4, 2, 16),  # block-causal 10.23 ms, over a context 10.57; 128x64, 8 warps: 11.07 and 12.39
    100: Tile(64, 64, 8, 2, 16),
    120: Tile(128, 32, 8, 2, 32),
}
DKDV = {
    0: Tile(32, 16, 4, 1, 16),
    80: Tile(128, 32, 8, 2, 32),
    89: Tile(32, 64, 8, 2, 32),
    90: Tile(32, 128, 8, 2, 16),  # block-causal 18.78 ms, beside a context 6.28; 64x64: 29.96 and 9.24
    100: Tile(32, 64, 8, 2, 32),
    120: Tile(128, 32, 8, 2, 32),
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    DKDV[90] = replace(DKDV[90], masked=32)  # spills 16 bytes there; with 16, the tile measured with 3.6, 40
FLOAT32 = {0: Tile(32, 32, 4, 1, 16), 80: Tile(32, 32, 8, 1, 32)}

# Worth measuring beside the pinned ones, where nothing was measured yet. The launchers take them as ``config``,
# ``dq_config`` and ``dkdv_config``.
CANDIDATES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        80: (Tile(128, 64, 8, 2, 16), Tile(64, 64, 4, 2, 64), *(replace(FORWARD[80], num_splits=n) for n in (1, 2, 3))),
        90: (),
        100: tuple(replace(FORWARD[100], num_splits=n) for n in (1, 2, 3)),
        120: (Tile(64, 64, 4, 2, 32), *(replace(FORWARD[120], num_splits=n) for n in (1, 2, 3))),
    },
    "dq": {80: (Tile(64, 64, 4, 2, 16),), 90: (), 100: ()},
    "dkdv": {80: (Tile(64, 64, 8, 2, 16),), 90: ()},
}


def pick(table: dict[int, Tile], arch: int) -> Tile:
    """Look up an architecture, or the newest older one."""
    return table[max((a for a in table if a <= arch), default=min(table))]


def tile_for(q: Tensor, table: dict[int, Tile]) -> Tile:
    """The pinned tile for the device and dtype of q."""
    return pick(FLOAT32 if q.dtype == torch.float32 else table, architecture(q))


def check(call: AttentionInputs) -> None:
    """Raise ValueError in one line for inputs that the kernels do not support."""
    q, context = call.q, call.context
    tensors = {"q": q, "k": call.k, "v": call.v}
    if context is not None:
        tensors |= {"context.k": context.k, "context.v": context.v}
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"attention: impl='triton' takes {name} as bfloat16, float16 or float32, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"attention: {name} must be {q.dtype} like q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"attention: {name} must be on {q.device} like q, got {x.device}")
        if x.stride(-1) != 1 and x.shape[-1] != 1 and x.numel():
            raise ValueError(f"attention: impl='triton' needs {name} with a last stride of 1, got {x.stride(-1)}")
        if x.stride(1) >= 2**24:  # offsets within a tile have 32 bits
            raise ValueError(
                f"attention: impl='triton' needs {name} with a token stride below {2**24}, got {x.stride(1)}"
            )
    if q.shape[3] not in TRITON_HEAD_DIMS:
        raise ValueError(
            f"attention: impl='triton' has head_dim {', '.join(map(str, TRITON_HEAD_DIMS))}, got {q.shape[3]}"
        )
    first = 0 if call.mask is None else call.mask.first_frame  # ids on the device are not checked: no sync
    if abs(first) >= LARGEST_FRAME:
        raise ValueError(
            f"attention: impl='triton' takes frame ids below {LARGEST_FRAME}, got mask.first_frame {first}"
        )


_windows: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}


def windows_on(device: torch.device, mask: BlockCausal, batch: int) -> Tensor:
    """int32 [B] on the device. Cached forever: a captured graph reads it on replay and must not copy from the host."""
    windows = window_list(mask, batch)
    key = (device, tuple(windows))
    if key not in _windows:
        _windows[key] = torch.tensor(windows, dtype=torch.int32, device=device)
    return _windows[key]


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of x [B, T, H, D] by the kernels' names; 0 for None."""
    b, t, h = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"stride_{name}b": b, f"stride_{name}t": t, f"stride_{name}h": h}


def key_strides(call: AttentionInputs) -> dict[str, int]:
    """Strides of k, v and of the context's k, v."""
    k, v = (None, None) if call.context is None else call.context.kv
    return {**strides("k", call.k), **strides("v", call.v), **strides("ck", k), **strides("cv", v)}


def row_stride(x: Tensor | None) -> int:
    """Batch stride of ids or counts [B or 1, n]; 0 if one row is shared."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def dense_rows(x: Tensor | None) -> Tensor | None:
    """Ids or counts with a last stride of 1."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


class DeviceIds(NamedTuple):
    """Frame ids as int32 with dense rows, and the window of each batch item; None where there are none."""

    q_frames: Tensor | None
    kv_frames: Tensor | None
    context_frames: Tensor | None
    windows: Tensor | None

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """In the order of the kernels' arguments."""
        return tuple(self)

    @property
    def strides(self) -> dict[str, int]:
        """From batch item to batch item, by the kernels' names."""
        ids = {"stride_qfb": self.q_frames, "stride_kfb": self.kv_frames, "stride_cfb": self.context_frames}
        return {name: row_stride(x) for name, x in ids.items()}


def device_ids(call: AttentionInputs) -> DeviceIds:
    """With a context the own keys need explicit ids too, since the kernels choose between the two at run time."""
    mask, context, kv_frames, k = call.mask, call.context, call.kv_frames, call.k
    if mask is not None and context is not None and kv_frames is None:
        first, slots = mask.first_frame, k.shape[1] // mask.frame_tokens
        kv_frames = torch.arange(first, first + slots, dtype=torch.int32, device=k.device)[None]
    ids = (call.q_frames, kv_frames, None if context is None else context.frames)
    q_frames, kv_frames, context_frames = (None if x is None else dense_rows(x.to(torch.int32)) for x in ids)
    windows = None if mask is None else windows_on(k.device, mask, k.shape[0])
    return DeviceIds(q_frames, kv_frames, context_frames, windows)


def rule_arguments(mask: BlockCausal | None, length: int) -> dict[str, Any]:
    """The mask by the kernels' names; without one all ``length`` keys are as one frame."""
    if mask is None:
        mask = BlockCausal(max(1, length), 1)
    first, block = mask.first_frame, mask.frames_per_block
    first_block = block if mask.first_block_frames is None else mask.first_block_frames
    return {
        "frame_tokens": mask.frame_tokens,
        "frames_per_block": block,
        "first_frame": first,
        "origin": first - (block - first_block),
        "sink_frames": mask.sink_frames,
        "sink_end": first + mask.sink_frames,
    }


def production_case(
    name: str, kernel: Any, options: dict[str, Any], tile: Tile, *, out: str = "", tensor_cores: bool = True
) -> Case:
    """A launch in bfloat16.

    Args:
        options: constexprs beside those of the tile, and ``pointers``: the optional pointers that are not None.
        out: dtype of out_ptr, where it is not that of q.
    """
    optional = options.pop("pointers")
    ends = {"frames": "*i32", "windows": "*i32", **dict.fromkeys(("counts", "lse", "dlse", "lse2", "delta"), "*fp32")}
    constexprs = {"HEAD_DIM": HEAD_DIM, "PRECISION": "tf32", **tile.constexprs(), **options}
    constexprs["CONTEXT"] = "context_k_ptr" in optional
    constexprs = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
    types = {arg: "fp32" for arg in kernel.arg_names if arg.endswith("scale")}
    for stem in (arg.removesuffix("_ptr") for arg in kernel.arg_names if arg.endswith("_ptr")):
        types[f"{stem}_ptr"] = ends.get(stem.rpartition("_")[2], "*bf16")
        if stem in OPTIONAL and f"{stem}_ptr" not in optional:
            constexprs[f"{stem}_ptr"] = None
    types |= {"out_ptr": f"*{out}"} if out else {}
    aligned = tuple(f"stride_{x}" for x in ("q", "k", "v", "ck", "cv"))
    unaligned = ("stride_qfb", "stride_kfb", "stride_cfb", "stride_nb")
    case = Case.of(name, kernel, types, constexprs, aligned, num_warps=tile.warps, num_stages=tile.stages)
    divisible = tuple(arg for arg in case.divisible if arg not in unaligned)
    return replace(case, divisible=divisible, tensor_cores=tensor_cores)
