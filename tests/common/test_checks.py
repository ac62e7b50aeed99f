"""Whole numbers of every kind are whole numbers, everywhere; what is none is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import make_rollout
from small_toy import PROMPT, small_folder, small_model  # noqa: F401 (fixtures)

from hiar_model import ExecutionConfig, FlowSchedule, RolloutConfig, WanConfig, generate
from hiar_model.common.checks import (
    as_whole,
    nearest,
    not_here,
    number_above_0,
    one_of,
    path_like,
    plain,
    true_or_false,
    whole,
)
from hiar_model.common.keyed import keyed_generator
from hiar_model.planning.fit import fit_query
from hiar_model.rollout.infill import _mask
from hiar_model.schedule.plan import Plan
from hiar_model.schedule.simulator import simulate

pytestmark = pytest.mark.cpu

KINDS = (np.int64, np.int32, np.uint8, torch.tensor, np.array)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_every_kind(kind):
    assert as_whole(kind(7)) == 7 and type(as_whole(kind(7))) is int and type(plain(kind(7))) is int


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 7.0, np.float64(7), "7", None, [7],
                                   torch.tensor([1, 2]), torch.tensor(7.0)])  # fmt: skip
def test_what_is_none(value):
    assert as_whole(value) is None
    with pytest.raises(ValueError, match="seed must be a whole number, got"):
        whole("seed", value)


def test_too_small():
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got"):
        whole("steps", np.int64(0), 1)


@pytest.mark.parametrize("value", [np.ones((9, 9)), torch.ones(9, 9), torch.nn.Sequential(torch.nn.SiLU())])
def test_what_takes_many_lines_is_named_by_its_type(value):
    for check in (whole, number_above_0, path_like, lambda name, value: one_of(name, value, ("stream",))):
        with pytest.raises(ValueError, match=rf"^order must be .*, got {type(value).__name__}$"):
            check("order", value)


@pytest.mark.parametrize("name", ["https://host/hiar.pt", "s3://bucket/a.mp4", "file:///a.png", Path("https://host/a")])
def test_a_url_names_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="^vae must be the path of a file or folder, got .*: a URL, of which nothing is"
    ):
        path_like("vae", name)
    Path(name).parent.mkdir(parents=True)
    Path(name).touch()
    assert path_like("vae", name) == Path(name)


def test_what_only_a_shell_replaces(tmp_path, monkeypatch):
    """A folder of that name would be made by whoever follows "~ is no folder; make it first"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/her")
    assert not_here("~/a.mp4") == "only a shell replaces ~, give /home/her/a.mp4"
    with pytest.raises(ValueError, match="^model must be the path of a folder, got ~/wan: .* give /home/her/wan$"):
        path_like("model", Path("~/wan"), "folder")
    for name in ("~x.mp4", "a/~/b", "~no.such.user/a", "C:/a", "C:\\a", "a:b.mp4"):
        assert path_like("path", name) == Path(name)
    Path("~").mkdir()
    assert path_like("path", "~/a.mp4") == Path("~/a.mp4")


def test_yes_and_no_of_every_kind():
    for kind in (bool, np.bool_, torch.tensor, np.array):
        assert true_or_false("open_end", kind(True)) is True and true_or_false("open_end", kind(False)) is False
    for wrong in (1, 0, "yes", None, np.int64(1), np.array([True]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="^open_end must be True or False, got "):
            true_or_false("open_end", wrong)
    assert ExecutionConfig(cuda_graph=np.bool_(False)) == ExecutionConfig()
    assert RolloutConfig(fuse_cache_denoise=np.True_).to_dict()["fuse_cache_denoise"] is True


def test_rates_of_every_kind():
    for kind in (int, float, np.float32, np.int64, torch.tensor):
        assert number_above_0("fps", kind(12)) == 12.0
    for wrong in (True, "12", None, 0, -1, float("nan"), float("inf"), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="fps must be a number above 0, got"):
            number_above_0("fps", wrong)


def test_the_nearest_choice_is_named():
    with pytest.raises(ValueError, match="order must be one of stream, step_first, got 'straem'; did you mean stream?"):
        one_of("order", "straem", ("stream", "step_first"))
    assert nearest("quite another", ("stream",)) == ""


@pytest.mark.parametrize("kind", (np.int64, torch.tensor))
def test_a_video_asked_for_in_numbers_of_every_kind(model, kind):
    numbers = {"num_frames": 9, "seed": 7, "steps": 2, "window_frames": 6, "sink_frames": 3, "threads": 1, "fps": 8}
    plainly = generate(PROMPT, model=model, order="stream", **numbers)
    requested = generate(PROMPT, model=model, order="stream", **{name: kind(n) for name, n in numbers.items()})
    assert np.array_equal(plainly.frames, requested.frames)
    assert json.dumps(requested.metadata) == json.dumps(plainly.metadata)  # as Python's numbers
    each = generate(PROMPT, model=model, num_frames=9, steps=2, window_frames=[kind(3), kind(6)], order="stream")
    assert each.metadata["rollout"]["window_frames"] == [3, 6] and json.dumps(each.metadata)


@pytest.mark.parametrize("kind", (np.int64, torch.tensor))
def test_relatives(model, kind):
    two, text = FlowSchedule.uniform(kind(2)), model.encode_text(PROMPT)
    assert two == FlowSchedule.uniform(2)
    assert FlowSchedule(tuple(np.array([1000, 500])), np.float32(5)) == FlowSchedule((1000, 500), 5.0)
    c = WanConfig.from_name("toy")
    config = WanConfig(
        kind(c.dim), kind(c.ffn_dim), kind(c.num_heads), kind(c.num_layers), patch_size=np.array([1, 2, 2])
    )
    assert json.loads(json.dumps(config.to_dict()))["dim"] == c.dim
    plan = Plan(kind(2), "stream", kind(3), window_frames=(kind(3), kind(6)))
    assert plan == Plan(2, "stream", 3, window_frames=(3, 6)) and type(plan.steps) is int
    assert simulate(plan, kind(4), kind(2)).time == simulate(plan, 4, 2).time
    _, rows, columns = model.latent_size
    sizes = {"num_frames": 3, "height": rows, "width": columns, "batch": 1, "seed": 3}
    result = [
        torch.cat([block.latents for block in make_rollout(model.transformer, text, two, **size)])
        for size in (sizes, {name: kind(n) for name, n in sizes.items()} | {"video_ids": [kind(0)]})
    ]
    assert torch.equal(*result)
    assert _mask([kind(1)], 1, (3, 3)).tolist() == [[False] * 3 + [True] * 3]
    assert torch.equal(*(keyed_generator(n, "a", n).normals(4) for n in (5, kind(5))))
    assert fit_query("wan2.1-t2v-1.3b", height=kind(480), width=kind(832), frames=kind(81)).request.height == 60


def test_paths():
    assert path_like("image", "a.png") == path_like("image", Path("a.png")) == Path("a.png")
    for wrong in (3, None, b"a.png", "", ["a.png"]):
        with pytest.raises(ValueError, match="image must be the path of a file or folder, got"):
            path_like("image", wrong)
