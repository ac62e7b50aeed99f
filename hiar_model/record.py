"""What is written down of a video beside it: all that it takes to make it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .version import NOISE, versions

if TYPE_CHECKING:
    from .generation import Generation


def describe(
    run: Generation, prompt: str | None, *, seed: int, steps: int | None, order: str, window: Any, sink: int
) -> dict[str, Any]:
    """What it takes to repeat the video, as JSON takes it."""
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
        "fps": f"{run.fps:g}",
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
        prompt, options["prompts"] = lines[0].prompt, run.show.script.name
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
        "command": command,
    }
