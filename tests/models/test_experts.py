"""Weights per noise level: which file serves which steps, who loads it, and walks that know nothing of it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from made_runs import make_rollout
from processes import torchrun
from refusals import refused
from tiny_model import SIZE, TEXT, TINY, difference, make_model, run

from hiar_model.config import FlowSchedule
from hiar_model.models.checkpoint import load_transformer, save_transformer
from hiar_model.models.experts import load_experts, parse_experts, steps_of_rank

pytestmark = pytest.mark.cpu

HIGH, LOW = make_model(1), make_model(2)
EXPERTS = [HIGH, HIGH, LOW, LOW]
OPTIONS = {"num_frames": 12, "window_frames": 7}


# Which file serves which steps


@pytest.mark.parametrize(
    "mapping",
    ["0-1=h.pt,2-3=l.pt", " 2-3 = l.pt , 0=h.pt,1=h.pt", {"0-1": "h.pt", "2-3": "l.pt"}],
    ids=str,
)
def test_a_mapping_is_read(mapping):
    assert parse_experts(mapping, 4) == ("h.pt", "h.pt", "l.pt", "l.pt")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("h.pt", "'h.pt' is not STEPS=FILE, such as 0-1=high.pt,2-3=low.pt"),
        ("0-3=h.pt,", "'' is not STEPS=FILE"),
        ("a-b=h.pt", "'a-b' is no range of steps"),
        ("3-0=h.pt", "'3-0' is no range of steps"),
        ("-1=h.pt", "'-1' is no range of steps"),
        ("0-3=", "steps 0-3 have no file; write 0-3=weights.pt"),
        ("0-4=h.pt", r"step 4 \(0-4=h.pt\) is outside the schedule, steps are 0-3"),
        ("0-2=h.pt,2-3=l.pt", "step 2 has two files, h.pt and l.pt"),
        ("0-1=h.pt,3=l.pt", "step 2 has no file; give one for each of the steps 0-3"),
        ({}, "step 0 has no file"),
    ],
    ids=str,
)
def test_a_wrong_mapping_is_refused_in_one_line(mapping, message):
    with refused(message) as error:
        parse_experts(mapping, 4)
    assert str(error.value).startswith("experts: ")


# Who loads it


def test_each_file_is_loaded_once_and_only_where_it_is_needed():
    files, loaded = parse_experts("0-1=h,2=l,3=h", 4), []

    def load(file):
        loaded.append(file)
        return {"h": HIGH, "l": LOW}[file]

    assert load_experts(files, load) == [HIGH, HIGH, LOW, HIGH]
    assert loaded == ["h", "l"]
    split = (1, 2, 1, 0)
    for rank, expected in enumerate([["h"], ["h", "l"], ["h"], ["h"]]):
        loaded.clear()
        models, steps = load_experts(files, load, steps_of_rank(split, rank)), steps_of_rank(split, rank)
        assert loaded == expected
        own = list(steps) or [3]  # one that only takes finished blocks is still asked for sizes
        assert [step for step in range(4) if models[step] is not None] == own


def test_experts_that_do_not_fit_together_are_refused():
    wide = torch.nn.Module.__new__(type(HIGH))
    torch.nn.Module.__init__(wide)
    wide.config = type(TINY)(**{**TINY.to_dict(), "num_layers": 3})
    with pytest.raises(ValueError, match="experts: l is .*num_layers=3.*, h is .*num_layers=2"):
        load_experts(("h", "l"), {"h": HIGH, "l": wide}.__getitem__)
    with pytest.raises(ValueError, match="this rank has step 2, there are steps 0-1"):
        load_experts(("h", "l"), {"h": HIGH, "l": LOW}.__getitem__, [2])
    with pytest.raises(ValueError, match="rank must be in 0..1, got 2"):
        steps_of_rank((2, 2), 2)


def test_from_files(tmp_path):
    for name, model in (("high", HIGH), ("low", LOW)):
        save_transformer(model, tmp_path / f"{name}.safetensors")
    files = parse_experts(f"0-1={tmp_path / 'high.safetensors'},2-3={tmp_path / 'low.safetensors'}", 4)
    models = load_experts(files, lambda file: load_transformer(file, TINY).eval().requires_grad_(False))
    assert models[0] is models[1] and models[2] is models[3] is not models[0]
    assert torch.equal(run(model=models, **OPTIONS), run(model=EXPERTS, **OPTIONS))


# Walks


def test_walks_agree_and_every_step_has_its_own():
    expected = run(model=EXPERTS, **OPTIONS)
    for order, pairs in itertools.product(("step_first", "stream", "wavefront"), (False, True)):
        assert difference(run(model=EXPERTS, order=order, pairs=pairs, **OPTIONS), expected) < 1e-5, (order, pairs)
    assert difference(run(model=EXPERTS, order="wavefront", executor="recorded", **OPTIONS), expected) < 1e-5
    for other in (HIGH, LOW, [HIGH, LOW, LOW, LOW], [HIGH, HIGH, HIGH, LOW]):
        assert difference(run(model=other, **OPTIONS), expected) > 1e-2


def test_the_baseline_and_shared_kv_take_them_too():
    """A visit's weights are its step's: a cache task of the clean cache is that of the last step."""
    for options in ({"order": "block_first"}, {"order": "stream", "cache_source": "next_step"}):
        actual = run(model=EXPERTS, **options, **OPTIONS)
        assert torch.equal(actual[:, :3], run(model=EXPERTS, **OPTIONS)[:, :3])
        assert difference(actual, run(model=LOW, **options, **OPTIONS)) > 1e-2


# A pipeline: this file is its own job


def test_in_a_pipeline_each_rank_has_its_own(tmp_path):
    for name, model in (("high", HIGH), ("low", LOW)):
        save_transformer(model, tmp_path / f"{name}.safetensors")
    done = torchrun(2, __file__, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    actual = torch.load(tmp_path / "latents.pt", weights_only=True)
    assert torch.equal(actual, run(model=EXPERTS, order="stream", **OPTIONS))


def job(folder: Path) -> None:
    """One rank: loads its own file alone; the other is not there when it looks."""
    dist.init_process_group("gloo")
    rank, split = dist.get_rank(), (2, 2)
    files = parse_experts(f"0-1={folder / 'high.safetensors'},2-3={folder / 'low.safetensors'}", 4)

    def load(file: str):
        assert Path(file).name == ("high.safetensors", "low.safetensors")[rank], f"rank {rank} loads {file}"
        return load_transformer(file, TINY).eval().requires_grad_(False)

    models = load_experts(files, load, steps_of_rank(split, rank))
    options = {"executor": "pipeline", "steps_per_rank": split, "timeout": 60, **SIZE, **OPTIONS}
    result = make_rollout(models, TEXT, FlowSchedule.uniform(4), **options)
    blocks = [block.latents for block in result]
    if blocks:
        torch.save(torch.cat(blocks, 1), folder / "latents.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    job(Path(sys.argv[1]))
