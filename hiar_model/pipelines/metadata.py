"""Metadata written beside a video: everything needed to reproduce it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..common.checks import dtype_name
from ..common.image_file import image_files
from ..config import SHIPPED
from ..version import NOISE, versions


def describe(run: Any, command: str = "generate", more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Metadata of a :class:`.video_pipeline.VideoRun` as JSON values. "command" reproduces it, and is missing if its
    prompts, or the weights, came from no file.

    Args:
        command: of `hiar`. more: its options beside those of the run, or in place of them; None: left out.
    """
    model, options, config, execution = run.model, run.options, run.config, run.rollout.execution
    device = model.device
    threads = torch.get_num_threads() if run.threads is None else run.threads
    dtype = dtype_name(model.dtype)
    window = list(config.window_frames) if isinstance(config.window_frames, tuple) else config.window_frames
    height, width = model.pixel_size
    words: dict[str, Any] = {
        "model": model.name,
        **model.options,
        "height": None if model.size_step is None else height,
        "width": None if model.size_step is None else width,
        "num-frames": run.num_frames,
        "seed": options.seed,
        **{name.replace("_", "-"): getattr(config, name) for name in options.of_rollout},
        "steps": model.options.get("steps") if options.steps is None else options.steps,
        "window-frames": json.dumps(window),  # null: all frames
        "fps": repr(run.fps).removesuffix(".0"),
        "device": str(device),
        "dtype": dtype,
        "threads": threads,
        "extend": options.extend,
        "last-frame": options.last_frame,
        "kv-dtype": execution.kv_dtype,
        "attention-dtype": execution.attention_dtype,
        "linear-dtype": execution.linear_dtype,
        "attention-impl": None if execution.attention_impl == "auto" else execution.attention_impl,
        "fuse-cache-denoise": "true" if config.fuse_cache_denoise else None,
        "on-prompt-change": None if options.prompts is None else config.on_prompt_change,
        "on-nan": None if execution.on_nan == "stop" else execution.on_nan,
        "from-session": options.session,
        **(more or {}),
    }
    prompt, prompts = options.prompt, None
    typed = ["hiar", command, *([] if prompt is None else [prompt])]
    schedule = None if run.prompts is None else run.prompts.schedule
    if schedule is not None:
        prompts = [[line.seconds, line.prompt] for line in schedule.lines]
        prompt, words["prompts"] = schedule.lines[0].prompt, schedule.file
    words |= {name: _absolute(words.get(name)) for name in ("extend", "last-frame", "from-session", "prompts")}
    if model.name not in SHIPPED and os.path.exists(model.name):
        words["model"] = _absolute(model.name)
    repeatable = (schedule is None or schedule.file is not None) and model.weights_sha256 != ""  # from no file: ""
    for name, value in words.items():
        typed += [] if value is None else [f"--{name}", str(value)]
    for file in image_files(options.image):
        typed += ["--image", str(replace(file, path=os.path.abspath(file.path)))]
    for lora in model.loras:
        typed += ["--lora", lora.option]
    return {
        "prompt": prompt,
        "prompts": prompts,
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "decoded_by": None if model.decoded_by is None else dict(model.decoded_by),
        **({"lora": [lora.to_dict() for lora in model.loras]} if model.loras else {}),
        "height": height,
        "width": width,
        "given": run.starts.names[0] if len(run.starts.names) == 1 else list(run.starts.names) or None,
        "num_frames": run.num_frames,
        "seed": options.seed,
        "noise": NOISE,
        "rollout": config.to_dict(),
        "timesteps": list(config.schedule.timesteps),
        "fps": run.fps,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "kv_dtype": execution.kv_dtype,
        "attention_dtype": execution.attention_dtype,
        "linear_dtype": execution.linear_dtype,
        "attention_impl": execution.attention_impl,
        "threads": threads,
        "versions": versions("torch", "numpy", "av"),
        **({"command": typed} if repeatable else {}),
    }


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    """So that the command names the same file from any working directory."""
    return None if path is None else os.path.abspath(path)
