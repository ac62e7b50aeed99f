"""Commands about weights on disk: `hiar convert`, `hiar doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from .choices import moved, rollout_options
from .machine import linear_argument, lora_argument, memory_arguments, size_arguments

if TYPE_CHECKING:
    from ..models.checkpoint import CheckpointInfo

# hiar convert


def convert_arguments(parser: ArgumentParser) -> None:
    """Options of `hiar convert`."""
    parser.add_argument(
        "source", type=str, metavar="IN",
        help="toy, scenes, a Wan or diffusers folder, .safetensors, .pth, .gguf, a training .pt (its EMA is taken); "
        "quantised weights become bfloat16",
    )  # fmt: skip
    parser.add_argument(
        "target", type=str, metavar="OUT",
        help="new folder (native, diffusers), name.safetensors (native) or name.pt (pt); nothing is overwritten",
    )  # fmt: skip
    parser.add_argument("--to", type=str, required=True, help="native, diffusers or pt")
    lora_argument(parser, "the result is a checkpoint that needs it no more")


def convert(a: Namespace) -> None:
    """Convert, and print the input, the output, and the hash of all tensors before and after."""
    from ..models.convert import convert as convert_files
    from ..planning.free_memory import require_memory_to_convert

    def show(info: CheckpointInfo, sha256: str) -> None:
        print(f"in:  {info}\n     tensors sha256 {sha256}", flush=True)

    done = convert_files(
        a.source, a.target, a.to, on_checkpoint=show, lora=a.lora, on_lora=print,
        on_open=lambda info: require_memory_to_convert(info, bool(a.lora)),
    )  # fmt: skip
    if done.path != Path(a.target):
        print(moved(Path(a.target), done.path), file=sys.stderr)
    print(f"out: {done.target}\n     tensors sha256 {done.sha256}: read again, the same")


# hiar doctor


def doctor_arguments(parser: ArgumentParser) -> None:
    """Options of `hiar doctor`."""
    parser.add_argument(
        "--model", type=str,
        help="memory of its videos: wan2.1-t2v-1.3b, wan2.1-t2v-14b, toy, scenes, a folder or a file of weights, also "
        "quantised ones, and what it is; no weights are loaded",
    )  # fmt: skip
    parser.add_argument("--gpu-memory", type=str, help="does it fit? Such as 24GB (10^9 bytes), 24GiB, or 24,40,80,141")
    size_arguments(parser)
    parser.add_argument("--frames", type=int, help="pixel frames; default: 81, or the model's")
    parser.add_argument("--order", type=str, default="step_first", help="step_first, stream, wavefront or block_first")
    memory_arguments(parser)
    linear_argument(parser)
    parser.add_argument("--batch", type=int, default=1, help="videos made at once")
    parser.add_argument("--fuse-cache-denoise", type=bool, default=False, help="one forward for both kinds of tasks")
    parser.add_argument("--dtype", type=str, help="of weights and work; default: bfloat16, of toy and scenes float32")
    parser.add_argument("--vae", type=str, help="in place of the folder's: taew2_1.pth, or another file or folder")
    parser.add_argument(
        "--vae-dtype", type=str, help="default: bfloat16, of the small VAE float16; none: no VAE on the GPU"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for an issue or a script")


def doctor(a: Namespace) -> None:
    """What is installed; with a model, its memory by component, whether it fits, and options that fit."""
    if a.model is None:
        defaults = {"order": "step_first", "window_frames": "model", "batch": 1, "fuse_cache_denoise": False}
        for name, value in vars(a).items():
            if name not in ("config", "model", "json") and value != defaults.get(name):
                raise ValueError(f"--{name.replace('_', '-')} needs --model")
        from .doctor import UNUSABLE, as_json, report

        topics = []
        for topic, value in report():
            topics.append((topic, value))
            if not a.json:
                print(f"{topic + ':':<28} {value}")
        if a.json:
            print(as_json(topics))
        broken = [f"the {topic} is {value}" for topic, value in topics if value.startswith(UNUSABLE)]
        if broken:
            raise ValueError("; ".join(broken))
        return
    if a.json:
        raise ValueError("--json is of the report without --model")
    from ..planning.fit import fit_query, lines, parse_size

    limits = [parse_size(size) for size in a.gpu_memory.split(",")] if a.gpu_memory is not None else []
    query = fit_query(
        a.model, height=a.height, width=a.width, frames=a.frames, dtype=a.dtype, kv_dtype=a.kv_dtype,
        attention_dtype=a.attention_dtype, linear_dtype=a.linear_dtype,
        vae=a.vae, vae_dtype=a.vae_dtype, offload=[name.strip() for name in a.offload.split(",")] if a.offload else (),
        batch=a.batch, **rollout_options(a),
    )  # fmt: skip
    for line in lines(query, limits):
        print(line)
