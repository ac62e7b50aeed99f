"""Recipes: every option of a training run, as frozen dataclasses (YAML and key=value: :mod:`.reading`).

``stage: NAME`` in a recipe file chooses its class below; the other keys are the fields of that class. The section
``scale`` says where a run happens and changes nothing that is learnt: a resumed run may have another one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...common.checks import (
    MOST_BATCH,
    MOST_CLIP,
    MOST_THREADS,
    MOST_UPDATES,
    finite_number,
    number_above_0,
    number_at_least_0,
    number_within,
    one_of,
    whole,
)
from ...config import RolloutConfig, WanConfig


@dataclass(frozen=True)
class DataRecipe:
    """What is trained on.

    Args:
        world: name of the toy world. codec_floor: of its codec. held_out_prompts: how many are left for evaluation.
        from_start: share of toy clips that begin a video. mark_continuing: one more prompt token marks the others
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
        number_within("codec_floor", self.codec_floor, 0, 1)
        if self.latent_size is not None and min(self.latent_size) < 1:
            raise ValueError(f"latent_size must be (height, width) of at least 1, got {list(self.latent_size)}")
        _share(self, "from_start")
        if (self.folder is None) != (self.latent_size is None):
            raise ValueError("folder and latent_size go together, or are both null for the toy world")
        if self.vae is not None and self.folder is None:
            raise ValueError("vae is for data.folder, the toy world has a codec of its own")


@dataclass(frozen=True)
class OptimizerRecipe:
    """How one network is updated.

    Args:
        kind: "adamw", or "muon_adamw": Muon for the matrices of the blocks, AdamW without decay for everything else.
        lr: peak learning rate. betas: of AdamW. weight_decay: of all (adamw), of the matrices (muon_adamw).
            1 - lr * weight_decay is rounded to float32, so a product below 3e-8 decays nothing: 0.01 at a rate of 2e-6.
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
        number_above_0("lr", self.lr)
        number_above_0("clip_norm", self.clip_norm)
        number_at_least_0("weight_decay", self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in 0..1 without 1, got {list(self.betas)}")
        _share(self, "warmup", "cooldown")
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup and cooldown must sum to at most 1, got {self.warmup} and {self.cooldown}")


@dataclass(frozen=True)
class EmaRecipe:
    """The running average of weights that is sampled and exported.

    Args:
        decay: per update. start: first update that is averaged; before, the average is a copy of the weights.
        ramp: raise the decay from small values to ``decay``, so that a short run forgets its first weights: n / (n + 9)
            in the n-th averaged update until that is more, so ``decay`` has no effect in the first
            9 / (1 - decay), 4,500 for 0.998.
    """

    decay: float = 0.998
    start: int = 0
    ramp: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:  # at 1 the first weights would stay
            raise ValueError(f"decay must be in 0..1 without 1, got {self.decay}")
        _at_least(self, 0, "start")


@dataclass(frozen=True)
class ScaleRecipe:
    """Where and how a run executes; changes losses by rounding at most.

    Args:
        micro_batch: samples that one process computes at once; null: its whole share of a batch.
        shard: processes over which one copy of the weights is sharded; 0: all.
        activation_checkpointing: recompute each block in the backward pass from its saved input.
        threads: of torch on the CPU; 0: one for small networks such as the toy's, else torch's default.
        max_minutes: save a state and stop after so many minutes; null: never.
        checkpoint_every: updates between two saved states, of which the last one stays.
        model_every: updates between two averaged models in models/update_N, all of which stay; 0: the last one alone.
    """

    micro_batch: int | None = None
    shard: int = 0
    activation_checkpointing: bool = False
    threads: int = 0
    max_minutes: float | None = None
    checkpoint_every: int = 250
    model_every: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 0, "shard", "model_every")
        _at_least(self, 0, "threads", most=MOST_THREADS)
        _at_least(self, 1, "checkpoint_every", "micro_batch")
        if self.max_minutes is not None:
            number_above_0("max_minutes", self.max_minutes)


@dataclass(frozen=True)
class Recipe:
    """What every stage has.

    Args:
        precision: "bfloat16" (autocast), or "float32".
    """

    stage: ClassVar[str]

    precision: Literal["bfloat16", "float32"] = "bfloat16"
    scale: ScaleRecipe = field(default_factory=ScaleRecipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON, with ``stage``."""
        return {"stage": self.stage, **plain(self)}


