"""Recipes: everything that decides a training run, as immutable values read from YAML and key=value.

A recipe file says ``stage: NAME``, which chooses its class below; the other keys are the fields of that class. What
stands under ``scale`` says where a run happens, never what is learnt: it may change when the run goes on.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...config import FlowSchedule, WanConfig

Window = int | tuple[int | None, ...] | None


@dataclass(frozen=True)
class DataRecipe:
    """What is trained on.

    Args:
        world: of the toy, by name. codec_floor: of its codec. held_out_prompts: never trained on, kept for evaluation.
        from_start: share of toy clips that are a video's beginning. mark_continuing: texts say which are not
            (:class:`hiar_model.train.data.datasets.ToyData`).
        folder: of encoded prompts (or clips) instead of the toy world. latent_size: (height, width) of their latents.
        vae: folder of a Wan model whose VAE decodes samples of such prompts; null: none are shown.
    """

    world: str = "plain"
    codec_floor: float = 0.25
    held_out_prompts: int = 64
    from_start: float = 0.5
    mark_continuing: bool = False
    folder: str | None = None
    latent_size: tuple[int, int] | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, 0, "held_out_prompts")
        _share(self, "from_start")
        if (self.folder is None) != (self.latent_size is None):
            raise ValueError("recipe: data.folder and data.latent_size go together, or are both null for the toy world")
        if self.vae is not None and self.folder is None:
            raise ValueError("recipe: data.vae is for data.folder, the toy world has a codec of its own")


@dataclass(frozen=True)
class OptimizerRecipe:
    """How one network is updated.

    Args:
        kind: "adamw", or "muon_adamw": Muon for the matrices of the blocks, AdamW without decay for everything else.
        lr: peak learning rate. betas: of AdamW. weight_decay: of all (adamw), of the matrices (muon_adamw).
        warmup, cooldown: shares of the run that the rate rises from 0, and falls to 0 at the end.
        clip_norm: largest gradient norm.
    """

    kind: Literal["muon_adamw", "adamw"] = "muon_adamw"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: float = 0.02
    cooldown: float = 0.4
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and self.clip_norm > 0 and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                "recipe: lr and clip_norm must be above 0, weight_decay at least 0, "
                f"got {self.lr}, {self.clip_norm}, {self.weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"recipe: betas must be in 0..1 without 1, got {list(self.betas)}")
        _share(self, "warmup", "cooldown")


@dataclass(frozen=True)
class EmaRecipe:
    """The running average of weights that is sampled and exported.

    Args:
        decay: of what was there, per update. start: updates after which it begins; until then it is the weights.
        ramp: the decay begins small and rises to ``decay``, so that a short run does not average its beginning.
    """

    decay: float = 0.998
    start: int = 0
    ramp: bool = True

    def __post_init__(self) -> None:
        _share(self, "decay")
        _at_least(self, 0, "start")


@dataclass(frozen=True)
class ScaleRecipe:
    """Where a run happens. Losses stay the same up to rounding, whatever stands here.

    Args:
        micro_batch: rows of a batch that one process computes at once; null: all of its share.
        shard: processes that share the weights of one copy; 0: all. The number of copies follows.
        activation_checkpointing: blocks keep nothing for the backward pass but their input.
        threads: of torch on the CPU; 0: one for small networks such as the toy's, else torch's choice.
        max_minutes: the run stops after so long, in a state to go on from; null: never.
        checkpoint_every: updates between two states to go on from.
    """

    micro_batch: int | None = None
    shard: int = 0
    activation_checkpointing: bool = False
    threads: int = 0
    max_minutes: float | None = None
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        _at_least(self, 0, "shard", "threads")
        _at_least(self, 1, "checkpoint_every", "micro_batch")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"recipe: max_minutes must be above 0, got {self.max_minutes}")


@dataclass(frozen=True)
class Recipe:
    """What every stage has.

    Args:
        precision: "bfloat16" (autocast, of what trains), or "float32".
    """

    stage: ClassVar[str]

    precision: Literal["bfloat16", "float32"] = "bfloat16"
    scale: ScaleRecipe = field(default_factory=ScaleRecipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping as JSON takes it, ``stage`` among it."""
        return {"stage": self.stage, **plain(self)}


@dataclass(frozen=True)
class PromptsRecipe(Recipe):
    """Prompts as embeddings of Wan's text encoder, on disk.

    Args:
        prompts: text file, one on each line. text_encoder: folder of a Wan model that has it.
        negative: the prompt of guidance's other side, in place of the empty one. shard_size: prompts in one file.
    """

    stage: ClassVar[str] = "prompts"

    prompts: str = ""
    text_encoder: str = ""
    negative: str = ""
    shard_size: int = 256

    def __post_init__(self) -> None:
        _at_least(self, 1, "shard_size")


