"""Rollout: generates a video as an iterator of finished blocks, with a state that can be saved."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from ..common.checks import dtype_name, whole
from ..common.settings import own_settings
from ..config import ExecutionConfig, RolloutConfig
from ..distributed.mesh import axis_size
from ..distributed.pipeline import Pipeline
from ..distributed.ulysses import HeadRanks, UlyssesAttention
from ..models.cached_attention import CachedAttention
from ..models.kv_cache import RingCache
from ..models.quantized_linear import linear_dtype_of, quantized
from ..models.transformer import HiARTransformer
from ..schedule.plan import Group, Plan, forwards
from ..version import NOISE, require_noise
from .executor import Executor, NoiseSource, Ready, working_dtype
from .fixed_frames import FixedFrames
from .networks import models_of, networks_of
from .noise import EXTERNAL, KeyedNoise, TensorNoise
from .prompt_cache import PromptSource, ResumedPrompts
from .receiver import Receiver
from .shapes import CheckedNoise, CheckedPrompts, check_prompt_embeds, pair, require_kind, require_shape
from .state_key import key_difference


class FinishedBlock(NamedTuple):
    """A finished block: its number and its first frame, both counted from the start of the video (prefix included), and
    its clean latents [B, F, C, H, W].
    """

    block: int
    first_frame: int
    latents: Tensor


class Rollout:
    """Generates a video block by block; iterate over it for the finished blocks (arXiv 2603.08703, section 3).

    The constructor allocates the caches and computes the modulation of the noise levels: no process groups, no
    measurements, no forward of the network.

    Args:
        model: one :class:`HiARTransformer`, or one for each of the S steps; None for steps of other ranks.
        prompt_embeds: [B or 1, L, text_dim], or a callable of the block number that returns this (the same tensor
            object for the same prompt: its cross-attention KV is computed once).
        config: what is computed. execution: where and how; None: eagerly, in this process.
        num_latent_frames: of the whole video, prefix included; None: endless (needs a window; not step_first).
        latent_size: (height, width) of a latent frame.
        seed: key of the noise, with the video's id, step and block.
        prefix: clean latents [B, F, C, H, W] to continue; its first block is short if need be.
        conditioning_frames: {number of a latent frame: its clean latents [B, C, H, W]}: given frames behind the prefix.
            The network sees them clean at every step, and the other frames of their blocks are made around them.
        video_ids: one for each of the B videos of the batch.
        noise: initial noise [B, num_latent_frames - prefix, C, H, W], or a callable (step, block) -> [B, frames, C, H,
            W] for all noise, where step -1 is the initial noise; None: keyed by (seed, video, step, block).

    Attributes:
        on_task: called with (forwards done, total forwards or None) after every group of tasks.
        on_boundary: in a pipeline, called with n on every rank when it has done all tasks of blocks before n and none
            of block n: states saved there are consistent.
        on_denoise: called with the task and its input latents before each denoise task.
        on_denoised: called with the task and the latents after it, x[s+1] of the block, which it may change in place.
        ready: blocks that an iteration yields before it makes others, such as some of :func:`hiar_model.step_together`.

    Raises:
        ValueError: illegal or contradictory arguments, with the legal values.
        FloatingPointError: while iterating: latents that are not finite; names step, block, layer and implementation.

    Example:
        >>> import torch
        >>> from hiar_model import HiARTransformer, Rollout, RolloutConfig, WanConfig
        >>> model = HiARTransformer(WanConfig(16, 32, 2, 2, text_dim=6, text_len=5, in_channels=4, out_channels=4))
        >>> config = RolloutConfig(order="stream", window_frames=6)
        >>> video = Rollout(model, torch.randn(1, 5, 6), config, num_latent_frames=9, latent_size=(4, 8))
        >>> [tuple(block.latents.shape) for block in video]
        [(1, 3, 4, 4, 8), (1, 3, 4, 4, 8), (1, 3, 4, 4, 8)]
    """

    @own_settings(autocast=True)
    def __init__(
        self,
        model: HiARTransformer | Sequence[HiARTransformer | None],
        prompt_embeds: Tensor | Callable[[int], Tensor],
        config: RolloutConfig,
        execution: ExecutionConfig | None = None,
        *,
        num_latent_frames: int | None,
        latent_size: tuple[int, int],
        seed: int = 0,
        prefix: Tensor | None = None,
        conditioning_frames: Mapping[int, Tensor] | None = None,
        video_ids: Sequence[int] = (0,),
        noise: Tensor | NoiseSource | None = None,
    ) -> None:
        require_kind("config", config, RolloutConfig)
        execution = ExecutionConfig() if execution is None else execution
        require_kind("execution", execution, ExecutionConfig)
        models, network = networks_of(model, len(config.steps))
        if execution.linear_dtype is None and (loaded := linear_dtype_of(network)) is not None:
            execution = replace(execution, linear_dtype=dtype_name(loaded))
        if execution.linear_dtype is not None:
            linear_dtype = getattr(torch, execution.linear_dtype)
            models = [None if one is None else quantized(one, linear_dtype) for one in models]
        weight, wan = network.patch_embedding.weight, network.config
        self._runs = Lock()
        self.execution, self.seed = execution, whole("seed", seed)
        self.video_ids = [whole("video_ids", n) for n in video_ids]
        self.batch = batch = len(self.video_ids)
        height, width = pair("latent_size", latent_size)
        self.shape = (wan.in_channels, height, width)
        grid = wan.grid(height, width)
        if num_latent_frames is not None:
            num_latent_frames = whole("num_latent_frames", num_latent_frames)
        if prefix is not None:
            require_shape("prefix", prefix, (batch, None, *self.shape))
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        if isinstance(noise, Tensor):
            new_frames = None if num_latent_frames is None else num_latent_frames - prefix_frames
            require_shape("noise", noise, (batch, new_frames, *self.shape))
        if not callable(prompt_embeds):
            check_prompt_embeds(prompt_embeds, batch, wan)
        steps_ranks, head_ranks = axis_size(execution.mesh, "step"), axis_size(execution.mesh, "head")
        if execution.on_nan == "retry" and head_ranks > 1:
            raise ValueError(
                "on_nan must be 'stop' with ranks that share heads (each checks its own latents), got 'retry'"
            )
        pipelined = steps_ranks > 1 or execution.steps_per_rank is not None or execution.dedicated_decoder_rank
        if pipelined and config.order in ("step_first", "wavefront"):
            config = config.with_order("stream")  # the same result: ranks run block after block
        if num_latent_frames is None:
            config.require_endless()
        self.config, self.plan = config, Plan.of(config, prefix_frames)
        self.num_blocks = self._count_blocks(num_latent_frames, prefix_frames)
        kv_dtype = None if execution.kv_dtype is None else getattr(torch, execution.kv_dtype)
        self.prompt_embeds: PromptSource = lambda _: prompt_embeds  # type: ignore[assignment,return-value]
        if callable(prompt_embeds):
            self.prompt_embeds = CheckedPrompts(prompt_embeds, batch, wan)
        self.pipeline: Pipeline | None = None
        if pipelined:
            block = (batch, config.frames_per_block, *self.shape)
            self.pipeline = Pipeline(execution, self.plan, self.num_blocks, weight.device, block, weight.dtype)
        self.groups_done = self.forwards_done = 0
        self._cursor = _Cursor(self._groups())
        self.ready: deque[FinishedBlock] = deque()
        self.blocks_done = self.plan.prefix_blocks
        self.on_task: Callable[[int, int | None], None] | None = None
        self.on_boundary: Callable[[int], None] | None = None
        self._head_ranks = HeadRanks(wan, grid, execution.mesh) if head_ranks > 1 else None
        self.heads = (0, wan.num_heads) if self._head_ranks is None else self._head_ranks.heads
        external = callable(noise) or (noise is not None and config.sampler == "ode")
        self.noise = EXTERNAL if external else NOISE
        self._executor: Executor
        steps = self.steps
        if not steps:
            assert self.pipeline is not None
            self._executor = cast(Executor, Receiver(self.pipeline))
            return
        keep_all = execution.keep_all_frames
        if keep_all and num_latent_frames is None:
            raise ValueError("keep_all_frames=True needs num_latent_frames: got None (an endless video)")
        cache = RingCache.of_rollout(
            wan,
            config,
            steps,
            total=num_latent_frames,
            keep_all=keep_all,
            batch=batch,
            frame_tokens=math.prod(grid),
            heads=self.heads[1] - self.heads[0],
            dtype=working_dtype(weight) if execution.autocast else weight.dtype,
            kv_dtype=kv_dtype,
            device=weight.device,
        )
        keyed = KeyedNoise(self.seed, self.video_ids, self.plan.block_frames, self.shape)
        sources: tuple[NoiseSource, NoiseSource] = (keyed, keyed)
        if isinstance(noise, Tensor):
            sources = TensorNoise(noise, self.plan.block_frames, prefix_frames), keyed
        elif noise is not None:
            checked = CheckedNoise(noise, self.plan.block_frames, (batch, *self.shape))
            sources = checked, checked
        attend = CachedAttention if self._head_ranks is None else partial(UlyssesAttention, self._head_ranks)
        fixed = FixedFrames(conditioning_frames or {}, self.plan, num_latent_frames, (batch, *self.shape), weight)
        with own_settings(execution.autocast):
            self._executor = Executor(
                models_of(steps, models),
                self.plan,
                self.num_blocks,
                config,
                execution,
                cache,
                grid,
                (self.prompt_embeds, *sources, prefix),
                fixed,
                attend,
                self.pipeline,
            )

    @property
    def steps(self) -> range:
        """The denoising steps of this process."""
        return range(self.plan.steps) if self.pipeline is None else self.pipeline.stage.steps

    @property
    def device(self) -> torch.device:
        """The device of the tasks."""
        return self._executor.device

    @property
    def cache(self) -> RingCache:
        """Keys and values of the blocks in the window, of this process's steps and heads."""
        return self._executor.cache

    @property
    def makes_blocks(self) -> bool:
        """Whether this process yields finished blocks: in a pipeline only the last rank does."""
        return self.pipeline is None or not self.pipeline.stage.sends

    @property
    def on_denoise(self) -> Any:
        """Called with (task, its input latents) before each denoise task; None: nothing."""
        return self._executor.on_denoise

    @on_denoise.setter
    def on_denoise(self, hook: Any) -> None:
        self._executor.on_denoise = hook

    @property
    def on_denoised(self) -> Any:
        """Called with (task, the latents after it) after each denoise task, before any other task reads them."""
        return self._executor.on_denoised

    @on_denoised.setter
    def on_denoised(self, hook: Any) -> None:
        self._executor.on_denoised = hook

    @cached_property
    def forwards_total(self) -> int | None:
        """Forwards of the whole video in this process; None: endless."""
        return None if self.num_blocks is None else forwards(self.groups())

    def groups(self) -> Iterator[Group]:
        """The groups of tasks of this process, from the start of the video."""
        return self._groups()()

    def _groups(self) -> Callable[[], Iterator[Group]]:
        """Lists the groups; without a reference to this object, so that none is in a circle."""
        return partial((self.plan if self.pipeline is None else self.pipeline.stage).groups, self.num_blocks)

    def _count_blocks(self, frames: int | None, prefix_frames: int) -> int | None:
        if frames is None:
            return None
        block, new = self.plan.frames_per_block, frames - prefix_frames
        if new < 1 or new % block:
            legal = [prefix_frames + block * n for n in (new // block, new // block + 1) if n >= 1]
            raise ValueError(
                f"num_latent_frames must be the prefix ({prefix_frames}) plus whole blocks of {block}: "
                f"got {frames}, nearest {' or '.join(map(str, legal))}"
            )
        return self.plan.prefix_blocks + new // block

    def warm_up(self) -> int:
        """Compile, load and capture everything that the tasks of this rollout need, without advancing it.

        Returns:
            How many kinds of forwards there are. A growing and a full window share them if attention reads frame ids on
            the device; if a library needs the visible keys on the host, they have their own.

        Raises:
            ValueError: the rollout has started.
        """
        if self.groups_done:
            raise ValueError(f"warm_up must come before the first block, got {self.groups_done} groups of tasks done")
        with own_settings(self.execution.autocast):
            return self._executor.warm_up(self.warm_up_blocks)

    @property
    def warm_up_blocks(self) -> int:
        """Blocks of an endless video after which no new kind of forward occurs."""
        block = self.plan.frames_per_block
        wide = max((window or 0 for window in self.plan.window_frames), default=0)
        return self.plan.steps + 2 * -(-(wide + block) // block) + 2

    def weights_changed(self) -> None:
        """Call it after the weights were changed in place, between two groups of tasks: the modulation and the prompt's
        keys and values follow. What the caches hold of earlier blocks stays.
        """
        if self.steps:
            with own_settings(self.execution.autocast):
                self._executor.weights_changed()

    def step(self) -> list[FinishedBlock] | None:
        """Run the next group of tasks.

        Returns:
            The blocks that it finished, most often none; None: nothing is left to do. On an accelerator the work is
            queued, not waited for.
        """
        group = self._cursor.at(self.groups_done)
        return None if group is None else [self._finished(*one) for one in self._run(group)]

    def _step_in_parts(self) -> Generator[Ready, None, list[FinishedBlock] | None]:
        """:meth:`step` whose forwards the caller runs; waits for the device where a block is finished."""
        group = self._cursor.at(self.groups_done)
        if group is None:
            return None
        finished = yield from self._executor.forwards(group)
        self._after(group)
        if finished:
            self._executor.await_finished(self._cursor.at(self.groups_done))
        return [self._finished(*one) for one in finished]

    def run_until(self, stop: Callable[[Group], bool] | None = None) -> None:
        """Run groups of tasks until ``stop(next group)`` is true, or to the end; finished blocks are dropped."""
        while (group := self._cursor.at(self.groups_done)) is not None:
            if stop is not None and stop(group):
                return
            self._run(group)

    def __iter__(self) -> Iterator[FinishedBlock]:
        """Finished blocks in order; a second iteration continues where the first one stopped. In a pipeline every rank
        must iterate; only the last one yields blocks.

        Raises:
            PipelineFault: another rank failed; the message names it, its step and its block.
        """
        if self._head_ranks is not None and not self.groups_done:
            c, e = self.config, self.execution
            about = (c.schedule, self.seed, self.video_ids, c.first_frame, c.sampler, c.context_noise, e.cuda_graph)
            self._head_ranks.require_same(f"{self._video()}, {', '.join(map(str, about))}", self.device)
        with nullcontext() if self.pipeline is None else self.pipeline.running():
            block: int | None = None  # of the pipeline
            while True:
                while self.ready:
                    finished = self.ready.popleft()
                    self.blocks_done = finished.block + 1
                    if self.pipeline is not None:
                        self.pipeline.hand_over(finished.block)
                    yield finished
                group = self._cursor.at(self.groups_done)
                if group is None:
                    return
                if self.pipeline is not None:
                    block = self._enter_pipeline(group, block)
                if blocks := self._run(group):
                    following = self._cursor.at(self.groups_done)
                    if following is not None and self._executor.may_run_ahead(following):
                        self._run(following)  # keeps the device busy while the block is handed over
                        following = self._cursor.at(self.groups_done)
                    self._executor.await_finished(following)
                    self.ready += [self._finished(*one) for one in blocks]

    def _finished(self, block: int, latents: Tensor) -> FinishedBlock:
        return FinishedBlock(block, self.plan.block_frames(block)[0], latents)

    def _run(self, group: Group) -> list[tuple[int, Tensor]]:
        if not self._runs.acquire(blocking=False):
            raise RuntimeError("this Rollout is in use by another thread: give each thread its own, or a lock")
        try:
            with own_settings(self.execution.autocast):
                finished = self._executor.run(group)
            self._after(group)
        finally:
            self._runs.release()
        return finished

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Rollout cannot be copied or pickled: load its state_dict() into a new one")

    def _after(self, group: Group) -> None:
        """Count a group that has run."""
        self.groups_done += 1
        self.forwards_done += forwards([group])
        if self.on_task is not None:
            self.on_task(self.forwards_done, self.forwards_total)

    def _enter_pipeline(self, group: Group, previous: int | None) -> int:
        """Before a pipeline runs a group: report the previous block as done if this is the next. Returns its block."""
        assert self.pipeline is not None
        block = group[0][-1].block
        if previous is not None and block > previous:
            self.pipeline.done(previous)
            if self.on_boundary is not None:
                self.on_boundary(block)
        self.pipeline.start(group)
        return block

    def state_dict(self, device: torch.device | None = None) -> dict[str, Any]:
        """A copy of the state: position, caches, latents in flight and their prompts. Call it between blocks.

        Args:
            device: for the caches, the bulk of it; None: their own. The CPU may have room where a GPU has none.

        Raises:
            ValueError: blocks are ``ready``, which the state would not have.
        """
        if self.ready:
            raise ValueError(f"block {self.ready[0].block} is ready: take it, then save")
        state = self._executor.state_dict(device)
        return {"key": self._key(), "noise": self.noise, "groups_done": self.groups_done, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` of a rollout with the same plan; prompt and noise may differ (a fork).

        Blocks that had started keep their prompt, so a fork equals a run whose prompt changes at the first block that
        had not. Noise is that of this rollout from here on.

        Raises:
            ValueError: the state belongs to another plan or noise scheme, or no block is left for a different prompt.
        """
        if not isinstance(state, dict) or "key" not in state:
            raise ValueError(f"a state is a mapping that state_dict() made, got {type(state).__name__}")
        if "kv_source=" not in state["key"]:  # the options had other names until 2026-11-28
            raise ValueError("a state of an older version, which this one cannot resume: make the video anew")
        if state["key"] != self._key():
            raise ValueError(f"state of a different rollout: {key_difference(state['key'], self._key())}")
        if EXTERNAL not in (self.noise, state["noise"]):
            require_noise("state", state["noise"])
        for name, x in state["latents"].items():
            frames = len(range(*self.plan.block_frames(int(name.partition("/")[2]))))
            expected = (self.batch, frames, *self.shape)
            if x.shape != expected or not x.is_floating_point():
                raise ValueError(f"damaged: latents {name} are {x.dtype} {list(x.shape)}, expected {list(expected)}")
        before = list(islice(self.groups(), state["groups_done"]))
        executed = {task for group in before for item in group for task in item}
        prompts = ResumedPrompts.after(self.prompt_embeds, state["prompt_embeds"])
        if prompts.forks and self.num_blocks is not None and max(prompts.saved) + 1 >= self.num_blocks:
            raise ValueError(
                f"no fork to another prompt here: all {self.num_blocks} blocks have started with theirs "
                f"(order {self.plan.order})"
            )
        if prompts.forks and self.plan.fuse_cache_denoise:
            raise ValueError(
                "no fork to another prompt with fuse_cache_denoise=True: a fused forward spans two blocks, one prompt"
            )
        self._executor.load_state_dict(state, executed)  # first: if it refuses the state, all is as it was
        self._executor.prompt_embeds = prompts
        self.groups_done, self.forwards_done = state["groups_done"], forwards(before)
        last = self.plan.steps - 1
        done = [task.block + 1 for task in executed if task[:2] == ("denoise", last)]
        self.blocks_done = max(done, default=self.plan.prefix_blocks)
        self.ready.clear()

    @property
    def last_started_block(self) -> int:
        """The last block that any task has run for, -1 before the first; a new prompt takes effect after it."""
        return self._executor.last_started_block

    def _key(self) -> str:
        return f"{self._video()}, {self._executor.about}, heads {self.heads[0]} to {self.heads[1] - 1}"

    def _video(self) -> str:
        """What all ranks of the mesh axis "head" have in common."""
        text = f"{self.plan}, {self.num_blocks} blocks, batch {self.batch}, latents {list(self.shape)}"
        dtypes = self.execution.dtypes.values()
        for name, dtype in zip(("caches", "products of attention", "linear layers"), dtypes, strict=True):
            text += f", {name} of {dtype}" if dtype is not None else ""
        if self.pipeline is not None:
            text += f", {self.pipeline.stage.name} of {list(self.pipeline.stage.split)}"
        return text


class _Cursor:
    """Looks groups of tasks up by number: the next one at once, an earlier one from the start."""

    def __init__(self, groups: Callable[[], Iterator[Group]]) -> None:
        self.groups, self.number = groups, -1
        self.iterator = groups()
        self.group: Group | None = None

    def at(self, number: int) -> Group | None:
        """None: behind the last one."""
        if number < self.number:
            self.iterator, self.number = self.groups(), -1
        if number > self.number:
            self.group = next(islice(self.iterator, number - self.number - 1, None), None)
            self.number = number
        return self.group