@dataclass(frozen=True)
class PromptsRecipe(Recipe):
    """Prompts as embeddings of Wan's text encoder, on disk.

    Args:
        prompts: text file, one on each line. text_encoder: folder of a Wan model that has it.
        negative: prompt for the unconditional side of guidance, in place of the empty one. shard_size: prompts a file.
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
        model: size of the network, a name of WanConfig. seed: of weights, data and noise.
        num_latent_frames: of a clip.
    """

    model: str = "toy"
    data: DataRecipe = field(default_factory=DataRecipe)
    seed: int = 0
    num_latent_frames: int = 12

    def __post_init__(self) -> None:
        _model_size(self, "model")
        _at_least(self, 1, "num_latent_frames", most=MOST_CLIP)


@dataclass(frozen=True)
class TrainingRecipe(NetworkRecipe):
    """What every stage that trains a network has.

    Args:
        init: initial weights, the folder of a model or a checkpoint; null: random.
        updates: of the run; a finished run goes on where more are asked for, if no rate has a warmup or cooldown, which
            are shares of them. batch_size: samples in each optimiser step, over all processes.
        log_every, sample_every: updates between two rows of loss.csv, two sheets of samples; 0: no samples.
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
        _at_least(self, 1, "updates", most=MOST_UPDATES)
        _at_least(self, 1, "batch_size", "sample_prompts", most=MOST_BATCH)
        _at_least(self, 1, "log_every")
        _at_least(self, 0, "sample_every")

    def optimizer_of(self, network: str) -> OptimizerRecipe:
        """The optimiser of a network, by its name in the stage."""
        return self.optimizer

    def has_constant_rates(self) -> bool:
        """Whether no optimiser has a learning rate that depends on ``updates``."""
        return not any(o.warmup or o.cooldown for o in map(self.optimizer_of, ("student", "critic")))


@dataclass(frozen=True)
class CausalRecipe(TrainingRecipe):
    """What every stage that trains a block-causal network has.

    Args:
        rollout: how the student will be rolled out; it is trained for that, and its model folder says so.
    """

    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(shift=1.0, order="stream", window_frames=12))

    def __post_init__(self) -> None:
        super().__post_init__()
        block = self.rollout.frames_per_block
        if self.num_latent_frames % block or self.num_latent_frames < 2 * block:
            raise ValueError(
                f"num_latent_frames must be a multiple of rollout.frames_per_block {block} and at least two blocks, "
                f"got {self.num_latent_frames}"
            )
        if self.rollout.first_frame:
            raise ValueError(f"rollout.first_frame must be 0 in training, got {self.rollout.first_frame}")


@dataclass(frozen=True)
class LevelsRecipe:
    """The distribution of noise levels (target, context) in teacher forcing.

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
        if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):  # NaN is none of it
            raise ValueError(f"matched, clean and continuous must be at least 0 and sum to 1, got {list(shares)}")


@dataclass(frozen=True)
class TeacherForcingRecipe(CausalRecipe):
    """Matched-noise teacher forcing from real clips.

    Args:
        levels: distribution of the noise levels.
        first_block_weight: loss weight of a video's first block, which has no context.
    """

    stage: ClassVar[str] = "teacher_forcing"

    levels: LevelsRecipe = field(default_factory=LevelsRecipe)
    first_block_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number_above_0("first_block_weight", self.first_block_weight)
        _trained_on_clips(self)


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
        number_above_0("shift", self.shift)
        finite_number("guidance", self.guidance)
        _at_least(self, 1, "sample_steps")


