"""The trainer in one process: update steps, accumulation, averages, metrics, and what stops it."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
import types

import av
import numpy as np
import pytest
import torch
from refusals import refused
from train_job import Pull, losses, recipe, train

from hiar_model.io.video import Frames
from hiar_model.planning import free_memory
from hiar_model.train.config.reading import load_recipe, make_recipe
from hiar_model.train.config.recipe import EmaRecipe, OptimizerRecipe
from hiar_model.train.engine import metrics
from hiar_model.train.engine.distributed import DistContext
from hiar_model.train.engine.ema import Ema
from hiar_model.train.engine.memory import require_memory_to_train, resident_bytes
from hiar_model.train.engine.metrics import MetricsLogger, sample_scalars
from hiar_model.train.engine.networks import make_network
from hiar_model.train.engine.optimizers import Optimizers, rate_factor
from hiar_model.train.engine.trainer import Trainer

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")


def make(folder, stage=None, say=lambda line: None, **values) -> Trainer:
    parsed = make_recipe(recipe(**values))
    return Trainer(parsed, stage or Pull(parsed, CPU), folder, DistContext(0, 1, CPU), say)


# Update steps and batches


def test_update_steps_samples_and_optimiser_steps(tmp_path):
    trainer = make(tmp_path, updates=2, scale={"micro_batch": 3, "checkpoint_every": 9})
    trainer.run()
    one = [(step, samples) for step, update, samples in trainer.stage.calls if update == 1]
    assert one == [(step, samples) for step in ("critic 0", "critic 1", "student 0") for samples in ([0, 1, 2], [3])]
    state = {name: o.state_dict()["state"] for name, o in trainer.optimizers.items()}
    assert {name: int(of["head.head.weight"]["step"]) for name, of in state.items()} == {"critic": 4, "student": 2}


def test_only_the_network_of_the_step_is_updated(tmp_path):
    trainer = make(tmp_path)
    before = {n: [p.clone() for p in m.parameters()] for n, m in trainer.stage.trained.items()}
    trainer._step(trainer.stage.update_steps(0)[0])
    critic, student = (
        [not torch.equal(a, b) for a, b in zip(before[n], trainer.stage.trained[n].parameters())]
        for n in ("critic", "student")
    )
    assert any(critic) and not any(student)


def test_any_micro_batch_gives_the_same_losses(tmp_path):
    rows = {}
    for size in (None, 1, 2, 3):
        train(tmp_path / str(size), recipe(updates=4, scale={"micro_batch": size}))
        rows[size] = losses(tmp_path / str(size))
    for size in (1, 2, 3):
        for a, b in zip(rows[None], rows[size], strict=True):
            for name in ("critic_loss", "student_loss", "critic_gradient_norm", "student_gradient_norm"):
                assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-5), (size, name)


def test_the_gradient_is_that_of_the_mean_over_the_batch(tmp_path):
    """A hand computation in one piece, beside two unequal parts."""
    trainer = make(tmp_path, scale={"micro_batch": 3})
    optimizer, seen = trainer.optimizers["student"], []
    optimizer.step = lambda done: seen.extend(p.grad.clone() for p in optimizer.parameters if p.grad is not None)
    optimizer.recipe = OptimizerRecipe("adamw", clip_norm=1e9)
    student = trainer.stage.update_steps(0)[-1]
    metrics = trainer._step(student)
    loss, _ = trainer.stage.loss(student, 0, [0, 1, 2, 3])
    expected = torch.autograd.grad(loss, [p for p in optimizer.parameters if p.grad is not None])
    for grad, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-7)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["samples"] == pytest.approx((3 * 3 + 1 * 1) / 4), "metrics are means over samples too"


def test_a_small_network_trains_in_one_thread(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trainer, inside = make(tmp_path, updates=1, scale={"threads": 0}), []
        loss = trainer.stage.loss
        trainer.stage.loss = lambda *samples: (inside.append(torch.get_num_threads()), loss(*samples))[1]
        trainer.run()
        assert set(inside) == {1} and torch.get_num_threads() == 2, "the caller's setting is put back"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_inside_autocast_learns_as_outside(tmp_path, enabled):
    """Until the outermost block of autocast ends, torch keeps 16-bit copies of weights, whatever is written since."""
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        train(tmp_path / "inside", recipe(updates=2, precision="bfloat16"))
    train(tmp_path / "outside", recipe(updates=2, precision="bfloat16"))
    assert losses(tmp_path / "inside") == losses(tmp_path / "outside")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_where_gradients_are_off_learns_as_elsewhere(tmp_path, mode):
    with mode():
        train(tmp_path / "inside", recipe(updates=2))
        assert not torch.is_grad_enabled()
    train(tmp_path / "outside", recipe(updates=2))
    assert losses(tmp_path / "inside") == losses(tmp_path / "outside")


def test_recomputed_blocks_change_no_number(tmp_path):
    for name, recompute in (("kept", False), ("again", True)):
        train(tmp_path / name, recipe(updates=3, scale={"activation_checkpointing": recompute}))
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")


def test_recomputed_blocks_keep_less(tmp_path):
    def saved(recompute: bool) -> int:
        trainer = make(tmp_path / str(recompute), scale={"activation_checkpointing": recompute})
        count = 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            trainer.stage.loss(trainer.stage.update_steps(0)[-1], 0, [0, 1, 2, 3])
        return count

    assert saved(True) < saved(False) / 2


# Averages and optimisers


def test_average_by_hand():
    network = make_network("tiny", seed=0)
    ema, first = Ema(network, EmaRecipe(decay=0.75, start=2, ramp=False)), network.head.head.bias
    values = [1.0, 3.0, 7.0, -1.0]
    expected = [1.0, 3.0, 0.75 * 3 + 0.25 * 7, 0.75 * (0.75 * 3 + 0.25 * 7) + 0.25 * -1]
    for update, (value, average) in enumerate(zip(values, expected, strict=True)):
        first.data.fill_(value)
        ema.update(update)
        assert torch.allclose(ema.weights["head.head.bias"], torch.full_like(first, average)), update
    with pytest.raises(FloatingPointError), ema.applied():
        assert torch.allclose(first, torch.full_like(first, expected[-1])) and not network.training
        raise FloatingPointError("of the samples")
    assert torch.equal(first, torch.full_like(first, -1.0)) and network.training
    network.eval()
    with ema.applied():
        pass
    assert not network.training


def test_the_average_of_narrow_weights_arrives():
    """In bfloat16 it would stop at 0.25: a thousandth of what is left is less than half a unit in the last place."""
    network = make_network("tiny", seed=0).to(torch.bfloat16)
    first = network.head.head.bias
    first.data.zero_()
    ema = Ema(network, EmaRecipe(decay=0.999, start=0, ramp=False))
    first.data.fill_(1.0)
    for update in range(3000):
        ema.update(update)
    assert {x.dtype for x in ema.weights.values()} == {torch.float32}
    arrived = torch.full(first.shape, 1 - 0.999**3000)
    torch.testing.assert_close(ema.weights["head.head.bias"], arrived, rtol=1e-4, atol=0)
    with ema.applied():
        assert first.dtype == torch.bfloat16 and first.min() > 0.94


def test_decay_rises_where_it_is_asked_to():
    network = make_network("tiny", seed=0)
    ramp = Ema(network, EmaRecipe(decay=0.5, start=3))
    assert [ramp.decay(u) for u in (0, 2, 3, 4, 11, 12, 99)] == [0, 0, 0.1, 2 / 11, 9 / 18, 0.5, 0.5]


def test_average_follows_the_student_alone(tmp_path):
    """From update 1 on: those of update 0 are copied."""
    trainer, steps = make(tmp_path, ema={"decay": 0.5, "ramp": False, "start": 1}, updates=2), []
    student = trainer.stage.trained["student"]
    trainer.run(lambda *_: steps.append({n: p.detach().clone() for n, p in student.named_parameters()}))
    for name, last in steps[1].items():
        torch.testing.assert_close(trainer.ema.weights[name], (steps[0][name] + last) / 2)
    exported = torch.load(trainer.export())
    for name, value in make_network("least", seed=0).state_dict().items():
        assert exported[name].shape == value.shape
    torch.testing.assert_close(exported["head.head.bias"], trainer.ema.weights["head.head.bias"])


def test_rate_rises_stays_and_falls():
    assert 0 < rate_factor(0.0, 0.1, 0.5) < 0.01, "no update is for nothing"
    assert rate_factor(0.05, 0.1, 0.5) == pytest.approx(0.5, abs=0.01)
    assert rate_factor(0.3, 0.1, 0.5) == 1
    assert rate_factor(0.75, 0.1, 0.5) == 0.5
    assert rate_factor(1.0, 0.1, 0.5) == 0
    assert rate_factor(0.5, 1.0, 1.0) == pytest.approx(0.5, abs=0.01), "the lower of the two"
    assert rate_factor(0.0, 0.0, 0.0) == rate_factor(1.0, 0.0, 0.0) == 1


def test_muon_has_the_matrices_of_the_blocks():
    network = make_network("tiny", seed=0)
    optimizers = Optimizers(network, OptimizerRecipe("muon_adamw", lr=0.5, betas=(0.0, 0.9)))
    adamw, muon = optimizers.parts
    (group,) = muon.param_groups
    matrices = {id(p) for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in matrices}
    assert {"blocks.1.ffn.0.weight", "blocks.0.self_attn.qkv.weight"} <= names
    assert all(n.startswith("blocks.") and n.endswith("weight") and "norm" not in n for n in names)
    assert sum(len(g["params"]) for part in optimizers.parts for g in part.param_groups) == len(optimizers.parameters)
    assert adamw.param_groups[0]["betas"] == (0.0, 0.9)
    assert group["adjust_lr_fn"] == "match_rms_adamw", "one rate fits both"
    assert adamw.param_groups[0]["weight_decay"] == 0 and muon.param_groups[0]["weight_decay"] == 0.01
    (alone,) = Optimizers(make_network("tiny", seed=0), OptimizerRecipe("adamw", weight_decay=0.3)).parts
    assert alone.param_groups[0]["weight_decay"] == 0.3
    rates = []
    alone.step = lambda: rates.append(alone.param_groups[0]["lr"])
    optimizers.parts = [alone]
    for progress in (0.01, 0.3, 0.8):
        optimizers.step(progress)
    assert rates == pytest.approx([0.5 * 0.505, 0.5, 0.25])


@pytest.mark.parametrize(("weight_decay", "decays"), [(0.01, False), (0.1, True)])
def test_weight_decay_below_rounding_has_no_effect(weight_decay, decays):
    networks = [make_network("tiny", seed=0) for _ in range(2)]
    for network, decay in zip(networks, (0.0, weight_decay), strict=True):
        optimizers = Optimizers(network, OptimizerRecipe("adamw", lr=2e-6, weight_decay=decay, warmup=0, cooldown=0))
        for step in range(3):
            for p in optimizers.parameters:
                p.grad = torch.full_like(p, 1.0 - step)
            optimizers.step(0.5)
    pairs = list(zip(*(network.parameters() for network in networks), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs) == decays


def test_models_on_the_way(tmp_path):
    """Each is the average after so many updates, as a run that is resumed there has it."""
    scale = {"checkpoint_every": 2, "threads": 1}
    make(tmp_path / "run", updates=6, scale={**scale, "model_every": 2}).run()  # the last one is the run's own model
    models = sorted((tmp_path / "run" / "models").iterdir())
    assert [model.name for model in models] == ["update_00000002", "update_00000004"]
    for model, stop in zip(models, (2, 4), strict=True):
        trainer = make(tmp_path / f"until {stop}", updates=6, scale=scale)
        trainer.run(lambda done, _, trainer=trainer, stop=stop: trainer.stop() if done == stop - 1 else None)
        expected = trainer.averaged_model().state_dict()
        written = torch.load(model / "weights.pt")
        assert written.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in written.items())


# Metrics


def test_the_table(tmp_path):
    """Means over the updates since the last row; a metric that not every row has gets a column too."""

    class Growing(Pull):
        def sample(self, update) -> Frames:
            return np.full((2, 3, 8, 8, 3), 10 * update, np.uint8)

    critic = {"kind": "adamw", "lr": 1e-3, "warmup": 0.0, "cooldown": 0.0}
    parsed = make_recipe(recipe(updates=5, log_every=2, sample_every=4, critic_optimizer=critic))
    trainer, seen = Trainer(parsed, Growing(parsed, CPU), tmp_path, say=lambda line: None), []
    trainer.run(lambda update, numbers: seen.append(numbers["student_loss"]))
    rows = losses(tmp_path)
    assert [row["update"] for row in rows] == ["2", "4", "5"]
    assert [float(row["student_loss"]) for row in rows] == pytest.approx(
        [(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2, seen[4]], rel=1e-6
    )
    assert [row["sample_motion"] for row in rows] == ["", "0", "0"]
    rates = [(row["student_learning_rate"], row["critic_learning_rate"]) for row in rows]
    assert rates == [("0.003", "0.001")] * 2 + [("0.0015", "0.001")], "of the last update in each: cooldown 0.4 of 5, 0"
    (adamw,) = trainer.optimizers["student"].parts
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.0015), "which it had"
    assert {"critic_loss", "critic_gradient_norm", "critic_largest", "student_gradient_norm"} <= rows[0].keys()
    sheets = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert sheets == ["update_00000004.png", "update_00000005.png"]
    assert (tmp_path / "samples" / sheets[0]).read_bytes().startswith(b"\x89PNG")


def test_metrics_of_an_update_are_means_over_its_steps(tmp_path):
    trainer, numbers = make(tmp_path), iter([1.0, 4.0, 7.0])
    trainer._step = lambda step: {"loss": next(numbers)}
    assert trainer._update() == {"critic_loss": 2.5, "student_loss": 7.0}


def test_the_time_of_a_run_is_in_minutes(tmp_path):
    trainer, begun = make(tmp_path, updates=1, scale={"max_minutes": 10, "threads": 1}), time.monotonic()
    assert trainer.run() and begun + 600 <= trainer._deadline <= time.monotonic() + 600


def test_samples_are_of_the_averaged_weights(tmp_path):
    class Remembers(Pull):
        def sample(self, update) -> None:
            self.seen = self.trained["student"].head.head.bias.detach().clone()

    parsed = make_recipe(recipe(updates=3, sample_every=3, ema={"decay": 0.9, "ramp": False}))
    trainer = Trainer(parsed, Remembers(parsed, CPU), tmp_path, say=lambda line: None)
    trainer.run()
    assert torch.equal(trainer.stage.seen, trainer.ema.weights["head.head.bias"])
    assert not torch.equal(trainer.stage.seen, trainer.stage.trained["student"].head.head.bias)


def test_motion_and_saturation():
    frames = np.full((1, 3, 2, 2, 3), 100, np.uint8)
    frames[0, 1], frames[0, 2] = 151, 49  # differences 51 and 102: on average 0.3 of 255
    frames[0, 0, 0, 0], frames[0, 0, 1, 1] = 4, 251  # 6 of 36 channels, in one frame
    scalars = sample_scalars(frames)
    changed = (151 - 4 + abs(151 - 251) - 2 * 51) * 3 / 12
    assert scalars["sample_motion"] == pytest.approx(((51 + changed) + 102) / 2 / 255)
    assert scalars["sample_saturation"] == pytest.approx(6 / 36)
    assert sample_scalars(frames[:, :1])["sample_motion"] == 0


def test_a_sheet_of_long_and_large_videos(tmp_path):
    """24 frames from first to last, each the mean of squares of 4 pixels."""
    video = np.zeros((2, 47, 482, 832, 3), np.uint8)
    video[0, :] = np.arange(47).reshape(47, 1, 1, 1)
    video[1, :, ::4] = 200
    path = MetricsLogger(tmp_path, 0, {}).sheet(1, video)
    with av.open(str(path)) as opened:
        sheet = next(opened.decode(video=0)).to_ndarray(format="rgb24")
    assert sheet.shape == (2 * 122 + 2, 24 * 210 + 2, 3)
    assert [sheet[60, 100 + 210 * i, 0] for i in range(24)] == list(range(0, 47, 2))
    assert (sheet[124:-2, 2:210] == 50).all()


def test_losses_are_drawn_while_the_run_goes_on(tmp_path, monkeypatch):
    """Now and then, and once more at the end; a picture that cannot be written does not end the run."""
    trainer, seen = make(tmp_path, updates=3), []
    monkeypatch.setattr(metrics, "PLOT_EVERY", 0.0)
    trainer.run(lambda update, numbers: seen.append((tmp_path / "loss.png").stat().st_mtime_ns))
    assert seen == sorted(set(seen)) and len(seen) == 3
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(metrics, "PLOT_EVERY", math.inf)
    lines: list[str] = []
    again = make(tmp_path / "again", updates=2, say=lines.append)
    (tmp_path / "again" / "loss.png" / "x").mkdir(parents=True)
    again.run()
    assert len(losses(tmp_path / "again")) == 2 and lines[-1].startswith("no loss plot: cannot write ")


def test_without_tensorboard_it_is_said_once(tmp_path, monkeypatch):
    find, lines = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    trainer = make(tmp_path, updates=2, say=lines.append)
    trainer.run()
    assert lines == ["no TensorBoard scalars: tensorboard is not installed (pip install 'hiar-kernels[train]')"]
    assert len(losses(tmp_path)) == 2 and not (tmp_path / "tensorboard").exists()


def test_wandb_only_where_its_variable_is_set(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    MetricsLogger(tmp_path / "run", 0, {}, lambda text: None).close()
    monkeypatch.setenv("WANDB_PROJECT", "films")
    with pytest.raises(ValueError, match="WANDB_PROJECT is set to 'films', but wandb is not installed"):
        MetricsLogger(tmp_path / "none", 0, {}, lambda text: None)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["adamw", "muon_adamw"])
def test_memory_is_that_of_the_tensors(tmp_path, kind):
    """Weights, optimiser states and average after an update, and gradients; but for AdamW's counts of steps."""
    optimizer = {"kind": kind, "lr": 1e-3}
    sizes = {"model": "least", "teacher_model": "least", "updates": 1}
    trainer = make(tmp_path, optimizer=optimizer, critic_optimizer=optimizer, **sizes)
    trainer.run()
    networks = [*trainer.stage.trained.values(), *trainer.stage.frozen.values()]
    tensors = [p for network in networks for p in network.parameters()]
    tensors += [*trainer.ema.weights.values(), *trainer.stage.trained["critic"].parameters()]  # as many gradients
    for optimizers in trainer.optimizers.values():
        tensors += [value for part in optimizers.parts for state in part.state.values() for value in state.values()]
    expected = sum(t.nbytes for t in tensors if t.dim())
    assert resident_bytes(trainer.recipe) == expected and resident_bytes(trainer.recipe, 4) == expected // 4


