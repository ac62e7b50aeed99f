"""The measurement of `hiar bench`: rollouts from their first block, with each decoder, and plain PyTorch beside them.

Times are taken by the host's clock where it has waited for the device: for a block's event, or for its frames. Device
events would leave out what the host does between two blocks, for which a viewer waits too.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.checks import dtype_name
from ..common.settings import own_settings
from ..models.threads import cpu_threads, fitting_threads
from ..pipelines.decode import Decoding
from ..planning.measure_costs import now
from ..planning.memory import parameters
from ..rollout import Rollout
from ..rollout.engine import FinishedBlock
from ..rollout.noise import KeyedNoise
from .machine import Clocks, describe, describe_versions, host_peak_bytes
from .parts import trace
from .plain import plain_blocks
from .result import FORMAT, VERSION
from .setting import BenchModel, Setting, load

NO_DECODER = "none"
INCLUDED = (
    "every forward of the network, for denoising and for the caches", "noise, drawn on the host and copied",
    "the check that latents are finite, and waiting for it", "Python between the forwards",
)  # fmt: skip
NOT_INCLUDED = (
    "reading weights", "encoding the prompt", "compiling kernels and capturing graphs (see cold_start)",
    "writing a video file",
)  # fmt: skip
DECODED = "decoding after each block, and copying the frames to the host as bytes"
DECODED_BESIDE = (
    "decoding on a stream of its own while the next block is made, and copying the frames to the host as bytes"
)
BASELINE = "plain PyTorch: eager, scaled_dot_product_attention, caches concatenated from lists"
TRACED = 2  # blocks under the profiler
Progress = Callable[[int, int, str], None]
"""Called with (blocks done, blocks in all, what runs)."""


@dataclass
class Speed:
    """Blocks in the steady state with one decoder."""

    decoder: str
    description: str
    also_included: list[str] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    intervals: list[float] = field(default_factory=list)
    forwards: int = 0
    peak_bytes: int | None = None


@dataclass
class RolloutTimes:
    """All repeats of a rollout: seconds, and the latents of each."""

    speeds: list[Speed]
    cold_s: float = 0.0
    kinds: int = 0
    first_block: list[float] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    parts: dict[str, Any] | None = None


def bench(
    setting: Setting,
    *,
    decode: bool = True,
    plain: bool = True,
    parts: bool = False,
    command: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a setting.

    Args:
        decode: with each decoder too. plain: plain PyTorch too. parts: the time of a task by kind of work too.
        command: that asked for it, for the result.

    Returns:
        JSON values as `schema.json` in this folder describes them.

    Raises:
        ValueError: one line: see :func:`.setting.load`; no room on the device.
        FloatingPointError: latents that are not finite.

    Example:
        >>> result = bench(Setting(layers=1, blocks=1, repeats=1), plain=False)
        >>> [speed["decoder"] for speed in result["speeds"] if "fps" in speed]
        ['none']
    """
    try:
        return _bench(setting, decode, plain, parts, command, on_progress)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{setting.model} does not fit: {str(error).splitlines()[0]}") from error


def _bench(
    setting: Setting, decode: bool, plain: bool, parts: bool, command: str | None, on_progress: Progress | None
) -> dict[str, Any]:
    begun = time.perf_counter()
    subject = load(setting)
    now(subject.device)
    loaded = time.perf_counter() - begun
    with cpu_threads(fitting_threads(subject.network)):
        return _result(subject, setting, loaded, decode, plain, parts, command, on_progress)


def _result(
    subject: BenchModel, setting: Setting, loaded: float, decode: bool, plain: bool, parts: bool, command: str | None,
    on_progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    decoders = dict(subject.decoders) if decode else dict.fromkeys(subject.decoders, "left out")
    usable = [name for name, each in decoders.items() if not isinstance(each, str)]
    a_repeat = subject.blocks_before + setting.blocks * (1 + len(usable))
    progress = _Counter(setting.repeats * a_repeat + plain * (subject.blocks_before + setting.blocks), on_progress)
    clocks = Clocks(subject.device)
    with clocks.sampling():
        measured = _rollouts(subject, setting, usable, parts, progress)
        baseline: dict[str, Any] = {"absent": "left out"}
        if plain:
            baseline = _plain(subject, setting, measured.latents, progress)
    without = measured.speeds[0]
    if "fps" in baseline:
        baseline["speedup"] = without.frames / without.seconds / baseline["fps"]
    execution = subject.execution
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "model": _model(subject, setting),
        "rollout": {**subject.rollout.to_dict(), "seed": setting.seed},
        "execution": {"cuda_graph": execution.cuda_graph, "attention_impl": execution.attention_impl},
        "precision": _precision(subject),
        "measured": {
            "blocks": setting.blocks, "repeats": setting.repeats, "blocks_before": subject.blocks_before,
            "forwards_per_block": without.forwards / setting.blocks / setting.repeats,
        },
        "included": list(INCLUDED),
        "not_included": list(NOT_INCLUDED),
        "machine": describe(subject.device),
        "versions": describe_versions(),
        "cold_start": {"load_s": loaded, "warm_up_s": measured.cold_s, "kinds_of_forwards": measured.kinds},
        "first_block_ms": _percentiles(measured.first_block),
        "speeds": [_speed(each) for each in measured.speeds]
        + [{"decoder": name, "absent": why} for name, why in decoders.items() if isinstance(why, str)],
        "plain": baseline,
        "memory": {"host_peak_bytes": host_peak_bytes()},
        "clocks": clocks.summary(),
        "latents": _latents(measured),
    }  # fmt: skip
    return result if measured.parts is None else {**result, "parts": measured.parts}


