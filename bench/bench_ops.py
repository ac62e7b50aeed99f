"""Every op, forward and backward, by every way this machine has. What is wrong is a failure, not a figure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import parsed
from measure import line_of
from op_cases import table
from op_results import ABSENT, BENCH, CUDA
from work import SMALL, Op, Sizes, Work

torch._dynamo.config.recompile_limit = 256  # every shape and mask is a compilation of its own,
torch._dynamo.config.fail_on_recompile_limit_hit = True  # and what is not compiled must not be measured as if it were
TOLERANCE = 0.02  # mean |difference| / mean |value|: bfloat16 rounding stays below 0.006
ARCHITECTURE = int("".join(map(str, torch.cuda.get_device_capability()))) if CUDA else 0
CASES = [
    pytest.param(op, direction, way, id=f"{op.label}-{direction}-{way}".replace(": ", "-").replace(" ", "_"))
    for op in table(BENCH, ABSENT)
    for direction in (("forward", "backward") if op.trained else ("forward",))
    for way in op.ways
    if (direction, way) != ("backward", "gluon")  # which has none
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


def first_results(work: Work, way: str, direction: str, peer: bool) -> tuple[Callable[[], Any], list[Tensor], str]:
    """What is measured and its results; of a peer that cannot do this: what it says."""
    try:
        run = timed(work, way, direction)
        return run, run(), ""
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if not peer:
            raise
        return list, [], line_of(error)


@pytest.mark.parametrize(("op", "direction", "way"), CASES)
def test_op(
    benchmark: Any,
    record_property: Callable[[str, object], None],
    limits: dict[str, float],
    op: Op,
    direction: str,
    way: str,
) -> None:
    row: dict[str, Any] = {"op": op.label, "pass": direction, "way": way}
    work = prepared(op.label, op.make)
    try:
        with torch.set_grad_enabled(direction == "backward"):
            run, found, refused = first_results(work, way, direction, way in op.peers)
            if refused:
                record_property("row", row | {"refused": refused})
                benchmark.pedantic(list)  # of nothing: with --benchmark-only every test must measure
                return
            if way != op.ways[0]:
                agree(f"{op.label} {direction} {way}", found, timed(work, op.ways[0], direction)())
            taken = BENCH.milliseconds(run)

            def finished() -> None:
                run()
                BENCH.sync()

            benchmark.pedantic(finished, rounds=3, warmup_rounds=1)
    finally:
        for x in work.inputs:
            x.requires_grad_(False)
    low, middle, high = (taken[round(p / 100 * (len(taken) - 1))] for p in (20, 50, 80))
    rate = (work.forward if direction == "forward" else work.backward) / (middle / 1e3)
    row |= {"baseline": way == op.ways[0], "ms": [low, middle, high], "unit": op.unit, "rate": rate}
    row |= {"limit": limits[op.unit], "of_limit": rate / limits[op.unit], "goal_ms": op.goal_ms}
    row |= {"rehearsal": not CUDA, "shape": op.shape, "arch": ARCHITECTURE}
    if op.shape is not None and way not in op.peers:
        row |= dict(zip(("impl", "num_splits"), parsed(way)))
    benchmark.extra_info.update(row)
    record_property("row", row)
