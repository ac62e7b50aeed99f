"""What a task launches on a CUDA device, counted without one: fake tensors that say they are on CUDA.

A kernel, a copy, a memset and a call of a library are one operation each; views and allocations are none. Attention
over a ring counts twice: its kernel and the merge of its parts. What a library launches inside of a call is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from made_runs import make_request
from on_cuda import OnCuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from hiar_kernels import AttentionLayout
from hiar_kernels.common import cuda_loader
from hiar_kernels.common.triton_loader import shapes_only
from hiar_model.config import WanConfig
from hiar_model.models.cached_attention import CachedAttention
from hiar_model.models.transformer import HiARTransformer
from hiar_model.planning.memory import Request
from hiar_model.rollout.batched_forward import BatchedForward

NO_LAUNCH = {
    "empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh", "device", "promote_types",
    "_unsafe_view", "_reshape_alias",
}  # fmt: skip
RULE = 9  # of hiar::attention's arguments: empty where every query sees every key


class HostAttention(CachedAttention):
    """Computes what is visible on the host, with real numbers."""

    def prepare_host(self, starts: Sequence[int], layout: bool = True) -> AttentionLayout | None:
        with unset_fake_temporarily():
            return super().prepare_host(starts, layout)


class Operations(TorchDispatchMode):
    """The operations that torch dispatches, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._opname not in NO_LAUNCH:
            self._note(f"{func.namespace}.{func._opname}", args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if name.startswith("hiar."):  # its launcher copies what is not dense in the last dimension
            loose = [x for x in tensors if x.is_floating_point() and x.shape[-1] > 1 and x.stride(-1) != 1]
            self.launched += [f"copy of {list(x.shape)} for {name}" for x in loose]
        self.launched.append(f"{name} {list(tensors[0].shape) if tensors else ''}".strip())
        if name == "hiar.attention" and args[RULE]:
            self.launched.append("merge of its parts")


@contextmanager
def on_cuda(monkeypatch: pytest.MonkeyPatch, architecture: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Fake tensors, for which "auto" takes what it would take on such a GPU with Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: architecture)
    monkeypatch.setattr(cuda_loader, "missing", lambda: "Triton's kernels are counted")
    with FakeTensorMode(), torch.no_grad(), shapes_only(), OnCuda():
        yield


LAYERS = 3
CONFIG = WanConfig(
    dim=256, ffn_dim=512, num_heads=2, num_layers=LAYERS, freq_dim=64, text_dim=32, text_len=64, in_channels=4,
    out_channels=4,
)  # fmt: skip
REQUEST = make_request(CONFIG, 8, 12, 24, steps=4, window_frames=9, dtype=torch.bfloat16, text_tokens=10)


def launches(request: Request) -> Iterator[tuple[str, BatchedForward]]:
    """Of a rollout by what their rows are; made and run on fake tensors."""
    with torch.device("meta"):
        model = HiARTransformer(request.config).eval().requires_grad_(False)
    weights = {name: torch.empty(x.shape, dtype=request.dtype) for name, x in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    text = torch.empty(1, request.text_tokens or 1, request.config.text_dim, dtype=request.dtype)
    rollout = request.make(model, text)
    executor = rollout._executor
    executor.attend = HostAttention
    executor.by_layout = False  # one graph for all blocks: visibility by frame ids on the device
    executor.prompt_cache.add(model, text, text)
    seen = set()
    for launch in executor.prepared(rollout.warm_up_blocks):
        shared = f", {sum(launch.key.shares_kv)} shared" if any(launch.key.shares_kv) else ""
        name = "; ".join("+".join(kind for kind, _ in row) for row in launch.key.items) + shared
        if name not in seen:
            seen.add(name)
            yield name, launch


def operations(launch: BatchedForward) -> list[list[str]]:
    """Of a task: what is launched up to the end of each layer, and after the last."""
    parts: list[list[str]] = []
    with Operations() as seen:

        def end_of_layer(*_: Any) -> None:
            parts.append(seen.launched)
            seen.launched = []

        hooks = [block.register_forward_hook(end_of_layer) for block in launch.model.blocks]
        launch.body()
        for hook in hooks:
            hook.remove()
    return [*parts, seen.launched]
