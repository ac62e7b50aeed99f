"""What the benchmarks share: the device, its limits measured in the same run, and the table at the end.

pytest bench/ --benchmark-only          on a CUDA device: Wan 1.3B sizes, into bench/results/<gpu>/<date>-<revision>/
                                        without one: rehearsal at small sizes, its figures mean nothing; out/bench/

ops.md and ops.json hold every op, ops.png shows them, rollout.md and rollout.json are of whole rollouts, vae.md and
vae.json of the VAE. measured.json is hiar_kernels/attention/measured.json with this run's measurements in it, to be
copied there. With --resume FILE the rows of earlier runs in FILE are among them (resume.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import op_results
import rollout_results
import vae_results
from op_results import BENCH, CUDA, REHEARSAL, default_folder

pytest_plugins = ["resume"]
DURATION = (
    "all of it takes 180 s of CPU, 160 of them test_two_ranks_on_two_cores, which says how far it is "
    "and is right on idle cores alone (-k 'not two_ranks' leaves it out)"
)
# what names a row -> who tells and writes such rows
TABLES = {"op": op_results, "rollout": rollout_results, "vae": vae_results}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="DIR", help="where the tables go (default: see conftest.py)")


def pytest_report_header() -> str:
    if CUDA:
        return f"bench: {torch.cuda.get_device_name()}, Wan 1.3B sizes"
    return f"bench: {REHEARSAL}\nbench: {DURATION}"


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """What a large matmul and a large copy reach here: FLOP/s and bytes/s."""
    n, size = (8192, 1 << 30) if CUDA else (128, 1 << 20)
    a, b = (torch.randn(n, n, device=BENCH.device).to(torch.bfloat16) for _ in range(2))
    x, y = (torch.zeros(size, dtype=torch.uint8, device=BENCH.device) for _ in range(2))
    found = {}
    for unit, work, run in (("flop", 2.0 * n**3, lambda: a @ b), ("bytes", 2.0 * size, lambda: y.copy_(x))):
        taken = BENCH.milliseconds(run)
        found[unit] = work / (taken[len(taken) // 2] / 1e3)
    return found


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    case = getattr(item, "callspec", None)
    if report.failed and case is not None and "op" in case.params:
        said = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr).strip().splitlines()[-1]
        labels = {"op": case.params["op"].label, "pass": case.params["direction"], "way": case.params["way"]}
        report.user_properties.append(("row", {**labels, "error": said[:200]}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run: Any = config.pluginmanager.get_plugin("resume-run")
    rows = [] if run is None else run.rows()
    about, folder = (None, None) if run is None else (run.journal.about, config.getoption("results"))
    for kind, results in TABLES.items():
        found = [row for row in rows if kind in row]
        found = vae_results.with_vae(found, rows) if kind == "rollout" else found
        if found:
            terminalreporter.section(f"{kind}s" if CUDA else f"{kind}s, {REHEARSAL}")
            for line in results.table(found):
                terminalreporter.write_line(line)
            terminalreporter.write_line(f"wrote {results.write(found, about, folder or default_folder(about))}")
