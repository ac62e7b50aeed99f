"""The shape of the source tree: imports run one way, implementations of an op do not know each other, files stay short.

Everything is read from the syntax tree, function-level imports included, so nothing has to be importable. The functions
take the root of a tree and return the problems they find as lines; the last tests hand them trees that are wrong.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hiar_kernels", "hiar_model")

# Lowest first. A module may import from its own layer and from those above it in this list, never from one below.
# A name stands for the module and, if that is a package, for all inside; `hiar_model` itself is only its __init__.
FOUNDATION = (
    "version", "checks", "settings", "keyed", "config", "schedule", "fp8", "cache", "conditions", "transformer",
    "threads", "files", "weight_files", "layouts", "checkpoint", "convert", "text",
)  # fmt: skip
USES = (
    "generation", "bundle", "train", "toy", "video", "profiling", "parallel_report", "gpu_report", "vae", "vae_weights",
    "vae_fused", "memory", "fit", "sessions", "script", "infill", "experts", "video_model", "wan", "given", "decoding",
    "record", "free_memory",
)  # fmt: skip
COMMANDS = (
    "cli", "cli_machine", "cli_signals", "cli_toy", "cli_train", "cli_parallel", "cli_performance", "cli_wan",
    "cli_generate", "cli_config", "cli_choices", "__main__", "doctor",
)  # fmt: skip
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kernels", ("hiar_kernels",)),
    ("foundation", tuple(f"hiar_model.{m}" for m in FOUNDATION)),
    ("parallel", ("hiar_model.distributed",)),
    ("rollout", ("hiar_model.rollout",)),
    ("use", tuple(f"hiar_model.{m}" for m in USES)),
    ("package", ("hiar_model",)),
    ("command line", tuple(f"hiar_model.{m}" for m in COMMANDS)),
)
IMPLEMENTATIONS = {"reference", "triton_fwd", "triton_bwd", "cuda"}  # file names inside the folder of an op
LONGEST_FILE = 500
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h"}
NOT_OURS = {"build", "dist", "out", "runs"}
TIERS = {"cpu", "interpreter", "compile", "gpu"}
NOT_AT_IMPORT = ("triton", "diffusers", "transformers", "flash_attn", "xformers")


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


def layer(module: str) -> int | None:
    """Index into LAYERS, None when the table does not know the module."""
    for index, (_, names) in enumerate(LAYERS):
        if any(module == n or (n != "hiar_model" and module.startswith(n + ".")) for n in names):
            return index
    return None


def unknown_modules(root: Path) -> list[str]:
    return [
        f"{path}: {module} stands in no layer; add it to LAYERS in tests/project/test_layout.py, as low as its imports allow"
        for module, path in modules(root).items()
        if layer(module) is None
    ]


def dead_names(root: Path) -> list[str]:
    """Names of the table that stand for nothing any more."""
    names = [name for _, names in LAYERS for name in names]
    return [f"LAYERS names {name}, which is not in the tree" for name in names if name not in modules(root)]


def wrong_direction(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root).items():
        own = layer(module)
        for target in sorted(imports(root, module)):
            other = layer(target) if target.partition(".")[0] in PACKAGES else None
            if own is not None and other is not None and other > own:
                problems.append(f"{path} ({LAYERS[own][0]}) imports {target} ({LAYERS[other][0]}): {arrow()}")
    return problems


def arrow() -> str:
    return "imports run " + " <- ".join(name for name, _ in LAYERS)


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


def reached(root: Path, module: str) -> set[str]:
    """All that a module imports, itself or through our modules (the __init__ of the packages around it aside)."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        for target in imports(root, todo.pop()):
            if target not in seen:
                seen.add(target)
                todo += [target] if target in modules(root) else []
    return seen


CHECKS = (unknown_modules, wrong_direction, entangled_implementations, long_files, untiered_tests)


@pytest.mark.parametrize("find", [*CHECKS, dead_names])
def test_tree(find):
    assert modules(ROOT).keys() >= set(PACKAGES), "the packages were not found: is ROOT right?"
    problems = find(ROOT)
    assert not problems, "\n" + "\n".join(problems)


def test_kernels_know_no_model():
    for module in modules(ROOT):
        if module.startswith("hiar_kernels"):
            assert not [t for t in imports(ROOT, module) if t.startswith("hiar_model")], module


def test_visits_are_plain_python():
    assert "torch" not in reached(ROOT, "hiar_model.schedule.plan")


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
        return tmp_path

    for folder in ("hiar_kernels", "hiar_kernels/norm", "hiar_kernels/attention", "hiar_model", "hiar_model/rollout"):
        write(f"{folder}/__init__.py")
    write("hiar_kernels/norm/reference.py", "import torch\n")
    write("hiar_kernels/norm/triton_fwd.py")
    write("hiar_kernels/norm/triton_bwd.py", "from .triton_fwd import tile\n")
    write("hiar_kernels/attention/reference.py", "from ..norm.reference import norm\n")
    write("hiar_model/config.py", "import dataclasses\n")
    write("hiar_model/schedule/plan.py", "from ..config import X\n")
    write("hiar_model/cli.py", "import hiar_model\nfrom . import config\n")
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
        (unknown_modules, "hiar_model/surprise.py", ""),
        (unknown_modules, "hiar_model/surprise/inner.py", ""),
        (wrong_direction, "hiar_kernels/norm/api.py", "from hiar_model.config import X\n"),
        (wrong_direction, "hiar_kernels/norm/api.py", "import hiar_model.config\n"),
        (wrong_direction, "hiar_model/config.py", "from .rollout import visits\n"),
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
    ],
)
def test_a_wrong_tree_fails(tree, check, path, text):
    root = tree(path, text)
    problems = check(root)
    assert len(problems) == 1, problems
    assert problems[0].startswith(path)


def test_a_dead_name_is_told(tree):
    root = tree("hiar_model/pipelines/video_pipeline.py")
    assert "LAYERS names hiar_model.models.transformer, which is not in the tree" in dead_names(root)
    assert not [line for line in dead_names(root) if "generation" in line]


def test_torch_is_found_through_our_modules(tree):
    root = tree("hiar_model/config.py", "import torch.nn\n")
    assert "torch" in reached(root, "hiar_model.schedule.plan")
