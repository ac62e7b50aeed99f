"""The stages of distillation: a bidirectional teacher, its ODE trajectories, a causal student that learns them, HiAR.

Each is made of a recipe and says what is drawn and which loss is asked for; the trainer does the rest.
"""

from __future__ import annotations

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
from ...schedule.plan import windows_per_step
from ..config.recipe import HiARRecipe, OdeInitRecipe, OdePairsRecipe, TeacherRecipe
from ..data.shards import shared_out
from ..data.trajectories import TrajectoryStore, generate_trajectories, weights_sha256
from ..engine.distributed import gathered
from ..engine.networks import frozen, make_network
from ..engine.self_rollout import SelfRollout, Visited, draw_exit_step
from ..losses.context import velocity_over_context
from ..losses.dmd import critic_loss, distribution_matching, draw_sigma
from ..losses.forward_kl import draw_points, forward_kl_loss
from ..losses.teacher import drop_text, flow_draws, flow_matching_loss, ode_trajectory
from .base import Scalars, Stage, Turn
from .sources import Sources, autocast, sample_videos, save_student

TURNS, ROWS = 64, 65536  # of an update, of a batch: what the numbers of videos leave room for


class Teacher(Stage):
    """Flow matching on whole clips, all frames seeing all frames."""

    averaged = "teacher"

    def __init__(self, recipe: TeacherRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        self.trained = {"teacher": make_network(recipe.model, seed=recipe.seed, weights=recipe.init)}
        self.frozen: dict[str, HiARTransformer] = {}

    def turns(self, update: int) -> Sequence[Turn]:
        return (Turn("teacher"),)

    def loss(self, turn: Turn, update: int, rows: Sequence[int]) -> tuple[Tensor, Scalars]:
        r = self.recipe
        batch = self.sources.clips().clips(r.seed, r.stage, update, rows)
        shape = self.sources.data.latent_shape
        draws = flow_draws(r.seed, r.stage, update, rows, shape, shift=r.shift, text_dropout=r.text_dropout)
        text = drop_text(batch.text, self.sources.data.unconditional(), draws.dropped)
        x0, text, sigma, noise = (x.to(self.device) for x in (batch.latents, text, draws.sigma, draws.noise))
        return flow_matching_loss(self.trained["teacher"], x0, text, sigma, noise), {}

    def sample(self, update: int) -> Frames | None:
        r = self.recipe
        text = self.sources.shown(r.sample_prompts)
        if text is None:
            return None
        noise = torch.stack([self._noise(i) for i in range(len(text))])
        last = ode_trajectory(
            self.trained["teacher"],
            noise.to(self.device),
            text.to(self.device),
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
    """The teacher's trajectories, on disk, for the stages behind."""

    @own_settings()
    def __init__(self, recipe: OdePairsRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        weights = _needed(recipe.teacher, "teacher")
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
        return shared_out(folder, "trajectories", ".json")


class OdeInit(Stage):
    """A causal student regresses the end of the teacher's trajectories from their points (CausVid, arXiv 2412.07772).

    Its context are points of the same trajectory: the next one (matched noise) or the last one (clean), so that one
    beginning serves every student that is distilled from it.
    """

    averaged = "student"

    def __init__(self, recipe: OdeInitRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        shape = self.sources.data.latent_shape
        self.store = _opened(recipe.trajectories, "trajectories", shape, recipe.skip_corrupt)
        _same_levels(self.store.sigmas, recipe.schedule.sigmas, recipe.trajectories)
        self.trained = {"student": make_network(recipe.model, seed=recipe.seed, weights=recipe.init)}
        self.frozen: dict[str, HiARTransformer] = {}

    def turns(self, update: int) -> Sequence[Turn]:
        return (Turn("student"),)

    def loss(self, turn: Turn, update: int, rows: Sequence[int]) -> tuple[Tensor, Scalars]:
        r = self.recipe
        trajectory, text = self.store.sample(r.seed, r.stage, update, rows)
        generators = [keyed_generator(r.seed, r.stage, update, row, "levels") for row in rows]
        points = torch.cat([draw_points(1, len(r.schedule), g) for g in generators])
        clean = torch.tensor([float(g.uniform()) < r.clean for g in generators])
        context = torch.where(clean, len(r.schedule), points + 1)
        index = torch.arange(len(rows))
        sigmas = torch.tensor(self.store.sigmas, dtype=torch.float64)
        x, before, end = trajectory[index, points], trajectory[index, context], trajectory[:, -1]
        return self._regress(*(y.to(self.device) for y in (x, before, end, text, sigmas[points], sigmas[context]))), {}

    def _regress(self, x: Tensor, before: Tensor, end: Tensor, text: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
        r = self.recipe
        velocity = velocity_over_context(
            self.trained["student"],
            x,
            before,
            text,
            sigma,
            lower,
            frames_per_block=r.frames_per_block,
            window_frames=windows_per_step(r.window_frames, len(r.schedule))[0],
            sink_frames=r.sink_frames,
        )
        x0 = x - sigma.float().view(-1, 1, 1, 1, 1) * velocity.float()
        return (x0 - end).square().mean()

    def sample(self, update: int) -> Frames | None:
        return sample_videos(self.sources, self.trained["student"], self.recipe)

    def export(self, model: HiARTransformer, folder: Path) -> Path:
        return save_student(self.sources, model, self.recipe, folder)


class HiAR(Stage):
    """Self-rollout DMD with the forward-KL regulariser (arXiv 2603.08703; design: one exit step for all ranks).

    The videos of the critic's and the student's turns are rollouts of the student as it is then.
    """

    averaged = "student"

    def __init__(self, recipe: HiARRecipe, device: torch.device) -> None:
        _countable(recipe)
        self.recipe, self.device = recipe, device
        self.sources = Sources(recipe, device)
        teacher = _needed(recipe.teacher, "teacher")
        student = make_network(recipe.model, seed=recipe.seed, weights=recipe.init)
        critic_model = recipe.critic_model or recipe.teacher_model
        critic = make_network(critic_model, seed=0, weights=recipe.critic_init or teacher)
        self.trained = {"critic": critic, "student": student}
        self.frozen = {"teacher": frozen(make_network(recipe.teacher_model, seed=0, weights=teacher))}
        self.store: TrajectoryStore | None = None
        if recipe.forward_kl.weight:
            folder, frame = recipe.forward_kl.trajectories, self.sources.data.latent_shape[1:]
            self.store = _opened(folder, "forward_kl.trajectories", frame, recipe.forward_kl.skip_corrupt)
            points, first_k = len(self.store.sigmas), recipe.forward_kl.first_k
            if first_k >= points:
                raise ValueError(
                    f"recipe: forward_kl.first_k must be below the {points} points of {folder}, got {first_k}"
                )
        self.rollout = SelfRollout(
            student,
            recipe.schedule,
            order="stream" if recipe.cache_source == "next_step" else recipe.order,
            cache_source=recipe.cache_source,
            frames_per_block=recipe.frames_per_block,
            window_frames=recipe.window_frames,
            sink_frames=recipe.sink_frames,
        )
        self._update = -1
        self._visited: dict[tuple[int, ...], tuple[Visited, Tensor]] = {}  # by rows; x0 of them without gradient:
        self._made: dict[tuple[int, ...], Tensor] = {}

    def turns(self, update: int) -> Sequence[Turn]:
        critic = [Turn("critic", i, f"critic {i}") for i in range(self.recipe.critic_updates)]
        return (*critic, Turn("student"))

    def loss(self, turn: Turn, update: int, rows: Sequence[int]) -> tuple[Tensor, Scalars]:
        visited, text = self._visit(turn, update, rows)
        return (self._critic if turn.network == "critic" else self._student)(visited, text, turn, update, rows)

    def _visit(self, turn: Turn, update: int, rows: Sequence[int]) -> tuple[Visited, Tensor]:
        """A rollout of the student for these rows; with ``shared_rollout`` one for all turns of an update."""
        r = self.recipe
        drawn = 0 if r.shared_rollout else turn.index + (turn.network == "student") * r.critic_updates
        if not r.shared_rollout or update != self._update:
            self._visited.clear()  # before the next ones are made: they are the largest of what there is
            self._made.clear()
        self._update = update
        if tuple(rows) in self._visited:
            return self._visited[tuple(rows)]
        stage = f"{r.stage} {drawn}"
        text = self.sources.data.prompts(r.seed, stage, update, rows).to(self.device)
        exit_step = draw_exit_step(len(r.schedule), keyed_generator(r.seed, stage, update, "exit"))
        frames, _, *size = self.sources.data.latent_shape
        student, videos = self.trained["student"], [_video(update, drawn, row) for row in rows]
        run = partial(self.rollout.run, seed=r.seed, video_ids=videos)
        visited = gathered(student, run, text, frames, *size, exit_step)
        self._visited[tuple(rows)] = visited, text
        return visited, text

    def _critic(
        self, visited: Visited, text: Tensor, turn: Turn, update: int, rows: Sequence[int]
    ) -> tuple[Tensor, Scalars]:
        if tuple(rows) not in self._made:
            with torch.no_grad():
                self._made[tuple(rows)] = self.rollout.predict(visited, text)
        x0 = self._made[tuple(rows)]
        sigma, noise = self._noised(turn, update, rows, x0)
        return critic_loss(self.trained["critic"], x0, text, sigma, noise), {}

    def _student(
        self, visited: Visited, text: Tensor, turn: Turn, update: int, rows: Sequence[int]
    ) -> tuple[Tensor, Scalars]:
        r = self.recipe
        x0 = self.rollout.predict(visited, text)
        sigma, noise = self._noised(turn, update, rows, x0)
        matched = distribution_matching(
            x0,
            text,
            self.sources.data.unconditional().to(text),
            sigma,
            noise,
            teacher=self.frozen["teacher"],
            critic=self.trained["critic"],
            guidance=r.guidance,
        )
        loss, told = matched.loss, {"dmd": matched.loss.detach(), "dmd_normaliser": matched.normaliser.mean()}
        if self.store is not None:
            kept = self._forward_kl(update, rows)
            loss = loss + r.forward_kl.weight * kept
            told["forward_kl"] = kept.detach()
        return loss, told

    def _forward_kl(self, update: int, rows: Sequence[int]) -> Tensor:
        r, kl = self.recipe, self.recipe.forward_kl
        assert self.store is not None
        trajectory, text = self.store.sample(r.seed, r.stage, update, rows)
        generators = [keyed_generator(r.seed, r.stage, update, row, "point") for row in rows]
        index = torch.cat([draw_points(1, kl.first_k, g) for g in generators])
        return forward_kl_loss(
            self.trained["student"],
            trajectory.to(self.device),
            self.store.sigmas,
            text.to(self.device),
            index=index,
            first_k=kl.first_k,
            attention=kl.attention,
            frames_per_block=r.frames_per_block,
            window_frames=self.rollout.windows[0],
            sink_frames=r.sink_frames,
        )

    def _noised(self, turn: Turn, update: int, rows: Sequence[int], x0: Tensor) -> tuple[Tensor, Tensor]:
        """Level and noise of the student's videos for both networks, keyed by row."""
        r = self.recipe
        shift = r.shift if r.dmd_shift is None else r.dmd_shift
        generators = [keyed_generator(r.seed, r.stage, update, str(turn), row, "noise") for row in rows]
        sigma = torch.cat([draw_sigma(1, shift, g) for g in generators])
        noise = torch.stack([g.normals(*x0.shape[1:]) for g in generators])
        return sigma.to(self.device), noise.to(self.device)

    def sample(self, update: int) -> Frames | None:
        return sample_videos(self.sources, self.trained["student"], self.recipe)

    def export(self, model: HiARTransformer, folder: Path) -> Path:
        return save_student(self.sources, model, self.recipe, folder)


def _video(update: int, drawn: int, row: int) -> int:
    """A number of its own for every video of a run: it keys the noise."""
    return (update * TURNS + drawn) * ROWS + row


def _countable(recipe: HiARRecipe) -> None:
    """More turns or rows would share the noise of others, see :func:`_video`."""
    if recipe.critic_updates >= TURNS:
        raise ValueError(f"recipe: critic_updates must be at most {TURNS - 1}, got {recipe.critic_updates}")
    if recipe.batch_size > ROWS:
        raise ValueError(f"recipe: batch_size must be at most {ROWS}, got {recipe.batch_size}")


def _needed(path: str | None, key: str) -> str:
    if not path:
        raise ValueError(f"recipe: {key} must be given: it names what an earlier stage has made")
    return path


def _opened(path: str | None, key: str, shape: Sequence[int], skip_corrupt: bool) -> TrajectoryStore:
    """The trajectories of a folder, whose points end in ``shape``, that of the recipe's clips or frames."""
    store = TrajectoryStore(_needed(path, key), skip_corrupt=skip_corrupt)
    if store.latent_shape[-len(shape) :] != tuple(shape):
        raise ValueError(f"{path}: its latents are {list(store.latent_shape)}, the recipe's must end in {list(shape)}")
    return store


def _same_levels(theirs: Sequence[float], ours: Sequence[float], folder: str) -> None:
    if len(theirs) != len(ours) or any(abs(a - b) > 1e-6 for a, b in zip(theirs, ours, strict=True)):
        told = [", ".join(f"{TRAIN_TIMESTEPS * s:g}" for s in levels) for levels in (theirs, ours)]
        raise ValueError(
            f"{folder}: its points are at t = {told[0]}, the student's steps at {told[1]}: "
            "make them agree by steps and shift of both, and by points"
        )
