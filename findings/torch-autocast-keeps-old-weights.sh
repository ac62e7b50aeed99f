#!/usr/bin/env bash
# Inside one torch.autocast block a model goes on computing with the weights it had at its first forward.
#
# autocast casts a weight to bfloat16 once and keeps the copy until the outermost block ends. A guess is that the copy is
# renewed when the weight is written to, as autograd notices such writes. In torch 2.13.0 it is not: after
# load_state_dict, copy_, an optimiser's step, or a new `.data`, the output is that of the old weights, without a warning,
# also under no_grad, and in a block nested inside. So samples of an average that is swapped in are samples of the
# student, and a training loop inside one block never gets past its first loss. A block with enabled=False counts as the
# outermost too: inside it, blocks that are opened and closed for each update all share the first one's copies. Weights
# that require no gradient are not kept, so the same code works on a frozen model; cache_enabled=False or
# torch.clear_autocast_cache() help. Seen on 2026-11-28, Linux x86-64, Python 3.11, on a CPU.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/weights.py" <<'PY'
import sys
from contextlib import nullcontext

import torch
from torch import nn

torch.manual_seed(0)
x = torch.ones(1, 4)


def autocast(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


def by_step(model, other):
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()


def by_copy(model, other):
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters()):
            mine.copy_(its)


def by_data(model, other):
    for mine, its in zip(model.parameters(), other.parameters()):
        mine.data = its.data.clone()


def by_state(model, other):
    model.load_state_dict(other.state_dict())


def sees(write, frozen=False, again=None, **options):
    """Does a forward in the same block see weights that were written after another forward?"""
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model.requires_grad_(not frozen)
    with autocast(**options):
        before = model(x)
        write(model, other)
        with again or autocast():
            after = model(x)
    with autocast():
        if torch.equal(before, model(x)):
            sys.exit("changed: in the next block the weights are described as new")
    return not torch.equal(before, after)


seen = {
    "load_state_dict": sees(by_state),
    "copy_": sees(by_copy),
    "optimiser": sees(by_step),
    ".data": sees(by_data),
    "copy_, then no_grad": sees(by_copy, again=torch.no_grad()),
    "copy_, frozen": sees(by_copy, frozen=True),
    "copy_, cache off": sees(by_copy, again=torch.no_grad(), cache_enabled=False),
}
print(f"torch {torch.__version__}: are new weights used?", seen)



def losses(outer, inner, clear=False):
    """Of five updates, each with a forward in a block of its own inside the outer one."""
    torch.manual_seed(0)
    model, found = nn.Linear(4, 1), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with outer:
        for _ in range(5):
            with inner:
                loss = (model(x) - 3).square().mean()
            found.append(round(loss.item(), 2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if clear:
                torch.clear_autocast_cache()
    return found


apart = losses(nullcontext(), autocast())
one, disabled = losses(autocast(), nullcontext()), losses(autocast(enabled=False), autocast())
cleared = losses(autocast(), nullcontext(), clear=True)
print(f"losses of five updates: {apart} in a block each, {one} in one, {disabled} in a block each inside a disabled one")
if list(seen.values()) != [False] * 5 + [True] * 2:
    sys.exit("changed: described is no for the first five, yes for a frozen model and without the cache")
if not len(set(apart)) == 5 or cleared != apart or one != apart[:1] * 5 or disabled != one:
    sys.exit("changed: described is that losses fall in blocks of their own alone, or where the cache is cleared")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "torch==2.13.0" "numpy==2.2.6"
"$folder/venv/bin/python" "$folder/weights.py"
echo "as described"
