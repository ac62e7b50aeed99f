"""Two revisions in turn on one device: ratios with their spread, so that a speed claim is a paired one.

    python bench/ab.py 6a287b2 HEAD --case rollout --order stream --order block_first
    python bench/ab.py 6a287b2 HEAD --case op --op "attention: visit" --way auto
    python bench/ab.py --a-dir ../before --b-dir . --case command --command "python -m hiar_model generate 'a red circle
        moving right' -o {out}/v.mp4 --num-frames 48"

A revision is checked out as a git worktree for the time of the run; a folder that holds one already (``--a-dir``) needs
no git. Each side is a process of its own with its own packages; both stay up, and A and B are measured in turn, ABAB...
Without a GPU rollouts and ops run at toy sizes: a rehearsal. Commands are measured in CPU seconds, wherever they run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import ab_results
from measure import environment, line_of, result_folder, sources

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DRIVER = Path(__file__).with_name("ab_driver.py")
ORDERS = ("stream", "block_first", "wavefront")
WAYS = ("triton", "auto")  # of an op, where none is asked for: the first for pointwise ops, the last for attention
Sample = dict[str, Any]


class Failed(RuntimeError):
    """A side could not do what it was asked; the run goes on with the next case."""


class Side:
    """One revision in a folder, and its process."""

    def __init__(self, name: str, folder: Path, logs: Path) -> None:
        self.name, self.folder, self.log = name, folder.resolve(), logs / f"{name}.log"
        if not (self.folder / "hiar_model" / "__init__.py").is_file():
            raise SystemExit(f"{name}: {folder} holds no hiar_model: give the root of a checkout")
        self.process: subprocess.Popen[str] | None = None
        self.about: dict[str, Any] = {"revision": revision_of(self.folder)}
        self.about |= {package: sources(self.folder / package) for package in ("hiar_kernels", "hiar_model")}

    def environment(self) -> dict[str, str]:
        before = os.environ.get("PYTHONPATH")
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(self.folder), before)))}

    def start(self) -> None:
        self.close()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=self.environment(), cwd=self.log.parent,
            )  # fmt: skip
        self.about |= self.ask(do="about")
        elsewhere = [folder for folder in self.about.pop("packages") if Path(folder) != self.folder]
        if elsewhere:
            raise SystemExit(f"{self.name}: imported from {elsewhere[0]}, not from {self.folder}")

    def send(self, **request: Any) -> None:
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Failed(f"{self.name} died (exit status {self.process.returncode}): {last_line(self.log.read_text())}")
        found = json.loads(line)
        if "error" in found:
            raise Failed(f"{self.name}: {found['error']}")
        return found["found"]

    def ask(self, **request: Any) -> Any:
        self.send(**request)
        return self.answer()

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
        self.process = None

    def command(self, line: str, out: Path) -> Sample:
        """CPU seconds (user and system, children too), wall seconds and the largest resident set of a command."""
        words = [word.replace("{out}", str(out)).replace("{dir}", str(self.folder)) for word in shlex.split(line)]
        words[:1] = [sys.executable] if words[0] in ("python", "python3") else words[:1]
        out.mkdir()
        begun = time.perf_counter()
        with self.log.open("w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment(), cwd=out)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begun
        shutil.rmtree(out)
        if process.returncode:
            raise Failed(f"{self.name}: exit status {process.returncode}: {last_line(self.log.read_text())}")
        scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        return {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": wall, "rss_mib": used.ru_maxrss / scale}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def git(*words: str, folder: Path = ROOT) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {last_line(done.stderr)}")
    return done.stdout.strip()


def revision_of(folder: Path) -> str:
    """Of a checkout, "-dirty" where something was changed; "unknown" for a plain folder."""
    try:
        if Path(git("rev-parse", "--show-toplevel", folder=folder)).resolve() != folder:
            return "unknown"  # of a repository around it
        dirty = git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results", folder=folder)
        return git("rev-parse", "--short=10", "HEAD", folder=folder) + ("-dirty" if dirty else "")
    except (SystemExit, OSError):
        return "unknown"


@contextlib.contextmanager
def folders(a: argparse.Namespace, scratch: Path) -> Iterator[list[Path]]:
    """The two folders; revisions are checked out into ``scratch`` and removed at the end."""
    revisions, found, trees = list(a.revisions), [], []
    if len(revisions) != 2 - sum(folder is not None for folder in (a.a_dir, a.b_dir)):
        raise SystemExit(f"give two revisions, --a-dir and --b-dir, or one of each; got {len(revisions)} revisions")
    try:
        for name, folder in (("A", a.a_dir), ("B", a.b_dir)):
            if folder is None:
                commit = git("rev-parse", "--verify", f"{revisions.pop(0)}^{{commit}}")
                folder = scratch / f"tree-{name}"
                git("worktree", "add", "--detach", str(folder), commit)
                trees.append(folder)
            found.append(folder)
        yield found
    finally:
        for tree in trees:
            git("worktree", "remove", "--force", str(tree))


def cases(a: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, each with the label of its rows."""
    found: list[dict[str, Any]] = []
    for kind in dict.fromkeys(a.case or ["rollout"]):
        if kind == "command":
            if not a.command:
                raise SystemExit("--case command needs --command 'LINE'")
            found += [{"kind": kind, "label": line, "line": line} for line in a.command]
        elif kind == "op":
            if not a.op:
                raise SystemExit(
                    "--case op needs --op NAME, of the table in bench/op_cases.py (--op 'attention: visit')"
                )
            for op in a.op:
                for way in a.way or [WAYS[op.startswith("attention")]]:
                    label = f"{op}, {a.direction}, {way}"
                    found.append({"kind": kind, "label": label, "op": op, "way": way, "direction": a.direction})
        else:
            small = {} if CUDA else {"model": "toy", "layers": 2, "window": 6, "dtype": "float32", "executor": "eager"}
            full = {"model": "wan2.1-t2v-1.3b", "layers": None, "window": 21, "dtype": "bfloat16", "executor": "graph"}
            asked = {name: getattr(a, name) for name in full if getattr(a, name) is not None}
            base = {**full, **small, **asked, "kind": kind, "blocks": a.blocks, "height": a.height, "width": a.width}
            variants = [(order, False, False) for order in a.order or ([] if a.pairs or a.shared_keys else ["stream"])]
            variants += [(order, True, False) for order in a.pairs] + [(order, False, True) for order in a.shared_keys]
            for order, pairs, shared in dict.fromkeys(variants):
                label = f"{order}{', pairs' if pairs else ''}{', shared keys' if shared else ''}, {base['executor']}"
                found.append({**base, "label": label, "order": order, "pairs": pairs, "shared_keys": shared})
    return found


