"""Predicts the device memory of a video before anything is loaded: `hiar doctor --model ...`.

Weights, caches and latents follow from the sizes. Activations are counted by running the rollout's own code on meta
tensors, which have shapes but no memory, with few layers (the peak does not depend on their number). Units: bytes; GB
is 10^9, GiB 2^30.
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
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hiar_kernels import prefer
from hiar_kernels.common.triton_loader import shapes_only

from ..common.checks import OFFLOAD, one_of
from ..config import ExecutionConfig, RolloutConfig, WanConfig
from ..models.checkpoint import loading_bytes
from ..models.kv_cache import E4M3, RingCache
from ..models.quantized_linear import QuantizedLinear, quantize_layers, quantized_bytes
from ..models.transformer import HiARTransformer
from ..rollout import Rollout
from ..rollout.footprint import forwards, prompt_bytes
from ..schedule.plan import Plan

_LAYERS = 2  # of the network run on meta tensors: a first and a last one
WORKSPACE = 32 << 20
"""Bytes of the cuBLAS workspace that torch keeps for each stream, on sm_90 (8 MiB on most others)."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors: ``now``, and ``peak`` since :meth:`restart`.

    Temporaries inside a torch operation are not seen.
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
        """Reset the peak to the live bytes, and return them."""
        self.peak = self.now
        return self.now


_ROLLOUT = RolloutConfig()


@dataclass(frozen=True)
class Request:
    """The options of a rollout that decide its memory.

    config             of the transformer
    height, width      of a latent frame
    num_frames         latent frames of the whole video; None: endless
    rollout            what is computed
    batch              videos at once
    dtype              of weights and activations; kv_dtype: of the KV caches, None: the same
    attention_dtype    of self-attention's products; linear_dtype: of the large linear layers; None: ``dtype``
    text_tokens        of the prompt; None: the longest
    cuda_graph         whether forwards are captured
    device             "cuda": with the GPU kernels (torch ops where triton is not installed); "cpu"
    """

    config: WanConfig
    height: int
    width: int
    num_frames: int | None
    rollout: RolloutConfig = _ROLLOUT
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    attention_dtype: torch.dtype | None = None
    linear_dtype: torch.dtype | None = None
    text_tokens: int | None = None
    device: str = "cuda"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        one_of("device", self.device, ("cuda", "cpu"))

    def make(self, model: HiARTransformer, prompt_embeds: Tensor) -> Rollout:
        """The rollout, eager, of a model of this config; its linear layers as they are."""
        execution = ExecutionConfig(kv_dtype=self.kv_dtype, attention_dtype=self.attention_dtype)  # type: ignore[arg-type]
        return Rollout(
            model, prompt_embeds, self.rollout, execution,
            num_latent_frames=self.num_frames, latent_size=(self.height, self.width), video_ids=range(self.batch),
        )  # fmt: skip


@dataclass(frozen=True)
class ComponentMemory:
    """Bytes of a model beside the transformer: ``weights``, ``resident`` features that stay from block to block, and
    the ``peak`` of its work on top of both.
    """

    weights: int = 0
    resident: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of a video on the device.

    transformer        weights; those of the large linear layers in 8 bits, if they are loaded so
    text_encoder, vae  weights, as `ComponentMemory`
    caches             keys, values, scales and frame ids of all ``rings``
    scratch            of keys and values that are stored in another dtype but e4m3, shared by all layers
    prompt             KV of the prompt in every layer (twice with CUDA graphs, which read it from a fixed buffer),
                       modulation, buffers of tasks
    latents            in flight, and the last finished block
    activations        peak of a task on top of all this
    captured           whether activations stay allocated, in the private pool of the CUDA graphs
    workspaces         of cuBLAS, one for each stream
    loading            beside the weights, while a transformer is loaded in 8 bits, with LoRA, or from a quantised
                       checkpoint
    offload            components that leave the device, of `OFFLOAD`
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
    loading: int = 0
    text_encoder: ComponentMemory = ComponentMemory()
    vae: ComponentMemory = ComponentMemory()
    offload: tuple[str, ...] = ()

    @property
    def _vae(self) -> ComponentMemory:
        return ComponentMemory() if "vae" in self.offload else self.vae

    @property
    def reading(self) -> int:
        """Peak while the transformer is loaded, after the VAE."""
        return self.transformer + self.loading + self._vae.weights

    @property
    def encoding(self) -> int:
        """Peak while the prompt is encoded: all weights, no caches yet."""
        weights = self.transformer + self._vae.weights + self.text_encoder.weights
        return weights + self.text_encoder.peak + self.workspaces

    @property
    def own(self) -> int:
        """Bytes of this video alone, beside others of the same weights whose tasks take turns with its own."""
        return self.caches + self.prompt + self.latents + self._vae.resident

    @property
    def resident(self) -> int:
        """Bytes that stay from block to block."""
        text = 0 if "text" in self.offload else self.text_encoder.weights
        total = self.transformer + self.caches + self.scratch + self.prompt + self.latents + self.workspaces
        total += self.activations if self.captured else 0
        return total + text + self._vae.weights + self._vae.resident

    @property
    def task(self) -> int:
        """Peak of a task."""
        return self.resident + (0 if self.captured else self.activations)

    @property
    def decoding(self) -> int:
        """Peak while the VAE decodes a block."""
        return self.resident + self._vae.peak

    @property
    def total(self) -> int:
        """The highest of the four."""
        return max(self.reading, self.encoding, self.task, self.decoding)

    @property
    def when(self) -> str:
        """Which of the four it is."""
        named = {
            "a task": self.task, "decoding": self.decoding, "encoding the prompt": self.encoding,
            "loading the transformer": self.reading,
        }  # fmt: skip
        return max(named, key=lambda name: named[name])