@dataclass(frozen=True)
class NetworkRecipe(Recipe):
    """What every stage with a network has.

    Args:
        model: size of the network, a name that WanConfig knows. seed: of weights, data and noise.
        num_frames: latent frames of a clip.
    """

    model: str = "toy"
    data: DataRecipe = field(default_factory=DataRecipe)
    seed: int = 0
    num_frames: int = 12

    def __post_init__(self) -> None:
        _sizes(self, "model")
        _at_least(self, 1, "num_frames")


@dataclass(frozen=True)
class TrainingRecipe(NetworkRecipe):
    """What every stage that trains a network has.

    Args:
        init: weights to begin with, the folder of a model or a checkpoint; null: random.
        updates: of the run. batch_size: rows in each optimiser step, over all processes.
        log_every, sample_every: updates between two rows of the log, two sheets of samples; 0: no samples.
        sample_prompts: videos on a sheet.
    """

    init: str | None = None
    updates: int = 5000
    batch_size: int = 16
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    log_every: int = 20
    sample_every: int = 0
    sample_prompts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "updates", "batch_size", "log_every", "sample_prompts")
        _at_least(self, 0, "sample_every")

    def optimizer_of(self, network: str) -> OptimizerRecipe:
        """That of a network; stages that train several say which is whose."""
        return self.optimizer


@dataclass(frozen=True)
class CausalRecipe(TrainingRecipe):
    """What every stage that trains a block-causal network has.

    Args:
        frames_per_block, window_frames, sink_frames: the block-causal rule; a window may be one number per step.
        steps, shift: the noise schedule of the rollout.
    """

    frames_per_block: int = 3
    window_frames: Window = 12
    sink_frames: int = 0
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "frames_per_block")
        if self.num_frames % self.frames_per_block or self.num_frames < 2 * self.frames_per_block:
            raise ValueError(
                f"recipe: num_frames must be a multiple of frames_per_block {self.frames_per_block} and at least two "
                f"blocks, got {self.num_frames}"
            )
        steps = len(self.schedule)
        if isinstance(self.window_frames, tuple) and len(self.window_frames) != steps:
            raise ValueError(
                f"recipe: window_frames has {len(self.window_frames)} numbers, give one for each of {steps} steps"
            )
        windows = self.window_frames if isinstance(self.window_frames, tuple) else (self.window_frames,)
        least = self.sink_frames + self.frames_per_block
        _at_least(self, 0, "sink_frames")
        if any(window is not None and window < least for window in windows):
            raise ValueError(
                f"recipe: window_frames must be at least sink_frames + frames_per_block = {least}, "
                f"got {plain(self.window_frames)}"
            )

    @property
    def schedule(self) -> FlowSchedule:
        """The noise schedule."""
        return FlowSchedule(self.steps, self.shift)


@dataclass(frozen=True)
class LevelsRecipe:
    """How noise levels of (target, context) are drawn in teacher forcing.

    Args:
        matched: share of (sigma_s, sigma_{s+1}) of the schedule, s uniform: step-first order.
        clean: share of (sigma_s, 0): block-first order, which conditions on clean context.
        continuous: share of any level with a context a random gap below: other step counts.
    """

    matched: float = 0.55
    clean: float = 0.2
    continuous: float = 0.25

    def __post_init__(self) -> None:
        shares = (self.matched, self.clean, self.continuous)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"recipe: levels must be at least 0 and sum to 1, got {list(shares)}")


@dataclass(frozen=True)
class TeacherForcingRecipe(CausalRecipe):
    """Matched-noise teacher forcing from real clips.

    Args:
        levels: which noise levels are trained.
        first_block_weight: of a video's first block in the loss: it must place its shape without any context.
    """

    stage: ClassVar[str] = "teacher_forcing"

    levels: LevelsRecipe = field(default_factory=LevelsRecipe)
    first_block_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_window(self)


@dataclass(frozen=True)
class TeacherRecipe(TrainingRecipe):
    """Flow matching of the bidirectional teacher.

    Args:
        shift: of the noise levels, uniform before. text_dropout: share of clips that are trained without their prompt.
        guidance, sample_steps: of sampled videos.
    """

    stage: ClassVar[str] = "teacher"

    shift: float = 1.0
    text_dropout: float = 0.1
    guidance: float = 3.0
    sample_steps: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "text_dropout")
        _at_least(self, 1, "sample_steps")