class Run:
    """The measuring of all cases, in turn."""

    def __init__(self, a: argparse.Namespace, sides: list[Side], scratch: Path) -> None:
        self.a, self.sides, self.scratch, self.begun = a, sides, scratch, time.monotonic()

    def late(self) -> bool:
        return self.a.budget is not None and time.monotonic() - self.begun > self.a.budget

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)

    def prepare(self, case: dict[str, Any], sides: list[Side]) -> list[Any]:
        """On all sides at once: most of it is the host's work."""
        for side in sides:
            side.send(do="prepare", case={**case, "folder": str(side.folder)})
        found, errors = [], []
        for side in sides:
            try:
                found.append(side.answer())
            except Failed as error:
                errors.append(str(error))
        if errors:
            raise Failed("; ".join(errors))
        return found

    def once(self, case: dict[str, Any], side: Side) -> Sample:
        if case["kind"] == "command":
            return side.command(case["line"], self.scratch / f"out-{side.name}")
        if self.a.fresh:
            side.start()
            self.prepare(case, [side])
        return side.ask(do="measure")

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """{"samples": {side: figures, one for each round}, ...}; a round that only B lacks is dropped."""
        row: dict[str, Any] = {**case, "samples": {"A": [], "B": []}}
        if case["kind"] == "command":
            for side in self.sides:
                self.once(case, side)  # reads the disk, writes byte code
        elif not self.a.fresh:
            row["prepared"] = self.prepare(case, self.sides)
            self.say(f"{case['label']}: prepared {json.dumps(row['prepared'])}")
        for done in range(self.a.rounds):
            if done and self.late():
                row["cut"] = f"{done} of {self.a.rounds} rounds within {self.a.budget:.0f} s"
                break
            found = [self.once(case, side) for side in self.sides]
            for side, sample in zip(self.sides, found):
                row["samples"][side.name].append(sample)
            self.say(f"{case['label']}: round {done + 1}: {'  '.join(ab_results.short(s) for s in found)}")
        try:
            for _ in range(self.a.traces if case["kind"] == "rollout" else 0):
                for side in self.sides:
                    found = ab_results.parts(side.ask(do="trace"), CUDA)
                    row.setdefault("traces", {}).setdefault(side.name, []).append(found)
        except Failed as error:  # what the clock showed stands
            row["cut"] = f"no parts: {error}"
        return row

    def all(self, todo: list[dict[str, Any]], write: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for case in todo:
            if rows and self.late():
                rows.append({**case, "error": f"not reached within {self.a.budget:.0f} s"})
                continue
            try:
                rows.append(self.measure(case))
            except Failed as error:
                rows.append({**case, "error": str(error)})
                self.say(f"{case['label']}: {error}")
            for side in self.sides:
                if side.process is not None and side.process.poll() is None:
                    side.ask(do="drop")
            write(rows)  # what is done is kept, whatever comes next
        return rows


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Two revisions in turn on one device.", allow_abbrev=False)
    parser.add_argument("revisions", nargs="*", metavar="REV", help="A, then B; those that no folder is given for")
    parser.add_argument("--a-dir", type=Path, help="folder that holds A already")
    parser.add_argument("--b-dir", type=Path, help="folder that holds B already")
    parser.add_argument("--case", action="append", choices=("rollout", "op", "command"), help="default: rollout")
    parser.add_argument("--order", action="append", choices=ORDERS, help="a rollout in this order (default: stream)")
    parser.add_argument(
        "--pairs", action="append", nargs="?", const="wavefront", default=[], choices=ORDERS, metavar="ORDER",
        help="a rollout with fused cache and denoise tasks (default: wavefront)",
    )  # fmt: skip
    parser.add_argument(
        "--shared-keys", action="append", nargs="?", const="stream", default=[], choices=ORDERS[::2], metavar="ORDER",
        help="a rollout with the next step's keys (default: stream)",
    )  # fmt: skip
    parser.add_argument("--model", help="default: wan2.1-t2v-1.3b, on a CPU the toy")
    parser.add_argument("--executor", help="default: graph, on a CPU eager (recorded: a rehearsal of graph)")
    parser.add_argument("--dtype", help="default: bfloat16, on a CPU float32")
    parser.add_argument("--layers", type=int, help="of the network; default: all, on a CPU 2")
    parser.add_argument("--window", type=int, help="latent frames that a block sees; default: 21, on a CPU 6")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832, help="pixels")
    parser.add_argument("--blocks", type=int, default=1, help="of a measurement of a rollout")
    parser.add_argument("--traces", type=int, default=1, help="blocks under the profiler, for the parts; 0: none")
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="of bench/op_cases.py")
    parser.add_argument("--way", action="append", default=[], help="of the op; default: triton, of attention auto")
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward")
    parser.add_argument(
        "--command", action="append", metavar="LINE", help="{out}: an empty folder, {dir}: the revision's"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--fresh", action="store_true", help="a new process for every measurement")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing more after so long")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="default: bench/results/..., a rehearsal: out/bench"
    )
    return parser