def predict(
    request: Request,
    *,
    text_encoder: ComponentMemory | None = None,
    vae: ComponentMemory | None = None,
    offload: Sequence[str] = (),
    quantised: bool = False,
    lora: bool = False,
) -> Memory:
    """Predict the memory of a rollout; nothing is allocated.

    Args:
        quantised: whether the transformer is loaded from a quantised checkpoint. lora: whether LoRA is merged into it,
            on the device where quantised weights are dequantised, else on the CPU.
        text_encoder, vae: components on the same device; None: absent. offload: components to leave it, of `OFFLOAD`.

    Raises:
        ValueError: options that `Rollout` refuses, or an unknown offload.
    """
    for name in offload:
        one_of("offload", name, OFFLOAD)
    on_cpu = request.device == "cpu"
    config, counted = request.config, _counted(request if on_cpu else replace(request, linear_dtype=None))
    ring = (counted.capacities, request.batch, math.prod(config.grid(request.height, request.width)))
    caches = RingCache.memory_bytes(config, *ring, request.dtype, kv_dtype=request.kv_dtype)
    narrow = request.kv_dtype not in (None, request.dtype, E4M3)
    scratch = 2 * math.prod(RingCache.shape(config, *ring)) * request.dtype.itemsize if narrow else 0
    captured, eight_bits, merged = request.cuda_graph, request.linear_dtype is not None, lora and (quantised or on_cpu)
    streams = 1 + captured if request.device == "cuda" else 0  # graphs are captured on a second stream
    return Memory(
        transformer=weights_bytes(config, request.dtype, request.linear_dtype, request.device),
        caches=caches - scratch,
        rings=len(counted.capacities),
        scratch=scratch,
        prompt=config.num_layers * counted.prompt_layer + counted.others,
        latents=_latents(request),
        activations=counted.activations,
        captured=captured,
        workspaces=streams * WORKSPACE,
        loading=loading_bytes(config, request.dtype, eight_bits, merged) if quantised or eight_bits or merged else 0,
        text_encoder=text_encoder or ComponentMemory(),
        vae=vae or ComponentMemory(),
        offload=tuple(offload),
    )


@lru_cache(maxsize=64)
def parameters(config: WanConfig) -> int:
    """The count of the transformer's weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in HiARTransformer(config).parameters())


def weights_bytes(
    config: WanConfig, dtype: torch.dtype, linear_dtype: torch.dtype | None = None, device: str = "cuda"
) -> int:
    """Bytes of the transformer's weights."""
    nbytes, numbers = (0, 0) if linear_dtype is None else quantized_bytes(config, linear_dtype, device == "cpu")
    return (parameters(config) - numbers) * dtype.itemsize + nbytes


