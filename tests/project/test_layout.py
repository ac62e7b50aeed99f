"""The shape of the source tree: imports run one way and in no circle, implementations of an op do not know each other,
files stay short.

Everything is read from the syntax tree, function-level imports included, so nothing has to be importable. The functions
take the root of a tree and return the problems they find as lines; the last tests hand them trees that are wrong.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hiar_kernels", "hiar_model")
HERE = "tests/project/test_layout.py"
SETTERS = ("setattr", "patch", "object")  # of monkeypatch and unittest.mock
OF_ALL_THREADS = {"time", "os", "shutil", "socket", "tempfile", "threading"}

# Lowest first: a file imports from its own unit and from those above it in this list. A unit is a folder or a file of
# hiar_model, all of hiar_kernels, or hiar_model/__init__.py itself, which gives the public names.
UNITS = (
    "hiar_kernels", "hiar_model.common", "hiar_model.version", "hiar_model.config", "hiar_model.io",
    "hiar_model.schedule", "hiar_model.toy", "hiar_model.models", "hiar_model.distributed", "hiar_model.rollout",
    "hiar_model.evaluation", "hiar_model.planning", "hiar_model.pipelines", "hiar_model.serve", "hiar_model.benchmark",
    "hiar_model.integrations", "hiar_model.train", "hiar_model", "hiar_model.cli", "hiar_model.__main__",
)  # fmt: skip
IMPLEMENTATIONS = {"reference", "triton_fwd", "triton_bwd", "cuda"}  # file names inside the folder of an op
LONGEST_FILE = 500
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h"}
NOT_OURS = {"build", "dist", "out", "runs"}
TIERS = {"cpu", "interpreter", "compile", "browser", "gpu"}
NOT_AT_IMPORT = ("triton", "diffusers", "transformers", "flash_attn", "xformers", "gguf")


def sources(root: Path) -> Iterator[Path]:
    """Every source file of the tree, as a path relative to `root`; hidden and generated folders are left out."""
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(d for d in inside if d[0] != "." and d not in NOT_OURS and not d.endswith(".egg-info"))
        yield from (Path(folder, name).relative_to(root) for name in sorted(files) if Path(name).suffix in SOURCES)


@lru_cache(maxsize=8)
def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the two packages."""
    found = {}
    for path in sources(root):
        if path.suffix == ".py" and path.parts[0] in PACKAGES:
            parts = path.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@lru_cache(maxsize=2000)
