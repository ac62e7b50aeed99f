"""Memory of a forward-KL update against the length of the video, at the toy's size, in bidirectional attention.

    python -m bench.studies.forward_kl_memory [--frames 21 42 84 168 336] [--out FOLDER]

Every length has a process of its own. Two figures: the bytes that autograd saves between forward and backward, and how
far the peak of both lies above what was allocated before (CUDA: torch's allocator; CPU: the resident set, which the
system rounds and the allocator pads). Weights and the trajectory are not in them. As a control the same with attention
that writes down all scores ("reference"), whose memory grows with the square.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import torch

import hiar_kernels
from bench.lib import report
from bench.lib.machine import environment, result_folder
from bench.lib.script import script
from hiar_model.config import WanConfig
from hiar_model.models.transformer import HiARTransformer
from hiar_model.train.losses.forward_kl import forward_kl_loss

SIGMAS = (1.0, 0.96, 0.0)
HEADINGS = ("attention", "frames", "tokens", "saved MiB", "saved KiB a frame", "peak MiB", "peak KiB a frame")


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
        forward_kl_loss(model, points(3), SIGMAS, text).backward()  # allocates gradients and constants
        trajectory, storages = points(frames), {}
        inputs = {x.untyped_storage().data_ptr() for x in (*model.parameters(), trajectory, text)}

        def save(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        before = allocated(device)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            loss = forward_kl_loss(model, trajectory, SIGMAS, text)
        saved = sum(storage.nbytes() for address, storage in storages.items() if address not in inputs)
        storages.clear()
        loss.backward()
    return {
        "frames": frames,
        "tokens": frames * config.position_grid[0] * config.position_grid[1],
        "attention": impl,
        "kept_bytes": saved,
        "peak_bytes": peak(device) - before,
    }


def allocated(device: str) -> int:
    """Bytes allocated now; the peak is counted from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    """The most that was allocated at once, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown; linear memory has the same bytes a frame in every row."""
    cells = []
    for row in rows:
        sizes = [row[name] / scale for name in ("kept_bytes", "peak_bytes") for scale in (2**20, 2**10 * row["frames"])]
        cells.append([row["attention"], str(row["frames"]), str(row["tokens"]), *(f"{size:.1f}" for size in sizes)])
    return report.table(HEADINGS, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[21, 42, 84, 168, 336], help="latent, of the videos")
    parser.add_argument("--control", type=int, nargs="*", default=[21, 42, 84], help="the same, with all scores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="default: bench/results/MACHINE/DATE-REVISION")
    a = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh_process:
        for impl, lengths in (("auto", a.frames), ("reference", a.control)):
            for frames in lengths:
                rows.append(fresh_process.apply(measure, (frames, impl, a.device)))
                print(table(rows)[-1], flush=True)
    body = [
        "The toy's network, float32, one video, bidirectional attention, forward and backward, no recomputation.",
        "Saved: by autograd between the two, weights apart. Peak: above what was allocated before. `reference` writes",
        "down all scores: the control, whose memory grows with the square of the length.",
        "",
        *table(rows),
    ]
    about = environment(a.device)
    title, command = "Memory of a forward-KL update", "python -m bench.studies.forward_kl_memory"
    result, out = {"environment": about, "rows": rows}, a.out or result_folder(about)
    print(report.write("forward_kl_memory", out, about, title, command, body, result))


if __name__ == "__main__":
    script(main)
