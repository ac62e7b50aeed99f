"""Prompts over time: reading a script, when a prompt shows, and what becomes of the context."""

from __future__ import annotations

import itertools

import pytest
import torch
from ids import brief
from made_runs import make_rollout, prepare
from refusals import refused
from small_toy import BLOCK, PROMPT, small_folder, small_model  # noqa: F401 (fixtures)
from tiny_model import MODEL, SIZE, TEXT, TINY, difference

import hiar_kernels
from hiar_model.config import FlowSchedule
from hiar_model.pipelines.prompt_schedule import EncodedPromptSchedule, PromptSchedule, prompt_delay
from hiar_model.rollout.noise import keyed_noise
from hiar_model.schedule.plan import Plan

pytestmark = pytest.mark.cpu

OTHER = torch.randn(1, 4, TINY.text_dim, generator=torch.Generator().manual_seed(7))
PREFIX = torch.randn(1, 4, TINY.in_channels, *SIZE.values(), generator=torch.Generator().manual_seed(2))
NEXT = "a blue square moving up"
TEXT_FILE = f"""
# a circle that turns into a square

0   {PROMPT}
\t1.5\t{NEXT}
"""


def encode(prompt: str) -> torch.Tensor:
    if "?" in prompt:
        raise ValueError(f"cannot show {prompt!r}")
    return torch.full((1, 2, 3), float(len(prompt)))


def show(script: PromptSchedule, num_blocks: int | None = None, block: float = 0.75) -> EncodedPromptSchedule:
    return EncodedPromptSchedule.encoded(script, encode, lambda n: n * block, num_blocks)


# Reading


