"""Registers, spills, shared memory and instructions of every Triton kernel, compiled without a GPU.

    python -m hiar_kernels.compile_report                    every op, for sm_80, 89, 90, 100, 120
    python -m hiar_kernels.compile_report --arch 90 --op attention --markdown report.md

Exit code 1 when a gate fails: register spills, more shared memory than the chip has, tensor cores that lie idle.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .common.aot import ARCHITECTURES, CHIPS, Case, Report, cases, compile_case, problems, triton_modules
from .common.triton_loader import interpreting

COLUMNS = (
    ("op", "kernel", "case", "sm", "registers", "spills B", "shared KB")
    + ("wgmma", "tcgen05", "mma", "TMA", "cp.async")
    + ("warps", "blocks/SM", "warps/SM", "gates")
)
_LEFT = {"op", "kernel", "case", "gates"}


@dataclass(frozen=True)
class Row:
    """A case on an architecture; ``report`` is None where it did not compile. ``failed``: one line for each gate."""

    op: str
    case: Case
    arch: int
    report: Report | None
    failed: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.op}: {self.case.kernel.__name__} {self.case.name} on sm_{self.arch}"

    def cells(self) -> list[str]:
        r = self.report
        head = [self.op, self.case.kernel.__name__, self.case.name, str(self.arch)]
        if r is None:
            return head + ["-"] * (len(COLUMNS) - len(head) - 1) + ["FAIL"]
        numbers = [r.registers, r.spills_bytes, f"{r.shared_bytes / 1024:.1f}", r.wgmma, r.tcgen05, r.mma, r.tma]
        share = f"{100 * r.occupancy * r.warps / CHIPS[self.arch].warps:.0f}%"
        numbers += [r.cp_async, r.warps, r.occupancy, share]
        return [*head, *map(str, numbers), "FAIL" if self.failed else "pass"]


def inspect(op: str, case: Case, arch: int) -> Row:
    """Compile one case and check the gates; a compile error is a failed gate too."""
    try:
        report = compile_case(case, arch)
    except Exception as error:  # any compiler error
        message = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        return Row(op, case, arch, None, (f"does not compile: {type(error).__name__}: {message.strip()}",))
    return Row(op, case, arch, report, tuple(problems(case, arch, report)))


def text_table(rows: Iterable[Row]) -> str:
    """Columns padded to the same width."""
    lines = [list(COLUMNS), *(row.cells() for row in rows)]
    padded = []
    for name, column in zip(COLUMNS, zip(*lines)):
        width = max(map(len, column))
        padded.append([cell.ljust(width) if name in _LEFT else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded))


def markdown(rows: Sequence[Row], command: str) -> str:
    """The committed page: command and versions, then a table for each architecture."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    releases: dict[str, list[str]] = {}
    for arch in sorted({row.arch for row in rows}):
        releases.setdefault(get_ptxas(arch).version, []).append(f"sm_{arch}")
    assemblers = " and ".join(f"ptxas {release} ({', '.join(of)})" for release, of in releases.items())
    failed = [f"- {row.name}: {line}" for row in rows for line in row.failed]
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, Triton {triton.__version__}, {assemblers}, "
        f"torch {torch.__version__}.",
        "",
        "Compiled ahead of time; nothing here was run or timed. Shapes: hiar_kernels/common/shapes.py, in bfloat16,",
        "with the very configuration that the launcher picks for the architecture. Registers and spill bytes are of",
        "one thread, shared memory of one block; wgmma to cp.async count instructions in the",
        "code, not executions. blocks/SM is what fits by registers, shared memory and warps; warps/SM the share of an",
        "SM's warps that they fill.",
        "",
        "Gates: no spills; shared memory within the chip ("
        + ", ".join(f"sm_{a} {CHIPS[a].shared_block // 1024} KB" for a in sorted({row.arch for row in rows}))
        + "); tensor cores in use where matrices are multiplied (wgmma on sm_90, tcgen05 or mma on sm_100, else mma); "
        "bulk copies where a kernel has tensor descriptors (sm_90 and later).",
        "",
        f"{len(rows) - sum(bool(row.failed) for row in rows)} of {len(rows)} pass."
        + (" These do not:" if failed else ""),
        *([""] + failed if failed else []),
    ]
    names = [name for name in COLUMNS if name != "sm"]
    for arch in sorted({row.arch for row in rows}):
        lines += ["", f"## sm_{arch}", "", "| " + " | ".join(names) + " |"]
        lines += ["|" + "|".join("---" if name in _LEFT else "---:" for name in names) + "|"]
        for row in rows:
            if row.arch == arch:
                cells = [cell for cell, name in zip(row.cells(), COLUMNS) if name != "sm"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hiar_kernels.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all"
    )
    parser.add_argument("--op", nargs="+", choices=list(triton_modules()), help="folders; all by default")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report there too")
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("needs a process without TRITON_INTERPRET=1, got one with it")

    rows = []
    for op in options.op or triton_modules():
        for arch in options.arch:
            for case in cases(op, arch):
                rows.append(inspect(op, case, arch))
    print(text_table(rows))
    for row in rows:
        for line in row.failed:
            print(f"FAIL {row.name}: {line}")
    print(f"{len(rows) - sum(bool(row.failed) for row in rows)} of {len(rows)} pass")
    if options.markdown:
        chosen = [f" --op {' '.join(options.op)}" if options.op else ""]
        chosen += [f" --arch {' '.join(map(str, options.arch))}" if options.arch != ARCHITECTURES else ""]
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        page = markdown(rows, "python -m hiar_kernels.compile_report" + "".join(chosen))
        options.markdown.write_text(page, encoding="utf-8")
        print(f"wrote {options.markdown}")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
