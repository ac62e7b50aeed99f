"""What is written down of a video beside it: all that it takes to make it again."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..config import SHIPPED
from ..version import NOISE, versions


def describe(
    run: Any, prompt: str | None, *, seed: int, steps: int | None, order: str, window: Any, sink: int
) -> dict[str, Any]:
    """What it takes to repeat the video, as JSON takes it; without a "command" where its prompts came from no file."""
    model, device = run.model, run.model.device
    threads = torch.get_num_threads() if run.threads is None else run.threads
    dtype = str(model.dtype).removeprefix("torch.")
    window = list(window) if isinstance(window, tuple) else window
    height, width = model.pixel_size
    options: dict[str, Any] = {
        "model": model.name,
        **model.options,
        "height": None if model.size_step is None else height,
        "width": None if model.size_step is None else width,
        "num-frames": run.num_frames,
        "seed": seed,
        "steps": steps,
        "order": order,
        "window-frames": "null" if window is None else str(window),
        "sink-frames": sink,
        "fps": repr(run.fps).removesuffix(".0"),
        "device": str(device),
        "dtype": dtype,
        "threads": threads,
        **run.options,
    }
    command = ["hiar", "generate", *([] if prompt is None else [prompt])]
    prompts = None
    if run.show is not None:
        lines = run.show.script.lines
        prompts = [[line.seconds, line.prompt] for line in lines]
        prompt, options["prompts"] = lines[0].prompt, run.show.script.file
    options |= {name: _absolute(options.get(name)) for name in ("image", "extend", "from-session", "prompts")}
    if model.name not in SHIPPED and os.path.exists(model.name):
        options["model"] = _absolute(model.name)
    repeatable = run.show is None or run.show.script.file is not None
    for name, value in options.items():
        command += [] if value is None else [f"--{name}", str(value)]
    return {
        "prompt": prompt,
        "prompts": prompts,
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "height": height,
        "width": width,
        "given": None if run.given is None else str(run.options["image"] or run.options["extend"]),
        "num_frames": run.num_frames,
        "seed": seed,
        "noise": NOISE,
        "steps": len(run.schedule),
        "timesteps": list(run.schedule.timesteps),
        "order": order,
        "cache_source": model.cache_source,
        "frames_per_block": model.frames_per_block,
        "window_frames": window,
        "sink_frames": sink,
        "fps": run.fps,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "threads": threads,
        "versions": versions("torch", "numpy", "av"),
        **({"command": command} if repeatable else {}),
    }


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    """So that the command means the same file wherever it is run."""
    return None if path is None else os.path.abspath(path)