def test_a_script_is_read(tmp_path):
    (tmp_path / "script.txt").write_text(TEXT_FILE, encoding="utf-8")
    script = PromptSchedule.read(tmp_path / "script.txt")
    assert [(line.seconds, line.prompt, line.where) for line in script.lines] == [
        (0, PROMPT, "script.txt line 4"),
        (1.5, NEXT, "script.txt line 5"),
    ]
    assert [script.at(t) for t in (0, 1.49, 1.5, 99)] == [0, 0, 1, 1]
    given = PromptSchedule.of([(1.5, NEXT)]).from_start(PROMPT)
    assert [(line.seconds, line.prompt) for line in given.lines] == [(0.0, PROMPT), (1.5, NEXT)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt schedule has no prompts"),
        ("# only this\n\n", "prompt schedule has no prompts"),
        ("a red circle", "prompt schedule line 1: starts with 'a', expected"),
        ("0 x\n12,5 y", "prompt schedule line 2: starts with '12,5', expected"),
        ("0", "prompt schedule line 1: no prompt after the time 0"),
        ("0 x\n-1 y", "prompt schedule line 2: time must be a number of seconds, at least 0, got -1"),
        ("0 x\nnan y", "line 2: time must be a number of seconds, at least 0, got nan"),
        ("0 x\ninf y", "line 2: time must be a number of seconds, at least 0, got inf"),
        ("0 x\n2 y\n2 z", "prompt schedule line 3: times must ascend, got 2 after 2"),
        ("1 x", "prompt schedule line 1: the first prompt must be at 0 s, got 1"),
        ("0 x\n1 why?", "prompt schedule line 2: cannot show 'why\\?'"),
        ("0 x\n7 y", "prompt schedule line 2: 7 s is too late, the last block starts at 6.75 s"),
        ("0 x\n1 y\n1.2 z", "line 2: has no effect, the next prompt replaces it in the same block \\(2, from 1.5 s\\)"),
    ],
)
def test_a_wrong_script_is_refused_in_one_line(text, message):
    with refused(message):
        show(PromptSchedule.parse(text), num_blocks=10)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((10**400, "x"), "prompts entry 2: time must be a number of at least 0, got 1000"),
        (("soon", "x"), "prompts entry 2: time must be a number of at least 0, got 'soon'"),
        ((1, None), r"prompts entry 2 must be \(seconds, prompt\), got \(1, None\)"),
        ("x", r"prompts entry 2 must be \(seconds, prompt\), got 'x'"),
        (7, r"prompts entry 2 must be \(seconds, prompt\), got 7"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(entry, message):
    with refused(message):
        PromptSchedule.of([(0, PROMPT), entry])


def test_times_are_checked_before_a_prompt_is_encoded():
    """A file of a million prompts was encoded whole before one was found to be too late."""
    schedule = PromptSchedule.of([(second, f"prompt {second}") for second in range(20_000)])
    with refused("prompts entry 8: 7 s is too late, the last block starts at 6.75 s"):
        EncodedPromptSchedule.encoded(schedule, None, lambda block: 0.75 * block, num_blocks=10)


def test_a_wrong_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*none.txt: No such file"):
        PromptSchedule.read(tmp_path / "none.txt")
    (tmp_path / "x.txt").write_bytes(b"0 \xff\xfe")
    with pytest.raises(ValueError, match="x.txt is not UTF-8"):
        PromptSchedule.read(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="line 1 is the prompt at 0 s: leave out the other one, 'x'"):
        PromptSchedule.parse("0 y").from_start("x")


# When it shows


@pytest.mark.parametrize("num_blocks", [None, 12])
def test_a_prompt_takes_over_at_the_first_block_that_begins_at_its_time(num_blocks):
    made = show(PromptSchedule.parse("0 a\n0.75 bb\n2.3 ccc\n6.75 a"), num_blocks)
    assert [int(made(n)[0, 0, 0]) for n in range(11)] == [1, 2, 2, 2, 3, 3, 3, 3, 3, 1, 1]
    assert made(0) is made(10), "one tensor for one prompt: its keys are computed once"
    assert made.summary() == [
        "0 s 'a': shows from 0 s (block 0)",
        "0.75 s 'bb': shows from 0.75 s (block 1)",
        "2.3 s 'ccc': shows from 3 s (block 4)",
        "6.75 s 'a': shows from 6.75 s (block 9)",
    ]


@pytest.mark.parametrize(
    ("options", "ranks", "blocks", "forwards", "again"),
    [
        ({"order": "stream"}, 1, 2, 4 + 8, 4 * 2),
        ({"order": "block_first"}, 1, 2, 4 + 5, 2),
        # a diagonal has half of 8 tasks: the next block begins 2 diagonals later and is finished in the fourth after
        ({"order": "wavefront"}, 1, 3, 18, 4 * 2),
        ({"order": "stream"}, 4, 3, 6, 4 * 2),  # a rank makes a block in 2 tasks; the next is finished 3 ranks later
        ({"order": "stream", "window_frames": (3, 6, 9, None)}, 1, 2, 12, None),
        ({"order": "stream", "window_frames": (3, 6, 9, 9)}, 1, 2, 12, 0 + 1 + 2 + 2),
    ],
)
def test_what_a_live_change_waits(options, ranks, blocks, forwards, again):
    plan = Plan(4, frames_per_block=3, **{"window_frames": (9,) * 4, **options})
    delay = prompt_delay(plan, ranks)
    assert (delay.blocks, delay.recache) == (blocks, 0)
    if options.get("window_frames") is None:
        assert delay.forwards == forwards
    assert prompt_delay(plan, ranks, "recache").recache == again
    assert str(delay) == f"a new prompt shows at worst in block {blocks} from now, after {delay.forwards:g} forwards"


def test_in_step_first_no_live_change_shows():
    with pytest.raises(ValueError, match="got step_first, which starts every block before one is"):
        prompt_delay(Plan(4, "step_first", 3))


# What becomes of the context


def run(order="stream", switch=2, on_prompt_change="keep", steps=3, **options) -> torch.Tensor:
    options = {"num_frames": 15, "window_frames": 7, **options}
    text = options.pop("text", lambda n: TEXT if n < switch else OTHER)
    schedule = FlowSchedule.uniform(steps)
    made = make_rollout(MODEL, text, schedule, order=order, on_prompt_change=on_prompt_change, **SIZE, **options)
    return torch.cat([block.latents for block in made], 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_frames": None},
        {"window_frames": (3, 7, 6)},
        {"window_frames": 8, "sink_frames": 2, "num_frames": 21, "switch": 5},
        {"prefix": PREFIX, "num_frames": 16},
        {"batch": 2},
        {"executor": "recorded"},
    ],
    ids=brief,
)
def test_walks_agree_on_a_recached_context(options):
    """A property of the text at each block, not of a walk."""
    expected = run("stream", on_prompt_change="recache", **options)
    for order in ("step_first", "wavefront"):
        assert difference(run(order, on_prompt_change="recache", **options), expected) < 1e-5, order
    assert difference(run("stream", **options), expected) > 1e-3


@pytest.mark.parametrize("order", ["stream", "step_first", "wavefront", "block_first"])
def test_recaching_concerns_what_comes_behind_the_change(order):
    keep, again = run(order), run(order, on_prompt_change="recache")
    assert torch.equal(keep[:, :6], again[:, :6]), "blocks before the change know nothing of it"
    assert difference(keep[:, 6:9], again[:, 6:9]) > 1e-3
    same = {"text": TEXT, "on_prompt_change": "recache"}
    assert torch.equal(run(order, **same), run(order, text=TEXT)), "without a change nothing is cached again"


@pytest.mark.parametrize("impl", ["auto", "reference"])  # by what the host knows of the rings, and by frame ids
@pytest.mark.parametrize("window_frames", [7, (7, 6, 3)])
def test_recaching_is_the_video_that_began_with_the_window_under_the_new_text(window_frames, impl):
    """In the clean graph literally: given the frames of the blocks in the window, a rollout makes the same block."""
    with hiar_kernels.prefer(impl):
        again = run("block_first", switch=3, on_prompt_change="recache", window_frames=window_frames)

        def renoise(step: int, block: int) -> torch.Tensor:
            return keyed_noise(0, 0, step, block + 1, (3, *PREFIX.shape[2:]))[None]

        options = {
            "num_frames": 9, "window_frames": window_frames, "prefix": again[:, 3:9], "first_frame": 3, **SIZE,
        }  # fmt: skip
        made = make_rollout(
            MODEL, OTHER, FlowSchedule.uniform(3), order="block_first", noise=renoise(-1, 2), renoise=renoise, **options
        )
        assert difference(next(iter(made)).latents, again[:, 9:12]) < 1e-5
    assert difference(again[:, 9:12], run("block_first", switch=3, window_frames=window_frames)[:, 9:12]) > 1e-3


