"""Every tile configuration of our Triton attention at the shapes it is used at: what the pinned tables should hold.

    python bench/sweep_attention.py                  needs a CUDA device; into bench/results/<gpu>/<date>-<revision>/
    python bench/sweep_attention.py --parts dq dkdv --shapes constant_context --seconds 120

Parts are kernels: `forward`, `dq` (gradient of the queries), `dkdv` (of keys and values; own ones beside a context),
each with the small kernels around it. The first configuration of a shape is what the launcher takes by itself; results
that differ from its are failures. A row of the table is a configuration, a column a shape. What does not compile, does
not fit or is not reached within the seconds is told. Configurations stand in hiar_kernels/attention/_launch.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attention_cases
from hiar_kernels.attention import _launch
from measure import Bench, Case, clocks, environment, result_folder, table
from work import Sizes, Work

PARTS = ("forward", "dq", "dkdv")
SHAPES = ("visit", "pair", "block_causal", "constant_context", "bidirectional")
TRAINED = ("block_causal", "constant_context", "bidirectional")
PINNED = "pinned"
TOLERANCE = 0.02  # mean |difference| / mean |value|: bfloat16 rounding stays below 0.006


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

    given = recorded.arguments
    if part == "forward":
        return lambda tile: list(triton_fwd.launch(*given, config=tile))[:1]
    out, lse = triton_fwd.launch(*given)
    gradients = [torch.randn_like(out), torch.zeros_like(lse)]
    tensors = sum(x is not None for x in given[:5])  # q, k, v and perhaps the context's
    needed = [(i == 0) if part == "dq" else (i in (1, 2)) for i in range(tensors)]
    return lambda tile: triton_bwd.launch(gradients, needed, [out, lse], *given, **{f"{part}_config": tile})


def cases(bench: Bench, z: Sizes, part: str, shapes: list[str], arch: int) -> Iterator[Case]:
    @functools.lru_cache(maxsize=1)
    def prepared(shape: str) -> tuple[Work, Callable[[Any], list[Tensor]], list[Tensor]]:
        torch.manual_seed(0)
        work = getattr(attention_cases, shape)(bench, z)
        launch = launcher(part, work)
        return work, launch, launch(None)

    def measured(shape: str, tile: Any) -> dict[str, Any]:
        work, launch, expected = prepared(shape)
        for got, want in zip(launch(tile), expected):
            off = ((got.float() - want.float()).abs().mean() / want.float().abs().mean()).item()
            if not off <= TOLERANCE:
                raise RuntimeError(f"off by {off:.3g} of the mean value, allowed {TOLERANCE}")
        return {"run": functools.partial(launch, tile), "flop": work_of(part, work)}

    for shape in shapes:
        if part == "forward" or shape in TRAINED:
            for name, tile in configurations(part, arch).items():
                yield {"configuration": name, "shape": shape}, functools.partial(measured, shape, tile)


def best(section: dict[str, Any]) -> list[str]:
    """A line for each shape: the fastest configuration, and how many times as fast as the pinned one it is."""
    lines = []
    for shape in dict.fromkeys(case["shape"] for case in section["cases"]):
        took = {c["configuration"]: c["ms"]["p50"] for c in section["cases"] if c["shape"] == shape and "ms" in c}
        if PINNED in took:
            fastest = min(took, key=lambda name: took[name])
            lines.append(f"- best for {shape}: {fastest}, {took[PINNED] / took[fastest]:.2f}x of {PINNED}")
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
    bench, about, before = Bench("cuda", (8, 40), 0.2), environment("cuda"), clocks()
    arch = int("".join(map(str, torch.cuda.get_device_capability())))
    torch.set_grad_enabled(False)
    out = args.out or result_folder(about)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter()
    lines = [f"# Tiles of the Triton attention: {about['device']}, sm_{arch}", ""]
    lines += ["`python bench/sweep_attention.py`. Cells: p50 [p20, p80], rate of the work that must be done.", ""]
    lines += [f"- {key}: {value}" for key, value in {**about, "clocks before": before}.items()]
    for part in args.parts:
        deadline += args.seconds / len(args.parts)  # what one part leaves over, the next one has
        bench.section(part, cases(bench, Sizes(), part, args.shapes, arch), deadline - time.perf_counter())
        section = bench.sections[part]
        lines += ["", f"## {part}", "", *table(section, "shape"), *best(section)]
        result = {"environment": about, "clocks before": before, "sections": bench.sections}
        (out / "sweep_attention.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        (out / "sweep_attention.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))
    print(f"wrote {out / 'sweep_attention.md'}")
    return 0 if all("error" not in case for s in bench.sections.values() for case in s["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
