"""What a video will take of a device's memory, before anything is loaded: `hiar doctor --model ...`.

Weights, caches and latents follow from the sizes. What a task needs beside them is counted: the rollout's own code
runs once on fake tensors, which have shapes and no memory, with few layers (the most that is alive at a time does not
depend on how many there are). Units: bytes; GB is 10^9 of them, GiB 2^30.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hiar_kernels import prefer
from hiar_kernels._triton import shapes_only

from ..common.checks import OFFLOAD, one_of
from ..config import ExecutionConfig, RolloutConfig, WanConfig
from ..models.kv_cache import RingCache
from ..models.transformer import HiARTransformer
from ..rollout import Rollout
from ..rollout.footprint import forwards, prompt_bytes
from ..schedule.plan import Plan

_LAYERS = 2  # of the network that is run on fake tensors: a first and a last one
WORKSPACE = 32 << 20
"""Bytes that torch keeps for cuBLAS for each stream that multiplies matrices, on sm_90 (8 MiB on most others)."""
"""What can leave the device: the text encoder after it has read the prompt; the VAE for good, to decode on the CPU."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors while they are alive: ``now``, and ``peak`` since :meth:`restart`.

    What torch makes inside an operation and frees again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes

    def restart(self) -> int:
        """Let the peak begin anew; returns what is alive."""
        self.peak = self.now
        return self.now


_ROLLOUT = RolloutConfig()