def test_too_little_memory_is_said_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 40 * 10**9)
    hiar = load_recipe("wan-1.3b/hiar")
    with refused(r"averages of a process need 51\.1 GB, 40\.0 GB of memory are free"):
        require_memory_to_train(hiar, DistContext(0, 1, CPU))
    assert require_memory_to_train(hiar, DistContext(0, 8, CPU)) == pytest.approx(51.1e9 / 8, rel=1e-3)


def test_a_resumed_run_goes_on_in_its_run_at_wandb(tmp_path, monkeypatch):
    started: list[dict] = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **options: (started.append(options), types.SimpleNamespace(finish=lambda: None))[1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    for update in (0, 5, 0):
        MetricsLogger(tmp_path, update, {}, lambda text: None).close()
    first, resumed, new = (options["id"] for options in started)
    assert first == resumed != new and {options["resume"] for options in started} == {"allow"}


# What stops it


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_loss_that_is_not_finite(tmp_path, micro_batch):
    class NoisedByNaN(Pull):
        def noise(self, update, step, sample):
            broken = (update, step, sample) == (3, "critic 1", 2)
            return super().noise(update, step, sample) * (math.nan if broken else 1)

    parsed = make_recipe(recipe(scale={"checkpoint_every": 2, "micro_batch": micro_batch}))
    trainer = Trainer(parsed, NoisedByNaN(parsed, CPU), tmp_path, say=lambda line: None)
    with pytest.raises(FloatingPointError) as error:
        trainer.run()
    samples = [2] if micro_batch else [0, 1, 2, 3]
    good = tmp_path / "states" / "update_00000002"
    assert f"is nan in samples {samples} " in str(error.value)
    assert str(error.value).endswith(f"update 3, step critic 1; last good state: {good}")
    again = Trainer(parsed, Pull(parsed, CPU), tmp_path, say=lambda line: None)
    assert again.update == 2 and all(bool(p.isfinite().all()) for p in again.stage.trained["critic"].parameters())


def test_a_gradient_that_is_not_finite(tmp_path):
    class InfiniteSlope(Pull):
        def loss(self, step, update, samples):
            loss, metrics = super().loss(step, update, samples)
            weight = self.trained[step.network].head.head.weight
            return loss + (weight.sum() * 0).sqrt(), metrics  # 0, of infinite slope

    parsed = make_recipe(recipe())
    with pytest.raises(FloatingPointError, match="gradient norm is nan, loss .*, update 0, step critic 0; .*: none"):
        Trainer(parsed, InfiniteSlope(parsed, CPU), tmp_path, say=lambda line: None).run()


class Diverged(Pull):
    """As a rollout does whose latents are not finite."""

    def loss(self, step, update, samples):
        if self.recipe.sample_every == 0 and (update, step.network) == (3, "student"):
            raise FloatingPointError("latents are not finite from step 0 of block 1 on")
        return super().loss(step, update, samples)

    def sample(self, update):
        raise FloatingPointError("latents are not finite from step 0 of block 1 on")


@pytest.mark.parametrize(
    ("sample_every", "where"), [(0, "update 3, step student 0"), (3, "samples after update 3")], ids=["loss", "samples"]
)
def test_a_rollout_that_is_not_finite(tmp_path, sample_every, where):
    parsed = make_recipe(recipe(sample_every=sample_every))
    with pytest.raises(FloatingPointError) as error:
        Trainer(parsed, Diverged(parsed, CPU), tmp_path, say=lambda line: None).run()
    good = tmp_path / "states" / "update_00000002"
    assert str(error.value) == (f"{where}: latents are not finite from step 0 of block 1 on; last good state: {good}")


def test_a_full_disk_under_the_losses_is_named(tmp_path):
    logger = MetricsLogger(tmp_path, 0, {}, lambda text: None)
    (tmp_path / "loss.csv").symlink_to("/dev/full")
    logger.columns = ["update"]  # a file that is there is read first, and this one has no end
    with pytest.raises(OSError, match="No space left on device") as error:
        logger._write_row({"update": "1"})
    assert error.value.filename == str(tmp_path / "loss.csv")


# Threads


def test_small_networks_train_in_one_thread_and_the_setting_is_put_back(tmp_path):
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        scale = {"threads": 0, "checkpoint_every": 9}
        make(tmp_path / "a", scale=scale).run(lambda *_: inside.append(torch.get_num_threads()))
        assert set(inside) == {1} and torch.get_num_threads() == 2

        def fail(*_):
            inside.append(torch.get_num_threads())
            raise OSError("full")

        with pytest.raises(OSError, match="full"):
            make(tmp_path / "b", scale={**scale, "threads": 3}).run(fail)
        assert inside[-1] == 3 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
