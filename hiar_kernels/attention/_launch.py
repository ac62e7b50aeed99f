"""What the launchers of the attention kernels share on the host: refusals, arguments, tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._compile import Case
from .._triton import architecture

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)
OPTIONAL = ("context_k", "context_v", "q_frames", "kv_frames", "context_frames", "windows", "counts", "frames")
LARGEST_FRAME = 2**30  # exclusive: sums of two ids and a window stay within 32 bits
WAN_HEAD_DIM = 128  # Wan 1.3B
RULE = ("frame_tokens", "frames_per_block", "first_frame", "origin", "sink_frames", "sink_end")


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up and launched.

    Attributes:
        q, kv: queries and keys of a tile. masked: width of a tile with a mask.
        warps, stages: of one program; stages of the loop's software pipeline.
        splits: into how many parts the keys are cut (forward); 0: as many as fill the device.
    """

    q: int
    kv: int
    warps: int
    stages: int
    masked: int = 0
    splits: int = 0

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
FLOAT32 = {0: Tile(32, 32, 4, 1, 16), 80: Tile(32, 32, 8, 1, 32)}

# Worth measuring beside the pinned ones, where nothing was measured yet. The launchers take them as ``config``,
# ``dq_config`` and ``dkdv_config``.
CANDIDATES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        80: (Tile(128, 64, 8, 2, 16), Tile(64, 64, 4, 2, 16), *(replace(FORWARD[80], splits=n) for n in (1, 2, 3))),
        90: (),
        100: tuple(replace(FORWARD[100], splits=n) for n in (1, 2, 3)),
        120: (Tile(64, 64, 4, 2, 32), *(replace(FORWARD[120], splits=n) for n in (1, 2, 3))),
    },
    "dq": {80: (Tile(64, 64, 4, 2, 16),), 90: (), 100: ()},
    "dkdv": {80: (Tile(64, 64, 8, 2, 16),), 90: ()},
}


def pick(table: dict[int, Tile], arch: int) -> Tile:
    """The entry of the architecture, or of the newest older one."""
    return table[max((a for a in table if a <= arch), default=min(table))]


def tile_for(q: Tensor, table: dict[int, Tile]) -> Tile:
    """The pinned tile for the device and dtype of q."""
    return pick(FLOAT32 if q.dtype == torch.float32 else table, architecture(q))


def check(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None, rule: list[int]) -> None:
    """Refuse in one line what the kernels do not take."""
    for name, x in (("q", q), ("k", k), ("v", v), ("context.k", context_k), ("context.v", context_v)):
        if x is None:
            continue
        known = x.dtype in DTYPES
        if not known:
            raise ValueError(f"attention: impl='triton' takes {name} as bfloat16, float16 or float32, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"attention: {name} must be {q.dtype} like q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"attention: {name} must be on {q.device} like q, got {x.device}")
        dense = x.stride(-1) == 1 or x.shape[-1] == 1 or x.numel() == 0
        if not dense:
            raise ValueError(f"attention: impl='triton' needs {name} with a last stride of 1, got {x.stride(-1)}")
        near = x.stride(1) < 2**24  # offsets within a tile have 32 bits
        if not near:
            raise ValueError(
                f"attention: impl='triton' needs {name} with a token stride below {2**24}, got {x.stride(1)}"
            )
    sizes = ", ".join(map(str, HEAD_DIMS))
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"attention: impl='triton' has head_dim {sizes}, got {q.shape[3]}")
    if rule:  # ids on the device are not looked at
        first = rule[3]
        near = abs(first) < LARGEST_FRAME
        if not near:
            raise ValueError(
                f"attention: impl='triton' takes frame ids below {LARGEST_FRAME}, got mask.first_frame {first}"
            )


_windows: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}


def windows_on(device: torch.device, windows: list[int]) -> Tensor:
    """int32 [B] on the device. Kept for good: a captured graph reads it again, and must not copy it from the host."""
    key = (device, tuple(windows))
    if key not in _windows:
        _windows[key] = torch.tensor(windows, dtype=torch.int32, device=device)
    return _windows[key]


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of x [B, T, H, D] by the kernels' names; 0 where it is not given."""
    b, t, h = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"stride_{name}b": b, f"stride_{name}t": t, f"stride_{name}h": h}


def row_stride(x: Tensor | None) -> int:
    """Stride from row to row of ids or counts [B or 1, n]; 0 where one row serves all."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def dense_rows(x: Tensor | None) -> Tensor | None:
    """Ids or counts with a last stride of 1."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def ids_of(
    q_frames: Tensor | None, kv_frames: Tensor | None, context_frames: Tensor | None, rule: list[int], k: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Frame ids as int32 with dense rows; beside a context the keys' own too, for kernels choose between the two."""
    if context_frames is not None and kv_frames is None:
        first, slots = rule[3], k.shape[1] // rule[0]
        kv_frames = torch.arange(first, first + slots, dtype=torch.int32, device=k.device)[None]
    ids = (q_frames, kv_frames, context_frames)
    q_frames, kv_frames, context_frames = (None if x is None else dense_rows(x.to(torch.int32)) for x in ids)
    return q_frames, kv_frames, context_frames


def rule_arguments(rule: list[int], length: int) -> dict[str, Any]:
    """The rule by the kernels' names; without one all ``length`` keys are as one frame."""
    tokens, block, sink, first, first_block = rule or (max(1, length), 1, 0, 0, 1)
    return {
        "frame_tokens": tokens,
        "frames_per_block": block,
        "first_frame": first,
        "origin": first - (block - first_block),
        "sink_frames": sink,
        "sink_end": first + sink,
    }


def production_case(
    name: str, kernel: Any, given: dict[str, Any], tile: Tile, *, out: str = "", tensor_cores: bool = True
) -> Case:
    """A launch at Wan 1.3B's shapes in bfloat16.

    Args:
        given: constexprs beside those of the tile, and ``pointers``: the optional pointers that are not None.
        out: dtype of out_ptr, where it is not that of q.
    """
    optional = given.pop("pointers")
    types = {"frames": "*i32", "windows": "*i32", "counts": "*fp32", "lse": "*fp32", "delta": "*fp32"}
    constexprs = {"HEAD_DIM": WAN_HEAD_DIM, "PRECISION": "tf32", **tile.constexprs(), **given}
    constexprs["CONTEXT"] = "context_k_ptr" in optional
    constexprs = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
    signature = {}
    for arg in kernel.arg_names:
        stem = arg.removesuffix("_ptr")
        if stem != arg and stem in OPTIONAL and arg not in optional:
            constexprs[arg] = None
        elif stem != arg:
            kind = next((kind for part, kind in types.items() if stem.endswith(part)), "*bf16")
            signature[arg] = f"*{out}" if stem == "out" and out else kind
        elif arg not in constexprs:
            signature[arg] = "fp32" if arg.endswith("scale") else "i32"
    frame_strides = ("stride_qfb", "stride_kfb", "stride_cfb", "stride_nb")
    sixteens = [a for a in signature if a.endswith("_ptr") or (a.startswith("stride_") and a not in frame_strides)]
    return Case(name, kernel, signature, constexprs, tuple(sixteens), tile.warps, tile.stages, tensor_cores)
