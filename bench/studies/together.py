"""What `step_together` gains on this CPU: by the width of the network, the tokens of a block, the order, the rollouts.

    python -m bench.studies.together

prints CPU milliseconds for a block of one rollout, one thread, window 9, four layers: alone, and with 2, 4 and 8
rollouts in step. From it come the limits of `hiar_model/serve/turns.py`.
"""

from __future__ import annotations

import argparse
import time

import torch

from bench.lib import report
from bench.lib.script import script
from hiar_model import HiARTransformer, Rollout, RolloutConfig, WanConfig, step_together
from hiar_model.config.rollout import ORDERS

COUNTS = (1, 2, 4, 8)
WIDTHS, SIZES, BLOCK, WINDOW = (64, 128, 256), ((8, 8), (8, 16), (16, 16), (16, 32)), 3, 9


def network(width: int, layers: int) -> HiARTransformer:
    """One with random weights."""
    torch.manual_seed(0)
    config = WanConfig(
        width, 4 * width, max(2, width // 64), layers, freq_dim=64, text_dim=32, text_len=8, in_channels=16,
        out_channels=16,
    )  # fmt: skip
    return HiARTransformer(config).eval().requires_grad_(False)


def turn(rollouts: list[Rollout]) -> None:
    """A block of each."""
    while rollouts:
        rollouts = [r for r, blocks in zip(rollouts, step_together(rollouts), strict=True) if blocks == []]


def block_ms(model: HiARTransformer, order: str, size: tuple[int, int], count: int, turns: int) -> float:
    """CPU milliseconds for a block of one of so many rollouts in step, the least of some turns; full windows."""
    config = RolloutConfig(order=order, window_frames=WINDOW)
    prompt = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    rollouts = [
        Rollout(model, prompt, config, num_latent_frames=None, latent_size=size, seed=seed) for seed in range(count)
    ]
    for _ in range(WINDOW // BLOCK + 1):
        turn(rollouts)
    spent = []
    for _ in range(turns):
        begun = time.process_time()
        turn(rollouts)
        spent.append(1000 * (time.process_time() - begun) / count)
    return min(spent)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--orders", choices=ORDERS, nargs="+", default=("stream", "wavefront"))
    parser.add_argument("--turns", type=int, default=4, help="of which the fastest counts")
    parser.add_argument("--layers", type=int, default=4)
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for order in a.orders:
        for width in a.widths:
            model = network(width, a.layers)
            for size in SIZES:
                ms = [block_ms(model, order, size, count, a.turns) for count in COUNTS]
                cells = [f"{one:.1f} ({ms[0] / one:.2f}x)" for one in ms[1:]]
                rows.append((order, str(width), str(BLOCK * size[0] * size[1] // 4), f"{ms[0]:.1f}", *cells))
    headings = ("order", "width", "tokens of a block", "alone", *(f"{count} in step" for count in COUNTS[1:]))
    print("\n".join(report.table(headings, rows)))


if __name__ == "__main__":
    script(main)