@dataclass(frozen=True)
class OdePairsRecipe(NetworkRecipe):
    """The teacher's ODE trajectories, on disk.

    Args:
        teacher: weights. teacher_model: its size. count: trajectories; shard_size: in one file; batch_size: at once.
        steps, shift, guidance: of the ODE. points: which of its states are kept, -1 the last.
    """

    stage: ClassVar[str] = "ode_pairs"

    teacher: str = ""
    teacher_model: str = "toy"
    count: int = 2048
    shard_size: int = 64
    batch_size: int = 16
    steps: int = 48
    shift: float = 8.0
    guidance: float = 6.0
    points: tuple[int, ...] = (0, 12, 24, 36, -1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "count", "shard_size", "batch_size", "steps")
        _sizes(self, "teacher_model")


@dataclass(frozen=True)
class OdeInitRecipe(CausalRecipe):
    """A causal student that learns the teacher's trajectories: where distillation begins.

    Args:
        trajectories: folder that a stage ode_pairs wrote. clean: share of contexts that are clean, not matched.
        skip_corrupt: leave out shards that are not as they were written, by name; false: the first one ends the run.
    """

    stage: ClassVar[str] = "ode_init"

    trajectories: str = ""
    clean: float = 0.5
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "clean")
        _one_window(self)


@dataclass(frozen=True)
class ForwardKLRecipe:
    """The regulariser that keeps motion.

    Args:
        weight: of it beside the DMD loss; 0: none. trajectories: folder that a stage ode_pairs wrote.
        first_k: of the trajectories' points, from which one is drawn. attention: of the student during it.
        skip_corrupt: as for ode_init.
    """

    weight: float = 0.1
    trajectories: str | None = None
    first_k: int = 1
    attention: Literal["bidirectional", "block_causal"] = "bidirectional"
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "first_k")
        if self.weight < 0:
            raise ValueError(f"recipe: forward_kl.weight must be at least 0, got {self.weight}")


@dataclass(frozen=True)
class HiARRecipe(CausalRecipe):
    """Self-rollout distillation: DMD with the forward-KL regulariser.

    Args:
        teacher: weights. teacher_model: its size.
        critic_init, critic_model: weights that the critic begins with, and its size; null: the teacher's.
        order: "step_first" matches the noise of the context, "block_first" is Self-Forcing.
        cache_source: "own", or "next_step": lent keys. guidance: of the teacher in DMD. dmd_shift: of its noise levels;
            null: the schedule's. critic_updates: of the critic for each of the student. critic_optimizer: its own.
        shared_rollout: the turns of one update share its videos, each with noise of its own; false: new ones for each.
    """

    stage: ClassVar[str] = "hiar"

    teacher: str = ""
    teacher_model: str = "toy"
    critic_init: str | None = None
    critic_model: str | None = None
    order: Literal["step_first", "block_first"] = "step_first"
    cache_source: Literal["own", "next_step"] = "own"
    guidance: float = 3.0
    dmd_shift: float | None = None
    critic_updates: int = 5
    shared_rollout: bool = False
    critic_optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    forward_kl: ForwardKLRecipe = field(default_factory=ForwardKLRecipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "critic_updates")
        _sizes(self, "teacher_model")
        if self.critic_model is not None:
            _sizes(self, "critic_model")
            if self.critic_init is None and self.critic_model != self.teacher_model:
                raise ValueError(
                    f"recipe: critic_init must be given: the teacher's weights are no {self.critic_model} to begin with"
                )
        if self.order == "block_first":
            if self.cache_source != "own":
                raise ValueError("recipe: cache_source next_step lends matched keys: order must be step_first")
            _one_window(self)

    def optimizer_of(self, network: str) -> OptimizerRecipe:
        return self.critic_optimizer if network == "critic" else self.optimizer


RECIPES: dict[str, type[Recipe]] = {
    kind.stage: kind
    for kind in (PromptsRecipe, TeacherForcingRecipe, TeacherRecipe, OdePairsRecipe, OdeInitRecipe, HiARRecipe)
}


def _at_least(recipe: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise ValueError(f"recipe: {name} must be at least {least}, got {value}")


def _share(recipe: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"recipe: {name} must be in 0..1, got {getattr(recipe, name)}")


def _sizes(recipe: Any, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) not in WanConfig.names():
            raise ValueError(
                f"recipe: {name} must be one of {', '.join(WanConfig.names())}, got {getattr(recipe, name)!r}"
            )


def _one_window(recipe: CausalRecipe) -> None:
    if isinstance(recipe.window_frames, tuple):
        raise ValueError(f"recipe: window_frames must be one number here, got {list(recipe.window_frames)}")


def plain(value: Any) -> Any:
    """Recipes as mappings, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(part) for part in value] if isinstance(value, tuple) else value
