"""The training loop of the toy model: data, optimisers, averaged weights, resume, progress."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import WanConfig
from ..toy.codec import ToyCodec
from ..toy.prompt import split_prompts, token_table
from ..toy.text import ToyTextEncoder
from ..toy.world import ToyWorld
from ..transformer import HiARTransformer
from .recipe import ToyRecipe
from .teacher_forcing import loss_weights, teacher_forcing_loss

CHECKPOINT, LOSSES = "checkpoint.pt", "loss.csv"
_NO_MATTER = ("threads", "checkpoint_every")  # may differ when a run is resumed: they do not decide what is learnt


class ToyTrainer:
    """One run in one folder. The same folder resumes where its last checkpoint stands, to the bit.

    Args:
        recipe: what to train. folder: for checkpoint.pt and loss.csv (iteration, loss, learning rate factor, gradient
            norm; one row every ``log_every`` iterations, means over them).

    Raises:
        ValueError: the folder holds a run of another recipe.
    """

    def __init__(self, recipe: ToyRecipe, folder: str | Path) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.config = WanConfig.from_name(recipe.model)
        self.world = ToyWorld()
        self.codec = ToyCodec.fit(channels=self.config.in_channels, floor=recipe.codec_floor)
        self.text = ToyTextEncoder(self.config.text_dim)
        self.pool = token_table(split_prompts(recipe.held_out_prompts)[0])
        self.generator = torch.Generator().manual_seed(recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = HiARTransformer(self.config)
        initialise(self.model)
        self.average = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.optimizers = make_optimizers(self.model, recipe)
        self.peak = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.iteration = 0
        self.pending: list[tuple[float, float]] = []
        if (self.folder / CHECKPOINT).exists():
            self._load()

    def run(self, on_iteration: Callable[[int, float], None] | None = None) -> None:
        """Train up to ``recipe.iterations``; a non-finite loss stops it with the iteration named."""
        recipe = self.recipe
        while self.iteration < recipe.iterations:
            loss, norm = self._update()
            self.iteration += 1
            self.pending.append((loss, norm))
            if self.iteration % recipe.log_every == 0:
                self._log()
            if self.iteration % recipe.checkpoint_every == 0 or self.iteration == recipe.iterations:
                self._save()
            if on_iteration is not None:
                on_iteration(self.iteration, loss)

    def averaged_model(self) -> HiARTransformer:
        """The transformer with the averaged weights, in evaluation mode."""
        model = HiARTransformer(self.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.average[name])
        return model.eval().requires_grad_(False)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(latents [B, F, C, H, W], text [B, L, text_dim], loss weights [B, F])."""
        r = self.recipe
        begins = round(r.batch_size * r.from_start)
        latents, tokens = [], []
        for count, start in ((begins, "center"), (r.batch_size - begins, "anywhere")):
            if count:
                sample = self.world.sample_batch(count, r.num_frames, self.generator, start=start, pool=self.pool)  # type: ignore[arg-type]
                latents.append(self.codec.encode(sample.videos))
                tokens.append(sample.tokens)
        from_start = [i < begins for i in range(r.batch_size)]
        weight = loss_weights(r.batch_size, r.num_frames, from_start, r.frames_per_block, r.first_block_weight)
        return torch.cat(latents), self.text.encode_tokens(torch.cat(tokens)), weight

    def _update(self) -> tuple[float, float]:
        r = self.recipe
        latents, text, weight = self.batch()
        target, context = r.levels.sample(r.batch_size, r.schedule, self.generator)
        factor = rate_factor(self.iteration / r.iterations, r.optimizer.warmup, r.optimizer.cooldown)
        with torch.autocast("cpu", torch.bfloat16, enabled=r.precision == "bfloat16"):
            loss = teacher_forcing_loss(
                self.model,
                latents,
                text,
                target,
                context,
                self.generator,
                frames_per_block=r.frames_per_block,
                window_frames=r.window_frames,
                sink_frames=r.sink_frames,
                weight=weight,
            )
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at iteration {self.iteration}; last good state: {self.folder / CHECKPOINT}"
            )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), r.optimizer.clip_norm)
        for optimizer, peaks in zip(self.optimizers, self.peak, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(r.ema, (self.iteration + 1) / (self.iteration + 10))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        return loss.item(), norm.item()

    def _log(self) -> None:
        path, new = self.folder / LOSSES, not (self.folder / LOSSES).exists()
        means = [sum(column) / len(column) for column in zip(*self.pending, strict=True)]
        factor = rate_factor(
            self.iteration / self.recipe.iterations, self.recipe.optimizer.warmup, self.recipe.optimizer.cooldown
        )
        with path.open("a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(["iteration", "loss", "rate", "gradient_norm"])
            writer.writerow([self.iteration, f"{means[0]:.6f}", f"{factor:.4f}", f"{means[1]:.4f}"])
        self.pending.clear()

    def _save(self) -> None:
        state = {
            "recipe": self.recipe.to_dict(),
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "pending": self.pending,
        }
        partial = self.folder / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self.folder / CHECKPOINT, weights_only=True)
        ours, theirs = self.recipe.to_dict(), state["recipe"]
        differ = [k for k in ours if k not in _NO_MATTER and ours[k] != theirs.get(k)]
        if differ:
            raise ValueError(
                f"{self.folder} holds a run with another {', '.join(differ)}; choose another --out or delete the folder"
            )
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.iteration, self.pending = state["iteration"], [tuple(p) for p in state["pending"]]
        self._drop_rows_after(self.iteration)

    def _drop_rows_after(self, iteration: int) -> None:
        """Rows that a killed run logged after its last checkpoint will be written again."""
        path = self.folder / LOSSES
        if path.exists():
            head, *rows = path.read_text().splitlines(keepends=True)
            path.write_text("".join([head, *(row for row in rows if int(row.split(",")[0]) <= iteration)]))


def initialise(model: HiARTransformer) -> None:
    """Gates and the head start at zero (adaLN-Zero, arXiv 2212.09748): every block begins as the identity."""
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.zero_()  # type: ignore[operator]
        last = model.time_projection[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
        model.head.head.weight.zero_()
        model.head.head.bias.zero_()


def make_optimizers(model: HiARTransformer, recipe: ToyRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases."""
    o = recipe.optimizer
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=o.matrix_lr, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=o.other_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def rate_factor(done: float, warmup: float, cooldown: float) -> float:
    """Rises over ``warmup``, stays 1, falls linearly to 0 over the last ``cooldown``; all shares of the run."""
    rise = 1.0 if warmup == 0 else min(1.0, (done + 1e-4) / warmup)
    fall = 1.0 if cooldown == 0 else min(1.0, max(0.0, (1 - done) / cooldown))
    return min(rise, fall)
