"""What the machine at hand gives without any kernel of ours: the figures that later measurements are held against.

    python bench/anchors.py                        under 6 minutes on one GPU; bench/results/<gpu>/<date>-<revision>/
    python bench/anchors.py --device cpu --small   rehearsal: the same code at toy sizes, its figures mean nothing

Sections: `limits` (large matmul, large copy), `attention` (every library present: alone, with K/V split in two and
merged by LSE, with several rows per launch), `matmul` (the linear layers of Wan 1.3B), `visit` (its 30 blocks over a
full ring). Needs torch alone, and the two files beside it. What is absent, fails or is not reached within the time
budget is written down as such. An attention that disagrees with float32 on sampled queries, or with itself once split,
counts as failed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from measure import Bench, Case, clocks, environment, line_of, result_folder, table
from plain_visit import PARTS, PlainVisit


@dataclass(frozen=True)
class Sizes:
    """The one table of sizes. The defaults are Wan 1.3B at 480x832: blocks of 3 latent frames, a window of 21."""

    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    layers: int = 30
    frame_tokens: int = 1560
    block_frames: int = 3
    window_blocks: int = 7
    text_tokens: int = 512
    rows: tuple[int, ...] = (1, 2, 4)  # per launch of attention and of the linear layers
    visit_rows: tuple[int, ...] = (1, 2)
    limit_matmul: tuple[int, ...] = (8192, 16384)
    limit_copy_mib: int = 4096
    repetitions: tuple[int, int] = (8, 40)  # of a case: as many as fit case_seconds, within these bounds
    case_seconds: float = 0.3

    width = property(lambda z: z.heads * z.head_dim)
    tokens = property(lambda z: z.block_frames * z.frame_tokens)  # of a block: the queries of a visit
    windows = property(lambda z: [z.tokens * n for n in range(1, z.window_blocks + 1)])

    def attention_flop(self, keys: int) -> float:
        return 4.0 * self.tokens * keys * self.width

    def visit_flop(self) -> float:  # q k v o, cross q o, ffn; self- and cross-attention
        linear = 12 * self.tokens * self.width**2 + 4 * self.tokens * self.width * self.ffn
        return self.layers * (linear + self.attention_flop(self.windows[-1] + self.text_tokens))


TOY: dict[str, Any] = {"heads": 2, "head_dim": 16, "ffn": 80, "layers": 2, "frame_tokens": 8, "window_blocks": 2}
TOY |= {"text_tokens": 8, "rows": (1, 2), "repetitions": (3, 3), "case_seconds": 0.0}
TOY |= {"limit_matmul": (128,), "limit_copy_mib": 1}
SECONDS = {"limits": 15.0, "attention": 180.0, "matmul": 20.0, "visit": 105.0}  # 320 of the 360
TOLERANCE = 0.02  # mean |difference| / mean |value|: bf16 rounding stays below 0.006, a wrong scale or LSE does not
VISIT_TOLERANCE = 0.05  # the same, through all layers


def randn(bench: Bench, *shape: int, scale: Tensor | float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=bench.device) * scale).to(torch.bfloat16)


def check(what: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> dict[str, float]:
    error = ((got.float() - want.float()).abs().mean() / want.float().abs().mean()).item()
    if not error <= tolerance:
        raise RuntimeError(f"{what}: off by {error:.3g} of the mean value, allowed {tolerance}")
    return {f"error_{what}": error}


def limits(bench: Bench, z: Sizes) -> Iterator[Case]:
    def matmul(n: int) -> dict[str, Any]:
        a, b = randn(bench, n, n), randn(bench, n, n)
        return {"run": lambda: a @ b, "flop": 2.0 * n**3}

    def copy(mib: int) -> dict[str, Any]:
        a, b = (torch.zeros(mib << 18, device=bench.device) for _ in range(2))
        return {"run": lambda: b.copy_(a), "bytes": 2.0 * a.numel() * a.element_size()}

    for n in z.limit_matmul:
        yield {"what": "matmul", "size": n}, functools.partial(matmul, n)
    yield {"what": "copy", "size": z.limit_copy_mib}, functools.partial(copy, z.limit_copy_mib)


# A library is two functions of q, k, v [B, T, H, D]: one gives out [B, T, H, D], the other (out, lse [B, H, T]) with a
# natural logarithm. Queries of an LSE may be padded; None stands where the library hands none out.
Attend = Callable[..., Any]
Library = tuple[Attend, Attend | None]


def swapped(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def sdpa(backend: str, op: str = "", *options: Any) -> Library:
    def alone(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = swapped(qkv)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def with_lse(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = getattr(torch.ops.aten, f"_scaled_dot_product_{op}")(*swapped(qkv), *options)
        return out.transpose(1, 2), lse

    return alone, with_lse if op else None


def flash(module: str) -> Library:
    """A member of the flash-attn family: some releases give out alone, others always (out, lse, ...)."""
    function = importlib.import_module(module).flash_attn_func
    known = inspect.signature(function).parameters
    ask = {name: True for name in ("return_lse", "return_attn_probs") if name in known}

    def alone(*qkv: Tensor) -> Tensor:
        got = function(*qkv)
        return got[0] if isinstance(got, tuple) else got

    return alone, lambda *qkv: function(*qkv, **ask)[:2]


def xformers(_: Bench) -> Library:
    ops = importlib.import_module("xformers.ops")
    return ops.memory_efficient_attention, ops.memory_efficient_attention_forward_requires_grad


def flex(bench: Bench) -> Library:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    function = bench.compiled(module.flex_attention)
    aux = getattr(module, "AuxRequest", None)  # before it there was return_lse
    ask: dict[str, Any] = {"return_aux": aux(lse=True)} if aux else {"return_lse": True}

    def with_lse(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, more = function(*swapped(qkv), **ask)
        return out.transpose(1, 2), getattr(more, "lse", more)

    return lambda *qkv: function(*swapped(qkv)).transpose(1, 2), with_lse


LIBRARIES: dict[str, tuple[str, Callable[[Bench], Library]]] = {  # name: devices, maker
    "sdpa-cudnn": ("cuda", lambda _: sdpa("CUDNN_ATTENTION", "cudnn_attention", None, True)),
    "sdpa-flash": ("cuda", lambda _: sdpa("FLASH_ATTENTION", "flash_attention")),
    "sdpa-efficient": ("cuda", lambda _: sdpa("EFFICIENT_ATTENTION", "efficient_attention", None, True)),
    "sdpa-flash-cpu": ("cpu", lambda _: sdpa("FLASH_ATTENTION", "flash_attention_for_cpu")),
    "flash-attn-2": ("cuda cpu", lambda _: flash("flash_attn")),
    "flash-attn-3": ("cuda cpu", lambda _: flash("flash_attn_interface")),
    "flash-attn-4": ("cuda cpu", lambda _: flash("flash_attn.cute")),
    "xformers": ("cuda cpu", xformers),
    "flex": ("cuda cpu", flex),  # last: it compiles anew for every shape and takes what time is left
}


def merge_halves(out: Tensor, lse: Tensor) -> Tensor:
    """Two partial attentions that lie as rows, out [2, T, H, D] and lse [2, H, T], as one [1, T, H, D]."""
    weight = torch.softmax(lse.float(), dim=0).transpose(1, 2).unsqueeze(-1)
    return (out.float() * weight).sum(0, keepdim=True).to(out.dtype)


def attention(bench: Bench, z: Sizes, absent: dict[str, str]) -> Iterator[Case]:
    merge = bench.compiled(merge_halves)

    @functools.lru_cache(maxsize=1)
    def inputs(keys: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(keys)  # later keys are larger: the halves of a split weigh unlike, a wrong merge is seen
        q, k, v = ((max(z.rows), n, z.heads, z.head_dim) for n in (z.tokens, keys, keys))
        grow = torch.linspace(0.5, 2.0, keys, device=bench.device)[:, None, None]
        return randn(bench, *q), randn(bench, *k, scale=grow), randn(bench, *v)

    @functools.lru_cache(maxsize=1)
    def sampled(keys: int) -> tuple[slice, Tensor]:
        (q, k, v), some = (x[:1].float() for x in inputs(keys)), slice(None, None, max(z.tokens // 32, 1))
        score = torch.einsum("bthd,bshd->bhts", q[:, some], k) / math.sqrt(z.head_dim)
        return some, torch.einsum("bhts,bshd->bthd", score.softmax(-1), v)

    def alone(library: Library, keys: int, rows: int) -> dict[str, Any]:
        qkv, (some, want) = [x[:rows] for x in inputs(keys)], sampled(keys)
        error = check("against_float32", library[0](*qkv)[:1, some], want)
        return {"run": lambda: library[0](*qkv), "flop": rows * z.attention_flop(keys), **error}

    def split(library: Library, keys: int, rows: int) -> dict[str, Any]:
        q, k, v = (x[:1] for x in inputs(keys))
        halves = [x.view(2, keys // 2, z.heads, z.head_dim) for x in (k, v)]  # two rows of one launch, without a copy
        ways = {"expanded": lambda: q.expand(2, -1, -1, -1), "copied": lambda: q.repeat(2, 1, 1, 1)}

        def run(how: str) -> Tensor:
            out, lse = library[1](ways[how](), *halves) if library[1] else (None, None)
            if lse is None:
                raise NotImplementedError("this library hands out no LSE")
            return merge(out, lse.reshape(2, z.heads, -1)[..., : z.tokens])

        notes: dict[str, Any] = {"flop": z.attention_flop(keys)}
        for how in ways:  # where a library takes no stride of 0, copying the queries is part of its price
            try:
                error = check("of_merge", run(how), library[0](q, k, v))
                return {"run": functools.partial(run, how), "queries": how, **error, **notes}
            except RuntimeError as failure:
                notes[f"{how}_failed"] = line_of(failure)
        raise RuntimeError(notes["copied_failed"])

    found: dict[str, Library] = {}
    for name, (devices, make) in LIBRARIES.items():
        try:
            found |= {name: make(bench)} if bench.device in devices else {}
        except Exception as error:
            absent[name] = line_of(error)
    for names in ([name for name in found if name != "flex"], ["flex"] if "flex" in found else []):
        for keys in (z.windows[-1], *z.windows[:-1]):
            for name in names:
                for mode, rows in (*(("alone", n) for n in z.rows), ("split", 1)):
                    prepare = functools.partial(alone if mode == "alone" else split, found[name], keys, rows)
                    yield {"library": name, "keys": keys, "mode": mode, "rows": rows}, prepare


def matmul(bench: Bench, z: Sizes) -> Iterator[Case]:
    def linear(m: int, k: int, n: int) -> dict[str, Any]:
        x, w, b = randn(bench, m, k), randn(bench, n, k, scale=k**-0.5), randn(bench, n)
        return {"run": lambda: F.linear(x, w, b), "flop": 2.0 * m * k * n}

    d, f = z.width, z.ffn
    for m in (rows * z.tokens for rows in z.rows):
        for layer, k, n in (("qkv", d, 3 * d), ("o", d, d), ("ffn up", d, f), ("ffn down", f, d)):
            yield {"layer": layer, "m": m, "k": k, "n": n}, functools.partial(linear, m, k, n)


def visit(bench: Bench, z: Sizes) -> Iterator[Case]:
    """All blocks of one forward over a full ring (see plain_visit.py)."""
    shape = {"heads": z.heads, "head_dim": z.head_dim, "ffn": z.ffn, "layers": z.layers, "frames": z.block_frames}
    shape |= {"tokens": z.tokens, "keys": z.windows[-1], "text_tokens": z.text_tokens}
    model = functools.lru_cache(maxsize=1)(lambda rows: PlainVisit(rows, **shape, device=bench.device))
    fast = tuple(bench.compiled(part) for part in PARTS)

    def prepare(rows: int, library: str, how: str) -> dict[str, Any]:
        attend = LIBRARIES[library][1](bench)[0]
        want = model(rows)(attend, PARTS)
        run: Callable[[], Any] = functools.partial(model(rows), attend, PARTS if how == "eager" else fast)
        got = run()
        if how == "graph":  # of the compiled parts, which the line above has warmed up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = run()
            run = graph.replay
            run()
        return {"run": run, "flop": rows * z.visit_flop(), **check("against_eager", got, want, VISIT_TOLERANCE)}

    for rows in z.visit_rows:
        for library in ("sdpa-cudnn", "sdpa-flash") if bench.cuda else ("sdpa-flash-cpu",):
            for how in ("eager", "compiled", "graph")[: 3 if bench.cuda else 2]:
                yield {"how": how, "rows": rows, "attention": library}, functools.partial(prepare, rows, library, how)
            if not any("error" in case and case["rows"] == rows for case in bench.sections["visit"]["cases"]):
                break  # the second library stands in only where the first failed


def markdown(result: dict[str, Any]) -> str:
    across = {"limits": "size", "attention": "keys", "matmul": "m", "visit": "rows"}
    lines = [f"# Anchors: {result['environment']['device']}", "", result["note"], ""]
    lines += [f"- {key}: {value}" for key, value in {**result["environment"], **result["clocks"]}.items()]
    for name, section in result["sections"].items():
        lines += ["", f"## {name}", "", *table(section, across[name])]
    absent = [f"- {name}: {error}" for name, error in result["absent"].items()]
    return "\n".join([*lines, "", "## Absent libraries", "", *absent, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="budget of all sections together")
    parser.add_argument("--out", type=Path, help="folder (default: see above; out/anchors for a rehearsal)")
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("a CPU would need hours for these sizes: --device cpu goes with --small")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; rehearse with --device cpu --small")
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 256  # every shape is a compilation of its own
    if args.device == "cpu":
        torch.set_num_threads(1)

    sizes = Sizes(**TOY) if args.small else Sizes()
    bench = Bench(args.device, sizes.repetitions, sizes.case_seconds)
    absent: dict[str, str] = {}
    about, before = environment(args.device), clocks()
    note = "Cells: p50 [p20, p80] of one launch, the rate of all its rows, and that as part of the large matmul's rate."
    if args.small:
        note = f"REHEARSAL at toy sizes on {args.device}: nothing here is a measurement. {note}"
    home = Path(__file__).resolve().parents[1]
    out = args.out or (home / "out" / "anchors" if args.small else result_folder(about))
    out.mkdir(parents=True, exist_ok=True)

    plan = {
        "limits": limits(bench, sizes),
        "attention": attention(bench, sizes, absent),
        "matmul": matmul(bench, sizes),
        "visit": visit(bench, sizes),
    }
    deadline = time.perf_counter()
    for name, cases in plan.items():  # what one section leaves over, the next one has
        deadline += SECONDS[name] * args.seconds / sum(SECONDS.values())
        bench.section(name, cases, deadline - time.perf_counter())
        if name == "limits":
            rates = [case["tflop_per_s"] for case in bench.sections[name]["cases"] if "tflop_per_s" in case]
            bench.matmul_limit = max(rates, default=None)
        result = {
            "note": note,
            "rehearsal": args.small,
            "environment": about,
            "clocks": {"clocks before": before, "clocks after": clocks()},
            "sizes": asdict(sizes),
            "matmul_limit_tflop_per_s": bench.matmul_limit,
            "absent": absent,
            "sections": bench.sections,
        }
        (out / "anchors.json").write_text(json.dumps(result, indent=1))  # after each section: a crash loses one
        (out / "anchors.md").write_text(markdown(result))
    print(f"{out / 'anchors.json'} and anchors.md")
    return 0 if all(any("ms" in case for case in s["cases"]) for s in bench.sections.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
