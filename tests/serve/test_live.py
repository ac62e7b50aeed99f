"""A live video equals one that was made at once: with changed prompts, after going back, from any state kept."""

from __future__ import annotations

import numpy as np
import pytest
from small_toy import write_model

from bench.studies import long_stream
from hiar_model import ExecutionConfig, PromptSchedule, RolloutConfig, VideoPipeline
from hiar_model.models.registry import load_video_model
from hiar_model.serve.live import LiveVideo
from hiar_model.serve.metrics import Metrics
from hiar_model.serve.protocol import Refusal, StartMessage
from hiar_model.serve.states import StateDisk

pytestmark = pytest.mark.cpu

RED, BLUE, GREEN = "a red circle moving right", "a blue square moving up", "a green triangle moving left"


def video(model, order="stream", frames=None, **options):
    return LiveVideo(model, ExecutionConfig(), StartMessage(1, RED, order=order, num_frames=frames), **options)


def blocks(live, count):
    """The next blocks, those on the way to a place left out."""
    made = []
    while len(made) < count:
        made += filter(None, [live.make()])
    return made


def scheduled(model, order, num_frames, *prompts):
    """Frames of a video with prompts at blocks, made at once."""
    schedule = PromptSchedule.of([(3 * block / model.fps, prompt) for block, prompt in prompts])
    return VideoPipeline(model)(None, prompts=schedule, order=order, num_frames=num_frames).frames


def same(made, frames):
    return all(np.array_equal(one.frames, frames[one.first_frame : one.first_frame + 3]) for one in made)


@pytest.mark.parametrize("order", ["stream", "wavefront", "block_first"])
def test_prompts_change_where_they_say(model, order):
    live = video(model, order)
    made = blocks(live, 2)
    at = live.change_prompt(BLUE)
    assert at.block == live.started + 1 and at.frame == 3 * at.block
    made += blocks(live, 6)
    assert [one.block for one in made] == list(range(8))
    assert [one.prompt for one in made] == [RED] * at.block + [BLUE] * (8 - at.block)
    if order != "wavefront":
        assert at.block == 2
    assert same(made, scheduled(model, order, 24, (0, RED), (at.block, BLUE)))
    assert not same(made, scheduled(model, order, 24, (0, RED), (at.block + 1, BLUE)))


@pytest.mark.parametrize("order", ["stream", "wavefront"])
@pytest.mark.parametrize("states", [9, 2, 0])  # that are kept: all, few, none
def test_going_back(model, order, states):
    live = video(model, order)
    live.make()
    live = video(model, order, rewind_bytes=states * live.states[0].nbytes)
    first = blocks(live, 6)
    assert len(live.states) == min(states, 6) and (not states or live.states[-1].block == 6)
    assert live.seek(2).block == 2
    again = blocks(live, 3)
    assert [one.block for one in again] == [2, 3, 4]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first[2:5], again, strict=True))
    assert live.run.frames_done == live.frame_of(5), "of which a message about black frames tells"
    live.fork(3, GREEN)
    forked = blocks(live, 2)
    assert same(forked, scheduled(model, order, 15, (0, RED), (3, GREEN)))
    assert live.lines() == [[0.0, RED], [0.75, GREEN]]
    live.fork(0, BLUE)
    assert same(blocks(live, 1), scheduled(model, order, 3, (0, BLUE)))
    assert live.lines() == [[0.0, BLUE]]


def test_going_back_to_a_block_that_later_ones_began_beside(tmp_path):
    """With four steps in flight the state before a block has begun that block, with the prompt of then."""
    config = RolloutConfig((1000, 750, 500, 250), 2.0, frames_per_block=3, window_frames=9)
    deep = load_video_model(write_model(tmp_path / "deep", config), "cpu")
    live = video(deep, "wavefront")
    first = blocks(live, 5)
    assert [(state.block, state.started) for state in live.states][2] == (3, 3)
    live.fork(3, GREEN)
    assert same(first[:3] + blocks(live, 2), scheduled(deep, "wavefront", 15, (0, RED), (3, GREEN)))