class _Counter:
    """Blocks done of all."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.done, self.total, self.report = 0, total, report

    def __call__(self, what: str) -> None:
        self.done += 1
        if self.report is not None:
            self.report(self.done, self.total, what)


def _rollouts(
    subject: BenchModel, setting: Setting, decoders: Sequence[str], parts: bool, progress: _Counter
) -> RolloutTimes:
    speeds = [Speed(NO_DECODER, "latents only")]
    speeds += [Speed(name, subject.decoders[name][0]) for name in decoders]
    result = RolloutTimes(speeds)
    for repeat in range(setting.repeats):
        rollout = subject.new_rollout(setting.seed)
        latents = _repeat(subject, setting, rollout, result, repeat, progress, parts)
        result.sha256.append(latents_sha256(latents))
        if repeat == 0:
            result.latents = latents
        del rollout
        gc.collect()  # a rollout and its executor know each other: its caches, before the next one takes its own
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def _repeat(
    subject: BenchModel,
    setting: Setting,
    rollout: Rollout,
    result: RolloutTimes,
    repeat: int,
    progress: _Counter,
    parts: bool,
) -> list[Tensor]:
    """One rollout; returns the latents of its blocks up to the last one that was measured without a decoder."""
    device, name = subject.device, f"rollout {repeat + 1} of {setting.repeats}"
    begun = now(device)
    kinds = rollout.warm_up()
    if repeat == 0:
        result.cold_s, result.kinds = now(device) - begun, kinds
    blocks, latents = iter(rollout), []
    begun = now(device)
    for block in range(subject.blocks_before):
        latents.append(next(blocks).latents)
        if block == 0:
            result.first_block.append(time.perf_counter() - begun)
        progress(f"{name}, filling the window")
    for speed in result.speeds:
        decoding = None if speed.decoder == NO_DECODER else _ready(subject, speed.decoder, latents[-1])
        if decoding is not None:
            speed.also_included = [DECODED_BESIDE if decoding.asynchronous else DECODED]
        if device.type == "cuda" and repeat == 0:
            torch.cuda.reset_peak_memory_stats(device)
        show = partial(progress, f"{name}, {what(speed)}")
        finished = _steady(subject, setting, rollout, blocks, speed, decoding, show)
        if device.type == "cuda" and repeat == 0:
            speed.peak_bytes = torch.cuda.max_memory_allocated(device)
        if decoding is None:
            latents += finished
    if parts and repeat == setting.repeats - 1:
        without = result.speeds[0]
        traced = trace(rollout, blocks, TRACED, without.seconds / without.forwards, subject.network)
        result.parts = dataclasses.asdict(traced)
    return latents


def what(speed: Speed) -> str:
    """What is timed, for the progress."""
    return "without decoding" if speed.decoder == NO_DECODER else f"decoder: {speed.decoder}"


def _ready(subject: BenchModel, decoder: str, latents: Tensor) -> Decoding:
    """A decoder that has been through the first call of a clip and a later one, which compile and capture."""
    decoding = Decoding(subject.decoders[decoder][1]())  # type: ignore[operator]
    for block in range(2):
        list(decoding.put(block, latents))
    list(decoding.flush())
    return decoding


def _steady(
    subject: BenchModel, setting: Setting, rollout: Rollout, blocks: Iterator[FinishedBlock], speed: Speed,
    decoding: Decoding | None, progress: Callable[[], None],
) -> list[Tensor]:  # fmt: skip
    """Measure the next blocks of a rollout; returns their latents."""
    of_block = subject.temporal_compression * subject.rollout.frames_per_block
    forwards, latents = rollout.forwards_done, []
    last = begun = now(subject.device)
    for _ in range(setting.blocks):
        finished = next(blocks)
        if decoding is None:
            speed.frames += of_block
        else:
            speed.frames += sum(len(frames) for _, frames in decoding.put(finished.block, finished.latents))
        current = time.perf_counter()
        speed.intervals.append(current - last)
        last = current
        latents.append(finished.latents)
        progress()
    if decoding is not None:  # the frames of the last block, where decoding runs beside the network
        speed.frames += sum(len(frames) for _, frames in decoding.flush())
        last = time.perf_counter()
    speed.seconds += last - begun
    speed.forwards += rollout.forwards_done - forwards
    return latents


@own_settings()
def _plain(subject: BenchModel, setting: Setting, latents: Sequence[Tensor], progress: _Counter) -> dict[str, Any]:
    """The same blocks in plain PyTorch, with weights in full, and how far their latents are from the engine's."""
    device, network, config = subject.device, subject.network, subject.rollout
    per_block = config.frames_per_block
    shape = (network.config.in_channels, *subject.latent_size)
    noise = KeyedNoise(setting.seed, (0,), lambda block: (block * per_block, (block + 1) * per_block), shape)
    difference, intervals = 0.0, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        full = subject if setting.linear_dtype is None else load(dataclasses.replace(setting, linear_dtype=None))
        next(plain_blocks(full.networks, subject.prompt_embeds, config, noise))  # loads kernels, chooses algorithms
        blocks = plain_blocks(full.networks, subject.prompt_embeds, config, noise)
        for block, of_engine in enumerate(latents):
            begun = now(device)
            own = next(blocks)
            seconds = now(device) - begun
            if block == 0:
                first = seconds
            if block >= subject.blocks_before:
                intervals.append(seconds)
            if not own.isfinite().all():  # max() would pass over a NaN
                return {"absent": f"latents of block {block} are not finite"}
            difference = max(difference, (own.double() - of_engine.double()).abs().max().item())
            progress("plain PyTorch")
    except torch.OutOfMemoryError as error:
        return {"absent": f"out of memory: {str(error).splitlines()[0]}"}
    return {
        "implementation": BASELINE,
        "fps": subject.temporal_compression * per_block * len(intervals) / sum(intervals),
        "first_block_ms": 1e3 * first,
        "interval_ms": _percentiles(intervals),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "largest_difference": difference,
    }