def test_all_context_under_the_new_text_is_the_new_text_alone():
    """Where block 1 caches a given block 0 again, it sees what a video of the new text sees from the start."""
    given = PREFIX[:, :3]
    options = {"prefix": given, "num_frames": 9, "window_frames": None}
    expected = run(text=OTHER, **options)
    assert difference(run(switch=1, on_prompt_change="recache", **options), expected) < 1e-6
    assert difference(run(switch=1, **options), expected) > 1e-3


def test_the_price_of_recaching_is_as_told():
    for order, steps, expected in (("stream", 3, 3 * 2), ("block_first", 3, 2), ("wavefront", 3, 3 * 2)):
        count = []
        for policy in ("keep", "recache"):
            made = make_rollout(
                MODEL, lambda n: TEXT if n < 3 else OTHER, FlowSchedule.uniform(steps), num_frames=18,
                window_frames=9, order=order, on_prompt_change=policy, **SIZE,
            )  # fmt: skip
            list(made)
            count.append(made._executor.counters.cache)
        assert count[1] - count[0] == expected == prompt_delay(made.plan, 1, "recache").recache, order


def test_what_is_kept_to_be_cached_again_does_not_grow():
    made = make_rollout(
        MODEL, TEXT, FlowSchedule.uniform(2), num_frames=None, order="stream", window_frames=8, sink_frames=2,
        on_prompt_change="recache", **SIZE,
    )  # fmt: skip
    kept = [len(made._executor.history.stored) for _ in itertools.islice(made, 30)]
    assert set(kept[5:]) == {2 * 2}  # at each step the block in the window and the sink's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": True}, "on_prompt_change='recache' is impossible with fuse_cache_denoise=True"),
        ({"cache_source": "next_step"}, "on_prompt_change='recache' is impossible with kv_source='next_step'"),
        ({"on_prompt_change": "forget"}, "on_prompt_change must be one of keep, recache, got 'forget'"),
    ],
)
def test_what_cannot_be_recached_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"on_prompt_change": "recache", **options})


# Prompt to video


def frames(model, prompt, **options):
    made = prepare(prompt, model=model, num_frames=18, order="stream", **options)
    return made, list(made)


def test_a_video_of_a_script(model):
    script = PromptSchedule.of([(0, PROMPT), (0.5, NEXT)])  # blocks of 3 frames at 12 fps: from the third block on
    made, found = frames(model, None, prompts=script)
    _, plain = frames(model, PROMPT)
    _, also = frames(model, PROMPT, prompts=PromptSchedule.of([(0.5, NEXT)]))
    assert [(a == b).all() for a, b in zip(found, plain, strict=True)] == [True, True] + [False] * 4
    assert all((a == b).all() for a, b in zip(found, also, strict=True))
    assert made.notes()[1:] == [
        f"0.5 s {NEXT!r}: shows from 0.5 s (block 2)",
        "a new prompt shows at worst in block 2 from now, after 6 forwards",
    ]
    assert made.metadata["prompts"] == [[0.0, PROMPT], [0.5, NEXT]]
    assert "command" not in made.metadata  # no file holds these prompts
    with pytest.raises(ValueError, match="prompt schedule line 2: .*colour"):
        prepare(None, model=model, prompts=PromptSchedule.parse(f"0 {PROMPT}\n0.5 a beige circle moving up"))
    with pytest.raises(ValueError, match="a prompt is a string, got NoneType"):
        prepare(None, model=model)


def test_a_video_goes_on_from_its_session(model, tmp_path):
    options = {"model": model, "num_frames": 18, "order": "stream"}
    _, whole = frames(model, PROMPT)
    first = prepare(PROMPT, **options)
    made = list(itertools.islice(first, 2))
    path = first.save_session(tmp_path / "s.safetensors")
    resumed = prepare(PROMPT, session=path, **options)
    rest = list(resumed)
    assert len(rest) == 4 and resumed.frames_done == 18
    assert all((a == b).all() for a, b in zip([*made, *rest], whole, strict=True))
    fork = list(prepare(NEXT, session=path, **options))
    _, expected = frames(model, None, prompts=PromptSchedule.of([(0, PROMPT), (2 * BLOCK / 12, NEXT)]))
    assert all((a == b).all() for a, b in zip([*made, *fork], expected, strict=True))
    with pytest.raises(ValueError, match="nothing to save"):
        prepare(PROMPT, **options).save_session(tmp_path / "t")


@pytest.mark.parametrize("wrong", [[(0, "a prompt")], "script.txt", {"0": "a prompt"}])
def test_a_script_of_what_are_no_lines_names_the_two_ways(wrong):
    with pytest.raises(ValueError, match=r"use .of\(\[\(0, 'a prompt'\), ...\]\), or .read"):
        PromptSchedule(wrong)
