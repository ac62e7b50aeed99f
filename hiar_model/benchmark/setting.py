"""What `hiar bench` and `hiar warmup` run: a setting, and the model with everything around it that the setting names.

With random weights on a torch.device nothing is imported but torch and numpy, which is all that a machine of the
benches has to have.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..common.checks import DTYPE_NAMES, dtype_name, one_of, whole
from ..common.settings import own_settings
from ..config import SHIPPED, WAN, ExecutionConfig, RolloutConfig, WanConfig
from ..models.quantized_linear import quantize_layers
from ..models.threads import cpu_threads, fitting_threads
from ..models.transformer import HiARTransformer
from ..rollout import Rollout
from .parts import now

if TYPE_CHECKING:
    from ..models.video_model import Decoder

PROMPTS = {"toy": "a red circle moving right", "scenes": "a red circle moving right"}
PROMPT = "a red fox runs through the snow"
RANDOM = "random, seed 0"


@dataclass(frozen=True)
class Setting:
    """A rollout to measure.

    Attributes:
        model: a shipped model, a folder, or a name of :meth:`WanConfig.from_name`, whose weights are random.
        height, width: pixels; None: what the model says.
        rollout: fields of :class:`RolloutConfig` in place of the model's own. Its order must have a steady state.
        cuda_graph: whether forwards are captured; None: on CUDA. kv_dtype: of keys and values; None: ``dtype``.
        attention_dtype: of self-attention's products. linear_dtype: of the large linear layers; None: ``dtype``.
        attention_impl: implementation of self-attention.
        device: "auto", "cpu", "cuda", "cuda:1", ... dtype: of weights; None: bfloat16 on CUDA, float32 on a CPU.
        layers: so many layers of the network, with random weights; None: all.
        blocks: measured with a full window. repeats: rollouts, each from its first block. seed: of the noise.

    Raises:
        ValueError: blocks or repeats below 1.
    """

    model: str = "toy"
    height: int | None = None
    width: int | None = None
    rollout: Mapping[str, Any] = field(default_factory=dict)
    cuda_graph: bool | None = None
    kv_dtype: str | None = None
    attention_dtype: str | None = None
    linear_dtype: str | None = None
    attention_impl: str = "auto"
    device: str | torch.device = "auto"
    dtype: str | None = None
    layers: int | None = None
    blocks: int = 8
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blocks", "repeats"):
            whole(name, getattr(self, name), 1)


@dataclass
class BenchModel:
    """A setting's model, ready to run.

    Attributes:
        networks: one, or one for each step. prompt_embeds: [1, L, text_dim].
        latent_size: (height, width) of a latent frame. temporal_compression: pixel frames of a latent frame.
        pixel_size: (height, width) of a frame.
        weights: their sha256, or "random, seed 0". prompt: None: a random embedding.
        decoders: name -> (what it is, how to make one), or why there is none.
    """

    networks: HiARTransformer | list[HiARTransformer]
    prompt_embeds: Tensor
    rollout: RolloutConfig
    execution: ExecutionConfig
    latent_size: tuple[int, int]
    pixel_size: tuple[int, int]
    temporal_compression: int
    weights: str
    prompt: str | None
    decoders: dict[str, tuple[str, Callable[[], Decoder]] | str]

    @property
    def network(self) -> HiARTransformer:
        """One of the networks, which all have the same sizes."""
        return self.networks if isinstance(self.networks, HiARTransformer) else self.networks[0]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.prompt_embeds.device

    @property
    def blocks_before(self) -> int:
        """Blocks until the widest window is full."""
        widest = max(window or 0 for window in self.rollout.windows)
        return -(-widest // self.rollout.frames_per_block)

    def new_rollout(self, seed: int = 0) -> Rollout:
        """An endless rollout from its first block."""
        return Rollout(
            self.networks, self.prompt_embeds, self.rollout, self.execution, num_latent_frames=None,
            latent_size=self.latent_size, seed=seed,
        )  # fmt: skip


def rollout_of(base: RolloutConfig, options: Mapping[str, Any]) -> RolloutConfig:
    """A model's own rollout with the options of a setting: in the order stream if its own has no steady state.

    Raises:
        ValueError: the order step_first, whose blocks are all finished at the end; a window of all frames.
    """
    base = base.with_order("stream") if base.order == "step_first" else base
    if base.window_frames is None:
        base = base.with_options(window_frames=WAN.window_frames)
    config = base.with_options(**{"window_frames": "model", **options})
    if config.order == "step_first":
        raise ValueError("order must have a steady state (stream, wavefront or block_first), got step_first")
    config.require_endless("a measurement with a full window")
    return config


@own_settings()
def load(setting: Setting) -> BenchModel:
    """Load, or make with random weights, what a setting names.

    Raises:
        ValueError: one line: no such model, a size that it cannot make, options that do not fit together.
    """
    device, dtype = setting.device, _dtype(setting)
    if not isinstance(device, torch.device):
        from ..models.video_model import pick_device

        device = pick_device(device)
    shipped = setting.model in SHIPPED
    if setting.layers is not None or (not shipped and setting.model in WanConfig.names()):
        return _random(setting, device, dtype)
    return _loaded(setting, device, dtype)


def _dtype(setting: Setting) -> torch.dtype | None:
    if setting.dtype is None:
        return None
    one_of("dtype", setting.dtype, DTYPE_NAMES)
    return cast(torch.dtype, getattr(torch, setting.dtype))


def _execution(setting: Setting, device: torch.device) -> ExecutionConfig:
    captured = device.type == "cuda" if setting.cuda_graph is None else setting.cuda_graph
    return ExecutionConfig(
        cuda_graph=captured, kv_dtype=setting.kv_dtype, attention_dtype=setting.attention_dtype,
        linear_dtype=setting.linear_dtype, attention_impl=setting.attention_impl,
    )  # fmt: skip


def _loaded(setting: Setting, device: torch.device, dtype: torch.dtype | None) -> BenchModel:
    from ..models.registry import load_video_model
    from ..models.wan import is_wan_folder
    from ..planning.free_memory import require_memory

    offload: dict[str, Any] = {"offload": ("text",)} if is_wan_folder(Path(setting.model)) else {}
    require_memory(
        setting.model, device, dtype, height=setting.height, width=setting.width, kv_dtype=setting.kv_dtype,
        attention_dtype=setting.attention_dtype, linear_dtype=setting.linear_dtype,
        **{"order": "stream", **setting.rollout}, **offload,
    )  # fmt: skip
    model = load_video_model(setting.model, device, dtype, linear_dtype=setting.linear_dtype, **offload)
    model = model.sized(setting.height, setting.width)
    config = rollout_of(model.rollout, setting.rollout)
    prompt = PROMPTS.get(setting.model, PROMPT if model.world is None else PROMPTS["toy"])
    if model.decoded_by is None:
        decoders: dict[str, Any] = {"codec": ("the model's own codec, on the CPU", model.decoder)}
        decoders |= dict.fromkeys(("small", "full"), f"{model.name} has no VAE: its codec decodes")
    else:
        decoders = _random_decoders(device, model.dtype)
        file = f"the model's own, {model.decoded_by['file']}"
        decoders[model.decoded_by["vae"]] = (file, model.decoder)
    return BenchModel(
        cast(Any, model.networks(len(config.steps))), model.encode_text(prompt), config, _execution(setting, device),
        model.latent_size[1:], model.pixel_size, model.temporal_compression, f"sha256 {model.weights_sha256}", prompt,
        decoders,
    )  # fmt: skip


def _random(setting: Setting, device: torch.device, dtype: torch.dtype | None) -> BenchModel:
    if setting.model not in WanConfig.names():
        raise ValueError(
            f"layers needs random weights, so one of the models {', '.join(WanConfig.names())}, got {setting.model!r}"
        )
    values = WanConfig.from_name(setting.model).to_dict()
    if setting.layers is not None:
        values["num_layers"] = whole("layers", setting.layers, 1, most=values["num_layers"])
    config = WanConfig.from_dict(values)
    latent_size, pixel_size = _sizes(setting, config)
    toy = config.position_grid is not None
    rollout = rollout_of(RolloutConfig(order="stream", window_frames=WAN.window_frames), setting.rollout)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    execution = _execution(setting, device)
    if not isinstance(setting.device, torch.device):
        _require_room(setting.model, config, latent_size, rollout, device, dtype, execution.linear_dtype)
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            each = {}
            if execution.linear_dtype is not None:
                each["each_block"] = partial(quantize_layers, dtype=getattr(torch, execution.linear_dtype))
            network = HiARTransformer(config, **each).eval().requires_grad_(False)
            prompt_embeds = torch.randn(1, config.text_len, config.text_dim)
    finally:
        torch.set_default_dtype(torch.float32)
    none = f"{setting.model} has no VAE, and no codec with random weights"
    decoders: Any = dict.fromkeys(("small", "full"), none) if toy else _random_decoders(device, dtype)
    compression = 1 if toy else WAN.temporal_compression
    return BenchModel(
        network, prompt_embeds, rollout, execution, latent_size, pixel_size, compression, RANDOM, None, decoders,
    )  # fmt: skip


def _require_room(
    model: str, config: WanConfig, latent_size: tuple[int, int], rollout: RolloutConfig, device: torch.device,
    dtype: torch.dtype, linear_dtype: str | None,
) -> None:  # fmt: skip
    from ..models.kv_cache import RingCache
    from ..planning.free_memory import require_free
    from ..planning.memory import weights_bytes

    tokens, sizes = math.prod(config.grid(*latent_size)), [max(window or 0 for window in rollout.windows)]
    weights = weights_bytes(config, dtype, None if linear_dtype is None else getattr(torch, linear_dtype), device.type)
    least = weights + RingCache.memory_bytes(config, sizes, 1, tokens, dtype)
    name = dtype_name(dtype)
    require_free(least, device, f"{model} in {name}, its weights and one window of keys and values,")


def _sizes(setting: Setting, config: WanConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) in latents and in pixels."""
    if config.position_grid is not None:
        if (setting.height, setting.width) != (None, None):
            from ..planning.fit import refuse_size

            refuse_size(setting.model, setting.height, setting.width)
        rows, columns = (n * p for n, p in zip(config.position_grid, config.patch_size[1:], strict=True))
        return (rows, columns), (4 * rows, 4 * columns)  # of the toy's codec
    height, width = setting.height or WAN.size[0], setting.width or WAN.size[1]
    step = WAN.spatial_compression * config.patch_size[1]
    if height % step or width % step:
        raise ValueError(f"height and width must be multiples of {step}, got {height}x{width}")
    return (height // WAN.spatial_compression, width // WAN.spatial_compression), (height, width)


def _random_decoders(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The small and the full VAE of Wan 2.1 with random weights, made when they are first needed."""
    from ..models.small_stream import SmallDecoder
    from ..models.small_vae import SmallVAE
    from ..models.vae import StreamingDecoder
    from ..models.vae_fused import fuse

    @functools.cache
    def small() -> SmallVAE:
        torch.manual_seed(0)
        vae = SmallVAE().to(device, torch.float32 if device.type == "cpu" else torch.float16)
        return vae.eval().requires_grad_(False)

    @functools.cache
    def full() -> Any:
        from diffusers import AutoencoderKLWan

        torch.manual_seed(0)
        vae: Any = AutoencoderKLWan()
        vae = torch.nn.Module.to(vae, device, torch.float32 if device.type == "cpu" else dtype)
        return fuse(vae).eval().requires_grad_(False)

    result: dict[str, Any] = {
        "small": ("taew2_1's layout, random weights", lambda: SmallDecoder(small(), own_stream=True)),
        "full": ("Wan 2.1's VAE, random weights", lambda: StreamingDecoder(full(), own_stream=True)),
    }
    if find_spec("diffusers") is None:
        result["full"] = "needs diffusers, which is not installed"
    return result


@dataclass
class Start:
    """Seconds to load the model and to run each of its kinds of forwards for the first time."""

    load: float
    warm_up: float
    kinds: int


def warm_up(setting: Setting) -> Start:
    """Compile, load and capture all that the rollout of a setting needs; what that takes in this process."""
    begun = time.perf_counter()
    subject = load(setting)
    loaded = now(subject.device)
    with cpu_threads(fitting_threads(subject.network)):
        kinds = subject.new_rollout().warm_up()
    return Start(loaded - begun, now(subject.device) - loaded, kinds)
