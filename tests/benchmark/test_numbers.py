"""The numbers of hiar bench, each where it is counted: percentiles, frames, differences, what a task needs."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from made_runs import make_rollout
from small_toy import small_folder  # noqa: F401
from tiny_model import MODEL, SIZE, TEXT, TINY

from hiar_model.benchmark import parts, plain, run
from hiar_model.benchmark.machine import Clocks, host_peak_bytes
from hiar_model.benchmark.setting import Setting, load, rollout_of
from hiar_model.config import WAN, FlowSchedule, RolloutConfig
from hiar_model.rollout.engine import FinishedBlock
from hiar_model.schedule.costs import task_flop

pytestmark = pytest.mark.cpu


def test_percentiles_are_in_milliseconds():
    expected = {"p50": 51, "p90": 91, "p99": 100, "max": 101, "count": 101}
    assert run._percentiles([k / 1000 for k in range(101, 0, -1)]) == pytest.approx(expected)


def test_clocks_and_memory_of_the_machine():
    clocks = Clocks(torch.device("cpu"))
    clocks.samples = [{"mhz": 8.0, "watts": 5.0}, {"mhz": 1.0}, {"mhz": 3.0, "watts": 7.0}]
    assert clocks.summary()["mhz"] == {"min": 1.0, "median": 3.0, "max": 8.0}
    assert clocks.summary()["watts"] == {"min": 5.0, "median": 6.0, "max": 7.0}
    assert host_peak_bytes() > 5e7, "torch alone takes more"


@pytest.mark.parametrize("beside", [False, True])
def test_frames_of_the_last_block_count_too(beside):
    """Where decoding runs beside the network, they come when it is waited for."""

    class DecoderBeside:
        def __init__(self):
            self.waiting = []

        def put(self, block, latents):
            coming = [(block, torch.zeros(4, 8, 8, 3))]
            coming, self.waiting = (self.waiting, coming) if beside else (coming, [])
            return coming

        def flush(self):
            return self.waiting

    subject = SimpleNamespace(
        device=torch.device("cpu"), temporal_compression=4, rollout=SimpleNamespace(frames_per_block=3)
    )
    rollout, speed, shown = SimpleNamespace(forwards_done=10), run.Speed("small", ""), []

    def blocks():
        for number in range(9):
            rollout.forwards_done += 5
            yield FinishedBlock(number, 3 * number, torch.full((1,), number))

    coming = blocks()
    setting = SimpleNamespace(blocks=3)
    done = run._steady(subject, setting, rollout, coming, speed, DecoderBeside(), lambda: shown.append(1))
    assert (speed.frames, speed.forwards, len(speed.intervals), len(shown)) == (12, 15, 3, 3)
    assert [int(x) for x in done] == [0, 1, 2] and speed.seconds >= sum(speed.intervals)
    without = run.Speed(run.NO_DECODER, "")
    run._steady(subject, setting, rollout, coming, without, None, lambda: None)
    assert (without.frames, without.forwards) == (3 * 4 * 3, 15)


def test_the_baseline_has_the_noise_of_the_seed_and_tells_the_largest_difference(folder):
    setting = Setting(str(folder), device="cpu", blocks=2, repeats=1, seed=3)
    subject = load(setting)
    latents = [block.latents for block in islice(subject.new_rollout(3), subject.blocks_before + 2)]
    baseline = run._plain(subject, setting, latents, run._Counter(0, None))
    assert baseline["largest_difference"] < 1e-3
    assert baseline["fps"] == pytest.approx(1e3 * 3 / baseline["interval_ms"]["p50"]), "of two intervals the mean"
    latents[1] = latents[1] + 0.5
    baseline = run._plain(subject, setting, latents, run._Counter(0, None))
    assert baseline["largest_difference"] == pytest.approx(0.5, abs=1e-3)


def test_a_model_without_a_steady_state_is_given_one():
    """And as many blocks come before it as fill the widest window."""
    config = rollout_of(RolloutConfig(), {})
    assert (config.order, config.window_frames) == ("stream", WAN.window_frames)
    for window_frames, blocks in ((21, 7), (7, 3), ((3, 6, 9, 10), 4)):
        config = rollout_of(RolloutConfig(order="wavefront"), {"window_frames": window_frames})
        model = replace(load(Setting(layers=1, device="cpu")), rollout=config)
        assert config.order == "wavefront" and model.blocks_before == blocks


def test_the_baseline_forgets_what_no_block_sees(monkeypatch):
    blocks_in_view, forward_block = [], plain.forward_block

    def note(*arguments, **options):
        blocks_in_view.append(len(arguments[5]))
        return forward_block(*arguments, **options)

    monkeypatch.setattr(plain, "forward_block", note)
    config = RolloutConfig(steps=(1000, 500), order="stream", window_frames=6)
    noise = torch.zeros(1, 3, TINY.in_channels, *SIZE.values())
    list(islice(plain.plain_blocks(MODEL, TEXT, config, lambda step, block: noise), 5))
    assert blocks_in_view == [0] * 4 + [1] * 16, "one block before the own one"


def test_what_a_task_needs_at_least(monkeypatch):
    """Of two tokens a frame, three frames a block, a window of two blocks."""
    monkeypatch.setattr(parts, "machine_limits", lambda device, dtype: {"flop": 1e9, "bytes": 1e8})
    rollout = make_rollout(
        MODEL, TEXT, FlowSchedule.uniform(2), num_frames=None, order="stream", window_frames=6, **SIZE
    )
    blocks = iter(rollout)
    list(islice(blocks, 2))
    traced = parts.trace(rollout, blocks, 1, 1e-9, MODEL)
    by_name = {part.name: part for part in traced.parts}
    attention, matmul = (by_name[name].limit * traced.limits["flop"] for name in ("attention", "matmul"))
    assert attention == pytest.approx(4 * 6 * (12 + TINY.text_len) * TINY.dim * TINY.num_layers)
    assert attention + matmul == pytest.approx(task_flop(TINY, 6, 12))
    assert by_name["pointwise"].limit * traced.limits["bytes"] == pytest.approx(parts.pointwise_bytes(TINY, 6, 4))
    assert by_name["idle"].seconds == 0.0, "not below, although the profiler made it slower than it is"
    assert by_name["copy"].limit == 0.0 and traced.launches is None
