"""Two revisions in turn on one device: ratios with their spread, so that a speed claim is a paired one.

    python -m bench.rollout.ab 6a287b2 HEAD --order stream --order block_first       more examples: bench/README.md

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

from bench.lib.machine import CUDA, ROOT, environment, error_line, result_folder, revision, sources
from bench.rollout import ab_results

DRIVER = Path(__file__).with_name("ab_driver.py")
ORDERS = ("stream", "stream+fused", "stream+shared_keys", "block_first")
ORDERS += ("wavefront", "wavefront+fused", "wavefront+shared_keys")
FULL = {"model": "wan2.1-t2v-1.3b", "layers": None, "window": 21, "dtype": "bfloat16", "executor": "graph"}
SMALL = {"model": "toy", "layers": 2, "window": 6, "dtype": "float32", "executor": "eager"}
Sample = dict[str, Any]


class Failed(RuntimeError):
    """A side could not run a case; the run goes on with the next."""


class Side:
    """One revision in a folder, and its process."""

    def __init__(self, name: str, folder: Path, logs: Path) -> None:
        self.name, self.folder, self.log = name, folder.resolve(), logs / f"{name}.log"
        if not (self.folder / "hiar_model" / "__init__.py").is_file():
            raise SystemExit(f"{name}: {folder} holds no hiar_model: give the root of a checkout")
        self.process: subprocess.Popen[str] | None = None
        self.is_new = False
        self.about: dict[str, Any] = {"revision": revision(self.folder)}
        self.about |= {package: sources(self.folder / package) for package in ("hiar_kernels", "hiar_model")}
        paths = filter(None, (str(self.folder), os.environ.get("PYTHONPATH")))
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def start(self) -> None:
        """Start its process, unless it runs. It imports torch first, for seconds: nobody waits for that here."""
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=self.environment, cwd=self.log.parent,
            )  # fmt: skip
        self.is_new = True

    def introduce(self) -> None:
        """Ask a new process where its packages come from."""
        self.is_new = False
        self.about |= self.request(do="about")
        for folder in self.about.pop("packages"):
            if Path(folder) != self.folder:
                raise SystemExit(f"{self.name}: imported from {folder}, not from {self.folder}")

    def send(self, **request: Any) -> None:
        self.start()
        if self.is_new:
            self.introduce()
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        return {"error": f"died (exit status {self.process.returncode}): {last_line(self.log.read_text())}"}

    def result(self, answer: dict[str, Any]) -> Any:
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}")
        return answer["result"]

    def request(self, **request: Any) -> Any:
        self.send(**request)
        return self.result(self.receive())

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
            process = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment, cwd=out)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begun
        shutil.rmtree(out)
        if process.returncode:
            raise Failed(f"{self.name}: exit status {process.returncode}: {last_line(self.log.read_text())}")
        scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        return {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": wall, "rss_mib": used.ru_maxrss / scale}


def last_line(text: str) -> str:
    return next(iter(text.strip().splitlines()[-1:]), "no output").strip()


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {last_line(done.stderr)}")
    return done.stdout.strip()


@contextlib.contextmanager
def folders(a: argparse.Namespace, scratch: Path) -> Iterator[list[Path]]:
    """The two folders; revisions are checked out into ``scratch`` and removed at the end."""
    revisions, both = list(a.revisions), [a.a_dir, a.b_dir]
    if len(revisions) != both.count(None):
        raise SystemExit(f"give two revisions, --a-dir and --b-dir, or one of each; got {len(revisions)} revisions")
    with contextlib.ExitStack() as trees:
        for i in range(2):
            if both[i] is None:
                commit, tree = git("rev-parse", "--verify", f"{revisions.pop(0)}^{{commit}}"), scratch / f"tree-{i}"
                git("worktree", "add", "--detach", str(tree), commit)
                trees.callback(git, "worktree", "remove", "--force", str(tree))
                both[i] = tree
        yield both


def op_cases(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for op in a.op:
        for variant in a.variant or ["auto" if op.startswith("attention") else "triton"]:
            label = f"{op}, {a.direction}, {variant}"
            yield {"kind": "op", "label": label, "op": op, "variant": variant, "direction": a.direction}


def rollout_cases(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = {name: getattr(a, name) for name in (*FULL, "blocks", "height", "width")}
    for name in dict.fromkeys(a.order or ["stream"]):
        order, *flags = name.split("+")
        label = ", ".join([order, *flags, base["executor"]]).replace("_keys", " keys")
        variant = {"order": order, "pairs": "fused" in flags, "shared_keys": "shared_keys" in flags}
        yield {**base, "kind": "rollout", "label": label, **variant}


def cases(a: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, each with the label of its rows."""
    kinds = a.case or ["rollout"]
    if "command" in kinds and not a.command:
        raise SystemExit("--case command needs --command 'LINE'")
    if "op" in kinds and not a.op:
        raise SystemExit("--case op needs --op NAME, of the table in bench/ops/op_cases.py (--op 'attention: visit')")
    commands = ({"kind": "command", "label": line, "line": line} for line in a.command)
    by_kind = {"rollout": rollout_cases(a), "op": op_cases(a), "command": commands}
    return [case for kind in dict.fromkeys(kinds) for case in by_kind[kind]]


