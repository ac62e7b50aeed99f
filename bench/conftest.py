"""What the pytest benchmarks share: the device, its limits measured in the same run, and the tables at the end.

On a CUDA device: Wan 1.3B's sizes; without one a rehearsal at small sizes, into out/bench/. See README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.machine import CUDA, result_folder
from bench.lib.measure import default_bench, large_copy, large_matmul, percentiles
from bench.ops import bench_ops
from bench.rollout import bench_rollout
from bench.vae import bench_vae

pytest_plugins = ["bench.lib.resume"]
REHEARSAL = "REHEARSAL at small sizes on a CPU: these figures mean nothing, only the path was tried"
DURATION = (
    "all of it takes 180 s of CPU, 160 of them test_two_ranks_on_two_cores, which says how far it is "
    "and is right on idle cores alone (-k 'not two_ranks' leaves it out)"
)
TABLES = {"op": bench_ops, "rollout": bench_rollout, "vae": bench_vae}  # the key that such rows have


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="DIR", help="where the tables go (default: see conftest.py)")


def pytest_configure() -> None:
    torch._dynamo.config.recompile_limit = 256  # every shape and mask is a compilation of its own,
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # and eager must not be measured as if compiled


def pytest_report_header() -> str:
    if CUDA:
        return f"bench: {torch.cuda.get_device_name()}, Wan 1.3B sizes"
    return f"bench: {REHEARSAL}\nbench: {DURATION}"


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """What a large matmul and a large copy reach here: FLOP/s and bytes/s."""
    bench = default_bench()
    cases = {"flop": large_matmul(bench, 8192 if CUDA else 128), "bytes": large_copy(bench, 1024 if CUDA else 1)}
    return {unit: case[unit] / percentiles(bench.milliseconds(case["run"]))[1] * 1e3 for unit, case in cases.items()}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    case = getattr(item, "callspec", None)
    if report.failed and case is not None and "op" in case.params:
        line = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr).strip().splitlines()[-1]
        labels = {"op": case.params["op"].label, "pass": case.params["direction"], "variant": case.params["variant"]}
        report.user_properties.append(("row", {**labels, "error": line[:200]}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run: Any = config.pluginmanager.get_plugin("resume-run")
    every = [] if run is None else run.rows()
    for kind, results in TABLES.items():
        rows = [row for row in every if kind in row]
        rows = bench_vae.with_vae(rows, every) if kind == "rollout" else rows
        if rows:
            about = run.journal.about
            page = results.write(rows, about, config.getoption("results") or result_folder(about, rehearsal=not CUDA))
            terminalreporter.section(f"{kind}s" if CUDA else f"{kind}s, {REHEARSAL}")
            for line in (*results.table(rows), f"wrote {page}"):
                terminalreporter.write_line(line)
