"""A long video takes no more memory than a short one: what is held after 100 frames is what is held after 1,000."""

from __future__ import annotations

import pytest
from made_runs import prepare
from small_toy import PROMPT, small_folder, small_model  # noqa: F401 (fixtures)

from bench.studies import long_stream
from hiar_model.io.video import VideoWriter
from hiar_model.pipelines.prompt_schedule import PromptSchedule

pytestmark = pytest.mark.cpu

TIMES = (1, 2, 3, *range(10, 80, 10))  # seconds of twelve frames
PROMPTS = [(t, f"a {('red', 'blue', 'green')[i % 3]} circle moving up") for i, t in enumerate(TIMES)]


def test_1000_frames_in_flat_memory(model, tmp_path):
    """Written as they come; prompts change on the way, and the context is cached again under each."""
    options = {"prompts": PromptSchedule.of(PROMPTS), "on_prompt_change": "recache"}
    run = prepare(PROMPT, model=model, endless=True, order="stream", **options)
    rows = []
    with VideoWriter(tmp_path / "long.mp4", run.fps, run.metadata, least_side=1) as writer:
        for row in long_stream.watch(run, writer, 100):
            rows.append(row)
            if row.frames >= 1000:
                break
    assert writer.frames_written >= 1000 and len(rows) == 10
    assert {(row.tensors, row.tensor_bytes) for row in rows} == {(rows[0].tensors, rows[0].tensor_bytes)}
    # Python's own caches fill at first: 80 to 108 blocks of memory between frames 200 and 400, 40 to 67 from there on
    most = max(row.blocks for row in rows[4:]) - rows[3].blocks
    assert most < 190, [row.blocks for row in rows]  # there are 200 blocks of video between the two


def test_the_count_tells_growth():
    before = long_stream.memory(0)
    import torch

    kept = [torch.zeros(1000) for _ in range(5)]
    after = long_stream.memory(0)
    assert (after.tensors - before.tensors, after.tensor_bytes - before.tensor_bytes) == (len(kept), 5 * 4000)
