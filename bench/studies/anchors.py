"""What the machine at hand gives without any kernel of ours: the figures that later measurements are held against.

    python -m bench.studies.anchors                        under 6 minutes on one GPU; into bench/results/
    python -m bench.studies.anchors --device cpu --small   rehearsal: toy sizes, its figures mean nothing

Needs torch alone. What is absent, fails or is not reached in time is listed. An attention that disagrees with float32
on sampled queries, or with itself once split, counts as failed.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import report
from bench.lib.machine import environment, error_line, result_folder
from bench.lib.measure import Bench, Case, captured, check, large_copy, large_matmul
from bench.ops import work
from bench.ops.libraries import Library, available, library
from bench.studies.plain_transformer import PARTS, PlainTransformer


@dataclass(frozen=True)
class AnchorSizes(work.Sizes):
    """Those of the op benchmarks, and of what they do not measure."""

    batches: tuple[int, ...] = (1, 2, 4)  # batch items of a launch of attention and of the linear layers
    forward_batches: tuple[int, ...] = (1, 2)
    matmuls: tuple[int, ...] = (8192, 16384)  # the limits
    copy_mib: int = 4096

    windows = property(lambda z: [z.tokens * n for n in range(1, z.window // z.block + 1)])

    def attention_flop(self, keys: int) -> float:
        return 4.0 * self.tokens * keys * self.width

    def forward_flop(self) -> float:  # q k v o, cross q o, ffn; self- and cross-attention
        linear = 12 * self.tokens * self.width**2 + 4 * self.tokens * self.width * self.ffn
        return self.layers * (linear + self.attention_flop(self.windows[-1] + self.text_tokens))


TOY: dict[str, Any] = {"heads": 2, "head_dim": 16, "ffn": 80, "layers": 2, "grid": (2, 4), "window": 6}
TOY |= {"text_tokens": 8, "batches": (1, 2), "matmuls": (128,), "copy_mib": 1}
SECONDS = {"limits": 15.0, "attention": 180.0, "matmul": 20.0, "visit": 105.0}  # 320 of the 360
FORWARD_TOLERANCE = 0.05  # as measure.TOLERANCE, through all layers


def limits(bench: Bench, z: AnchorSizes) -> Iterator[Case]:
    for n in z.matmuls:
        yield {"what": "matmul", "size": n}, functools.partial(large_matmul, bench, n)
    yield {"what": "copy", "size": z.copy_mib}, functools.partial(large_copy, bench, z.copy_mib)
    rates = (case.get("tflop_per_s") for case in bench.sections["limits"]["cases"])
    bench.matmul_limit = max(filter(None, rates), default=None)


def merge_halves(out: Tensor, lse: Tensor) -> Tensor:
    """Two partial attentions as a batch, out [2, T, H, D] and lse [2, H, T], as one [1, T, H, D]."""
    weight = torch.softmax(lse.float(), dim=0).transpose(1, 2).unsqueeze(-1)
    return (out.float() * weight).sum(0, keepdim=True).to(out.dtype)


def attention(bench: Bench, z: AnchorSizes, absent: dict[str, str]) -> Iterator[Case]:
    merge = bench.compiled(merge_halves)

    @functools.lru_cache(maxsize=1)
    def inputs(keys: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(keys)  # later keys are larger: halves of unequal weight show a wrong merge
        q, k, v = ((max(z.batches), n, z.heads, z.head_dim) for n in (z.tokens, keys, keys))
        grow = torch.linspace(0.5, 2.0, keys, device=bench.device)[:, None, None]
        return bench.normal(*q), bench.normal(*k, scale=grow), bench.normal(*v)

    @functools.lru_cache(maxsize=1)
    def sampled(keys: int) -> tuple[slice, Tensor]:
        (q, k, v), some = (x[:1].float() for x in inputs(keys)), slice(None, None, max(z.tokens // 32, 1))
        score = torch.einsum("bthd,bshd->bhts", q[:, some], k) / math.sqrt(z.head_dim)
        return some, torch.einsum("bhts,bshd->bthd", score.softmax(-1), v)

    def alone(library: Library, keys: int, rows: int) -> dict[str, Any]:
        qkv, (some, expected) = [x[:rows] for x in inputs(keys)], sampled(keys)
        error = check("against_float32", library[0](*qkv)[:1, some], expected)
        flop = rows * z.attention_flop(keys)
        return {"run": lambda: library[0](*qkv), "flop": flop, "error_against_float32": error}

    def split(library: Library, keys: int, rows: int) -> dict[str, Any]:
        q, k, v = (x[:1] for x in inputs(keys))
        halves = [x.view(2, keys // 2, z.heads, z.head_dim) for x in (k, v)]  # a batch of two, without a copy
        queries = {"expanded": lambda: q.expand(2, -1, -1, -1), "copied": lambda: q.repeat(2, 1, 1, 1)}

        def run(how: str) -> Tensor:
            out, lse = library[1](queries[how](), *halves) if library[1] else (None, None)
            if lse is None:
                raise NotImplementedError("this library hands out no LSE")
            return merge(out, lse.reshape(2, z.heads, -1)[..., : z.tokens])

        notes: dict[str, Any] = {"flop": z.attention_flop(keys)}
        for how in queries:  # where a library takes no stride of 0, copying the queries is part of its price
            try:
                error = check("of_merge", run(how), library[0](q, k, v))
                return {"run": functools.partial(run, how), "queries": how, "error_of_merge": error, **notes}
            except RuntimeError as failure:
                notes[f"{how}_failed"] = error_line(failure)
        raise RuntimeError(notes["copied_failed"])

    present = available(bench, absent)
    for names in ([name for name in present if name != "flex"], ["flex"] if "flex" in present else []):
        for keys in (z.windows[-1], *z.windows[:-1]):
            for name in names:
                for mode, rows in (*(("alone", n) for n in z.batches), ("split", 1)):
                    prepare = functools.partial(alone if mode == "alone" else split, present[name], keys, rows)
                    yield {"library": name, "keys": keys, "mode": mode, "rows": rows}, prepare


def matmul(bench: Bench, z: AnchorSizes) -> Iterator[Case]:
    def linear(m: int, k: int, n: int) -> dict[str, Any]:
        x, w, b = bench.normal(m, k), bench.normal(n, k, scale=k**-0.5), bench.normal(n)
        return {"run": lambda: F.linear(x, w, b), "flop": 2.0 * m * k * n}

    d, f = z.width, z.ffn
    for m in (n * z.tokens for n in z.batches):
        for layer, k, n in (("qkv", d, 3 * d), ("o", d, d), ("ffn up", d, f), ("ffn down", f, d)):
            yield {"layer": layer, "m": m, "k": k, "n": n}, functools.partial(linear, m, k, n)


def forward(bench: Bench, z: AnchorSizes) -> Iterator[Case]:
    """All blocks of one forward over a full ring (see plain_transformer.py)."""
    model = functools.lru_cache(maxsize=1)(lambda batch: PlainTransformer(z, batch, bench.device))
    fast = tuple(bench.compiled(part) for part in PARTS)

    def prepare(rows: int, name: str, how: str) -> dict[str, Any]:
        attend = library(bench, name)[0]
        expected = model(rows)(attend, PARTS)
        run: Callable[[], Any] = functools.partial(model(rows), attend, PARTS if how == "eager" else fast)
        run = captured(run) if how == "graph" else run
        error = check("against_eager", run(), expected, FORWARD_TOLERANCE)
        return {"run": run, "flop": rows * z.forward_flop(), "error_against_eager": error}

    for rows in z.forward_batches:
        for name in ("sdpa-cudnn", "sdpa-flash") if bench.cuda else ("sdpa-flash-cpu",):
            for how in ("eager", "compiled", "graph")[: 3 if bench.cuda else 2]:
                yield {"how": how, "rows": rows, "attention": name}, functools.partial(prepare, rows, name, how)
            if not any("error" in case and case["rows"] == rows for case in bench.sections["visit"]["cases"]):
                break  # the second library stands in only where the first failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="budget of all sections together")
    parser.add_argument("--out", type=Path, help="folder (default: see above; out/bench for a rehearsal)")
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("a CPU would need hours for these sizes: --device cpu goes with --small")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; rehearse with --device cpu --small")
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 256  # every shape is a compilation of its own
    if args.device == "cpu":
        torch.set_num_threads(1)

    sizes, repetitions, seconds = (AnchorSizes(**TOY), (3, 3), 0.0) if args.small else (AnchorSizes(), (8, 40), 0.3)
    bench, about = Bench(args.device, repetitions, seconds), environment(args.device)
    absent: dict[str, str] = {}
    sections = {
        "limits": (limits(bench, sizes), "size"),
        "attention": (attention(bench, sizes, absent), "keys"),
        "matmul": (matmul(bench, sizes), "m"),
        "visit": (forward(bench, sizes), "rows"),
    }
    share = args.seconds / sum(SECONDS.values())
    plan = {name: (*section, SECONDS[name] * share) for name, section in sections.items()}

    def notes(section: dict[str, Any]) -> list[str]:
        return [f"- absent: {x}: {error}" for x, error in absent.items() if section is bench.sections.get("attention")]

    page = report.run_sections(
        bench, plan, "anchors", args.out or result_folder(about, rehearsal=args.small), about, "Anchors",
        "python -m bench.studies.anchors", {"sizes": asdict(sizes), "absent": absent}, notes,
        f"at toy sizes on {args.device}" if args.small else "",
    )  # fmt: skip
    print(f"wrote {page}")
    return 0 if all(any("ms" in case for case in s["cases"]) for s in bench.sections.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
