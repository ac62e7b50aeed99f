"""How much memory a transformer takes on a CPU while it is loaded and used: in full, with 8-bit layers beside the full
ones, and with 8-bit layers alone.

    python -m bench.studies.weights_memory      # writes two files of 0.6 and 0.4 GB, and deletes them; some minutes

Wan 1.3B with 6 of its 30 layers, random weights in the published layout, bfloat16, and e4m3 with a scale for each row.
Each row is a process of its own. "in memory" is memory that the process has written (RssAnon), "with the file" counts
pages of the memory-mapped file too (RssFile), which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.lib import report
from bench.lib.script import script
from hiar_model.config import WanConfig
from hiar_model.models.checkpoint import load_transformer, save_transformer
from hiar_model.models.quantized_linear import quantize_layers, quantized
from hiar_model.models.transformer import HiARTransformer

LAYERS = ("full", "beside", "alone")
HEADINGS = ("file", "linear layers", "loading, in memory", "with the file", "after a forward", "with the file")


def resident() -> dict[str, int]:
    """Bytes of this process: "RssAnon", and "VmRSS" with files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmRSS")}


def child(file: str, layers: str) -> dict[str, int]:
    """Peaks, in bytes above those before: while loading, and after a forward of 64 tokens."""
    before, done = resident(), threading.Event()
    peak = dict(before)

    def watch() -> None:
        while not done.wait(0.001):
            for name, value in resident().items():
                peak[name] = max(peak[name], value)

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_transformer(file, **({"linear_dtype": "float8_e4m3fn"} if layers == "alone" else {}))
    used = quantized(model) if layers == "beside" else model
    done.set()
    thread.join()
    with torch.no_grad():
        used(torch.zeros(1, 1, 16, 16, 16), torch.tensor([500.0]), torch.zeros(1, 8, model.config.text_dim))
    return {f"loading {name}": peak[name] - before[name] for name in peak} | {
        f"after {name}": value - before[name] for name, value in resident().items()
    }


def write(folder: Path, layers: int) -> list[Path]:
    """Files of the same random weights in bfloat16 and, in the large linear layers, e4m3."""
    torch.manual_seed(0)
    model = HiARTransformer(replace(WanConfig.from_name("wan2.1-t2v-1.3b"), num_layers=layers)).to(torch.bfloat16)
    files = [folder / "bfloat16.safetensors", folder / "e4m3.safetensors"]
    save_transformer(model, files[0])
    save_transformer(quantize_layers(model), files[1])
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--child", nargs=2, metavar=("FILE", "LAYERS"), help="one row, as JSON")
    a = parser.parse_args(argv)
    if a.child is not None:
        print(json.dumps(child(*a.child)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for file in write(Path(folder), a.layers):
            for layers in LAYERS:
                words = [sys.executable, "-m", "bench.studies.weights_memory", "--child", str(file), layers]
                bytes_of = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                rows.append([f"{file.stem}, {file.stat().st_size / 1e9:.2f} GB", layers,
                             *(f"{value / 1e9:.2f}" for value in bytes_of.values())])  # fmt: skip
    print("\n".join(report.table(HEADINGS, rows, 2)))


if __name__ == "__main__":
    script(main)
