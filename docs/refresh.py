"""Renews the tables and pictures that commands print into README and docs/, or tells which of them are stale.

    make docs-refresh    (python docs/refresh.py)            write them anew
    make docs-check      (python docs/refresh.py --check)    exit status 1 and a line for everything that is stale

Between `<!-- table NAME -->` and `<!-- end -->` stands a table of bench.studies.parallel, between
`<!-- COMMAND -->` and `<!-- end -->` what a command of this repository prints, less the paragraphs that an earlier
command of the page printed word for word. Figures that stand in a sentence are only checked: change such a sentence by
hand.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pictures import pictures

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this repository's packages, from wherever it is run
BLOCK = re.compile(r"<!-- (table|hiar|python) (.*?) -->\n.*?<!-- end -->", re.DOTALL)
RENEW = "run make docs-refresh"


def pages(root: Path) -> list[Path]:
    """Those that may hold generated text."""
    return [root / "README.md", *sorted(root.glob("docs/**/*.md"))]


def printed(program: str, words: str, root: Path) -> str:
    """What a command prints, run in the root of the repository.

    Raises:
        ValueError: it fails; its last line says why.
    """
    command = ["-m", "hiar_model", *shlex.split(words)] if program == "hiar" else shlex.split(words)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it says nothing"]
        raise ValueError(f"`{program} {words}` fails with exit status {done.returncode}: {said[-1]}")
    return done.stdout.strip()


@functools.cache
def table(name: str) -> str:
    """A table of bench.studies.parallel.

    Raises:
        ValueError: there is none of this name.
    """
    from bench.studies.parallel import quoted_tables

    tables = quoted_tables()
    if name not in tables:
        raise ValueError(f"table {name!r} is unknown: give one of {', '.join(tables)}")
    return "\n".join(tables[name]())


def refreshed(page: str, root: Path = ROOT) -> str:
    """The text of a page with its generated blocks made anew."""
    before: set[str] = set()

    def made(match: re.Match[str]) -> str:
        program, words = match.groups()
        if program == "table":
            text = table(words)
        else:
            paragraphs = printed(program, words, root).split("\n\n")
            text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in before)
            before.update(paragraphs)
        return f"<!-- {program} {words} -->\n\n{text}\n\n<!-- end -->"

    return BLOCK.sub(made, page)


def sentences() -> Iterator[tuple[str, str]]:
    """(page, what it must say) where a sentence quotes a figure of the simulator or of a measurement."""
    from bench.lib.gpu_tables import stage_times
    from bench.lib.strategies import machines
    from bench.studies.parallel import gain_table
    from hiar_model.schedule.costs import LINKS, exchanged_bytes, measured, task_flop, unit_costs

    parallel, machine = (
        "docs/evidence/parallel.md",
        next(m for m in machines(links=("pcie",)) if m.name == "wan2.1-t2v-1.3b"),
    )
    costs = machine.costs
    short = [gain_table(each, (4,), (7,))[2].split("|")[-2].strip() for each in (costs, unit_costs())]
    for folder in sorted(ROOT.glob("bench/results/toy-training*")):  # every comparison is shown
        yield "docs/evidence/runs.md", f"bench/results/{folder.name} -->"
    yield parallel, f"1.3B, 4 steps, 7 blocks: {short[0]} instead of {short[1]}"
    hop, shared = costs.latents.nbytes / 1e6, exchanged_bytes(machine.config, machine.geometry, 4) / 1e6
    yield parallel, f"sends {hop:.1f} MB per block and hop, the other {shared:.0f} MB per GPU and forward (1.3B)"
    yield parallel, f"finishes a block every {1e3 * costs.decode:g} ms: {12 / costs.decode:.0f} fps at most"
    yield parallel, f"only replicas exceed {12 / costs.decode:.0f} fps"
    file = stage_times()
    if file is None:
        return
    config, geometry, timed = measured(file, LINKS["pcie"])
    frame, denoise, cache = geometry.frame_tokens(config), timed.curve("denoise", 0), timed.curve("cache", 0)
    whole, own = (task_flop(config, 3 * frame, seen * frame) / denoise(seen) / 1e12 for seen in (21, 3))
    yield parallel, f"took {1e3 * denoise(21):.1f} ms ({round(whole, -1):.0f} TFLOP/s)"
    yield parallel, f"own 3 frames {1e3 * denoise(3):.1f} ms ({round(own, -1):.0f} TFLOP/s"
    yield parallel, f"a cache task {1e3 * cache(21):.1f} and {1e3 * cache(3):.1f} ms"


def first_difference(old: str, new: str) -> str:
    """Where two texts part, as the old one has it."""
    was, now = old.splitlines(), new.splitlines()
    number = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    return f"line {number + 1}: {was[number] if number < len(was) else 'the end'}"


def stale(root: Path, write: bool = False) -> list[str]:
    """A line for everything that is not as its command prints it; with ``write`` it is so afterwards."""
    now = {root / "docs" / "pictures" / name: svg for name, svg in pictures().items()}
    problems = []
    for page in pages(root):
        try:
            now[page] = refreshed(page.read_text(encoding="utf-8"), root)
        except ValueError as error:
            problems.append(f"{page.relative_to(root)}: {error}")
    for path, text in now.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != text and write:
            path.write_text(text, encoding="utf-8")
            print(f"renewed {path.relative_to(root)}")
        elif old != text:
            problems.append(f"{path.relative_to(root)} is stale, {RENEW}; first at {first_difference(old, text)}")
    for name, text in sentences():
        if text not in " ".join((root / name).read_text(encoding="utf-8").split()):
            problems.append(f"{name} does not say what is computed now, change it by hand: {text!r}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is stale")
    problems = stale(ROOT, write=not parser.parse_args().check)
    print("\n".join(problems) if problems else "README and docs/ are as their commands print them")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
