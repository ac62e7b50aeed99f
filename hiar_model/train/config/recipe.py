"""Recipes: every option of a training run, as frozen dataclasses (YAML and key=value: :mod:`.reading`).

``stage: NAME`` in a recipe file chooses its class below; the other keys are the fields of that class. The section
``scale`` says where a run happens and changes nothing that is learnt: a resumed run may have another one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...common.checks import number_above_0, number_at_least_0, one_of, whole
from ...config import RolloutConfig, WanConfig


@dataclass(frozen=True)
class DataRecipe:
    """What is trained on.

    Args:
        world: of the toy, by name. codec_floor: of its codec. held_out_prompts: never trained on, kept for evaluation.
        from_start: share of toy clips that are a video's beginning. mark_continuing: prompts say which are not
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
            raise ValueError("folder and latent_size go together, or are both null for the toy world")
        if self.vae is not None and self.folder is None:
            raise ValueError("vae is for data.folder, the toy world has a codec of its own")


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
        number_above_0("lr", self.lr)
        number_above_0("clip_norm", self.clip_norm)
        number_at_least_0("weight_decay", self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in 0..1 without 1, got {list(self.betas)}")
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
        micro_batch: samples that one process computes at once; null: its whole share of a batch.
        shard: processes that share the weights of one copy; 0: all. The number of copies follows.
        activation_checkpointing: recompute each block in the backward pass from its saved input.
        threads: of torch on the CPU; 0: one for small networks such as the toy's, else torch's choice.
        max_minutes: save a state and stop after so many minutes; null: never.
        checkpoint_every: updates between two saved states.
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
        if self.max_minutes is not None:
            number_above_0("max_minutes", self.max_minutes)


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
        num_latent_frames: of a clip.
    """

    model: str = "toy"
    data: DataRecipe = field(default_factory=DataRecipe)
    seed: int = 0
    num_latent_frames: int = 12

    def __post_init__(self) -> None:
        _model_size(self, "model")
        _at_least(self, 1, "num_latent_frames")


@dataclass(frozen=True)
class TrainingRecipe(NetworkRecipe):
    """What every stage that trains a network has.

    Args:
        init: weights to begin with, the folder of a model or a checkpoint; null: random.
        updates: of the run. batch_size: samples in each optimiser step, over all processes.
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
        _at_least(self, 1, "updates", "batch_size", "log_every", "sample_prompts")
        _at_least(self, 0, "sample_every")

    def optimizer_of(self, network: str) -> OptimizerRecipe:
        """That of a network; stages that train several say which is whose."""
        return self.optimizer


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
            raise ValueError(f"matched, clean and continuous must be at least 0 and sum to 1, got {list(shares)}")


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
        _model_size(self, "teacher_model")


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
        _trained_on_clips(self)


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
        number_at_least_0("weight", self.weight)


@dataclass(frozen=True)
class HiARRecipe(CausalRecipe):
    """Self-rollout distillation: DMD with the forward-KL regulariser.

    Args:
        teacher: weights. teacher_model: its size.
        critic_init, critic_model: weights that the critic begins with, and its size; null: the teacher's.
        guidance: of the teacher in DMD. dmd_shift: of the noise levels in DMD; null: rollout.shift.
        critic_updates: optimiser steps of the critic for each step of the student. critic_optimizer: of the critic.
        shared_rollout: all steps of an update share its videos, each with its own noise; false: new videos for each.
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


RECIPES: dict[str, type[Recipe]] = {
    kind.stage: kind
    for kind in (PromptsRecipe, TeacherForcingRecipe, TeacherRecipe, OdePairsRecipe, OdeInitRecipe, HiARRecipe)
}


def _at_least(recipe: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) is not None:
            whole(name, getattr(recipe, name), least)


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
