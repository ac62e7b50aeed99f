#!/usr/bin/env bash
# StatefulDataLoader(generator=): a resumed run finishes its epoch as before, and has another order from then on.
#
# The loader's state dict holds its position and its samplers, and a guess is that a run that loads it goes on as if it
# had never stopped; the rest of the epoch in progress shows that it does. In torchdata 0.11.0 with shuffle=True,
# generator=g and num_workers=0 the next epoch is in another order than without the interruption, and so is the one
# after that: the loader draws from g itself too, once per epoch, and that is not replayed. No sample is lost or
# doubled, so only the comparison with an uninterrupted run shows it. With a worker it is right, and so it is with the
# generator in a RandomSampler of one's own (sampler=), or without a generator, whatever torch.manual_seed says after
# the restart. Seen on 2026-11-28, Linux x86-64, Python 3.11, torch 2.13.0.
#
# Needs python3 (3.10 to 3.13) with venv, and a package index. Fails if this version behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/orders.py" <<'PY'
import sys
import warnings

import torch
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def loader(where: str, workers: int) -> StatefulDataLoader:
    g, numbers = torch.Generator().manual_seed(5), list(range(64))
    options = {
        "generator=": {"shuffle": True, "generator": g},
        "RandomSampler(generator=)": {"sampler": RandomSampler(numbers, generator=g)},
        "no generator": {"shuffle": True},
    }[where]
    return StatefulDataLoader(numbers, batch_size=8, num_workers=workers, **options)


def epoch(batches) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


if __name__ == "__main__":
    wrong = False
    for where in ("generator=", "RandomSampler(generator=)", "no generator"):
        for workers in (0, 1):
            torch.manual_seed(5)
            data = loader(where, workers)
            batches = iter(data)
            for _ in range(3):
                next(batches)
            state = data.state_dict()
            through = [epoch(batches), epoch(data), epoch(data)]

            torch.manual_seed(1234)
            data = loader(where, workers)
            data.load_state_dict(state)
            resumed = [epoch(data), epoch(data), epoch(data)]
            same = [a == b for a, b in zip(through, resumed, strict=True)]
            complete = all(sorted(sum(e, [])) == list(range(64)) for e in resumed[1:])
            print(f"{where}, {workers} workers: rest of the epoch, next, next but one as without interruption: {same}")
            wrong |= same != [True, *[where != "generator=" or workers == 1] * 2] or not complete
    if wrong:
        sys.exit("changed: described as another order from the next epoch on, for generator= without workers")
PY

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    torch==2.13.0 numpy==2.2.6 torchdata==0.11.0
"$folder/venv/bin/python" "$folder/orders.py"
echo "as described"