@dataclass(frozen=True)
class OdePairsRecipe(NetworkRecipe):
    """The teacher's ODE trajectories, on disk.

    Args:
        teacher: weights. teacher_model: its size. count: trajectories; shard_size: in one file; batch_size: at once.
        steps, shift, guidance: of the ODE. points: indices of the states that are stored, -1 the last.
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
        _at_least(self, 1, "count", "shard_size", "steps")
        _at_least(self, 1, "batch_size", most=MOST_BATCH)
        number_above_0("shift", self.shift)
        finite_number("guidance", self.guidance)
        _model_size(self, "teacher_model")


@dataclass(frozen=True)
class OdeInitRecipe(CausalRecipe):
    """A causal student that learns the teacher's trajectories: the initial weights of distillation.

    Args:
        trajectories: output folder of a stage ode_pairs. clean: share of contexts that are clean, not matched.
        skip_corrupt: leave out damaged shards, with a warning for each; false: the first one ends the run.
    """

    stage: ClassVar[str] = "ode_init"

    trajectories: str = ""
    clean: float = 0.5
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _share(self, "clean")
        _trained_on_clips(self)


@dataclass(frozen=True)
class ForwardKLRecipe:
    """The regulariser that keeps motion.

    Args:
        weight: factor of the forward KL beside the DMD loss; 0: none. trajectories: output folder of a stage ode_pairs.
        first_k: the student predicts from one of the first k points. attention: of the student in this loss.
        skip_corrupt: as for ode_init.
    """

    weight: float = 0.1
    trajectories: str | None = None
    first_k: int = 1
    attention: Literal["bidirectional", "block_causal"] = "bidirectional"
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "first_k")
        number_at_least_0("weight", self.weight)


@dataclass(frozen=True)
class HiARRecipe(CausalRecipe):
    """Self-rollout distillation: DMD with the forward-KL regulariser.

    Args:
        teacher: weights. teacher_model: its size.
        critic_init, critic_model: initial weights of the critic, and its size; null: the teacher's.
        guidance: of the teacher in DMD. dmd_shift: of the noise levels in DMD; null: rollout.shift.
        critic_updates: optimiser steps of the critic for each step of the student. critic_optimizer: of the critic.
        shared_rollout: all steps of an update share its videos, each with its own noise, and their keys stay in memory;
            false: new videos for each.
    """

    stage: ClassVar[str] = "hiar"

    teacher: str = ""
    teacher_model: str = "toy"
    critic_init: str | None = None
    critic_model: str | None = None
    guidance: float = 3.0
    dmd_shift: float | None = None
    critic_updates: int = 5
    shared_rollout: bool = False
    critic_optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    forward_kl: ForwardKLRecipe = field(default_factory=ForwardKLRecipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "critic_updates")
        finite_number("guidance", self.guidance)
        if self.dmd_shift is not None:
            number_above_0("dmd_shift", self.dmd_shift)
        _model_size(self, "teacher_model")
        if self.critic_model is not None:
            _model_size(self, "critic_model")
            if self.critic_init is None and self.critic_model != self.teacher_model:
                raise ValueError(
                    f"critic_init must be given: the teacher's weights are not of the size {self.critic_model}"
                )
        if self.rollout.order == "block_first":
            _one_window(self)

    def optimizer_of(self, network: str) -> OptimizerRecipe:
        return self.critic_optimizer if network == "critic" else self.optimizer


REPORTS = ("log_every", "sample_every", "sample_prompts", "data.vae")
"""Keys that decide what is reported and not what is learnt: a resumed run may have others."""
REPORTS_OF = {"teacher": ("guidance", "sample_steps")}
"""Further ones of a stage."""
SKIPS = ("skip_corrupt", "forward_kl.skip_corrupt")
"""Keys that matter only where a shard is damaged: a resumed run may have others, and says what it leaves out."""

RECIPES: dict[str, type[Recipe]] = {
    kind.stage: kind
    for kind in (PromptsRecipe, TeacherForcingRecipe, TeacherRecipe, OdePairsRecipe, OdeInitRecipe, HiARRecipe)
}


def _at_least(recipe: Any, least: int, *names: str, most: int | None = None) -> None:
    for name in names:
        if getattr(recipe, name) is not None:
            whole(name, getattr(recipe, name), least, most=most)


def _share(recipe: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} must be in 0..1, got {getattr(recipe, name)}")


def _model_size(recipe: Any, *names: str) -> None:
    for name in names:
        one_of(name, getattr(recipe, name), WanConfig.names())


def _one_window(recipe: CausalRecipe) -> None:
    if len(set(recipe.rollout.windows)) > 1:
        raise ValueError(f"rollout.window_frames must be one number here, got {plain(recipe.rollout.window_frames)}")


def _trained_on_clips(recipe: CausalRecipe) -> None:
    """Stages that make no rollout train one window, and every step with keys of its own."""
    _one_window(recipe)
    if recipe.rollout.kv_source != "own":
        raise ValueError(f"rollout.kv_source must be own in the stage {recipe.stage}, got {recipe.rollout.kv_source}")


def plain(value: Any) -> Any:
    """Recipes as mappings, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(part) for part in value] if isinstance(value, tuple) else value
