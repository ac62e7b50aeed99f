"""The source distribution, installed from there into an environment of its own: what a user has who never saw the
clone. torch and the other dependencies are those of the environment that runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from email import message_from_string
from pathlib import Path

import pytest
from project_file import PROJECT

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
VERSION = PROJECT["version"]
PACKAGES = ("hiar_kernels", "hiar_model")
SOURCES = (*PACKAGES, "csrc", "examples", *(path.name for path in ROOT.iterdir() if path.is_file()))
BUILT = re.compile(r"__pycache__|\.pyc$|_cuda_ops\.|\.egg-info")


def files(folder: Path, *below: str) -> set[str]:
    """Paths of the files of some folders, without what a build or an import leaves."""
    found = (path.relative_to(folder).as_posix() for name in below for path in (folder / name).rglob("*"))
    return {name for name in found if not BUILT.search(name) and (folder / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The archive, made of a copy of the tree: a build leaves files where it runs."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=lambda _, names: [n for n in names if BUILT.search(n)])
        else:
            shutil.copy(ROOT / name, tree / name)
    (tree / "hiar_kernels/_cuda_ops.so").write_bytes(b"of another machine")
    run(sys.executable, "setup.py", "--quiet", "sdist", cwd=tree)
    (archive,) = (tree / "dist").iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory) -> Path:
    """Folder of an environment into which pip has installed the archive, through a wheel."""
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home)
    # A path in a .pth file is searched last, and its own .pth files, such as that of this clone, are not read.
    (site_packages(home) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python(home), "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--no-compile", "--no-build-isolation", sdist, cwd=home)
    return home


def run(*command: object, cwd: Path | None = None) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**variables, "HIAR_BUILD_CUDA": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(home: Path) -> Path:
    return home / "bin" / "python"


def site_packages(home: Path) -> Path:
    return next(home.glob("lib/python*/site-packages"))


def test_what_the_archive_holds(sdist):
    with tarfile.open(sdist) as archive:
        prefixed = [member.name for member in archive if member.isfile()]
        names = {name.partition("/")[2] for name in prefixed}
    assert {name.partition("/")[0] for name in prefixed} == {f"hiar_kernels-{VERSION}"}
    assert files(ROOT, *PACKAGES, "csrc", "examples") <= names
    assert {"setup.py", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"} <= names
    assert not [name for name in names if BUILT.search(name) and "egg-info" not in name]


def test_what_is_installed(installed):
    """Every file of both packages (weights, recipes, measured tables, markers of types), and nothing beside them."""
    site = site_packages(installed)
    assert files(site, *PACKAGES) == files(ROOT, *PACKAGES)
    assert {path.name for path in site.iterdir()} == {
        *PACKAGES,
        f"hiar_kernels-{VERSION}.dist-info",
        "dependencies.pth",
    }
    metadata = message_from_string((site / f"hiar_kernels-{VERSION}.dist-info" / "METADATA").read_text())
    assert metadata["Version"] == VERSION and metadata["License-Expression"] == "Apache-2.0"


SESSION = """
import pathlib, sys
import hiar_kernels, hiar_model
from hiar_model.cli import main
from hiar_model.train.config.reading import load_recipe

recipes = pathlib.Path(hiar_model.__file__).parent / "train" / "recipes"
names = [path.relative_to(recipes).with_suffix("").as_posix() for path in recipes.rglob("*.yaml")]
for name in names:
    load_recipe(name)
print(hiar_model.__file__, hiar_kernels.__file__, hiar_kernels.__version__, len(names))
sys.exit(main(["generate", "a red circle moving right", "-o", "a.mp4", "--num-frames", "6", "--steps", "1"]))
"""


def test_it_runs_outside_of_the_clone(installed, tmp_path):
    assert run(installed / "bin" / "hiar", "--version", cwd=tmp_path) == f"hiar {VERSION}\n"
    model, kernels, version, recipes = run(python(installed), "-c", SESSION, cwd=tmp_path).split()[:4]
    site = str(site_packages(installed))
    assert model.startswith(site) and kernels.startswith(site) and version == VERSION
    assert int(recipes) == len(list((ROOT / "hiar_model/train/recipes").rglob("*.yaml"))) > 5
    metadata = json.loads((tmp_path / "a.mp4.json").read_text())
    assert metadata["versions"]["hiar-kernels"] == VERSION and (tmp_path / "a.mp4").stat().st_size > 1000


FOREIGN = """\
from hiar_kernels import BlockCausal, rms_norm
from hiar_model import ExecutionConfig, RolloutConfig, Video, VideoPipeline, generate

pipeline = VideoPipeline("toy", ExecutionConfig(cuda_graph=False))
video: Video = pipeline("a red circle moving right", num_frames=6)
frames: int = len(video)
config = RolloutConfig(order="stream", window_frames=(6, 9, 12, 12))
mask = BlockCausal(frame_tokens=5, frames_per_block=2)
path: int = generate("a blue square moving up")
rms_norm(video, factor=None)
"""


def test_types_reach_a_foreign_project(installed, tmp_path):
    """mypy sees the types of both installed packages: right use passes, a wrong type and a wrong name are found."""
    (tmp_path / "foreign.py").write_text(FOREIGN)
    others = "[mypy-torch.*,numpy.*,av.*,PIL.*]\nfollow_imports = skip\nfollow_imports_for_stubs = true\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n{others}")
    options = ("--python-executable", python(installed), "--config-file", "mypy.ini", "--cache-dir", os.devnull)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, options), "foreign.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    errors = re.findall(r"^foreign.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert errors == [("9", "assignment"), ("10", "call-arg")], done.stdout
