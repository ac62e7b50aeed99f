"""HiARPipeline: HiAR's rollout as a DiffusionPipeline, with the names and the contract of diffusers' WanPipeline."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from ...common.checks import path_like, whole
from ...common.settings import own_settings
from ...config import WAN, ExecutionConfig, RolloutConfig
from ...io.atomic import atomic
from ...models.checkpoint import CheckpointInfo
from ...models.quantized_linear import linear_dtype_of
from ...models.text_encoder import clean_prompt
from ...models.transformer import HiARTransformer
from ...models.vae import StreamingDecoder, StreamingEncoder, to_pixels
from ...models.vae_fused import fuse
from ...models.video_model import VideoModel
from ...pipelines.video_pipeline import VideoOptions, rollout_config
from ...rollout.shapes import check_prompt_embeds, require_shape
from .network import SharedNetwork, empty_network, load_wan_transformer
from .options import CALLBACK_INPUTS, CallOptions, as_output, joined, read_image
from .run import PipelineRun, VideoRequest

_OF_LOADER = ("variant", "quantization_config", "device_map", "use_flashpack", "revision")
_CALL = inspect.signature(CallOptions)


class HiARPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text to video by hierarchical denoising (arXiv 2603.08703), in place of diffusers' ``WanPipeline``.

    A pipeline of the same components, files and names, over :class:`hiar_model.Rollout`. The rollout uses the memory of
    ``transformer``'s weights; everything that diffusers does to them before a call (``to``, offload, ``fuse_lora``)
    counts.

    Args:
        tokenizer, text_encoder, vae, transformer: as of a WanPipeline; the VAE an AutoencoderKLWan.
        scheduler: HiAR has its own few-step sampler, so this is a FlowMatchEulerDiscreteScheduler of which only
            ``shift`` is used, and only beside a ``rollout`` that has none; any other is replaced.
        rollout: a :class:`hiar_model.RolloutConfig`, or its ``to_dict``; saved in model_index.json, but for the shift.
            None: four steps of shift 5, blocks of 3 and a window of 21 latent frames.
        execution: a :class:`hiar_model.ExecutionConfig`: CUDA graphs, 8-bit caches, ...; not saved.

    Raises:
        ValueError: one line: components of another kind, an illegal rollout.

    Example::

        pipe = HiARPipeline.from_pretrained(folder, checkpoint="hiar.pt", torch_dtype=torch.bfloat16)
        frames = pipe.to("cuda")("A cat surfs.", generator=torch.Generator().manual_seed(0)).frames[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_INPUTS)
    _optional_components: ClassVar[list[str]] = ["scheduler"]

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: AutoencoderKLWan,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        rollout: Any = None,
        execution: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(vae, AutoencoderKLWan):
            raise ValueError(f"vae must be an AutoencoderKLWan, got {type(vae).__name__}")
        keep = isinstance(rollout, Mapping) and "shift" not in rollout
        keep = keep and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        config = _rollout(rollout, scheduler.config.shift if keep and scheduler is not None else None)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler if keep else _scheduler(config),
        )
        self.register_to_config(rollout=_without_shift(config))
        if not isinstance(execution, ExecutionConfig | None):
            raise ValueError(f"execution must be an ExecutionConfig, got {execution!r}")
        self.execution: ExecutionConfig | None = execution
        self._shared = SharedNetwork()
        self._interrupt, self._current_timestep, self._current_block = False, None, None
        self._num_timesteps = len(config.steps)

    @classmethod
    @own_settings()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        rollout: RolloutConfig | Mapping[str, Any] | None = None,
        on_checkpoint: Callable[[CheckpointInfo], None] | None = None,
        **kwargs: Any,
    ) -> HiARPipeline:
        """Load a Wan folder of diffusers' layout, or one of :meth:`save_pretrained`.

        Args:
            checkpoint: weights of the transformer in place of the folder's, which may be missing: HiAR's,
                Self-Forcing's or whatever :func:`hiar_model.load_transformer` reads.
            on_checkpoint: called with a description of the transformer's weights.
            rollout: what the weights were trained for; None: the folder's, or, with a checkpoint, the default with the
                window of its config.json.
            kwargs: of ``DiffusionPipeline.from_pretrained``: torch_dtype, variant, transformer=..., vae=..., ...; and
                ``execution``: with its ``linear_dtype`` the large linear layers are loaded in 8 bits and in no other
                form.
        """
        name = pretrained_model_name_or_path
        folder = Path(path_like("pretrained_model_name_or_path", name))
        if folder.is_dir() and not (folder / cls.config_name).is_file():
            raise ValueError(
                f"{folder}: no {cls.config_name}: expected a pipeline folder in diffusers' layout; "
                "hiar_model.load_video_model reads Wan's own"
            )
        if not folder.is_dir() and (folder.exists() or not isinstance(name, str) or folder.is_absolute()):
            raise ValueError(f"{folder}: no such folder")  # any other string may be a name on the hub
        if checkpoint is not None:
            path_like("checkpoint", checkpoint)
        for key in ("torch_dtype", "dtype"):
            _require_dtype(key, kwargs.get(key))
        absent = kwargs.get("transformer") is None
        if checkpoint is not None and not absent:
            raise ValueError(f"checkpoint {os.fspath(checkpoint)} and transformer exclude each other: give one")
        # Without accelerate, diffusers does not load this transformer at all; options of its loader are left to it.
        ours = absent and folder.is_dir() and not any(kwargs.get(name) for name in _OF_LOADER)
        if checkpoint is not None or ours:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            if isinstance(dtype, Mapping):
                dtype = dtype.get("transformer", dtype.get("default"))
            source = folder / "transformer" if checkpoint is None else checkpoint
            linear = getattr(kwargs.get("execution"), "linear_dtype", None)
            kwargs["transformer"], info = load_wan_transformer(source, dtype or torch.float32, linear)
            if checkpoint is not None and rollout is None:
                rollout = info.window.apply(_rollout(None))
            if on_checkpoint is not None:
                on_checkpoint(info)
        if rollout is not None:
            config = _rollout(rollout)
            kwargs |= {"rollout": config, "scheduler": _scheduler(config)}
        own_vae = kwargs.get("vae") is None
        pipe = super().from_pretrained(os.fspath(name), **kwargs)
        if own_vae:
            fuse(pipe.vae)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a folder that this class and diffusers' WanPipeline read. A new folder is written atomically.

        Raises:
            ValueError: large linear layers in 8 bits, which diffusers does not read.
        """
        if linear_dtype_of(self.transformer) is not None:
            raise ValueError(
                "transformer: its linear layers are in 8 bits, which diffusers does not read; to save it, load it "
                "without linear_dtype"
            )
        target = path_like("save_directory", save_directory)
        if target.is_file():
            raise ValueError(f"save_directory {target} is a file, expected a folder")
        if target.exists() or kwargs.get("push_to_hub"):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as partial:
            super().save_pretrained(partial, *args, **kwargs)

    @property
    def rollout(self) -> RolloutConfig:
        """What is computed, with the scheduler's shift; may be set."""
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            name = type(self.scheduler).__name__
            raise ValueError(
                f"scheduler must be a FlowMatchEulerDiscreteScheduler, got {name}: HiAR takes only its shift"
            )
        return _rollout(self.config.rollout, self.scheduler.config.shift)

    @rollout.setter
    def rollout(self, value: RolloutConfig | Mapping[str, Any] | None) -> None:
        config = _rollout(value)
        self.scheduler = _scheduler(config)
        self.register_to_config(rollout=_without_shift(config))

    @property
    def video_model(self) -> VideoModel:
        """The components as a :class:`hiar_model.VideoModel`, for :class:`hiar_model.VideoPipeline` and its like."""
        return self._video_model(self._shared.of(self.transformer), self.rollout)

    def _video_model(self, network: HiARTransformer, rollout: RolloutConfig) -> VideoModel:
        vae = self.vae.config
        needed = (network.config.in_channels, network.config.out_channels)
        if needed != (vae.z_dim, vae.z_dim):
            raise ValueError(f"transformer takes {needed[0]} channels and makes {needed[1]}, the VAE has {vae.z_dim}")
        cell, step, block = vae.scale_factor_spatial, vae.scale_factor_temporal, rollout.frames_per_block
        rows, columns = (cell * patch for patch in network.config.patch_size[1:])
        latent_frames = -(-(1 + (WAN.num_frames - 1) // step) // block) * block
        num_frames = 1 + (latent_frames - 1) * step
        return VideoModel(
            name=os.fspath(self.name_or_path or type(self).__name__),
            transformer=network,
            rollout=rollout,
            fps=WAN.fps,
            num_frames=num_frames,
            train_frames=num_frames,
            latent_size=(vae.z_dim, WAN.size[0] // cell, WAN.size[1] // cell),
            weights_sha256="",
            text_encoder=lambda prompt: self.encode_prompt(prompt)[0],
            new_decoder=lambda: StreamingDecoder(self.vae, own_stream=True),
            new_encoder=lambda: StreamingEncoder(self.vae),
            temporal_compression=step,
            spatial_compression=cell,
            size_step=(rows, columns),
        )

    def encode_prompt(
        self, prompt: str | Sequence[str], *, max_sequence_length: int = 512, device: Any = None
    ) -> tuple[Tensor, None]:
        """Embeddings [B, L, text_dim] of prompts, zero behind a prompt's end, and None, as of WanPipeline.

        L is the longest prompt's: the network counts the missing tokens itself.
        """
        for name in ("text_encoder", "tokenizer"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is None: without it, give prompt_embeds in place of prompt")
        clean = [clean_prompt(one) for one in ([prompt] if isinstance(prompt, str) else prompt)]
        for text in clean:
            if len(self.tokenizer(text).input_ids) > max_sequence_length:
                warnings.warn(
                    f"longer than {max_sequence_length} tokens, the rest is left out: {text[:60]!r}", stacklevel=2
                )
        tokens = self.tokenizer(
            clean, padding="longest", max_length=max_sequence_length, truncation=True, return_tensors="pt"
        )
        device = device or self._execution_device
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        with torch.no_grad(), own_settings():
            embeds = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return embeds * mask[..., None].to(embeds.dtype), None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make videos.

        Args:
            args, kwargs: fields of :class:`.options.CallOptions`.

        Returns:
            WanPipelineOutput with ``frames``; a tuple of them with ``return_dict=False``.

        Raises:
            ValueError: one line with the illegal argument, its value and the legal values, before work starts.
            FloatingPointError: latents that are not finite; names step and block.
        """
        options = CallOptions.of("HiARPipeline", args, kwargs)
        frames = joined(list(self._parts(self._start(options, False), options, False)), options.output_type)
        return WanPipelineOutput(frames=frames) if options.return_dict else (frames,)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yield videos block by block, each part as ``frames`` of a call: ``part[0]`` is of the first video.

        Takes the arguments of a call; ``num_frames`` None: endless. They are checked here, and the prompt is encoded;
        the rest of the work starts with the first ``next``. With ``enable_model_cpu_offload`` transformer and VAE stay
        on the device until the end.
        """
        options = CallOptions.of("HiARPipeline.stream", args, kwargs)
        return self._parts(self._start(options, True), options, True)

    @own_settings()
    def _start(self, options: CallOptions, blockwise: bool) -> PipelineRun:
        """Check and encode everything, and build the run."""
        self._interrupt, self._current_timestep, self._current_block = False, None, None
        if self._maybe_raise_error_if_group_offload_active(module=self.transformer):
            raise ValueError("transformer: with group offload its weights come layer by layer, not for a whole rollout")
        # With a network without weights, as those may have to be moved first.
        rollout = self.rollout if options.rollout is None else _rollout(options.rollout)
        model = self._video_model(empty_network(self.transformer), rollout).sized(options.height, options.width)
        of_video = VideoOptions(None, steps=options.num_inference_steps, order=options.order)
        config = rollout_config(model, of_video, blockwise)
        self._num_timesteps = len(config.steps)
        picture = read_image(options.image, model.pixel_size)
        prefix_frames = 0 if picture is None else 1
        latent_frames = self._latent_frames(model, options, prefix_frames, blockwise)
        if latent_frames is None:
            config.require_endless("a video without num_frames")
        per_prompt = options.num_videos_per_prompt
        embeds = options.prompt_embeds
        if embeds is not None:
            require_shape("prompt_embeds", embeds, (None, None, model.transformer.config.text_dim))
            if not len(embeds):
                raise ValueError(f"prompt_embeds must hold at least one prompt, got {list(embeds.shape)}")
        count = len(options.prompts) if embeds is None else len(embeds)
        batch, noise = count * per_prompt, options.latents
        if noise is not None:
            new = None if latent_frames is None else latent_frames - prefix_frames
            channels, height, width = model.latent_size
            require_shape("latents", noise, (batch, channels, new, height, width))
            noise = noise.transpose(1, 2)
        seeds = options.seeds(batch)
        whole("max_sequence_length", options.max_sequence_length, 1, most=model.transformer.config.text_len)
        if embeds is None:
            embeds, _ = self.encode_prompt(options.prompts, max_sequence_length=options.max_sequence_length)
        check_prompt_embeds(embeds, count, model.transformer.config)
        prefix = None
        if picture is not None:
            self._onload("vae")
            prefix = model.encoder().encode(to_pixels(picture.frames)).expand(batch, -1, -1, -1, -1)
        self._to_device(blockwise)
        model = replace(model, transformer=self._shared.of(self.transformer))
        request = VideoRequest(
            config=rollout_config(model, of_video, blockwise),
            batch=batch,
            prompt_embeds=embeds.to(model.device, model.dtype).repeat_interleave(per_prompt, 0),
            seeds=seeds,
            num_latent_frames=latent_frames,
            noise=noise,
            prefix=None if prefix is None else prefix.to(model.device, model.dtype),
            picture=None if picture is None else picture.frames,
        )
        return PipelineRun(self, model, request, self.execution, options.callback_on_step_end, options.tensor_inputs)

    def _latent_frames(
        self, model: VideoModel, options: CallOptions, prefix_frames: int, blockwise: bool
    ) -> int | None:
        """Latent frames of the video, the image included; None: endless."""
        if options.num_frames is not None:
            return model.latent_frames(options.num_frames, prefix_frames)
        if options.latents is not None and options.latents.dim() == 5:
            frames = model.pixel_frames(prefix_frames + options.latents.shape[2])
            return model.latent_frames(frames, prefix_frames)
        return None if blockwise else prefix_frames + model.latent_frames(model.num_frames)

    def _parts(self, run: PipelineRun, options: CallOptions, blockwise: bool) -> Iterator[Any]:
        """The parts of the output, block by block; afterwards the models go where they are kept."""
        latents: Any = run.latents()
        try:
            if options.output_type == "latent":
                if run.request.prefix is not None:
                    yield run.request.prefix.transpose(1, 2)
                for _, block in latents:
                    yield block.transpose(1, 2)
                return
            if self._offloads and not blockwise:
                latents = list(latents)  # the transformer leaves before the VAE comes
                self._onload("vae")
            for frames in run.frames(latents):
                yield as_output(frames, options.output_type)
        finally:
            self.maybe_free_model_hooks()

    # enable_model_cpu_offload: accelerate moves a model when its forward is called, which a rollout does not.

    @property
    def _offloads(self) -> bool:
        return bool(getattr(self, "_all_hooks", None))

    def _onload(self, name: str) -> None:
        """Bring a model to the device, as a call of its forward would: the one before it in the sequence leaves."""
        module = getattr(self, name)
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(module)

    def _to_device(self, blockwise: bool) -> None:
        """Bring the transformer to the device, and for a stream the VAE too."""
        if self._offloads:
            self.vae.to("cpu")
            self._onload("transformer")
            if blockwise:
                self.vae.to(self._execution_device)

    # What callbacks of diffusers read.

    @property
    def interrupt(self) -> bool:
        """Whether the video shall end; set ``_interrupt`` in a callback."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of a block."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the last denoising step; None before the first."""
        return self._current_timestep

    @property
    def current_block(self) -> int | None:
        """Block of the last denoising step; None before the first."""
        return self._current_block

    @property
    def guidance_scale(self) -> float:
        """No guidance."""
        return 1.0


_METHODS: tuple[Any, ...] = (HiARPipeline.__call__, HiARPipeline.stream)
for _method in _METHODS:
    _method.__signature__ = _CALL.replace(
        parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *_CALL.parameters.values()],
        return_annotation=inspect.signature(_method).return_annotation,
    )


def _rollout(rollout: RolloutConfig | Mapping[str, Any] | None, shift: float | None = None) -> RolloutConfig:
    """The configuration of a config, of its plain mapping, or the default; with another shift unless that is None."""
    if rollout is None:
        config = RolloutConfig(frames_per_block=WAN.frames_per_block, window_frames=WAN.window_frames)
    else:
        if not isinstance(rollout, RolloutConfig | Mapping):
            raise ValueError(f"rollout must be a RolloutConfig, or a mapping of its fields, got {rollout!r}")
        config = rollout if isinstance(rollout, RolloutConfig) else RolloutConfig.from_dict(rollout)
    return config if shift is None else replace(config, shift=shift)


def _without_shift(config: RolloutConfig) -> dict[str, Any]:
    """For model_index.json; the scheduler has the shift."""
    return {name: value for name, value in config.to_dict().items() if name != "shift"}


def _require_dtype(name: str, value: Any) -> None:
    """ValueError unless it is None, a dtype, or dtypes by component."""
    for dtype in value.values() if isinstance(value, Mapping) else [value]:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} must be a torch.dtype, such as torch.bfloat16, got {dtype!r}")


def _scheduler(config: RolloutConfig) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=config.shift)
