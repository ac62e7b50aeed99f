"""The output of `hiar doctor`: what is installed, the devices, the chosen implementations, what is missing and why."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..version import versions

MEASURED = "attention measured"  # topic of several lines
LIBRARIES = ("torch", "triton", "numpy", "safetensors", "av", "jsonargparse", "rich")
UNUSABLE = "not usable"  # prefix of the line of a broken component
OPTIONAL = ("diffusers", "transformers", "gguf", "flash-attn", "xformers", "tensorboard")


def report() -> Iterator[tuple[str, str]]:
    """(topic, value) of each line; imports torch and loads the shipped models."""
    import torch

    import hiar_kernels

    from ..models.registry import SHIPPED, load_video_model

    own = versions()
    yield "package", f"hiar-kernels {own['hiar-kernels']} in {Path(__file__).resolve().parents[2]}"
    yield "python", f"{own['python']} on {platform.system()} {platform.machine()}"
    for topic, names in (("libraries", LIBRARIES), ("optional", OPTIONAL)):
        installed = versions(*names)
        yield topic, ", ".join(f"{name} {installed[name]}" for name in names)
    yield "torch threads", f"{torch.get_num_threads()}"
    backends = hiar_kernels.backends()
    yield "devices", ", ".join(backends.devices)
    yield "CUDA", cuda()
    yield "CUDA extension", backends.extension
    for op, choice in backends.ops.items():
        yield f"op {op}", f"auto = {choice.auto} of {', '.join(choice.implementations)}: {choice.why}"
    for shape, taken in backends.attention.items():
        yield f"attention {shape}", str(taken)
    for measurement in backends.measured:
        yield MEASURED, str(measurement)
    for name in SHIPPED:
        try:
            model = load_video_model(name, "cpu")
        except ValueError as error:
            yield f"model {name}", f"{UNUSABLE}: {error}"
        else:
            parameters = sum(parameter.numel() for parameter in model.transformer.parameters())
            yield f"model {name}", f"{parameters:,} parameters, sha256 {model.weights_sha256}"


def cuda() -> str:
    """The CUDA version and devices of torch, or why there are none."""
    import torch

    if torch.version.cuda is None:
        return f"not in this torch: {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, but finds no usable driver or device"
    return f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)"


def as_json(lines: Iterable[tuple[str, str]]) -> str:
    """The lines of :func:`report` as one JSON object: topic -> value, or a list where a topic has a line for each
    measurement.
    """
    content: dict[str, Any] = {}
    for topic, value in lines:
        if topic == MEASURED:
            content.setdefault(topic, []).append(value)
        else:
            content[topic] = value
    return json.dumps(content, indent=2)