def latents_sha256(latents: Sequence[Tensor]) -> str:
    """Hexadecimal, of the bytes of blocks of latents in order."""
    digest = hashlib.sha256()
    for block in latents:
        digest.update(block.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _percentiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Milliseconds."""
    p50, p90, p99 = (float(value) for value in np.percentile([1e3 * s for s in seconds], (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "max": 1e3 * max(seconds), "count": len(seconds)}


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "decoder": speed.decoder,
        "description": speed.description,
        "also_included": speed.also_included,
        "fps": speed.frames / speed.seconds,
        "frames": speed.frames,
        "seconds": speed.seconds,
        "interval_ms": _percentiles(speed.intervals),
        "intervals_ms": [1e3 * seconds for seconds in speed.intervals],
        "device_peak_bytes": speed.peak_bytes,
    }


def _model(subject: BenchModel, setting: Setting) -> dict[str, Any]:
    config, (height, width) = subject.network.config, subject.pixel_size
    return {
        "name": setting.model,
        "weights": subject.weights,
        "prompt": subject.prompt,
        "parameters": parameters(config),
        "layers": config.num_layers,
        "dim": config.dim,
        "height": height,
        "width": width,
        "latent": [config.in_channels, *subject.latent_size],
        "frames_per_block": subject.temporal_compression * subject.rollout.frames_per_block,
    }


def _precision(subject: BenchModel) -> dict[str, str]:
    weights = dtype_name(subject.network.patch_embedding.weight.dtype)
    execution = subject.execution
    return {
        "weights": weights,
        "kv": execution.kv_dtype or weights,
        "attention": execution.attention_dtype or weights,
        "linear": execution.linear_dtype or weights,
        "float32_matmul": "ieee",
    }


def _latents(measured: RolloutTimes) -> dict[str, Any]:
    first = measured.latents[0]
    return {
        "sha256": measured.sha256[0],
        "same_in_all_repeats": len(set(measured.sha256)) == 1,
        "blocks": len(measured.latents),
        "shape": list(first.shape),
        "dtype": dtype_name(first.dtype),
    }