def _latents(request: Request) -> int:
    """Peak bytes of a rollout's latents, including the block that is handed over and one that is being drawn.

    A block's latents live until their last reader; free buffers are reused.
    """
    plan, block = Plan.of(request.rollout), request.rollout.frames_per_block
    seen = max((window or 0 for window in plan.window_frames), default=0)
    blocks = request.num_frames // block if request.num_frames else None
    readers: dict[tuple[int, int], int] = {}
    most = 0
    for group in plan.groups(blocks if blocks is not None else seen // block + plan.steps + 2):
        for task in (task for item in group for task in item):
            if task.kind == "denoise":
                readers.setdefault((task.step, task.block), 1)
                readers[task.step + 1, task.block] = (task.step + 1 < plan.steps) + plan.has_cache(
                    task.step, task.block, blocks
                )
        most = max(most, len(readers))
        for task in (task for item in group for task in item):
            level = task.step + (task.kind == "cache")
            readers[level, task.block] -= 1
        readers = {key: n for key, n in readers.items() if n}
    frame = request.config.in_channels * request.height * request.width
    return (most + 2) * request.batch * block * frame * request.dtype.itemsize


# Counted on meta tensors. torch's fake ones, which say that they are on a CPU, take several times as long.


class Counted(NamedTuple):
    """Bytes: ``prompt_layer`` of the prompt's KV in a layer, ``others`` that stay, ``activations`` at the peak."""

    capacities: tuple[int, ...]
    prompt_layer: int
    others: int
    activations: int


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch's attention computes its scores; this one has their result alone, as fused kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _attention_output(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention_output(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@contextmanager
def shapes_of(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Meta tensors stand for those of a device. "cuda": allocations are those of the GPU kernels."""
    with _FusedAttention(), torch.no_grad():
        if device == "cpu" or dtype == torch.float64:
            yield
            return
        with shapes_only(), prefer("triton"):
            yield


@lru_cache(maxsize=256)
def _counted(request: Request) -> Counted:
    """Run each kind of forward once on meta tensors."""
    few = replace(request.config, num_layers=min(_LAYERS, request.config.num_layers))
    with torch.device("meta"):
        model = HiARTransformer(few).to(request.dtype).eval().requires_grad_(False)
    if request.linear_dtype is not None:  # on a GPU they take less than the full ones, which are counted there
        quantize_layers(model, request.linear_dtype)
    kinds = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
    with shapes_of(request.device, request.dtype), LiveBytes() as live:
        weights = {name: torch.empty(x, dtype=dtype, device="meta") for name, (x, dtype) in kinds.items()}
        model.load_state_dict(weights, assign=True)
        del weights
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear) and request.linear_dtype == E4M3:
                layer.wide_weight()  # which a small layer keeps
        tokens = few.text_len if request.text_tokens is None else request.text_tokens
        embeds = torch.empty(1, tokens, few.text_dim, dtype=request.dtype, device="meta")
        rollout = request.make(model, embeds)
        cache = rollout.cache
        prompt = (1 + request.cuda_graph) * prompt_bytes(rollout, model, embeds)  # and in graphs' buffers
        activations = 0
        for forward in forwards(rollout, request.cuda_graph):
            before = live.restart()
            forward.body()
            activations = max(activations, live.peak - before)
        others = live.now - prompt - sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        for x in (*cache.k, *cache.v, *cache.k_scales, *cache.v_scales, *cache.scratch, cache.frames):
            others -= x.nbytes
    return Counted(tuple(cache.capacities), prompt // few.num_layers, others, activations)


def vae_memory(
    config: Mapping[str, Any], height: int, width: int, frames: int, dtype: torch.dtype, device: str = "cuda"
) -> ComponentMemory:
    """Memory of diffusers' AutoencoderKLWan of this config, or of the small VAE of these settings, decoding ``frames``
    latent frames of height x width.
    """
    return _vae(json.dumps(dict(config), sort_keys=True), height, width, frames, dtype, device)


@lru_cache(maxsize=32)
def _vae(settings: str, height: int, width: int, frames: int, dtype: torch.dtype, device: str) -> ComponentMemory:
    from ..models.small_stream import SmallDecoder
    from ..models.small_vae import SmallVAE
    from ..models.vae import StreamingDecoder
    from ..models.vae_fused import fuse
    from ..models.vae_weights import library

    config = {key: value for key, value in json.loads(settings).items() if not key.startswith("_")}
    small = is_small(json.loads(settings))
    wan = library("models.autoencoders.autoencoder_kl_wan") if not small else None
    with torch.device("meta"):
        vae: Any = SmallVAE(**config) if wan is None else fuse(wan.AutoencoderKLWan(**config))
    vae.eval().requires_grad_(False)
    shapes = {name: x.shape for name, x in vae.state_dict().items()}
    options: Any = {"dtype": dtype, "device": "meta"}
    with shapes_of(device, dtype), LiveBytes() as live:
        vae.load_state_dict({name: torch.empty(shape, **options) for name, shape in shapes.items()}, assign=True)
        weights = sum(x.nbytes for x in vae.state_dict().values())
        decoder = SmallDecoder(vae) if small else StreamingDecoder(vae)
        for count in (1, frames):  # the first latent frame has no past
            live.restart()
            decoder.submit(torch.empty(1, count, vae.config.z_dim, height, width, **options))
        resident, peak = live.now - weights, live.peak - live.now
        if small and device == "cuda":  # the features of a captured call stay in the graph's pool, and its output
            before = live.restart()
            decoder.submit(torch.empty(1, 1, vae.config.z_dim, height, width, **options))
            resident += live.peak - before
        return ComponentMemory(weights, resident, peak)


def is_small(settings: Mapping[str, Any] | None) -> bool:
    """Whether the settings of a VAE are the small one's."""
    if settings is None:
        return False
    from ..models.small_vae import SMALL

    return settings.get("_class_name") == SMALL