def imports(root: Path, module: str) -> set[str]:
    """What a module imports, as dotted names: ours as they stand in `modules`, others by their first part."""
    ours = modules(root)
    path = ours[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def add(name: str) -> None:
        if name.partition(".")[0] not in PACKAGES:
            found.add(name.partition(".")[0])
            return
        while name not in ours and "." in name:  # the last part is an attribute, not a module
            name = name.rpartition(".")[0]
        found.add(name)

    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                add(f"{name}.{alias.name}" if alias.name != "*" else name)
    return found - {module}


def unit(module: str) -> str:
    """The folder, or the file beside the folders, that a module belongs to."""
    first, *rest = module.split(".")
    return first if first == "hiar_kernels" or not rest else f"{first}.{rest[0]}"


def unknown_units(root: Path) -> list[str]:
    return [
        f"{path}: {unit(module)} is in no order; add it to UNITS in {HERE}, as low as it can stand"
        for module, path in modules(root).items()
        if unit(module) not in UNITS
    ]


def dead_units(root: Path) -> list[str]:
    """Names of the table that stand for nothing any more."""
    return [f"UNITS names {name}, which is not in the tree" for name in UNITS if name not in modules(root)]


def wrong_direction(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        for target in sorted(imports(root, module)):
            own, other = unit(module), unit(target)
            if own in UNITS and other in UNITS and UNITS.index(other) > UNITS.index(own):
                problems.append(f"{path} imports {target}: {own} may not import {other}, which comes after it in UNITS")
    return problems


def circles(root: Path) -> list[str]:
    """Files that import each other, directly or in a circle; imports of types alone and inside of functions count."""
    ours = {
        module: {t for t in imports(root, module) if t in modules(root) and t not in PACKAGES}
        for module in modules(root)
        if modules(root)[module].name != "__init__.py"
    }
    reachable = {module: _reach(module, lambda name: ours.get(name, set())) for module in ours}
    rings = {tuple(sorted(o for o in reachable[m] if m in reachable.get(o, ()))) for m in ours if m in reachable[m]}
    return [f"{modules(root)[ring[0]]}: a circle of imports: {', '.join(ring)}" for ring in sorted(rings)]


def _reach(start: str, following: Callable[[str], set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = following(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


def entangled_implementations(root: Path) -> list[str]:
    """An implementation may build on its kind in another folder, a backward on the forward beside it; nothing else."""
    problems = []
    for module, path in modules(root).items():
        folder, _, kind = module.rpartition(".")
        if not module.startswith("hiar_kernels.") or kind not in IMPLEMENTATIONS:
            continue
        for target in sorted(imports(root, module)):
            other_folder, _, other = target.rpartition(".")
            if (kind, other) == ("triton_bwd", "triton_fwd") and other_folder == folder:
                continue
            if other in IMPLEMENTATIONS and (other != kind or other_folder == folder):
                problems.append(f"{path} imports {target}: what two implementations share goes into a third module")
    return problems


def long_files(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        lines = len((root / path).read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_FILE:
            found.append(f"{path}: {lines} lines, at most {LONGEST_FILE}; is there a natural seam?")
    return found


def tier_of(text: str) -> str | None:
    """The tier that a test file gives itself, as `pytestmark = pytest.mark.cpu` or first of a list."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            value = node.value.elts[0] if isinstance(node.value, ast.List) else node.value
            name = ast.unparse(value).removeprefix("pytest.mark.")
            return name if name in TIERS else None
    return None


def untiered_tests(root: Path) -> list[str]:
    """Test files that no tier would run, or the wrong one."""
    problems = []
    for path in sources(root):
        if path.parts[0] != "tests" or not path.name.startswith("test_"):
            continue
        tier = tier_of((root / path).read_text(encoding="utf-8"))
        if tier is None:
            problems.append(f"{path}: no tier; write pytestmark = pytest.mark.cpu, or another of {sorted(TIERS)}")
        elif (tier == "interpreter") != (path.parts[1] == "interpreter"):
            problems.append(
                f"{path}: {tier} tests stand elsewhere: tests/interpreter/ holds interpreter tests, all of them"
            )
    return problems


def set_for_all_threads(root: Path) -> list[str]:
    """Tests that set a function of `time`, `os`, ... itself, and so that of every thread: the loop of a server that
    runs beside the test then sleeps until it has a request, and its calls count as the test's. They set the name of
    the module in one of ours: SimpleNamespace(monotonic=...), or tests/helpers/altered.py.
    """
    problems = []
    for path in sources(root):
        text = (root / path).read_text(encoding="utf-8") if path.parts[0] == "tests" else ""
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in SETTERS or not node.args:
                continue
            target = node.args[0]
            named = isinstance(target, ast.Constant)
            owner = str(target.value).rpartition(".")[0] if named else ast.unparse(target)
            if (module := owner.split(".")[-1]) in OF_ALL_THREADS:
                problems.append(f"{path}: line {node.lineno} sets a function of {module} for every thread")
    return problems


def reached(root: Path, module: str) -> set[str]:
    """All that a module imports, itself or through our modules (the __init__ of the packages around it aside)."""
    return _reach(module, lambda name: imports(root, name) if name in modules(root) else set())


CHECKS = (
    unknown_units, wrong_direction, circles, entangled_implementations, long_files, untiered_tests, set_for_all_threads,
)  # fmt: skip


@pytest.mark.parametrize("find", [*CHECKS, dead_units])
def test_tree(find):
    assert modules(ROOT).keys() >= set(PACKAGES), "the packages were not found: is ROOT right?"
    problems = find(ROOT)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("unit_name", ["hiar_model.schedule", "hiar_model.config"])
def test_schedules_and_configuration_are_plain_python(unit_name):
    for module in modules(ROOT):
        if unit(module) == unit_name:
            assert "torch" not in reached(ROOT, module), module


def test_what_ops_share_knows_no_op():
    for module in modules(ROOT):
        if module.startswith("hiar_kernels.common."):
            ours = [t for t in imports(ROOT, module) if t.startswith("hiar_kernels.")]
            assert all(t.startswith("hiar_kernels.common") for t in ours), module


def test_the_reference_rollout_shares_nothing_with_the_engine():
    """An oracle that called what it is compared with would agree with it in everything."""
    ours = [name for name in reached(ROOT, "hiar_model.rollout.reference") if name.startswith("hiar_model.")]
    assert any(name.endswith(".transformer") for name in ours)  # whose weights it takes
    assert not [name for name in ours if name.startswith("hiar_model.rollout") or "cache" in name]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_light(package):
    code = f"import sys, {package}; print(*sorted(set({NOT_AT_IMPORT!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"import {package} loads {done.stdout.strip()}"


# The checks themselves: each must be able to fail.


@pytest.fixture
def tree(tmp_path):
    """A small legal tree, and a function that overwrites one file of it."""

    def write(path: str, text: str = "") -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        modules.cache_clear()
        imports.cache_clear()
        return tmp_path

    folders = ("hiar_kernels/norm", "hiar_kernels/attention", "hiar_model/rollout", "hiar_model/schedule")
    for folder in ("hiar_kernels", "hiar_model", *folders):
        write(f"{folder}/__init__.py")
    write("hiar_kernels/norm/reference.py", "import torch\n")
    write("hiar_kernels/norm/triton_fwd.py")
    write("hiar_kernels/norm/triton_bwd.py", "from .triton_fwd import tile\n")
    write("hiar_kernels/attention/reference.py", "from ..norm.reference import norm\n")
    write("hiar_model/config.py", "import dataclasses\n")
    write("hiar_model/schedule/plan.py", "from ..config import X\n")
    write("hiar_model/cli/__init__.py", "import hiar_model\nfrom .. import config\n")
    write("tests/test_norm.py", "import pytest\npytestmark = pytest.mark.cpu\n")
    write("tests/interpreter/test_norm.py", "import pytest\npytestmark = [pytest.mark.interpreter]\n")
    return write


def test_a_legal_tree_passes(tree):
    root = tree("hiar_model/.venv/generate.py", "x = 1\n" * 900)  # hidden: not ours
    assert [problem for check in CHECKS for problem in check(root)] == []
    assert reached(root, "hiar_model.schedule.plan") == {"dataclasses", "hiar_model.config"}


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (unknown_units, "hiar_model/surprise.py", ""),
        (unknown_units, "hiar_model/surprise/inner.py", ""),
        (circles, "hiar_model/config.py", "from .schedule import plan\n"),
        (wrong_direction, "hiar_kernels/norm/api.py", "from hiar_model.config import X\n"),
        (wrong_direction, "hiar_kernels/norm/api.py", "import hiar_model.config\n"),
        (wrong_direction, "hiar_model/config.py", "from .rollout import engine\n"),
        (wrong_direction, "hiar_model/config.py", "from hiar_model import rollout\n"),
        (wrong_direction, "hiar_model/schedule/plan.py", "from .. import WanConfig\n"),
        (wrong_direction, "hiar_model/schedule/plan.py", "def late():\n    from ..cli import main\n"),
        (entangled_implementations, "hiar_kernels/norm/triton_fwd.py", "from . import reference\n"),
        (entangled_implementations, "hiar_kernels/norm/triton_fwd.py", "from .triton_bwd import x\n"),
        (entangled_implementations, "hiar_kernels/norm/triton_fwd.py", "from ..attention.reference import x\n"),
        (long_files, "csrc/big.cu", "//\n" * 501),
        (long_files, "bench/big.py", "#\n" * 501),
        (untiered_tests, "tests/test_norm.py", "def test(): pass\n"),
        (untiered_tests, "tests/test_norm.py", "pytestmark = pytest.mark.slow\n"),
        (untiered_tests, "tests/test_norm.py", "pytestmark = pytest.mark.interpreter\n"),
        (untiered_tests, "tests/interpreter/test_norm.py", "pytestmark = pytest.mark.cpu\n"),
        (set_for_all_threads, "tests/test_norm.py", 'patch.setattr(clock.time, "monotonic", clock)\n'),
        (set_for_all_threads, "tests/test_norm.py", 'setattr(time, "sleep", clock)\n'),
        (set_for_all_threads, "tests/test_norm.py", 'mock.patch.object(clock.time, "time")\n'),
        (set_for_all_threads, "tests/test_norm.py", 'patch.setattr("package.clock.time.time", clock)\n'),
        (set_for_all_threads, "tests/test_norm.py", 'patch.setattr(atomic.os, "fsync", full)\n'),
        (set_for_all_threads, "tests/test_norm.py", 'patch.setattr("tempfile.TemporaryFile", full)\n'),
    ],
)
def test_a_wrong_tree_fails(tree, check, path, text):
    root = tree(path, text)
    problems = check(root)
    assert len(problems) == 1, problems
    assert problems[0].startswith(path)


def test_a_dead_name_is_told(tree):
    root = tree("hiar_model/pipelines/__init__.py")
    assert "UNITS names hiar_model.models, which is not in the tree" in dead_units(root)
    assert not [line for line in dead_units(root) if "pipelines" in line]


def test_torch_is_found_through_our_modules(tree):
    root = tree("hiar_model/config.py", "import torch.nn\n")
    assert "torch" in reached(root, "hiar_model.schedule.plan")
