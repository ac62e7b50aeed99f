"""What `/metrics` tells, in the format of Prometheus."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """The figures of one server; a registry of its own, so that several may be in one process."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.sessions = Gauge("hiar_sessions", "sessions, kept ones among them", registry=r)
        self.dormant = Gauge("hiar_dormant_sessions", "sessions that this server cannot go on with", registry=r)
        self.connections = Gauge("hiar_connections", "open WebSockets", registry=r)
        self.blocks = Counter("hiar_blocks", "blocks sent to viewers", registry=r)
        self.frames = Counter("hiar_frames", "frames sent to viewers", registry=r)
        self.misses = Counter("hiar_deadline_misses", "blocks that came after the viewer had played all", registry=r)
        self.first_chunk = Histogram(
            "hiar_first_chunk_seconds", "from start to the first chunk", buckets=SECONDS, registry=r
        )
        self.intervals = Histogram(
            "hiar_chunk_interval_seconds", "between chunks of a viewer who keeps up", buckets=SECONDS, registry=r
        )
        self.turns = Histogram(
            "hiar_turn_sessions", "sessions that made a block together", buckets=(1, 2, 4, 8, 16, 32), registry=r
        )
        self.refusals = Counter("hiar_refusals", "requests refused", ["code"], registry=r)
        self.state_errors = Counter("hiar_state_errors", "states and records that could not be written", registry=r)
        self.state_bytes = Gauge("hiar_state_bytes", "states of live sessions on disk", registry=r)
        self.videos = Gauge("hiar_videos", "whole videos", ["status"], registry=r)
        memory = Gauge("hiar_memory_bytes", "memory of the process", registry=r)
        memory.set_function(resident_bytes)

    def chunk(self, frames: int, first: float | None, interval: float | None, late: bool) -> None:
        """A chunk was sent."""
        self.blocks.inc()
        self.frames.inc(frames)
        self.misses.inc(late)
        if first is not None:
            self.first_chunk.observe(first)
        if interval is not None:
            self.intervals.observe(interval)

    def text(self) -> bytes:
        """All of them, as a scrape gets them."""
        return generate_latest(self.registry)


def resident_bytes() -> int:
    """Bytes of memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
