"""Rollout: one video in the making, as an iterator of finished blocks with a state that can be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from ..common.checks import EXECUTORS, ON_NAN, ON_NEW_TEXT, whole
from ..common.settings import own_settings
from ..distributed.pipeline import Pipeline, PipelineOptions
from ..models.flow_schedule import FlowSchedule
from ..models.kv_cache import RingAttend, RingCache, kept_dtype, ring_frames
from ..models.transformer import HiARTransformer
from ..schedule.plan import Group, Plan, forwards, windows_per_step
from ..version import NOISE, require_noise
from .executor import Executor, working_dtype
from .noise import GIVEN, GivenNoise, KeyedNoise
from .prompt_cache import KeptTexts
from .recache import History
from .receiver import Receiver
from .shapes import CheckedNoise, CheckedTexts, check_text, require_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..schedule.costs import Costs

PARALLELS = ("ulysses",)
TRAJECTORIES = ("sde", "ode")


class FinishedBlock(NamedTuple):
    """A finished block: its number (blocks of the prefix count), its first frame counted from the video's first
    frame, and its clean latents [B, F, C, H, W].
    """

    block: int
    first_frame: int
    latents: Tensor


class Rollout:
    """Makes a video block by block; iterate over it for the finished blocks (arXiv 2603.08703, section 3).

    Every walk of the matched graph (``step_first``, ``stream``, ``wavefront``; pairs or not) gives the same latents;
    ``block_first`` is the Self-Forcing baseline, which conditions on clean context.

    Args:
        model: one :class:`HiARTransformer`, or one for each step; None at steps that other ranks of a pipeline have.
        text: prompt embedding [B or 1, L, text_dim], or a callable of the block number (return the same tensor object
            for the same prompt: its keys are computed once).
        schedule: noise levels of the S steps.
        num_frames: latent frames of the whole video with its prefix; None: endless (a window is needed then).
        height, width: of a latent frame. batch: videos made at once.
        order: "step_first" | "stream" | "wavefront" | "block_first".
        frames_per_block: latent frames made at once.
        window_frames: frames a block sees, its own among them; None: all; or one for each step.
        sink_frames: first frames that stay visible, within the window's number.
        trajectory: "sde" re-noises x0 at each step, "ode" follows the velocity.
        noise: initial noise [B, num_frames - prefix, C, H, W]; None: keyed by (seed, video, step, block).
        renoise: callable (step, block) -> [B, frames, C, H, W]; None: keyed likewise.
        prefix: given clean latents [B, F, C, H, W] to go on from; its first block is short if need be.
        first_frame: absolute id of the video's first frame.
        seed, video_ids: key of the noise; ``video_ids`` [B], default 0..B-1.
        context_noise: timestep that finished blocks are cached at.
        cache_source: "own", or "next_step" (a cache takes the keys of the next step's denoise visit).
        pairs: fuse cache(s, n - 1) and denoise(s, n) into one forward. "measured": where the first rank of a pipeline
            finds that faster, by its own times of visits and pairs.
        executor: "eager"; "graph": visits are captured as CUDA graphs the first time they occur, and replayed for every
            block after that; "recorded": the same on any device, by recording torch's operations: for tests, not fast.
            "pipeline": the steps live on the processes of the job, which must all run the same rollout; they walk
            "step_first" and "wavefront" as "stream". Finished blocks come on the last rank, others yield none.
            "pipeline-graph", "pipeline-recorded": with visits captured.
        pipeline: how a pipeline uses the processes.
        parallel: None: a visit runs in one process. "ulysses": the ranks of the axis "head" share every visit (tokens
            outside self-attention, heads inside, 1 / R of the rings each). All of them must run the same rollout, and
            every one makes all blocks.
        mesh: of the processes (:func:`.distributed.make_mesh`), its axis "step" for a pipeline; None: all of the
            job are the axis "head", or "step".
        on_visit: called with (forwards done, forwards in all or None) after every group of visits.
        on_boundary: in a pipeline, called with n on every rank when it has done all visits of blocks before n and none
            of block n: states taken there fit together.
        cache_dtype: that keys and values are kept in: torch.float8_e4m3fn (with a scale for each layer, head and frame:
            half the memory of bfloat16, and other latents: docs/memory.md), or another float; None: that of the model.
        on_nan: what to do about latents that are not finite. "stop": say where they came from (step, block, layer,
            implementation). "retry": repeat the visit with the reference ops and go on if that is finite; then every
            visit waits for the device, for a look at what it made.
        on_new_text: where the text changes from one block to the next, "keep" leaves the context as it is; "recache"
            caches the blocks in the window once more under the new text (:mod:`hiar_model.rollout.recache`).
        keep_frames: the rings hold every frame of the video, not only a window of them; what is seen stays the same.
        autocast: compute in the caller's autocast, as training does; else it changes nothing.

    Raises:
        ValueError: options that do not fit together, with the legal values.
        FloatingPointError: while iterating: latents that are not finite, with step, block, layer and implementation.
    """

    @own_settings(autocast=True)
    def __init__(
        self,
        model: HiARTransformer | Sequence[HiARTransformer | None],
        text: Tensor | Callable[[int], Tensor],
        schedule: FlowSchedule,
        *,
        num_frames: int | None,
        height: int,
        width: int,
        batch: int = 1,
        order: str = "step_first",
        frames_per_block: int = 3,
        window_frames: int | None | Sequence[int | None] = None,
        sink_frames: int = 0,
        trajectory: str = "sde",
        renoise: Callable[[int, int], Tensor] | None = None,
        noise: Tensor | None = None,
        prefix: Tensor | None = None,
        first_frame: int = 0,
        seed: int = 0,
        video_ids: Sequence[int] | None = None,
        context_noise: float = 0.0,
        cache_source: str = "own",
        pairs: bool | str = False,
        executor: str = "eager",
        parallel: str | None = None,
        pipeline: PipelineOptions | None = None,
        mesh: DeviceMesh | None = None,
        on_visit: Callable[[int, int | None], None] | None = None,
        on_boundary: Callable[[int], None] | None = None,
        cache_dtype: torch.dtype | None = None,
        keep_frames: bool = False,
        on_nan: str = "stop",
        on_new_text: str = "keep",
        autocast: bool = False,
    ) -> None:
        given = [model] * len(schedule) if isinstance(model, HiARTransformer) else list(model)
        some = next(filter(None, given), None)
        if len(given) != len(schedule) or some is None:
            raise ValueError(f"model: give one, or one for each of the {len(schedule)} steps; got {len(given)}")
        _one_of("trajectory", trajectory, TRAJECTORIES)
        _one_of("executor", executor, EXECUTORS)
        _one_of("on_nan", on_nan, ON_NAN)
        _one_of("on_new_text", on_new_text, ON_NEW_TEXT)
        if parallel is not None:
            _one_of("parallel", parallel, PARALLELS)
        if on_nan == "retry" and parallel is not None:
            raise ValueError(
                f"on_nan='retry' is impossible with parallel={parallel!r} (ranks look for themselves): stop"
            )
        on_ranks, _, captured = executor.partition("-") if executor.startswith("pipeline") else ("", "", executor)
        if on_ranks and order in ("step_first", "wavefront"):
            order = "stream"
        if not isinstance(pairs, bool) and not (pairs == "measured" and on_ranks):
            legal = 'True, False, and "measured" with a pipeline'
            raise ValueError(f"pairs={pairs!r} with executor={executor!r} is not legal: give {legal}")
        if parallel is not None and on_ranks and mesh is None:
            raise ValueError(f"executor={executor!r} with parallel={parallel!r} needs a mesh: see make_mesh")
        num_frames = None if num_frames is None else whole("num_frames", num_frames)
        height, width, batch = (whole(n, v, 1) for n, v in (("height", height), ("width", width), ("batch", batch)))
        seed, first_frame = whole("seed", seed), whole("first_frame", first_frame)
        config = some.config
        odd = [step for step, one in enumerate(given) if one is not None and one.config != config]
        if odd:
            raise ValueError(f"model: that of step {odd[0]} is {given[odd[0]].config}, others are {config}")  # type: ignore[union-attr]
        size = (config.in_channels, height, width)
        for name, latents in (("prefix", prefix), ("noise", noise)):
            if latents is not None:
                require_shape(name, latents, (batch, None, *size))
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        self.plan = Plan(
            len(schedule),
            order,
            frames_per_block,
            prefix_frames,
            windows_per_step(window_frames, len(schedule)),
            sink_frames,
            cache_source,
            pairs is True,
        )
        self.num_blocks = self._count_blocks(num_frames, prefix_frames)
        self.shape = size
        self.batch, self.seed, self.cache_dtype = batch, seed, cache_dtype
        kept_dtype(some.patch_embedding.weight.dtype, cache_dtype)
        self.video_ids = [whole("video_ids", n) for n in (range(batch) if video_ids is None else video_ids)]
        require_shape("video_ids", (len(self.video_ids),), (batch,))
        if noise is not None:
            made = None if num_frames is None else num_frames - prefix_frames
            require_shape("noise", noise, (batch, made, *self.shape))
        weight = some.patch_embedding.weight
        if captured == "graph" and weight.device.type != "cuda":
            legal = "pipeline" if on_ranks else "eager"
            raise ValueError(f"executor={executor!r} needs a CUDA device, the model is on {weight.device}; use {legal}")
        grid = config.grid(height, width)
        if not callable(text):
            check_text(text, batch, config)
        self.text = text_of = CheckedTexts(text, batch, config) if callable(text) else lambda _: text
        self.pipeline: Pipeline | None = None
        if on_ranks:
            options = pipeline or PipelineOptions()
            if pairs == "measured" and options.costs is None:
                raise ValueError('pairs="measured" needs costs of visits: give PipelineOptions(costs=measure_costs)')
            if mesh is not None:
                from ..distributed.mesh import axis

                options = replace(options, group=axis(mesh, "step"))
            sizes = {"height": height, "width": width, "batch": batch, "cache_dtype": cache_dtype}
            fused = pairs == "measured"
            measure = partial(_measured, options.costs, some, text_of, self.plan, num_frames, captured, sizes, fused)
            self.pipeline = Pipeline(options, self.plan, self.num_blocks, weight.device, measure, fused)
            self.plan = self.pipeline.plan
            self.pipeline.connect((batch, frames_per_block, *self.shape), weight.dtype)
        steps = range(len(schedule)) if self.pipeline is None else self.pipeline.stage.steps
        self.groups = self.plan.groups if self.pipeline is None else self.pipeline.stage.groups
        self.groups_done = self.forwards_done = 0
        self.blocks_done = self.plan.prefix_blocks
        self.forwards_total = None if num_frames is None else forwards(self.groups(self.num_blocks))
        self.on_visit, self.on_boundary = on_visit, on_boundary
        extra = frames_per_block if self.plan.pairs else 0
        if keep_frames and num_frames is None:
            raise ValueError("keep_frames=True needs num_frames: an endless video cannot be held whole")
        held = [ring_frames(None if keep_frames else w, num_frames, extra) for w in self.plan.window_frames]
        # one ring may serve several steps: it must hold the widest of their windows
        capacities = held[steps.start : steps.stop] if self.plan.caches > 1 else [max(held)]
        attend: Callable[..., RingAttend] = RingAttend
        self.heads = (0, config.num_heads)
        if parallel == "ulysses":
            from ..distributed.ulysses import HeadRanks, UlyssesAttend

            ranks = HeadRanks(config, grid, mesh)
            told = (schedule, seed, self.video_ids, first_frame, trajectory, context_noise, executor)
            ranks.require_same(f"{self._video()}, {', '.join(map(str, told))}", weight.device)
            attend, self.heads = partial(UlyssesAttend, ranks), ranks.heads
        self.autocast = autocast
        self.noise = GIVEN if noise is not None and (renoise is not None or trajectory == "ode") else NOISE
        self.executor: Executor
        if not steps:
            assert self.pipeline is not None
            self.executor = cast(Executor, Receiver(self.pipeline))
            return
        cache = RingCache(
            config,
            capacities,
            batch,
            math.prod(grid),
            sink_frames,
            heads=self.heads[1] - self.heads[0],
            dtype=working_dtype(weight) if autocast else weight.dtype,
            cache_dtype=cache_dtype,
            device=weight.device,
        )
        keyed = KeyedNoise(seed, self.video_ids, self.plan.block_frames, self.shape)
        with own_settings(autocast):
            self.executor = Executor(
                _models_of(steps, given),
                self.plan,
                self.num_blocks,
                schedule,
                cache,
                grid,
                text_of,
                keyed if noise is None else GivenNoise(noise, self.plan.block_frames, prefix_frames),
                CheckedNoise(renoise, self.plan.block_frames, (batch, *self.shape)) if renoise else keyed,
                prefix,
                first_frame,
                trajectory,
                context_noise,
                captured or "eager",
                attend,
                self.pipeline,
                on_nan,
                History(self.plan) if on_new_text == "recache" else None,
            )

    def _count_blocks(self, num_frames: int | None, prefix_frames: int) -> int | None:
        if num_frames is None:
            return None
        block, made = self.plan.frames_per_block, num_frames - prefix_frames
        if made < 1 or made % block:
            legal = [prefix_frames + block * n for n in (made // block, made // block + 1) if n >= 1]
            raise ValueError(
                f"num_frames must be the prefix ({prefix_frames}) and whole blocks of {block}: "
                f"got {num_frames}, nearest {' or '.join(map(str, legal))}"
            )
        return self.plan.prefix_blocks + made // block

    def warm_up(self) -> int:
        """Compile, load and capture ahead what the visits of this rollout need; the rollout itself does not move.

        Returns:
            How many kinds of launches there are: growth and a full window have the same ones where attention goes by
            frame ids on the device, their own where a library is told what is visible.
        """
        if self.groups_done:
            raise ValueError(f"warm_up comes before the first block; {self.groups_done} groups of visits are done")
        with own_settings(self.autocast):
            return self.executor.warm_up(self.warm_up_blocks)

    @property
    def warm_up_blocks(self) -> int:
        """Blocks of an endless video after which its visits are of no new kind."""
        block = self.plan.frames_per_block
        wide = max((window or 0 for window in self.plan.window_frames), default=0)
        return self.plan.steps + 2 * -(-(wide + block) // block) + 2

    def __iter__(self) -> Iterator[FinishedBlock]:
        """Finished blocks in order; a second iteration goes on where the first one stopped. In a pipeline every rank
        has to iterate; all but the last one yield nothing.

        Raises:
            PipelineFault: another rank failed; the message names it, its step and its block.
        """
        with nullcontext() if self.pipeline is None else self.pipeline.running():
            begun: int | None = None
            groups = islice(self.groups(self.num_blocks), self.groups_done, None)
            following = next(groups, None)
            while following is not None:
                group, following = following, next(groups, None)
                if self.pipeline is not None:
                    begun = self._enter(group, begun)
                finished = self._run(group)
                if finished:
                    if following is not None and self.executor.may_run_ahead(following):
                        self._run(following)  # the device works while the block is waited for and handed over
                        following = next(groups, None)
                    self.executor.await_finished(following)
                for block, latents in finished:
                    self.blocks_done = block + 1
                    if self.pipeline is not None:
                        self.pipeline.hand_over(block)
                    yield FinishedBlock(block, self.plan.block_frames(block)[0], latents)

    def _run(self, group: Group) -> list[tuple[int, Tensor]]:
        with own_settings(self.autocast):
            finished = self.executor.run(group)
        self.groups_done += 1
        self.forwards_done += forwards([group])
        if self.on_visit is not None:
            self.on_visit(self.forwards_done, self.forwards_total)
        return finished

    def _enter(self, group: Group, begun: int | None) -> int:
        """Before visits of a pipeline: have all of the earlier blocks been done? Returns the block begun."""
        assert self.pipeline is not None
        block = group[0][-1].block
        if begun is not None and block > begun:
            self.pipeline.done(begun)
            if self.on_boundary is not None:
                self.on_boundary(block)
        self.pipeline.enter(group)
        return block

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: position, latents in flight, caches, and texts of blocks that have begun, as
        copies. Take it between blocks.
        """
        return {"key": self._key(), "noise": self.noise, "groups_done": self.groups_done, **self.executor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a rollout with the same plan; text and noise may differ (a fork).

        Blocks that had begun keep the text they began with, so a fork is the run whose text changes at the first block
        that had not; their noise is that of this rollout from here on.

        Raises:
            ValueError: the state belongs to another plan, or no block is left that another text could show in.
        """
        if state["key"] != self._key():
            raise ValueError(f"state of another rollout: expected {self._key()}, got {state['key']}")
        if self.noise != GIVEN and state["noise"] != GIVEN:
            require_noise("state", state["noise"])
        before = list(islice(self.groups(self.num_blocks), state["groups_done"]))
        executed = {visit for group in before for row in group for visit in row}
        text = KeptTexts.after(self.text, state["texts"])
        if text.forks and self.num_blocks is not None and max(text.kept) + 1 >= self.num_blocks:
            raise ValueError(
                f"no fork to another text here: all {self.num_blocks} blocks have begun with theirs "
                f"(order {self.plan.order})"
            )
        if text.forks and self.plan.pairs:
            raise ValueError("no fork to another text with pairs=True: a pair spans two blocks and has one text")
        self.groups_done, self.forwards_done = state["groups_done"], forwards(before)
        last = self.plan.steps - 1
        done = [visit.block + 1 for visit in executed if visit[:2] == ("denoise", last)]
        self.blocks_done = max(done, default=self.plan.prefix_blocks)
        self.executor.load_state_dict(state, executed.__contains__)
        self.executor.text = text

    @property
    def begun(self) -> int:
        """The last block of which anything has been done, -1 before the first: a new text shows behind it."""
        return self.executor.begun

    def _key(self) -> str:
        return f"{self._video()}, {self.executor.about}, heads {self.heads[0]} to {self.heads[1] - 1}"

    def _video(self) -> str:
        """What ranks of the axis "head" have in common."""
        what = f"{self.plan}, {self.num_blocks} blocks, batch {self.batch}, latents {list(self.shape)}"
        if self.cache_dtype is not None:
            what += f", caches of {self.cache_dtype}"
        if self.pipeline is not None:
            what += f", {self.pipeline.stage.name} of {list(self.pipeline.stage.split)}"
        return what


def _models_of(steps: range, given: Sequence[HiARTransformer | None]) -> list[HiARTransformer]:
    """A model for each step; where other ranks have the step, one of this rank's stands there and is never run."""
    own = [given[step] for step in steps]
    missing = [step for step, model in zip(steps, own, strict=True) if model is None]
    if missing:
        raise ValueError(f"model: this rank has steps {list(steps)}: give the weights of step {missing[0]} too")
    return [(given[step] if step in steps else own[0]) or own[0] for step in range(len(given))]  # type: ignore[misc]


def _measured(
    measure_costs: Any,
    model: HiARTransformer,
    text: Callable[[int], Tensor],
    plan: Plan,
    num_frames: int | None,
    mode: str,
    size: dict[str, Any],
    pairs: bool,
) -> Costs:
    text_of_first, mode = text(plan.prefix_blocks), mode or "eager"
    return measure_costs(model, text_of_first, plan, num_frames=num_frames, executor=mode, pairs=pairs, **size)


def _one_of(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(legal)}, got {value!r}")
