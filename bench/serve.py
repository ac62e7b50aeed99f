"""A load on `hiar serve`: viewers who play in real time, connections that drop, memory over time; on this machine.

    python -m bench.serve --viewers 8 --seconds 600
    python -m bench.serve --aggregate 1 2 4 8      # viewers who take all they can get: frames per second of them all,
                                                   # sessions in turns of their own, then in common ones
    python -m bench.serve --drops 200
    python -m bench.serve --model Wan2.1-T2V-1.3B --options "--vae taew2_1.pth --cuda-graph true"

Each starts a server of its own (or give --url), and prints one table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.lib import report
from bench.lib.script import script

PROMPT = "a red circle moving right"
HEADINGS = ("viewers", "fps of each", "first chunk s", "P50 s", "P99 s", "late", "MB at first", "MB at last")
AGGREGATE = ("viewers", "fps of all, apart", "together", "fps of the slowest, apart", "together",
             "server's CPU ms a frame, apart", "together")  # fmt: skip
BY_MINUTE = ("minute", "chunks", "P50 s", "P99 s", "late", "MB")


@dataclass
class Seen:
    """What one viewer saw: (arrival, frames) of chunks, (arrival, seconds since the one before), arrivals of those that
    the server counts as late, and the memory that it told, with its time.
    """

    fps: float = 0.0
    begun: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    intervals: list[tuple[float, float]] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds from start to the first chunk; NaN if none came."""
        return self.arrivals[0][0] - self.begun if self.arrivals else float("nan")

    @property
    def speed(self) -> float:
        """Frames per second, from the first chunk to the last; 0 if there were no two."""
        spent = self.arrivals[-1][0] - self.arrivals[0][0] if self.arrivals else 0.0
        return sum(frames for _, frames in self.arrivals[1:]) / max(spent, 1e-9)


def percentile(values: Sequence[float], part: float) -> float:
    """The value that this part of them does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[int(part * (len(ordered) - 1) + 0.5)] if ordered else float("nan")


async def watch(url: str, seconds: float, seed: int, paced: bool, prompt: str = PROMPT) -> Seen:
    """Play a video for so long. paced: acknowledge a chunk when it has been played, as the page does; else at once."""
    from websockets.asyncio.client import connect

    seen, loop = Seen(), asyncio.get_running_loop()
    async with connect(url.replace("http", "ws", 1) + "/v1/realtime/video", max_size=1 << 26, compression=None) as s:
        seen.begun = time.perf_counter()
        await s.send(json.dumps({"type": "start", "v": 1, "prompt": prompt, "seed": seed}))
        misses, played, end = 0, 0.0, seen.begun + seconds
        while (now := time.perf_counter()) < end:
            with suppress(asyncio.TimeoutError):
                message = await asyncio.wait_for(s.recv(), end - now)
                if isinstance(message, bytes):
                    continue
                m: dict[str, Any] = json.loads(message)
                if m["type"] == "refused":
                    raise RuntimeError(m["message"])
                if m["type"] == "ready":
                    seen.fps = m["fps"]
                if m["type"] != "block":
                    continue
                now, stats = time.perf_counter(), m["stats"]
                if seen.arrivals:
                    seen.intervals.append((now, now - seen.arrivals[-1][0]))
                seen.arrivals.append((now, m["frames"]))
                seen.late += [now] * (stats["misses"] - misses)
                misses = stats["misses"]
                seen.memory.append((now, stats["memory"]))
                ack = json.dumps({"type": "ack", "seq": m["seq"]})
                if not paced:
                    await s.send(ack)
                    continue
                played = max(played, now) + m["frames"] / seen.fps
                loop.call_later(played - now, lambda ack=ack: loop.create_task(_send(s, ack)))
        await s.send(json.dumps({"type": "stop"}))
    return seen


async def _send(socket: Any, text: str) -> None:
    with suppress(Exception):  # the connection has been closed meanwhile
        await socket.send(text)


async def watch_all(url: str, viewers: int, seconds: float, paced: bool) -> list[Seen]:
    """So many viewers at once."""
    return await asyncio.gather(*(watch(url, seconds, seed, paced) for seed in range(viewers)))


async def drop(url: str, times: int) -> None:
    """Connect and drop, most of them in the middle of a video."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidStatus

    for turn in range(times):
        with suppress(InvalidStatus):  # no place: those before are not yet gone
            socket = await connect(url.replace("http", "ws", 1) + "/v1/realtime/video", compression=None)
            if turn % 4:
                await socket.send(json.dumps({"type": "start", "v": 1, "prompt": PROMPT, "seed": turn}))
            if turn % 4 > 1:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(socket.recv(), 0.2)
            socket.transport.abort()
        await asyncio.sleep(0.02)


@contextmanager
def served(url: str | None, model: str, *options: str) -> Iterator[tuple[str, int | None]]:
    """(address, process id) of a server that is ended afterwards; with ``url`` one that runs."""
    if url is not None:
        yield url.rstrip("/"), None
        return
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "hiar_model", "serve", "--model", model, "--port", "0", "--data", data]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start")
            yield line.split()[-1], process.pid
        finally:
            process.terminate()
            process.wait(60)


def process_figures(process: int) -> tuple[int, int, float]:
    """(threads, open files, resident MB) of a process."""
    folder = Path("/proc", str(process))
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir())), resident / 1e6


