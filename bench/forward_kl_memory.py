"""Memory of a forward-KL update against the length of the video, at the toy's size, in bidirectional attention.

    python bench/forward_kl_memory.py [--frames 21 42 84 168 336] [--out FOLDER]       with the repository on PYTHONPATH

Every length has a process of its own. Two figures: the bytes that autograd keeps between forward and backward, and how
far the peak of forward and backward lies above what was held before (CUDA: torch's allocator; CPU: the resident set,
which the system rounds and the allocator pads). Weights and the trajectory are not in them. As a control the same with
attention that writes down all scores ("reference"), whose memory grows with the square.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import hiar_kernels
from hiar_model.config import WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.train.losses.forward_kl import forward_kl_loss
from measure import environment, result_folder

FRAMES = (21, 42, 84, 168, 336)
CONTROL = (21, 42, 84)
SIGMAS = (1.0, 0.96, 0.0)
MIB = 2**20
COLUMNS = ("frames", "tokens", "attention", "kept MiB", "kept KiB a frame", "peak MiB", "peak KiB a frame")


def measure(frames: int, impl: str, device: str) -> dict[str, Any]:
    """One forward and backward of a video of so many latent frames, in this process."""
    torch.manual_seed(0)
    config = WanConfig.from_name("toy")
    assert config.position_grid is not None
    height, width = (n * p for n, p in zip(config.position_grid, config.patch_size[1:], strict=True))
    model = HiARTransformer(config).to(device)
    text = torch.randn(1, config.text_len, config.text_dim, device=device)

    def points(length: int) -> torch.Tensor:
        return torch.randn(1, len(SIGMAS), length, config.in_channels, height, width, device=device)

    with hiar_kernels.prefer(impl):
        forward_kl_loss(model, points(3), SIGMAS, text).backward()  # gradients and whatever is made once are there
        trajectory, kept = points(frames), {}
        given = {x.untyped_storage().data_ptr() for x in (*model.parameters(), trajectory, text)}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        before = held(device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = forward_kl_loss(model, trajectory, SIGMAS, text)
        saved = sum(storage.nbytes() for place, storage in kept.items() if place not in given)
        kept.clear()
        loss.backward()
    return {
        "frames": frames,
        "tokens": frames * config.position_grid[0] * config.position_grid[1],
        "attention": impl,
        "kept_bytes": saved,
        "peak_bytes": peak(device) - before,
    }


def held(device: str) -> int:
    """Bytes held now; the peak is counted from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak(device: str) -> int:
    """The most that was held at once."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown; linear memory has the same bytes a frame in every row."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---:|---:|---|" + "---:|" * (len(COLUMNS) - 3)]
    for row in rows:
        cells = [str(row["frames"]), str(row["tokens"]), row["attention"]]
        for name in ("kept_bytes", "peak_bytes"):
            cells += [f"{row[name] / MIB:.1f}", f"{row[name] / 1024 / row['frames']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(rows: list[dict[str, Any]], about: dict[str, str], folder: Path) -> Path:
    """forward_kl_memory.md and .json; the path of the first."""
    lines = [
        f"# Memory of a forward-KL update: {about['device']}",
        "",
        "`PYTHONPATH=. python bench/forward_kl_memory.py`",
        "",
        "The toy's network, float32, one video, bidirectional attention, forward and backward, no recomputation. Kept:",
        "what autograd holds between the two, weights apart. Peak: above what was held before. `reference` writes down",
        "all scores: the control, whose memory grows with the square of the length.",
        "",
        *table(rows),
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forward_kl_memory.md").write_text("\n".join(lines), encoding="utf-8")
    content = json.dumps({"environment": about, "rows": rows}, indent=1)
    (folder / "forward_kl_memory.json").write_text(content, encoding="utf-8")
    return folder / "forward_kl_memory.md"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), help="latent frames of the videos")
    parser.add_argument("--control", type=int, nargs="*", default=list(CONTROL), help="the same, with all scores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="default: bench/results/MACHINE/DATE-REVISION")
    parser.add_argument("--one", metavar="IMPL", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.one:
        print(json.dumps(measure(given.frames[0], given.one, given.device)))
        return
    rows = []
    for impl, lengths in (("auto", given.frames), ("reference", given.control)):
        for frames in lengths:
            command = [sys.executable, __file__, "--frames", str(frames), "--device", given.device, "--one", impl]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(table(rows)[-1], flush=True)
    about = environment(given.device)
    print(write(rows, about, given.out or result_folder(about)))


if __name__ == "__main__":
    main()
