"""The stages of distillation: a bidirectional teacher, its ODE trajectories, a causal student that learns them, HiAR.

Each is built from a recipe and defines random draws and losses; the trainer does the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...common.keyed import keyed_generator
from ...common.settings import own_settings
from ...config import TRAIN_TIMESTEPS
from ...io.video import Frames
from ...models.checkpoint import save_transformer
from ...models.threads import cpu_threads, fitting_threads
from ...models.transformer import HiARTransformer
from ..config.recipe import HiARRecipe, OdeInitRecipe, OdePairsRecipe, TeacherRecipe
from ..data.datasets import Prompts
from ..data.shards import progress_report
from ..data.trajectories import TrajectoryStore, generate_trajectories, weights_sha256
from ..engine.distributed import is_first, unsharded
from ..engine.networks import frozen, make_network
from ..engine.self_rollout import ExitStepBatch, SelfRollout, draw_exit_step
from ..losses.context import velocity_over_context
from ..losses.dmd import critic_loss, distribution_matching, draw_sigma
from ..losses.forward_kl import draw_points, forward_kl_loss
from ..losses.teacher import drop_prompts, flow_draws, flow_matching_loss, ode_trajectory
from .base import Inputs, Scalars, Stage, UpdateStep
from .sources import Sources, StudentStage, autocast

MAX_STEPS, MAX_SAMPLES = 64, 65536  # of an update, of a batch: what the ids of videos leave room for


class Teacher(Stage):
    """Flow matching on whole clips, all frames seeing all frames."""

    averaged = "teacher"

    def __init__(self, recipe: TeacherRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        self.trained = {"teacher": make_network(recipe.model, seed=recipe.seed, weights=recipe.init)}
        self.frozen: dict[str, HiARTransformer] = {}

    def inputs(self) -> Inputs:
        return self.sources.inputs()

    def update_steps(self, update: int) -> Sequence[UpdateStep]:
        return (UpdateStep("teacher"),)

    def loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Scalars]:
        r = self.recipe
        batch = self.sources.clips().clips(r.seed, r.stage, update, samples)
        shape = self.sources.data.latent_shape
        draws = flow_draws(r.seed, r.stage, update, samples, shape, shift=r.shift, text_dropout=r.text_dropout)
        prompt_embeds = drop_prompts(batch.prompt_embeds, self.sources.data.unconditional(), draws.dropped)
        tensors = (batch.latents, prompt_embeds, draws.sigma, draws.noise)
        return flow_matching_loss(self.trained["teacher"], *(x.to(self.device) for x in tensors)), {}

    def sample(self, update: int) -> Frames | None:
        r = self.recipe
        prompt_embeds = self.sources.sample_prompts(r.sample_prompts)
        if prompt_embeds is None:
            return None
        noise = torch.stack([self._noise(i) for i in range(len(prompt_embeds))])
        last = ode_trajectory(
            self.trained["teacher"],
            noise.to(self.device),
            prompt_embeds.to(self.device),
            self.sources.data.unconditional().to(self.device),
            steps=r.sample_steps,
            shift=r.shift,
            guidance=r.guidance,
            points=(0, -1),
        )[:, -1]
        return self.sources.decode(last)

    def _noise(self, video: int) -> Tensor:
        return keyed_generator(self.recipe.seed, "sample", video).normals(*self.sources.data.latent_shape)

    def export(self, model: HiARTransformer, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "teacher.safetensors"
        save_transformer(model, path)
        return path


class OdePairs:
    """Writes the teacher's ODE trajectories, which later stages read."""

    @own_settings()
    def __init__(self, recipe: OdePairsRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        weights = _required(recipe.teacher, "teacher")
        self.teacher = frozen(make_network(recipe.teacher_model, seed=0, weights=weights, device=device))

    @own_settings()
    def produce(self, folder: Path, rank: int, ranks: int, on_progress: Callable[[int, int], None]) -> str:
        r = self.recipe
        with autocast(r, self.device), cpu_threads(fitting_threads(self.teacher, requested=r.scale.threads)):
            generate_trajectories(
                self.teacher,
                self.sources.data,
                folder,
                count=r.count,
                shard_size=r.shard_size,
                batch_size=r.batch_size,
                seed=r.seed,
                steps=r.steps,
                shift=r.shift,
                guidance=r.guidance,
                points=r.points,
                teacher_sha256=weights_sha256(self.teacher),
                device=self.device,
                rank=rank,
                world_size=ranks,
                on_progress=on_progress,
            )
        return progress_report(folder, "trajectories", ".json")


class OdeInit(StudentStage[OdeInitRecipe]):
    """A causal student regresses the end of the teacher's trajectories from their points (CausVid, arXiv 2412.07772).

    Its context are points of the same trajectory: the next one (matched noise) or the last one (clean), so that every
    student can be distilled from it.
    """

    def __init__(self, recipe: OdeInitRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        shape = self.sources.data.latent_shape
        self.store = _open_store(recipe.trajectories, "trajectories", shape, self.sources.data, recipe.skip_corrupt)
        _require_same_levels(self.store.sigmas, recipe.rollout.schedule.sigmas, recipe.trajectories)
        self.trained = {"student": make_network(recipe.model, seed=recipe.seed, weights=recipe.init)}
        self.frozen: dict[str, HiARTransformer] = {}

    def inputs(self) -> Inputs:
        return self.sources.inputs("trajectories", self.store)

    def update_steps(self, update: int) -> Sequence[UpdateStep]:
        return (UpdateStep("student"),)

    def loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Scalars]:
        r = self.recipe
        steps = len(r.rollout.steps)
        trajectory, prompt_embeds = self.store.sample(r.seed, r.stage, update, samples)
        generators = [keyed_generator(r.seed, r.stage, update, sample, "levels") for sample in samples]
        points = torch.cat([draw_points(1, steps, g) for g in generators])
        clean = torch.tensor([float(g.uniform()) < r.clean for g in generators])
        context = torch.where(clean, steps, points + 1)
        index = torch.arange(len(samples))
        sigmas = torch.tensor(self.store.sigmas, dtype=torch.float64)
        x, before, end = trajectory[index, points], trajectory[index, context], trajectory[:, -1]
        tensors = (x, before, end, prompt_embeds, sigmas[points], sigmas[context])
        return self._regress(*(y.to(self.device) for y in tensors)), {}

    def _regress(
        self, x: Tensor, before: Tensor, end: Tensor, prompt_embeds: Tensor, sigma: Tensor, lower: Tensor
    ) -> Tensor:
        rollout = self.recipe.rollout
        velocity = velocity_over_context(
            self.trained["student"],
            x,
            before,
            prompt_embeds,
            sigma,
            lower,
            rollout.context_noise,
            **rollout.block_causal(),
        )
        x0 = x - sigma.float().view(-1, 1, 1, 1, 1) * velocity.float()
        return (x0 - end).square().mean()


class HiAR(StudentStage[HiARRecipe]):
    """Self-rollout DMD with the forward-KL regulariser (arXiv 2603.08703; design: one exit step for all ranks).

    The videos of the critic's and the student's steps are rollouts of the current student.
    """

    def __init__(self, recipe: HiARRecipe, device: torch.device) -> None:
        _require_unique_ids(recipe)
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        teacher = _required(recipe.teacher, "teacher")
        self.store: TrajectoryStore | None = None
        if recipe.forward_kl.weight:
            folder, data = recipe.forward_kl.trajectories, self.sources.data
            key, frame = "forward_kl.trajectories", data.latent_shape[1:]
            self.store = _open_store(folder, key, frame, data, recipe.forward_kl.skip_corrupt)
            points, first_k = len(self.store.sigmas), recipe.forward_kl.first_k
            if first_k >= points:
                raise ValueError(
                    f"recipe: forward_kl.first_k must be below the {points} points of {folder}, got {first_k}"
                )
        student = make_network(recipe.model, seed=recipe.seed, weights=recipe.init)
        critic_model = recipe.critic_model or recipe.teacher_model
        critic = make_network(critic_model, seed=0, weights=recipe.critic_init or teacher)
        self.trained = {"critic": critic, "student": student}
        self.frozen = {"teacher": frozen(make_network(recipe.teacher_model, seed=0, weights=teacher))}
        if self.store is not None:
            _warn_of_another_teacher(self.store, self.frozen["teacher"], teacher)
        self.rollout = SelfRollout(student, recipe.rollout)
        self._update = -1
        self._batches: dict[tuple[int, ...], tuple[ExitStepBatch, Tensor]] = {}  # by samples; with prompt_embeds
        self._videos: dict[tuple[int, ...], Tensor] = {}  # by samples: x0 of a batch, without gradient

    def inputs(self) -> Inputs:
        return self.sources.inputs("forward_kl.trajectories", self.store)

    def update_steps(self, update: int) -> Sequence[UpdateStep]:
        critic = [UpdateStep("critic", i, f"critic {i}") for i in range(self.recipe.critic_updates)]
        return (*critic, UpdateStep("student"))

    def loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Scalars]:
        loss = self._critic_loss if step.network == "critic" else self._student_loss
        return loss(step, update, samples)

    def _roll_out(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[ExitStepBatch, Tensor]:
        """A rollout of the student for these samples; with ``shared_rollout`` one for all steps of an update."""
        r, key = self.recipe, tuple(samples)
        draw = 0 if r.shared_rollout else step.index + (step.network == "student") * r.critic_updates
        if not r.shared_rollout or update != self._update:
            self._batches.clear()  # before the next rollout: nothing here takes more memory
            self._videos.clear()
        self._update = update
        if key not in self._batches:
            stage = f"{r.stage} {draw}"
            prompt_embeds = self.sources.data.prompts(r.seed, stage, update, samples).to(self.device)
            exit_step = draw_exit_step(len(r.rollout.steps), keyed_generator(r.seed, stage, update, "exit"))
            frames, _, height, width = self.sources.data.latent_shape
            ids = [_video_id(update, draw, sample) for sample in samples]
            run = partial(self.rollout.run, seed=r.seed, video_ids=ids)
            batch = unsharded(self.trained["student"], run, prompt_embeds, frames, (height, width), exit_step)
            self._batches[key] = batch, prompt_embeds
        return self._batches[key]

    def _video(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(x0 of a rollout without gradient, prompt_embeds). Its keys are freed unless later steps share it: of a video
        of Wan 1.3B they take gigabytes.
        """
        batch, prompt_embeds = self._roll_out(step, update, samples)
        key = tuple(samples)
        if key not in self._videos:
            with torch.no_grad():
                self._videos[key] = self.rollout.predict(batch, prompt_embeds)
        if not self.recipe.shared_rollout:
            self._batches.clear()
        return self._videos[key], prompt_embeds

    def _critic_loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Scalars]:
        x0, prompt_embeds = self._video(step, update, samples)
        sigma, noise = self._draw_noise(step, update, samples, x0)
        return critic_loss(self.trained["critic"], x0, prompt_embeds, sigma, noise), {}

    def _student_loss(self, step: UpdateStep, update: int, samples: Sequence[int]) -> tuple[Tensor, Scalars]:
        r = self.recipe
        batch, prompt_embeds = self._roll_out(step, update, samples)
        x0 = self.rollout.predict(batch, prompt_embeds)
        del self._batches[tuple(samples)]  # the student's step is the last one; after it videos are sampled
        sigma, noise = self._draw_noise(step, update, samples, x0)
        dmd = distribution_matching(
            x0,
            prompt_embeds,
            self.sources.data.unconditional().to(prompt_embeds),
            sigma,
            noise,
            teacher=self.frozen["teacher"],
            critic=self.trained["critic"],
            guidance=r.guidance,
        )
        loss, metrics = dmd.loss, {"dmd": dmd.loss.detach(), "dmd_normaliser": dmd.normaliser.mean()}
        if self.store is not None:
            forward_kl = self._forward_kl(update, samples)
            loss = loss + r.forward_kl.weight * forward_kl
            metrics["forward_kl"] = forward_kl.detach()
        return loss, metrics

    def _forward_kl(self, update: int, samples: Sequence[int]) -> Tensor:
        r, kl = self.recipe, self.recipe.forward_kl
        assert self.store is not None
        trajectory, prompt_embeds = self.store.sample(r.seed, r.stage, update, samples)
        generators = [keyed_generator(r.seed, r.stage, update, sample, "point") for sample in samples]
        index = torch.cat([draw_points(1, kl.first_k, g) for g in generators])
        return forward_kl_loss(
            self.trained["student"],
            trajectory.to(self.device),
            self.store.sigmas,
            prompt_embeds.to(self.device),
            index=index,
            first_k=kl.first_k,
            attention=kl.attention,
            **r.rollout.block_causal(),
        )

    def _draw_noise(self, step: UpdateStep, update: int, samples: Sequence[int], x0: Tensor) -> tuple[Tensor, Tensor]:
        """Noise level and noise of the student's videos for both networks, keyed by sample."""
        r = self.recipe
        shift = r.rollout.shift if r.dmd_shift is None else r.dmd_shift
        generators = [keyed_generator(r.seed, r.stage, update, str(step), sample, "noise") for sample in samples]
        sigma = torch.cat([draw_sigma(1, shift, g) for g in generators])
        noise = torch.stack([g.normals(*x0.shape[1:]) for g in generators])
        return sigma.to(self.device), noise.to(self.device)


def _video_id(update: int, draw: int, sample: int) -> int:
    """Unique in a run: it keys the video's noise."""
    return (update * MAX_STEPS + draw) * MAX_SAMPLES + sample


def _require_unique_ids(recipe: HiARRecipe) -> None:
    """ValueError where :func:`_video_id` would repeat."""
    if recipe.critic_updates >= MAX_STEPS:
        raise ValueError(f"recipe: critic_updates must be at most {MAX_STEPS - 1}, got {recipe.critic_updates}")
    if recipe.batch_size > MAX_SAMPLES:
        raise ValueError(f"recipe: batch_size must be at most {MAX_SAMPLES}, got {recipe.batch_size}")


def _required(path: str | None, key: str) -> str:
    if not path:
        raise ValueError(f"recipe: {key} must be given: the output of an earlier stage")
    return path


def _open_store(path: str | None, key: str, shape: Sequence[int], data: Prompts, skip_corrupt: bool) -> TrajectoryStore:
    """The trajectories of a folder; the shape of their points must end in ``shape``, that of the recipe's latents, and
    their prompts must be as wide as those of ``data``. A warning says where they have been made with other data.
    """
    store = TrajectoryStore(_required(path, key), skip_corrupt=skip_corrupt, together=True)
    if store.latent_shape[-len(shape) :] != tuple(shape):
        raise ValueError(f"{path}: its latents are {list(store.latent_shape)}, the recipe's must end in {list(shape)}")
    ours, theirs = list(data.unconditional().shape[1:]), store.manifest["text_shape"]
    if ours[-1] != theirs[-1]:
        raise ValueError(f"{path}: its prompts are {theirs}, the recipe's {ours}: their widths must be equal")
    if is_first() and not store.is_of(data):
        warnings.warn(f"{path} has been made with other data than this recipe's: other prompts or world", stacklevel=2)
    return store


def _warn_of_another_teacher(store: TrajectoryStore, network: HiARTransformer, teacher: str) -> None:
    """It may be meant (a larger one for the trajectories), or not. The hash reads all weights: 5.7 GB of Wan 1.3B."""
    theirs = store.manifest.get("teacher")
    if is_first() and theirs is not None and (ours := weights_sha256(network)) != theirs:
        hashes = f"the sha256 of its weights is {theirs[:12]}, that of {teacher} {ours[:12]}"
        warnings.warn(f"{store.folder} has been made by another teacher than this recipe's: {hashes}", stacklevel=3)


def _require_same_levels(stored: Sequence[float], student: Sequence[float], folder: str) -> None:
    if len(stored) != len(student) or any(abs(a - b) > 1e-6 for a, b in zip(stored, student, strict=True)):
        points, steps = (", ".join(f"{TRAIN_TIMESTEPS * s:g}" for s in levels) for levels in (stored, student))
        raise ValueError(
            f"{folder}: its points are at t = {points}, the student's steps at {steps}: "
            "choose steps, shift and points of ode_pairs and rollout.steps, rollout.shift so that they agree"
        )
