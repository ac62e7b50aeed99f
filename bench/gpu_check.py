"""All that one GPU has to say of a revision, in at most seven minutes of a machine that is available for minutes only.

    python -m bench.gpu_check BEFORE OUT                             the parts of DEFAULT, at most 415 s
    python -m bench.gpu_check BEFORE OUT --part tests ops rollouts   without the 8-bit kernel's own, at most 360 s
    python -m bench.gpu_check BEFORE OUT --part precisions decoder   rollouts in 8 bits; the small decoder: 265 s
    python -m bench.gpu_check BEFORE OUT --rehearse [--part ...]     without a GPU: the same at small sizes

BEFORE is a folder with another revision, OUT gets logs and results. Needs torch, triton, pytest, pytest-benchmark; with
pytest-xdist the tests share the GPU; tests/gpu/test_serve_cuda.py needs av, as a wheel where it is missing.
hiar_kernels/_cuda_ops.* are built if they are not there: carry them along to save the time. Every part has its limit,
and what it printed so far is kept. A rehearsal collects the tests of a GPU without running them, and runs all else on
the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"build": 20, "variants": 55, "tests": 165, "ops": 60, "rollouts": 115, "precisions": 225, "decoder": 40}
DEFAULT = ("variants", "tests", "ops", "rollouts")
BEFORE_KERNELS = ("variants", "tests")  # parts that need the CUDA extension
WORKERS = 14
PATIENCE = 8.0  # seconds for an interrupted process to say what it knows
STUCK = 45  # seconds after which a test's stack is printed

FP8 = "tests/gpu/test_attention_fp8_gluon.py"
VARIANTS = ("pinned", "3 stages", "wide tails", "polynomial", "polynomial 3 stages")
CASES = ("less than a group", "whole blocks only", "half empty", "two tasks in a row")
SHAPES = ("task", "pair")
OPS = ("pointwise", "attention_fp8", "linear", "attention-visit", "attention-pair")
PEERS = ("flex", "flash", "efficient", "compiled", "GELU", "eager")  # measured before, and they do not change
ORDERS = ("stream", "block_first", "wavefront+fused", "stream+shared_keys")
E4M3 = "float8_e4m3fn"
ATTENTION, LINEAR = {"kv_dtype": E4M3, "attention_dtype": E4M3, "attention_impl": "gluon"}, {"linear_dtype": E4M3}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {}, "attention": ATTENTION, "linear": LINEAR, "all": ATTENTION | LINEAR,
    "int8": {"linear_dtype": "int8"},
}  # fmt: skip
"""What is in 8 bits -> fields of :class:`hiar_model.benchmark.setting.Setting`."""
SUMMARY = re.compile(r"^(\||FAILED|ERROR|E  |- |=+ .* in [0-9]|Timeout)")


@dataclass
class Step:
    """A process, its limit in seconds, and its log: OUT/NAME.log."""

    name: str
    seconds: float
    words: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    begun: float = 0.0

    def start(self, out: Path) -> Step:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        own = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([paths, os.environ.get("PYTHONPATH", "")])}
        self.begun, self.log = time.monotonic(), out / f"{self.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.words], stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, **own, **self.environment}, preexec_fn=os.setpgrp,
            )  # fmt: skip
        return self

    def finish(self) -> int:
        """Wait, stop it at its limit, say how it went: its exit status."""
        assert self.process is not None
        code, left = None, self.begun + self.seconds - time.monotonic()
        for kind, patience in ((None, max(left, 0.0)), (signal.SIGINT, PATIENCE), (signal.SIGKILL, PATIENCE)):
            if kind is not None:  # to pytest's workers too; first so that it says what it knows
                self.kill(kind)
            try:
                code = self.process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        self.kill(signal.SIGKILL)  # whoever is left
        late = time.monotonic() - self.begun > self.seconds
        code = 124 if late or code is None else code
        lines = self.log.read_text(errors="replace").splitlines()
        print(f"== {self.name}: exit status {code}, {time.monotonic() - self.begun:.0f} of {self.seconds:.0f} s")
        shown = [line for line in lines if SUMMARY.match(line)][-40:] or (lines[-8:] if code else [])
        print("\n".join(line[:200] for line in shown), flush=True)
        return code

    def kill(self, kind: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, kind)


def of_variant(variant: str) -> list[str]:
    return [f"{FP8}::test_variants_and_the_logsumexp[{case}-{variant}]" for case in CASES]


def left_out(failed: Iterable[str]) -> list[str]:
    """What is neither tested further nor measured where these variants failed; the pinned one is the kernel."""
    ids: list[str] = []
    for variant in failed:
        ids += [FP8] if variant == "pinned" else of_variant(variant)
        name = "gluon" if variant == "pinned" else f"gluon_{variant.replace(' ', '_')}"
        ids += [f"bench/ops/bench_ops.py::test_op[attention_fp8-{shape}-forward-{name}]" for shape in SHAPES]
    return ids


def chosen_ops(rehearsal: bool) -> str:
    """An expression for pytest's -k; on a CPU eager is all that there is."""
    return " and not ".join([f"({' or '.join(OPS)})", *(peer for peer in PEERS if not rehearsal or peer != "eager")])


