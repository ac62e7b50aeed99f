"""bench/studies/infill_join.py: how far a path breaks where an infilled middle meets its ends."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_toy import small_folder, small_model  # noqa: F401 (fixtures)

from bench.studies.infill_join import Join, measure_join, path_breaks, seams
from hiar_model.toy.prompt import split_prompts

pytestmark = pytest.mark.cpu

EXTENT = torch.tensor([32.0, 32.0])


def line(frames: int, pace=(3.0, -1.0), start=(30.0, 2.0)) -> torch.Tensor:
    return (torch.tensor(start) + torch.tensor(pace) * torch.arange(frames)[:, None]) % 32


def test_seams_are_where_given_and_made_meet():
    assert seams(torch.tensor([True] * 3 + [False] * 6 + [True] * 3)) == [3, 9]
    assert seams(torch.ones(4, dtype=torch.bool)) == []


def test_a_straight_path_has_no_break_and_a_shifted_one_its_shift():
    path = line(12)
    assert path_breaks(path, EXTENT, [3, 6, 9]) == pytest.approx([0, 0, 0], abs=1e-5)
    path[6:] = (path[6:] + torch.tensor([4.0, 3.0])) % 32
    assert path_breaks(path, EXTENT, [3, 6, 9]) == pytest.approx([0, 5, 0], abs=1e-5)
    path[6] = math.nan
    assert [math.isnan(x) for x in path_breaks(path, EXTENT, [3, 6, 9])] == [False, True, True]
    with pytest.raises(ValueError, match=r"3 frames on either side: give 3..9, got 10"):
        path_breaks(path, EXTENT, [10])


def test_the_join_is_measured_on_the_toy_world(model):
    """A model of random weights joins nothing; the true clip does, and is read from its own pixels."""
    done = []
    join = measure_join(model, split_prompts()[1][:3], batch=2, on_videos=done.append)
    assert isinstance(join, Join) and (join.videos, join.blocks, join.known_blocks) == (3, 4, (0, 3))
    assert join.true_break < 1.0
    assert not join.infilled_break < 1.0  # nan where nothing is seen
    assert 0 <= join.seen <= 1 and done == [2, 3]
    assert join == measure_join(model, split_prompts()[1][:3], batch=2) or math.isnan(join.infilled_break)


def test_a_perfect_infill_is_measured_as_one(model, monkeypatch):
    monkeypatch.setattr(
        "bench.studies.infill_join.infill", lambda network, clean, ends, *_, **__: clean if ends else -clean
    )
    join = measure_join(model, split_prompts()[1][:3])
    assert join.infilled_break == join.true_break and join.seen == 1 and join.colour > 0.9


def test_what_cannot_be_measured_is_refused(model):
    with pytest.raises(ValueError, match="shows no toy world"):
        measure_join(dataclasses.replace(model, world=None), split_prompts()[1][:1])
    with pytest.raises(ValueError, match="some of 4 blocks known but not all"):
        measure_join(model, split_prompts()[1][:1], known_blocks=(0, 1, 2, 3))