@dataclass(frozen=True)
class Request:
    """A rollout, in what decides about memory.

    config             of the transformer
    height, width      of a latent frame
    num_frames         latent frames of the whole video; None: endless
    rollout            what is computed
    batch              videos at once
    dtype              of weights and work; kv_dtype: of keys and values, None: the same
    text_tokens        of the prompt; None: as long as it may be
    cuda_graph         whether forwards are captured
    device             "cuda": with the kernels of a GPU (of torch where triton is not installed); "cpu"
    """

    config: WanConfig
    height: int
    width: int
    num_frames: int | None
    rollout: RolloutConfig = _ROLLOUT
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    text_tokens: int | None = None
    device: str = "cuda"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        one_of("device", self.device, ("cuda", "cpu"))

    def make(self, model: HiARTransformer, prompt_embeds: Tensor) -> Rollout:
        """The rollout, eager, with weights of this config."""
        return Rollout(
            model, prompt_embeds, self.rollout, ExecutionConfig(kv_dtype=self.kv_dtype),  # type: ignore[arg-type]
            num_latent_frames=self.num_frames, latent_size=(self.height, self.width), video_ids=range(self.batch),
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A model beside the transformer: bytes of its ``weights``; ``kept`` from block to block, and the ``peak`` while it
    works beside both.
    """

    weights: int = 0
    kept: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of a video's parts on the device.

    transformer        weights
    text_encoder, vae  weights, as `Part`
    caches             keys, values, scales and frame ids of all ``rings``
    scratch            what all layers read narrow keys into
    prompt             keys and values of the prompt for every layer (twice where tasks are captured: graphs read them
                       in a fixed place), modulation, buffers of tasks
    latents            in flight, and the block that was finished last
    activations        the most that a task needs beside all this
    captured           that lies in the private pool of the graphs, which nothing else can use between tasks
    workspaces         of cuBLAS, one for each stream that multiplies matrices
    offload            what leaves the device, of `OFFLOAD`
    """

    transformer: int
    caches: int
    rings: int
    scratch: int
    prompt: int
    latents: int
    activations: int
    captured: bool = False
    workspaces: int = 0
    text_encoder: Part = Part()
    vae: Part = Part()
    offload: tuple[str, ...] = ()

    @property
    def _vae(self) -> Part:
        return Part() if "vae" in self.offload else self.vae

    @property
    def reading(self) -> int:
        """Peak while the prompt is read: all weights, no caches yet."""
        weights = self.transformer + self._vae.weights + self.text_encoder.weights
        return weights + self.text_encoder.peak + self.workspaces

    @property
    def resident(self) -> int:
        """What stays from block to block."""
        text = 0 if "text" in self.offload else self.text_encoder.weights
        held = self.transformer + self.caches + self.scratch + self.prompt + self.latents + self.workspaces
        held += self.activations if self.captured else 0
        return held + text + self._vae.weights + self._vae.kept

    @property
    def visiting(self) -> int:
        """Peak of a task."""
        return self.resident + (0 if self.captured else self.activations)

    @property
    def decoding(self) -> int:
        """Peak while the VAE decodes a block."""
        return self.resident + self._vae.peak

    @property
    def total(self) -> int:
        """The highest of the three."""
        return max(self.reading, self.visiting, self.decoding)

    @property
    def when(self) -> str:
        """Which of the three it is."""
        named = {"a visit": self.visiting, "decoding": self.decoding, "reading the prompt": self.reading}
        return max(named, key=lambda name: named[name])


def predict(
    request: Request, *, text_encoder: Part | None = None, vae: Part | None = None, offload: Sequence[str] = ()
) -> Memory:
    """The memory of a rollout; nothing is allocated.

    Args:
        text_encoder, vae: models beside the transformer on the same device; None: there is none. offload: of `OFFLOAD`.

    Raises:
        ValueError: options that do not fit together, as `Rollout` says it; an unknown offload.
    """
    for name in offload:
        if name not in OFFLOAD:
            raise ValueError(f"offload must be of {', '.join(OFFLOAD)}, got {name!r}")
    config, counted = request.config, _counted(request)
    rows, columns = config.grid(request.height, request.width)
    ring = (counted.capacities, request.batch, rows * columns)
    caches = RingCache.memory_bytes(config, *ring, request.dtype, kv_dtype=request.kv_dtype)
    narrow = request.kv_dtype not in (None, request.dtype)
    scratch = 2 * math.prod(RingCache.shape(config, *ring)) * request.dtype.itemsize if narrow else 0
    captured = request.cuda_graph
    streams = 1 + captured if request.device == "cuda" else 0  # tasks are captured on a stream of their own
    return Memory(
        transformer=weights_bytes(config, request.dtype),
        caches=caches - scratch,
        rings=len(counted.capacities),
        scratch=scratch,
        prompt=config.num_layers * counted.prompt_layer + counted.beside,
        latents=_latents(request),
        activations=counted.activations,
        captured=captured,
        workspaces=streams * WORKSPACE,
        text_encoder=text_encoder or Part(),
        vae=vae or Part(),
        offload=tuple(offload),
    )


@lru_cache(maxsize=64)
def weights_bytes(config: WanConfig, dtype: torch.dtype) -> int:
    """Bytes of the transformer's weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in HiARTransformer(config).parameters()) * dtype.itemsize


def _latents(request: Request) -> int:
    """Bytes of the blocks that a rollout holds at most, with the one that it hands over and one on its way in.

    A block's latents stay until their last reader; memory that is free again is used for the next ones.
    """
    plan, block = Plan.of(request.rollout), request.rollout.frames_per_block
    seen = max((window or 0 for window in plan.window_frames), default=0)
    blocks = request.num_frames // block if request.num_frames else None
    readers: dict[tuple[int, int], int] = {}
    most = 0
    for group in plan.groups(blocks if blocks is not None else seen // block + plan.steps + 2):
        for task in (task for row in group for task in row):
            if task.kind == "denoise":
                readers.setdefault((task.step, task.block), 1)
                readers[task.step + 1, task.block] = (task.step + 1 < plan.steps) + plan.has_cache(
                    task.step, task.block, blocks
                )
        most = max(most, len(readers))
        for task in (task for row in group for task in row):
            level = task.step + (task.kind == "cache")
            readers[level, task.block] -= 1
        readers = {key: n for key, n in readers.items() if n}
    frame = request.config.in_channels * request.height * request.width
    return (most + 2) * request.batch * block * frame * request.dtype.itemsize


# What a task needs, counted.


class Counted(NamedTuple):
    """Bytes: ``prompt_layer`` of the prompt's keys in a layer, ``beside`` what else stays, ``activations`` the peak."""

    capacities: tuple[int, ...]
    prompt_layer: int
    beside: int
    activations: int


@contextmanager
def fake(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Tensors made here have no memory. "cuda": they are allocated as beside the kernels that take the dtype on a GPU.

    All of them are said to be on the CPU: torch without CUDA cannot index others.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports much

    with FakeTensorMode(), torch.no_grad():
        if device == "cpu" or dtype == torch.float64:
            yield
            return
        with shapes_only(), prefer("triton"):
            yield


@lru_cache(maxsize=256)
def _counted(request: Request) -> Counted:
    """Each kind of task, run once on fake tensors."""
    few = replace(request.config, num_layers=min(_LAYERS, request.config.num_layers))
    with torch.device("meta"):
        model = HiARTransformer(few).eval().requires_grad_(False)
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    with fake(request.device, request.dtype), LiveBytes() as live:
        weights = {name: torch.empty(shape, dtype=request.dtype) for name, shape in shapes.items()}
        model.load_state_dict(weights, assign=True)
        del weights
        tokens = few.text_len if request.text_tokens is None else request.text_tokens
        text = torch.empty(1, tokens, few.text_dim, dtype=request.dtype)
        rollout = request.make(model, text)
        cache = rollout.cache
        prompt = (1 + request.cuda_graph) * prompt_bytes(rollout, model, text)  # graphs read theirs in a fixed place
        activations = 0
        for forward in forwards(rollout, request.cuda_graph):
            before = live.restart()
            forward.body()
            activations = max(activations, live.peak - before)
        held = live.now - prompt - sum(p.nbytes for p in model.parameters())
        for kept in (*cache.k, *cache.v, *cache.k_scales, *cache.v_scales, *cache.scratch, cache.frames):
            held -= kept.nbytes
    return Counted(tuple(cache.capacities), prompt // few.num_layers, held, activations)


def vae_part(
    config: Mapping[str, Any], height: int, width: int, frames: int, dtype: torch.dtype, device: str = "cuda"
) -> Part:
    """diffusers' AutoencoderKLWan of such settings, decoding blocks of ``frames`` latent frames of height x width."""
    return _vae(json.dumps(dict(config), sort_keys=True), height, width, frames, dtype, device)


@lru_cache(maxsize=32)
def _vae(settings: str, height: int, width: int, frames: int, dtype: torch.dtype, device: str) -> Part:
    from ..models.vae import StreamingDecoder
    from ..models.vae_fused import fuse
    from ..models.vae_weights import library

    given = {key: value for key, value in json.loads(settings).items() if not key.startswith("_")}
    with torch.device("meta"):
        vae = fuse(library("models.autoencoders.autoencoder_kl_wan").AutoencoderKLWan(**given))
    vae.eval().requires_grad_(False)
    shapes = {name: x.shape for name, x in vae.state_dict().items()}
    with fake(device, dtype), LiveBytes() as live:
        vae.load_state_dict({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, assign=True)
        weights = sum(x.nbytes for x in vae.state_dict().values())
        decoder = StreamingDecoder(vae)
        for count in (1, frames):  # the first latent frame has no past
            live.restart()
            decoder.submit(torch.empty(1, count, vae.config.z_dim, height, width, dtype=dtype))
        kept = live.now - weights
        return Part(weights, kept, live.peak - live.now)