def test_the_nearest_state_is_taken_in_memory_or_on_disk(model, tmp_path):
    disk = StateDisk(tmp_path, 10**8, Metrics(), every=4, rate=1e12)
    live = video(model, disk=disk.of("a"))
    blocks(live, 5)
    disk.close()  # when the state before block 4 is written
    assert [file.block for file in live.disk.files] == [4]
    for stored, block in ((live.states[:5], 5), (live.states[:2], 4)):
        live.states = stored
        live._go_back(5)
        assert live.block == block
    assert same(blocks(live, 1), scheduled(model, "stream", 18, (0, RED)))


def test_a_prompt_changes_on_the_way_back(model):
    """Where the viewer goes to, not at the blocks that are made again on the way there."""
    live = video(model, rewind_bytes=0)
    first = blocks(live, 5)
    live.seek(4)
    assert live.change_prompt(BLUE).block == 4
    assert same(first[:4] + blocks(live, 2), scheduled(model, "stream", 18, (0, RED), (4, BLUE)))


def test_a_video_has_at_most_so_many_prompts(model, monkeypatch):
    monkeypatch.setattr("hiar_model.serve.live.MOST_CHANGES", 2)
    live = video(model)
    blocks(live, 1)
    live.change_prompt(BLUE)
    with pytest.raises(Refusal, match="a video has at most 2 prompts") as refused:
        live.fork(0, GREEN)
    assert refused.value.code == "too_many" and live.lines() == [[0.0, RED]]
    blocks(live, 1)
    assert live.lines() == [[0.0, RED], [0.25, BLUE]]


def test_states_thin_out_with_age(model):
    live = video(model)
    live.make()
    live = video(model, rewind_bytes=4 * live.states[0].nbytes)
    blocks(live, 16)
    kept = [state.block for state in live.states]
    gaps = np.diff([0, *kept])
    assert len(kept) == 4 and kept[-1] == 16
    assert gaps[0] >= gaps[-1] and gaps.max() < 12, kept


def test_memory_stays_flat(model):
    live = video(model)
    live.make()
    live = video(model, rewind_bytes=4 * live.states[0].nbytes)
    rows = []
    for turn in range(4):
        live.change_prompt((BLUE, GREEN)[turn % 2])
        blocks(live, 40)
        rows.append(long_stream.memory(0))
    for row in rows[2:]:  # less where threads of an earlier test let go of theirs meanwhile
        assert row.tensors <= rows[1].tensors and row.tensor_bytes <= rows[1].tensor_bytes, rows


def test_a_finite_video_ends_and_goes_back(model):
    live = video(model, frames=6)
    made = [live.make(), live.make(), live.make()]
    assert live.complete and made[2] is None
    with pytest.raises(Refusal, match="all 2 blocks have begun"):
        live.change_prompt(BLUE)
    live.seek(1)
    assert not live.complete and np.array_equal(blocks(live, 1)[0].frames, made[1].frames)


def test_groups_are_reported(model):
    groups = []
    live = video(model, on_group=groups.append)
    blocks(live, 2)
    live.seek(1)
    blocks(live, 1)
    plan = live.run.rollout.plan
    first = list(plan.groups(2))
    assert groups[: len(first)] == [*plan.groups(3)][: len(first)]
    assert [task for item in groups[-1] for task in item][-1].block in (0, 1)
    drawn = live.plan(2)
    assert drawn[0] == [["denoise", 0, 0]] and len(drawn) == len(first)


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (StartMessage(1, "seven kittens"), "bad_prompt", "seven"),
        (StartMessage(1, RED, num_frames=7), "bad_video", "nearest 6 or 9"),
        (StartMessage(1, RED, height=64), "bad_video", "32x32"),
    ],
)
def test_refused_videos(model, request_, code, words):
    with pytest.raises(Refusal, match=words) as refused:
        LiveVideo(model, ExecutionConfig(), request_)
    assert refused.value.code == code


def test_refused_changes_change_nothing(model):
    live = video(model)
    blocks(live, 1)
    for call, code in (
        (lambda: live.change_prompt("nonsense"), "bad_prompt"),
        (lambda: live.fork(0, "nonsense"), "bad_prompt"),
        (lambda: live.fork(9, BLUE), "no_such_block"),
        (lambda: live.seek(2), "no_such_block"),
    ):
        with pytest.raises(Refusal) as refused:
            call()
        assert refused.value.code == code
    assert same(blocks(live, 1), scheduled(model, "stream", 6, (0, RED)))
