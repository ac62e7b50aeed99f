"""Every tile configuration of our Triton attention at the shapes it is used at: what the pinned tables should hold.

    python -m bench.ops.sweep_attention --parts dq dkdv --shapes constant_context --seconds 120      (default: all)

Parts are kernels: `forward`, `dq` (gradient of the queries), `dkdv` (of keys and values; own ones beside a context),
each with the small kernels around it. The first configuration of a shape is what the launcher takes by itself; results
that differ from its are failures. Configurations stand in hiar_kernels/attention/_launch.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lib import report
from bench.lib.machine import environment, result_folder
from bench.lib.measure import Bench, Case, check_all
from bench.ops import attention_cases
from bench.ops.work import Sizes, Work
from hiar_kernels.attention import _launch

PARTS = ("forward", "dq", "dkdv")
SHAPES = ("visit", "pair", "block_causal", "constant_context", "bidirectional")
TRAINED = ("block_causal", "constant_context", "bidirectional")
PINNED = "pinned"


class Recorded(TorchDispatchMode):
    """Keeps the arguments of ``hiar::attention``: those of its launchers."""

    arguments: tuple[Any, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.hiar.attention.default:
            self.arguments = args
        return func(*args, **kwargs or {})


def named(tile: Any) -> str:
    """A configuration as its fields that are not the default."""
    values = ((field, getattr(tile, field.name)) for field in dataclasses.fields(tile))
    return " ".join(f"{field.name}={value}" for field, value in values if value != field.default)


def configurations(part: str, arch: int) -> dict[str, Any]:
    """Name -> tile, of the architecture or the newest older one; None is what the launcher takes by itself."""
    return {PINNED: None, **{named(tile): tile for tile in _launch.pick(_launch.CANDIDATES[part], arch)}}


def work_of(part: str, work: Work) -> float:
    """FLOP that a part has to do: a forward is two matmuls, dq three over all keys, dkdv four where gradients go."""
    if part == "forward":
        return work.forward
    with_gradient = work.backward - 1.5 * work.forward  # a forward over those keys alone: see attention_cases.attend
    return 1.5 * work.forward if part == "dq" else 2 * with_gradient


def launcher(part: str, work: Work) -> Callable[[Any], list[Tensor]]:
    """A function of a configuration that runs the part alone; a backward on a forward done before."""
    with Recorded() as recorded:
        work.run("triton")  # loads the kernels too
    from hiar_kernels.attention import triton_bwd, triton_fwd

    arguments = recorded.arguments
    if part == "forward":
        return lambda tile: list(triton_fwd.launch(*arguments, config=tile))[:1]
    out, lse = triton_fwd.launch(*arguments)
    gradients = [torch.randn_like(out), torch.zeros_like(lse)]
    tensors = sum(x is not None for x in arguments[:5])  # q, k, v and perhaps the context's
    needed = [(i == 0) if part == "dq" else (i in (1, 2)) for i in range(tensors)]
    return lambda tile: triton_bwd.launch(gradients, needed, [out, lse], *arguments, **{f"{part}_config": tile})


def cases(bench: Bench, z: Sizes, part: str, shapes: list[str], arch: int) -> Iterator[Case]:
    @functools.lru_cache(maxsize=1)
    def prepared(shape: str) -> tuple[Work, Callable[[Any], list[Tensor]], list[Tensor]]:
        torch.manual_seed(0)
        work = getattr(attention_cases, shape)(bench, z)
        launch = launcher(part, work)
        return work, launch, launch(None)

    def measured(shape: str, tile: Any) -> dict[str, Any]:
        work, launch, expected = prepared(shape)
        check_all(part, launch(tile), expected)
        return {"run": functools.partial(launch, tile), "flop": work_of(part, work)}

    for shape in shapes:
        if part == "forward" or shape in TRAINED:
            for name, tile in configurations(part, arch).items():
                yield {"configuration": name, "shape": shape}, functools.partial(measured, shape, tile)


def best(section: dict[str, Any]) -> list[str]:
    """A line for each shape: the fastest configuration, and how many times as fast as the pinned one it is."""
    lines = []
    for shape in dict.fromkeys(case["shape"] for case in section["cases"]):
        times = {c["configuration"]: c["ms"]["p50"] for c in section["cases"] if c["shape"] == shape and "ms" in c}
        if PINNED in times:
            fastest = min(times, key=lambda name: times[name])
            lines.append(f"- best for {shape}: {fastest}, {times[PINNED] / times[fastest]:.2f}x of {PINNED}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder (default: see above)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a sweep measures kernels on a CUDA device, torch finds none")
    bench, about = Bench("cuda", (8, 40), 0.2), environment("cuda")
    arch = int("".join(map(str, torch.cuda.get_device_capability())))
    torch.set_grad_enabled(False)
    seconds = args.seconds / len(args.parts)
    plan = {part: (cases(bench, Sizes(), part, args.shapes, arch), "shape", seconds) for part in args.parts}
    page = report.run_sections(
        bench, plan, "sweep_attention", args.out or result_folder(about), about,
        f"Tiles of the Triton attention, sm_{arch}", "python -m bench.ops.sweep_attention", {}, best,
    )  # fmt: skip
    print(f"{page.read_text()}\nwrote {page}")
    return 0 if all("error" not in case for s in bench.sections.values() for case in s["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
