"""The load of bench/serve.py against a real server, for a second: what it counts is there."""

from __future__ import annotations

import asyncio
import os

import pytest
from serving import until

from bench import serve as load

pytestmark = pytest.mark.cpu
SECONDS = (0.6, 6, 60)  # a machine that is busy with other work gets longer


@pytest.mark.parametrize("paced", [True, False])
def test_viewers_are_measured(service, paced):
    for seconds in SECONDS:
        all_seen = asyncio.run(load.watch_all(service.url, 2, seconds, paced))
        if all(len(seen.arrivals) >= 2 for seen in all_seen):
            break
    assert len(all_seen) == 2 and all(len(seen.arrivals) >= 2 and seen.fps == 12 for seen in all_seen)
    viewers, speeds, first, *_, before, after = load.row(2, all_seen)
    assert viewers == "2" and " to " in speeds and 0 < float(first) < 60 and float(before) > 10 and float(after) > 10
    (minute,) = load.minutes(all_seen)
    assert minute[:2] == ("1", str(sum(len(seen.arrivals) for seen in all_seen)))


def test_frames_of_all_are_added_up(service):
    for seconds in SECONDS:
        (line,) = load.compare(service.url, "toy", [2], seconds, None)[2:]
        viewers, total, slowest, cpu = line.strip("| ").split(" | ")
        if float(slowest):
            break
    assert viewers == "2" and float(total) >= 2 * float(slowest) > 0 and cpu == "nan"
    assert load.cpu_seconds(os.getpid()) == pytest.approx(sum(os.times()[:2]), abs=1)


def test_drops_leave_nothing(service):
    before = set(service.scheduler.sessions)
    asyncio.run(load.drop(service.url, 6))
    until(lambda: not service.clients)
    assert all(s.detached for name, s in list(service.scheduler.sessions.items()) if name not in before)


def test_a_viewer_who_got_nothing(monkeypatch):
    """Of a server that is too slow, or a machine that is too busy: a row of the table all the same."""
    viewers, speeds, first, *_ = load.row(1, [load.Seen(fps=12)])
    assert (viewers, speeds, first) == ("1", "0.0 to 0.0", "nan")
    assert load.minutes([load.Seen(fps=12)]) == [("1", "0", "nan", "nan", "0", "0")]
    late = load.Seen(fps=12, arrivals=[(130.0, 3)], memory=[(130.0, 2_000_000)])
    chunks_and_megabytes = [(line[1], line[-1]) for line in load.minutes([late])]
    assert chunks_and_megabytes == [("0", "0"), ("0", "0"), ("1", "2")]

    async def nothing(*_):
        return [load.Seen(fps=12)]

    monkeypatch.setattr(load, "watch_all", nothing)
    assert load.aggregate("", os.getpid(), 1, 0.0) == ("0.0", "0.0", "nan")


def test_percentiles():
    assert [load.percentile([3.0, 1.0, 2.0], part) for part in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]
    assert load.percentile([], 0.5) != load.percentile([], 0.5)  # NaN