def cpu_seconds(process: int) -> float:
    """User and system time of a process."""
    fields = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def aggregate(url: str, process: int | None, viewers: int, seconds: float) -> tuple[str, str, str]:
    """Of viewers who take all they can: frames per second of all, of the slowest, the server's CPU ms a frame; NaN
    where its process is not known, or no frame came.
    """
    before = 0.0 if process is None else cpu_seconds(process)
    all_seen = asyncio.run(watch_all(url, viewers, seconds, False))
    spent = float("nan") if process is None else cpu_seconds(process) - before
    frames = sum(count for seen in all_seen for _, count in seen.arrivals)
    speeds = [seen.speed for seen in all_seen]
    of_frame = 1000 * spent / frames if frames else float("nan")
    return f"{sum(speeds):.1f}", f"{min(speeds):.1f}", f"{of_frame:.1f}"


def compare(
    url: str | None, model: str, counts: Sequence[int], seconds: float, most: int | None, further: Sequence[str] = ()
) -> list[str]:
    """The table of --aggregate: two servers, measured in turn; with ``url`` the one that runs."""
    options = ("--max-sessions", str(max(8, *counts)), *further)
    common = () if most is None else ("--batch-sessions", str(most))
    with served(url, model, *options, "--batch-sessions", "1") as apart, served(url, model, *options, *common) as joint:
        rows = []
        for viewers in counts:
            measured = [aggregate(*server, viewers, seconds) for server in ((apart,) if url else (apart, joint))]
            rows.append((str(viewers), *(cell for cells in zip(*measured, strict=True) for cell in cells)))
    headings = AGGREGATE if url is None else ("viewers", "fps of all", "fps of the slowest", "server's CPU ms a frame")
    return report.table(headings, rows)


def row(viewers: int, all_seen: Sequence[Seen]) -> tuple[str, ...]:
    """A line of the table."""
    intervals = [interval for seen in all_seen for _, interval in seen.intervals]
    memory = sorted(pair for seen in all_seen for pair in seen.memory) or [(0.0, 0)]
    return (
        str(viewers), f"{min(s.speed for s in all_seen):.1f} to {max(s.speed for s in all_seen):.1f}",
        f"{max(seen.first for seen in all_seen):.2f}", f"{percentile(intervals, 0.5):.3f}",
        f"{percentile(intervals, 0.99):.3f}", str(sum(len(seen.late) for seen in all_seen)),
        f"{memory[0][1] / 1e6:.0f}", f"{memory[-1][1] / 1e6:.0f}",
    )  # fmt: skip


def minutes(all_seen: Sequence[Seen]) -> list[tuple[str, ...]]:
    """The same by the minute."""
    begun, rows = min(seen.begun for seen in all_seen), []
    last = max((arrival for seen in all_seen for arrival, _ in seen.arrivals), default=begun)
    for minute in range(int((last - begun) // 60) + 1):
        lo, hi = begun + 60 * minute, begun + 60 * (minute + 1)
        intervals = [i for seen in all_seen for at, i in seen.intervals if lo <= at < hi]
        memory = [nbytes for seen in all_seen for at, nbytes in seen.memory if lo <= at < hi]
        late = sum(lo <= at < hi for seen in all_seen for at in seen.late)
        p50, p99 = (f"{percentile(intervals, part):.3f}" for part in (0.5, 0.99))
        megabytes = f"{max(memory, default=0) / 1e6:.0f}"
        rows.append((str(minute + 1), str(len(memory)), p50, p99, str(late), megabytes))
    return rows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="of a server that runs; default: one is started")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--options", default="", help="further ones of hiar serve, in quotes")
    parser.add_argument("--viewers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--aggregate", type=int, nargs="+", help="numbers of viewers who take all they can get")
    parser.add_argument("--batch-sessions", type=int, help="of --aggregate's common turns; default: as many as pay")
    parser.add_argument("--drops", type=int, help="connections that drop")
    a = parser.parse_args()
    for name, count in (("--viewers", a.viewers), *(("--aggregate", count) for count in a.aggregate or ())):
        if count < 1:
            parser.error(f"{name} must be at least 1, got {count}")
    if not 0 < a.seconds < math.inf:
        parser.error(f"--seconds must be a number above 0, got {a.seconds}")
    further = shlex.split(a.options)
    if a.aggregate:
        print("\n".join(compare(a.url, a.model, a.aggregate, a.seconds, a.batch_sessions, further)))
        return
    keep = ("--keep", "0") if a.drops else ()
    with served(a.url, a.model, "--max-sessions", str(max(8, a.viewers)), *keep, *further) as (url, process):
        if a.drops is not None:
            assert process is not None, "--drops needs a server of its own"
            asyncio.run(watch_all(url, 1, 3.0, True))  # so that all that is made once is there
            before = process_figures(process)
            asyncio.run(drop(url, a.drops))
            time.sleep(2.0)
            names = ("", "threads", "files", "MB")
            rows = [("before", *before), (f"2 s after {a.drops} drops", *process_figures(process))]
            print(
                "\n".join(
                    report.table(
                        names,
                        [tuple(f"{one:.0f}" if isinstance(one, float) else str(one) for one in row) for row in rows],
                    )
                )
            )
            return
        all_seen = asyncio.run(watch_all(url, a.viewers, a.seconds, True))
        print("\n".join(report.table(HEADINGS, [row(a.viewers, all_seen)])))
        if a.seconds >= 120:
            print("\n" + "\n".join(report.table(BY_MINUTE, minutes(all_seen))))


if __name__ == "__main__":
    script(main)
