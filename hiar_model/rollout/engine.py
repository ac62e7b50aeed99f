"""Rollout: one video in the making, as an iterator of finished blocks with a state that can be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..common.checks import whole
from ..common.settings import own_settings
from ..config import ExecutionConfig, RolloutConfig
from ..distributed.mesh import axis_size
from ..distributed.pipeline import Pipeline
from ..distributed.ulysses import HeadRanks, UlyssesAttention
from ..models.kv_cache import CachedAttention, RingCache, ring_frames
from ..models.transformer import HiARTransformer
from ..schedule.plan import Group, Plan, forwards
from ..version import NOISE, require_noise
from .executor import Executor, NoiseSource, working_dtype
from .noise import GIVEN, GivenNoise, KeyedNoise
from .prompt_cache import ResumedPrompts
from .receiver import Receiver
from .shapes import CheckedNoise, CheckedTexts, check_text, require_shape


class FinishedBlock(NamedTuple):
    """A finished block: its number (blocks of the prefix count), its first frame counted from the video's first
    frame, and its clean latents [B, F, C, H, W].
    """

    block: int
    first_frame: int
    latents: Tensor


class Rollout:
    """Makes a video block by block; iterate over it for the finished blocks (arXiv 2603.08703, section 3).

    Making one allocates the caches and nothing else: no process groups, no measurements, no forward.

    Args:
        model: one :class:`HiARTransformer`, or one for each of the S steps; None at steps that other ranks have.
        prompt_embeds: [B or 1, L, text_dim], or a callable of the block number (return the same tensor object for the
            same prompt: its keys are computed once).
        config: what is computed. execution: where and how; None: eagerly, in this process.
        num_latent_frames: of the whole video with its prefix; None: endless (needs a window, and no step_first).
        latent_size: (height, width) of a latent frame.
        seed: key of the noise, with the video's id, step and block.
        prefix: clean latents [B, F, C, H, W] to go on from; its first block is short if need be.
        video_ids: one for each of the B videos made at once.
        noise: initial noise [B, num_latent_frames - prefix, C, H, W], or a callable (step, block) -> [B, frames, C, H,
            W] for all noise, where step -1 is the initial noise; None: keyed by (seed, video, step, block).

    Attributes:
        on_task: called with (forwards done, forwards in all or None) after every group of tasks.
        on_boundary: in a pipeline, called with n on every rank when it has done all tasks of blocks before n and none
            of block n: states taken there fit together.
        on_denoise: called with the task and its input latents before each denoise task.

    Raises:
        ValueError: arguments that do not fit together, with the legal values.
        FloatingPointError: while iterating: latents that are not finite, with step, block, layer and implementation.

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
        video_ids: Sequence[int] = (0,),
        noise: Tensor | NoiseSource | None = None,
    ) -> None:
        execution = execution or ExecutionConfig()
        models, network = _networks(model, len(config.steps))
        weight, wan = network.patch_embedding.weight, network.config
        self.execution, self.seed = execution, whole("seed", seed)
        self.video_ids = [whole("video_ids", n) for n in video_ids]
        self.batch = batch = len(self.video_ids)
        height, width = (whole("latent_size", n, 1) for n in latent_size)
        self.shape = (wan.in_channels, height, width)
        grid = wan.grid(height, width)
        if num_latent_frames is None:
            config.require_endless()
        else:
            num_latent_frames = whole("num_latent_frames", num_latent_frames)
        if prefix is not None:
            require_shape("prefix", prefix, (batch, None, *self.shape))
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        if isinstance(noise, Tensor):
            made = None if num_latent_frames is None else num_latent_frames - prefix_frames
            require_shape("noise", noise, (batch, made, *self.shape))
        if not callable(prompt_embeds):
            check_text(prompt_embeds, batch, wan)
        steps_ranks, head_ranks = axis_size(execution.mesh, "step"), axis_size(execution.mesh, "head")
        if execution.on_nan == "retry" and head_ranks > 1:
            raise ValueError("on_nan='retry' is impossible with ranks that share heads (each looks for itself): stop")
        pipelined = steps_ranks > 1 or execution.steps_per_rank is not None
        if pipelined and config.order in ("step_first", "wavefront"):
            config = config.with_order("stream")  # the same numbers: ranks walk block after block
        self.config, self.plan = config, Plan.of(config, prefix_frames)
        self.num_blocks = self._count_blocks(num_latent_frames, prefix_frames)
        kv_dtype = None if execution.kv_dtype is None else getattr(torch, execution.kv_dtype)
        self.text = CheckedTexts(prompt_embeds, batch, wan) if callable(prompt_embeds) else lambda _: prompt_embeds
        self.pipeline: Pipeline | None = None
        if pipelined:
            block = (batch, config.frames_per_block, *self.shape)
            self.pipeline = Pipeline(execution, self.plan, self.num_blocks, weight.device, block, weight.dtype)
        self.groups_done = self.forwards_done = 0
        self._ahead: tuple[int, Iterator[Group]] | None = None
        self.blocks_done = self.plan.prefix_blocks
        self.on_task: Callable[[int, int | None], None] | None = None
        self.on_boundary: Callable[[int], None] | None = None
        self._head_ranks = HeadRanks(wan, grid, execution.mesh) if head_ranks > 1 else None
        self.heads = (0, wan.num_heads) if self._head_ranks is None else self._head_ranks.heads
        drawn_outside = callable(noise) or (noise is not None and config.sampler == "ode")
        self.noise = GIVEN if drawn_outside else NOISE
        self._executor: Executor
        steps = self.steps
        if not steps:
            assert self.pipeline is not None
            self._executor = cast(Executor, Receiver(self.pipeline))
            return
        keep_all = execution.keep_all_frames
        if keep_all and num_latent_frames is None:
            raise ValueError("keep_all_frames=True needs num_latent_frames: an endless video cannot be held whole")
        extra = config.frames_per_block if config.fuse_cache_denoise else 0
        rings = [ring_frames(None if keep_all else w, num_latent_frames, extra) for w in config.windows]
        # one ring may serve several steps: it must hold the widest of their windows
        capacities = rings[steps.start : steps.stop] if self.plan.caches > 1 else [max(rings)]
        cache = RingCache(
            wan,
            capacities,
            batch,
            math.prod(grid),
            config.sink_frames,
            heads=self.heads[1] - self.heads[0],
            dtype=working_dtype(weight) if execution.autocast else weight.dtype,
            kv_dtype=kv_dtype,
            device=weight.device,
        )
        keyed = KeyedNoise(self.seed, self.video_ids, self.plan.block_frames, self.shape)
        sources: tuple[NoiseSource, NoiseSource] = (keyed, keyed)
        if isinstance(noise, Tensor):
            sources = GivenNoise(noise, self.plan.block_frames, prefix_frames), keyed
        elif noise is not None:
            checked = CheckedNoise(noise, self.plan.block_frames, (batch, *self.shape))
            sources = checked, checked
        attend = CachedAttention if self._head_ranks is None else partial(UlyssesAttention, self._head_ranks)
        with own_settings(execution.autocast):
            self._executor = Executor(
                _models_of(steps, models),
                self.plan,
                self.num_blocks,
                config,
                execution,
                cache,
                grid,
                (self.text, *sources, prefix),
                attend,
                self.pipeline,
            )

    @property
    def steps(self) -> range:
        """The denoising steps of this process."""
        return range(self.plan.steps) if self.pipeline is None else self.pipeline.stage.steps

    @property
    def device(self) -> torch.device:
        """Where the tasks run."""
        return self._executor.device

    @property
    def cache(self) -> RingCache:
        """Keys and values of the blocks in the window, of this process's steps and heads."""
        return self._executor.cache

    @property
    def makes_blocks(self) -> bool:
        """Whether finished blocks come in this process: in a pipeline on the last rank alone."""
        return self.pipeline is None or not self.pipeline.stage.sends

    @property
    def on_denoise(self) -> Any:
        """Called with (task, its input latents) before each denoise task; None: nothing."""
        return self._executor.on_denoise

    @on_denoise.setter
    def on_denoise(self, hook: Any) -> None:
        self._executor.on_denoise = hook

    @cached_property
    def forwards_total(self) -> int | None:
        """Forwards of the whole video in this process; None: endless."""
        return None if self.num_blocks is None else forwards(self.groups())

    def groups(self) -> Iterator[Group]:
        """The groups of tasks that this process runs, from the beginning of the video."""
        return (self.plan if self.pipeline is None else self.pipeline.stage).groups(self.num_blocks)

    def _count_blocks(self, frames: int | None, prefix_frames: int) -> int | None:
        if frames is None:
            return None
        block, made = self.plan.frames_per_block, frames - prefix_frames
        if made < 1 or made % block:
            legal = [prefix_frames + block * n for n in (made // block, made // block + 1) if n >= 1]
            raise ValueError(
                f"num_latent_frames must be the prefix ({prefix_frames}) and whole blocks of {block}: "
                f"got {frames}, nearest {' or '.join(map(str, legal))}"
            )
        return self.plan.prefix_blocks + made // block

    def warm_up(self) -> int:
        """Compile, load and capture ahead what the tasks of this rollout need; the rollout itself does not move.

        Returns:
            How many kinds of forwards there are: growth and a full window have the same ones where attention goes by
            frame ids on the device, their own where a library is told what is visible.
        """
        if self.groups_done:
            raise ValueError(f"warm_up comes before the first block; {self.groups_done} groups of tasks are done")
        with own_settings(self.execution.autocast):
            return self._executor.warm_up(self.warm_up_blocks)

    @property
    def warm_up_blocks(self) -> int:
        """Blocks of an endless video after which its tasks are of no new kind."""
        block = self.plan.frames_per_block
        wide = max((window or 0 for window in self.plan.window_frames), default=0)
        return self.plan.steps + 2 * -(-(wide + block) // block) + 2

    def step(self) -> list[FinishedBlock] | None:
        """Run the next group of tasks.

        Returns:
            The blocks that it finished, most often none; None: there is nothing left to do. On an accelerator the
            work is queued, not waited for.
        """
        if self._ahead is None or self._ahead[0] != self.groups_done:  # not from the start every time
            self._ahead = self.groups_done, islice(self.groups(), self.groups_done, None)
        group = next(self._ahead[1], None)
        if group is None:
            return None
        blocks = [self._finished(*one) for one in self._run(group)]
        self._ahead = self.groups_done, self._ahead[1]
        return blocks

    def run_until(self, stop: Callable[[Group], bool] | None = None) -> None:
        """Run groups of tasks until the next one is such a group, or to the end; finished blocks are dropped."""
        for group in islice(self.groups(), self.groups_done, None):
            if stop is not None and stop(group):
                return
            self._run(group)

    def __iter__(self) -> Iterator[FinishedBlock]:
        """Finished blocks in order; a second iteration goes on where the first one stopped. In a pipeline every rank
        has to iterate; all but the last one yield nothing.

        Raises:
            PipelineFault: another rank failed; the message names it, its step and its block.
        """
        if self._head_ranks is not None and not self.groups_done:
            c, e = self.config, self.execution
            about = (c.schedule, self.seed, self.video_ids, c.first_frame, c.sampler, c.context_noise, e.cuda_graph)
            self._head_ranks.require_same(f"{self._video()}, {', '.join(map(str, about))}", self.device)
        with nullcontext() if self.pipeline is None else self.pipeline.running():
            begun: int | None = None
            groups = islice(self.groups(), self.groups_done, None)
            following = next(groups, None)
            while following is not None:
                group, following = following, next(groups, None)
                if self.pipeline is not None:
                    begun = self._enter(group, begun)
                finished = self._run(group)
                if finished:
                    if following is not None and self._executor.may_run_ahead(following):
                        self._run(following)  # the device works while the block is waited for and handed over
                        following = next(groups, None)
                    self._executor.await_finished(following)
                for block, latents in finished:
                    self.blocks_done = block + 1
                    if self.pipeline is not None:
                        self.pipeline.hand_over(block)
                    yield self._finished(block, latents)

    def _finished(self, block: int, latents: Tensor) -> FinishedBlock:
        return FinishedBlock(block, self.plan.block_frames(block)[0], latents)

    def _run(self, group: Group) -> list[tuple[int, Tensor]]:
        with own_settings(self.execution.autocast):
            finished = self._executor.run(group)
        self.groups_done += 1
        self.forwards_done += forwards([group])
        if self.on_task is not None:
            self.on_task(self.forwards_done, self.forwards_total)
        return finished

    def _enter(self, group: Group, begun: int | None) -> int:
        """Before tasks of a pipeline: have all of the earlier blocks been done? Returns the block begun."""
        assert self.pipeline is not None
        block = group[0][-1].block
        if begun is not None and block > begun:
            self.pipeline.done(begun)
            if self.on_boundary is not None:
                self.on_boundary(block)
        self.pipeline.enter(group)
        return block

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: position, latents in flight, caches, and prompts of blocks that have begun, as
        copies. Take it between blocks.
        """
        return {"key": self._key(), "noise": self.noise, "groups_done": self.groups_done, **self._executor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a rollout with the same plan; prompt and noise may differ (a fork).

        Blocks that had begun keep the prompt they began with, so a fork is the run whose prompt changes at the first
        block that had not; their noise is that of this rollout from here on.

        Raises:
            ValueError: the state belongs to another plan, or no block is left that another prompt could show in.
        """
        if state["key"] != self._key():
            raise ValueError(f"state of another rollout: expected {self._key()}, got {state['key']}")
        if self.noise != GIVEN and state["noise"] != GIVEN:
            require_noise("state", state["noise"])
        before = list(islice(self.groups(), state["groups_done"]))
        executed = {task for group in before for row in group for task in row}
        text = ResumedPrompts.after(self.text, state["texts"])
        if text.forks and self.num_blocks is not None and max(text.kept) + 1 >= self.num_blocks:
            raise ValueError(
                f"no fork to another prompt here: all {self.num_blocks} blocks have begun with theirs "
                f"(order {self.plan.order})"
            )
        if text.forks and self.plan.fuse_cache_denoise:
            raise ValueError(
                "no fork to another prompt with fuse_cache_denoise=True: a fused forward spans two blocks, one prompt"
            )
        self.groups_done, self.forwards_done = state["groups_done"], forwards(before)
        last = self.plan.steps - 1
        done = [task.block + 1 for task in executed if task[:2] == ("denoise", last)]
        self.blocks_done = max(done, default=self.plan.prefix_blocks)
        self._executor.load_state_dict(state, executed.__contains__)
        self._executor.text = text

    @property
    def begun(self) -> int:
        """The last block of which anything has been done, -1 before the first: a new prompt shows behind it."""
        return self._executor.begun

    def _key(self) -> str:
        return f"{self._video()}, {self._executor.about}, heads {self.heads[0]} to {self.heads[1] - 1}"

    def _video(self) -> str:
        """What ranks of the axis "head" have in common."""
        what = f"{self.plan}, {self.num_blocks} blocks, batch {self.batch}, latents {list(self.shape)}"
        if self.execution.kv_dtype is not None:
            what += f", caches of {self.execution.kv_dtype}"
        if self.pipeline is not None:
            what += f", {self.pipeline.stage.name} of {list(self.pipeline.stage.split)}"
        return what


def _networks(
    model: HiARTransformer | Sequence[HiARTransformer | None], steps: int
) -> tuple[list[HiARTransformer | None], HiARTransformer]:
    """The network of each step, and one that is there."""
    models: list[HiARTransformer | None] = [model] * steps if isinstance(model, HiARTransformer) else list(model)
    some = next(filter(None, models), None)
    if len(models) != steps or some is None:
        raise ValueError(f"model: give one, or one for each of the {steps} steps; got {len(models)}")
    for step, one in enumerate(models):
        if one is not None and one.config != some.config:
            raise ValueError(f"model: that of step {step} is {one.config}, others are {some.config}")
    return models, some


def _models_of(steps: range, models: Sequence[HiARTransformer | None]) -> list[HiARTransformer]:
    """A model for each step; where other ranks have the step, one of this rank's stands there and is never run."""
    own = [models[step] for step in steps]
    missing = [step for step, model in zip(steps, own, strict=True) if model is None]
    if missing:
        raise ValueError(f"model: this rank has steps {list(steps)}: give the weights of step {missing[0]} too")
    return [(models[step] if step in steps else own[0]) or own[0] for step in range(len(models))]  # type: ignore[misc]
