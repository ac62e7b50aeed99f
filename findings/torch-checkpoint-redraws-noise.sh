#!/usr/bin/env bash
# Activation checkpointing computes the gradient of another noise, if the noise comes from a torch.Generator of one's own.
#
# torch.utils.checkpoint runs a function a second time in the backward. preserve_rng_state, on by default, makes that run
# draw what the first one drew, and a guess is that this holds for every generator. In torch 2.13.0 it holds for torch's
# global ones alone. A function that draws with generator=g (a sampler with a seed for each video) draws new numbers: the
# loss is of one noise and the gradient of another, unrelated one, with and without use_reentrant. The check that both runs
# agree, determinism_check="default", passes, for shapes and dtypes do. Drawing before the checkpoint helps. Seen on
# 2026-11-28, Linux x86-64, Python 3.11.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/noise.py" <<'PY'
import sys

import torch
from torch.utils.checkpoint import checkpoint


def gradients(own: bool, reentrant: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of sum(sin(w * noise)) at w = 1, without and with a checkpoint."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0) if own else None

        def loss(w: torch.Tensor) -> torch.Tensor:
            return (w * torch.randn(1000, generator=generator)).sin()

        w = torch.ones(1000, requires_grad=True)
        out = checkpoint(loss, w, use_reentrant=reentrant) if checkpointed else loss(w)
        out.sum().backward()
        results.append(w.grad)
    return results[0], results[1]


for reentrant in (False, True):
    for own in (False, True):
        plain, again = gradients(own, reentrant)
        equal = torch.equal(plain, again)
        alike = torch.corrcoef(torch.stack([plain, again]))[0, 1].item()
        name = "own generator" if own else "global generator"
        print(f"use_reentrant={reentrant}, {name}: equal {equal}, correlation {alike:.2f}")
        if equal == own or (own and abs(alike) > 0.15):
            sys.exit("changed: described as equal with the global generator and unrelated with one's own")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" "$folder/noise.py"
echo "as described"
