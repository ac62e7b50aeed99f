"""Every op, forward and backward, by every way this machine has. What is wrong is a failure, not a figure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import SMALL, Op, Sizes, Work, table
from op_results import ABSENT, BENCH, CUDA, ROWS

TOLERANCE = 0.02  # mean |difference| / mean |value|: bfloat16 rounding stays below 0.006
CASES = [
    pytest.param(op, direction, way, id=f"{op.label.replace(': ', '-')}-{direction}-{way}")
    for op in table(BENCH, ABSENT)
    for direction in (("forward", "backward") if op.trained else ("forward",))
    for way in op.ways
]


@functools.lru_cache(maxsize=1)
def prepared(label: str, make: Callable[..., Work]) -> Work:
    """Inputs of an op, the same for all its ways."""
    torch.manual_seed(0)
    return make(BENCH, Sizes() if CUDA else SMALL)


def outputs(work: Work, way: str) -> list[Tensor]:
    found = work.run(way)
    return [found] if isinstance(found, Tensor) else list(found)


def timed(work: Work, way: str, direction: str) -> Callable[[], list[Tensor]]:
    """What is measured: the op, or the gradients of its inputs with the forward done once before."""
    if direction == "forward":
        return lambda: outputs(work, way)
    for x in work.inputs:
        x.requires_grad_()
    outs = outputs(work, way)
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outs)]
    return lambda: list(torch.autograd.grad(outs, work.inputs, grads, retain_graph=True))


def agree(what: str, found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted)):
        off = ((a.float() - b.float()).abs().mean() / b.float().abs().mean()).item()
        assert off <= TOLERANCE, f"{what}: result {i} is off by {off:.3g} of the mean value, allowed {TOLERANCE}"


@pytest.mark.parametrize(("op", "direction", "way"), CASES)
def test_op(benchmark: Any, limits: dict[str, float], op: Op, direction: str, way: str) -> None:
    work = prepared(op.label, op.make)
    with torch.set_grad_enabled(direction == "backward"):
        run = timed(work, way, direction)
        if way != op.ways[0]:
            agree(f"{op.label} {direction} {way}", run(), timed(work, op.ways[0], direction)())
        taken = BENCH.milliseconds(run)
        low, middle, high = (taken[round(p / 100 * (len(taken) - 1))] for p in (20, 50, 80))
        rate = (work.forward if direction == "forward" else work.backward) / (middle / 1e3)

        def finished() -> None:
            run()
            BENCH.sync()

        benchmark.pedantic(finished, rounds=3, warmup_rounds=1)
    row = {"op": op.label, "pass": direction, "way": way, "baseline": way == op.ways[0], "ms": [low, middle, high]}
    row |= {"unit": op.unit, "rate": rate, "of_limit": rate / limits[op.unit], "rehearsal": not CUDA}
    benchmark.extra_info.update(row)
    ROWS.append(row)
    for x in work.inputs:
        x.requires_grad_(False)