class Run:
    """The measuring of all cases, in turn."""

    def __init__(self, a: argparse.Namespace, sides: list[Side], scratch: Path) -> None:
        self.a, self.sides, self.scratch, self.begun = a, sides, scratch, time.monotonic()

    def late(self) -> bool:
        return time.monotonic() - self.begun > self.a.budget

    def log(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)

    def prepare(self, case: dict[str, Any]) -> list[Any]:
        """On both sides at once: most of it is the host's work."""
        for side in self.sides:
            side.start()
        for side in self.sides:
            side.send(do="prepare", case={**case, "folder": str(side.folder)})
        answers = [side.receive() for side in self.sides]  # of both, whatever the first one is
        return [side.result(answer) for side, answer in zip(self.sides, answers)]

    def once(self, case: dict[str, Any], side: Side) -> Sample:
        if case["kind"] == "command":
            return side.command(case["line"], self.scratch / f"out-{side.name}")
        return side.request(do="measure")

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """{"samples": {side: figures, one for each round}, ...}; a round that only B lacks is dropped."""
        row: dict[str, Any] = {**case, "samples": {"A": [], "B": []}}
        if case["kind"] == "command":
            for side in self.sides:
                self.once(case, side)  # reads the disk, writes byte code
        else:
            row["prepared"] = self.prepare(case)
            self.log(f"{case['label']}: prepared {json.dumps(row['prepared'])}")
        for done in range(self.a.rounds):
            if done and self.late():
                row["cut"] = f"{done} of {self.a.rounds} rounds within {self.a.budget:.0f} s"
                break
            samples = [self.once(case, side) for side in self.sides]
            for side, sample in zip(self.sides, samples):
                row["samples"][side.name].append(sample)
            self.log(f"{case['label']}: round {done + 1}: {'  '.join(map(ab_results.short, samples))}")
        try:
            for _ in range(self.a.traces if case["kind"] == "rollout" else 0):
                for side in self.sides:
                    parts = ab_results.parts(side.request(do="trace"), CUDA)
                    row.setdefault("traces", {}).setdefault(side.name, []).append(parts)
        except Failed as error:  # the rounds stand
            row["cut"] = f"no parts: {error}"
        return row

    def attempt(self, case: dict[str, Any]) -> dict[str, Any]:
        """The row of a case, measured or with its error."""
        try:
            return self.measure(case)
        except Failed as error:
            self.log(f"{case['label']}: {error}")
            return {**case, "error": str(error)}
        finally:
            for side in self.sides:
                if side.process is not None and side.process.poll() is None:
                    side.request(do="drop")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    option, size = parser.add_argument, FULL if CUDA else SMALL
    several: dict[str, Any] = {"action": "append", "default": []}
    option("revisions", nargs="*", metavar="REV", help="A, then B; those that no folder is given for")
    option("--a-dir", type=Path, help="folder that holds A already")
    option("--b-dir", type=Path, help="folder that holds B already")
    option("--case", **several, choices=("rollout", "op", "command"), help="none: rollout")
    option("--order", **several, choices=ORDERS, help="of a rollout; fused: fuse_cache_denoise; none: stream")
    option("--model", default=size["model"], help="of rollouts")
    option("--executor", default=size["executor"], help="eager, or graph: CUDA graphs")
    option("--dtype", default=size["dtype"], help="of weights and latents")
    option("--layers", type=int, default=size["layers"], help="of the network; None: all")
    option("--window", type=int, default=size["window"], help="latent frames that a block sees")
    option("--height", type=int, default=480, help="pixels")
    option("--width", type=int, default=832, help="pixels")
    option("--blocks", type=int, default=1, help="of a measurement of a rollout")
    option("--traces", type=int, default=1, help="blocks under the profiler, for the parts; 0: none")
    option("--op", **several, metavar="NAME", help="of bench/ops/op_cases.py")
    option("--variant", **several, help="of the op; none: triton, of attention auto")
    option("--direction", choices=("forward", "backward"), default="forward", help="of the op")
    option("--command", **several, metavar="LINE", help="{out}: an empty folder, {dir}: the revision's")
    option("--rounds", type=int, default=5, help="measurements of each side")
    option("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing more after so long")
    option("--results", type=Path, metavar="DIR", help="None: bench/results/..., for a rehearsal out/bench")
    return parser


def main() -> int:
    a = arguments().parse_args()
    for name, least in (("rounds", 1), ("blocks", 1), ("traces", 0)):
        if getattr(a, name) < least:
            raise SystemExit(f"--{name} must be at least {least}, got {getattr(a, name)}")
    todo = cases(a)
    about = environment("cuda" if CUDA else "cpu")
    in_process = any(case["kind"] != "command" for case in todo)
    rehearsal = in_process and not CUDA
    command = shlex.join(["python", "-m", "bench.rollout.ab", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ab-")))
        sides = [Side(name, x, scratch) for name, x in zip("AB", stack.enter_context(folders(a, scratch)))]
        stack.callback(lambda: [side.close() for side in sides])
        names = [side.about["revision"] if side.about["revision"] != "unknown" else side.folder.name for side in sides]
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"ab-{names[0]}-{names[1]}")
        folder = a.results or result_folder({**about, "revision": name}, rehearsal)
        run = Run(a, sides, scratch)
        for case in todo:
            late = bool(rows) and run.late()
            rows.append({**case, "error": f"not reached within {a.budget:.0f} s"} if late else run.attempt(case))
            result = {"environment": about, "command": command, "rehearsal": rehearsal}
            result["sides"] = {side.name: side.about for side in sides}
            page = ab_results.write({**result, "rows": rows}, folder)  # after each case: a crash loses one
    print("\n".join([*ab_results.table(rows), f"wrote {page}"]))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(error_line(error))