def main() -> int:
    a = arguments().parse_args()
    for name, least in (("rounds", 1), ("blocks", 1), ("traces", 0)):
        if getattr(a, name) < least:
            raise SystemExit(f"--{name} must be at least {least}, got {getattr(a, name)}")
    todo = cases(a)
    about = environment("cuda" if CUDA else "cpu")
    rehearsal = not CUDA and any(case["kind"] != "command" for case in todo)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ab-")))
        sides = [Side(name, x, scratch) for name, x in zip("AB", stack.enter_context(folders(a, scratch)))]
        stack.callback(lambda: [side.close() for side in sides])
        if not a.fresh and any(case["kind"] != "command" for case in todo):
            for side in sides:
                side.start()
        names = [side.about["revision"] if side.about["revision"] != "unknown" else side.folder.name for side in sides]
        named = re.sub(r"[^A-Za-z0-9.-]+", "-", f"ab-{names[0]}-{names[1]}")
        folder = a.results or (ROOT / "out" / "bench" if rehearsal else result_folder({**about, "revision": named}))
        kept = {"environment": about, "command": shlex.join(["python", "bench/ab.py", *sys.argv[1:]]),
                "rehearsal": rehearsal}  # fmt: skip

        def write(rows: list[dict[str, Any]]) -> None:
            told = {side.name: side.about for side in sides}
            ab_results.write({**kept, "sides": told, "rows": rows}, folder)

        rows = Run(a, sides, scratch).all(todo, write)
    print("\n".join(ab_results.table(rows)))
    print(f"wrote {folder / 'ab.md'}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(line_of(error))