class Check:
    """The parts, one after the other; ``wrong`` counts what failed."""

    def __init__(self, before: Path, out: Path, rehearsal: bool) -> None:
        self.before, self.out, self.rehearsal = before, out, rehearsal
        self.wrong = 0
        self.failed: list[str] = []  # variants

    def step(self, part: str, words: Sequence[str], name: str = "", **environment: str) -> Step:
        seconds = SECONDS[part] * (20 if self.rehearsal else 1)
        return Step(name or part, seconds, words, environment).start(self.out)

    def finish(self, step: Step) -> int:
        code = step.finish()
        self.wrong += code != 0
        return code

    def pytest(self, *words: str) -> list[str]:
        return ["-m", "pytest", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={STUCK}", *words]

    def deselect(self) -> list[str]:
        return [word for test in left_out(self.failed) for word in ("--deselect", test)]

    def build(self) -> None:
        if (ROOT / "hiar_kernels" / "_cuda_ops.so").exists() or self.rehearsal:
            return
        self.finish(self.step("build", ["hiar_kernels/common/extension.py"], HIAR_CUDA_ARCHS="90a"))

    def variants(self) -> None:
        """Each in a process of its own, side by side: a kernel that nobody has run may hang."""
        how = ["--collect-only", "-q"] if self.rehearsal else ["-v", "-x"]
        steps = []
        for i, variant in enumerate(VARIANTS):
            words = self.pytest(*how, "-m", "gpu", *of_variant(variant))
            steps.append(self.step("variants", words, f"variant-{i}"))
        for variant, step in zip(VARIANTS, steps, strict=True):
            print(f"8-bit attention, {variant}:")
            if self.finish(step):
                self.failed.append(variant)

    def tests(self) -> None:
        together = ["-n", str(WORKERS), "--dist", "worksteal"] if find_spec("xdist") and not self.rehearsal else []
        how = ["--collect-only"] if self.rehearsal else []
        words = self.pytest("-q", *how, *together, *self.deselect(), "-m", "gpu", "tests/gpu", "tests/interpreter")
        self.finish(self.step("tests", words))

    def benchmark(self, part: str, path: str, chosen: str, *more: str) -> None:
        words = ["-m", "pytest", "-q", "-p", "bench.lib.resume", "-p", "pytest_benchmark.plugin", "--benchmark-only"]
        words += ["--resume", str(self.out / f"{part}.jsonl"), "--results", str(self.out / part), path, "-k", chosen]
        words += ["--budget", str(SECONDS[part] - 12)] if not self.rehearsal else []
        self.finish(self.step(part, [*words, *more], PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"))

    def ops(self) -> None:
        self.benchmark("ops", "bench/ops/bench_ops.py", chosen_ops(self.rehearsal), *self.deselect())

    def decoder(self) -> None:
        self.benchmark("decoder", "bench/vae/bench_vae.py", "small_vae")

    def rollouts(self) -> None:
        orders = [word for order in ORDERS for word in ("--order", order)]
        words = ["-m", "bench.rollout.ab", "--a-dir", str(self.before), "--b-dir", ".", *orders]
        words += ["--rounds", "1" if self.rehearsal else "4", "--results", str(self.out / "ab")]
        words += [] if self.rehearsal else ["--budget", str(SECONDS["rollouts"] - 25)]
        self.finish(self.step("rollouts", words))

    def precisions(self) -> None:
        for name in PRECISIONS:
            how = ["--rehearse"] if self.rehearsal else []
            words = ["-m", "bench.gpu_check", str(self.before), str(self.out), "--precision", name, *how]
            step = self.step("precisions", words, f"precision-{name}")
            step.seconds /= len(PRECISIONS)
            self.finish(step)


def measure(name: str, out: Path, rehearsal: bool) -> None:
    """A whole rollout as ``hiar bench`` measures it, which needs more packages than a machine of the benches has."""
    import torch

    from hiar_model.benchmark.result import figures
    from hiar_model.benchmark.run import bench
    from hiar_model.benchmark.setting import Setting
    from hiar_model.io.atomic import atomic_write

    options: dict[str, Any] = {"blocks": 4, "repeats": 2, "device": torch.device("cuda"), **PRECISIONS[name]}
    if rehearsal:
        options |= {"blocks": 1, "repeats": 1, "device": torch.device("cpu"), "layers": 1, "height": 32, "width": 32}
        options |= {"rollout": {"window_frames": 6}, "attention_impl": "auto"}
    result = bench(Setting("wan2.1-t2v-1.3b", **options), plain=False, parts=not rehearsal)
    atomic_write(out / f"precision-{name}.json", json.dumps(result, indent=1) + "\n")
    for what, value, unit in figures(result):
        print(f"- {what}: {value:.4g} {unit}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a folder with another revision of the project")
    parser.add_argument("out", type=Path, metavar="OUT", help="where logs and results go")
    parser.add_argument("--part", nargs="+", choices=[x for x in SECONDS if x != "build"], default=list(DEFAULT))
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at small sizes")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="measure one rollout in this process")
    return parser


def main() -> int:
    a = arguments().parse_args()
    if not (a.before / "hiar_model").is_dir():
        raise SystemExit(f"BEFORE must be a folder with a revision of the project, got {a.before}")
    before, out = a.before.resolve(), a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if a.precision is not None:
        measure(a.precision, out, a.rehearse)
        return 0
    check = Check(before, out, a.rehearse)
    if set(a.part) & set(BEFORE_KERNELS):
        check.build()
    for part in a.part:
        getattr(check, part)()
    print(f"{check.wrong} steps failed" if check.wrong else "all steps passed")
    return int(check.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
