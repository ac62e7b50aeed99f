"""What hosts and archives read of a project: changes, citation, issue forms, images. `make lint` runs hadolint too."""

from __future__ import annotations

import datetime
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from project_file import PROJECT

from hiar_model.cli import build_parser

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


def test_the_newest_change_is_of_this_version():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)", heading) for heading in headings]
    assert all(found), headings
    versions = [tuple(map(int, match.groups()[:3])) for match in found]
    dates = [datetime.date.fromisoformat(match[4]) for match in found]
    assert headings[0].split()[0] == PROJECT["version"]
    assert versions == sorted(set(versions), reverse=True) and dates == sorted(dates, reverse=True)


def test_citation():
    """The keys that version 1.2.0 of the format requires, and those without which nobody can cite."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["type"] == "software"
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {citation['version']} ({citation['date-released']})" in changes
    paper = citation["preferred-citation"]
    for work in (citation, paper):
        assert work["title"] and work["authors"]
        assert all({"name"} <= author.keys() or {"family-names"} <= author.keys() for author in work["authors"])
    assert paper["type"] == "article" and paper["url"].endswith("2603.08703") and paper["year"] == 2026


# Issue forms, as GitHub documents them

FORMS = sorted(path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.name != "config.yml")
TOP = {"name", "description", "body", "labels", "title", "assignees", "projects", "type"}
ATTRIBUTES = {
    "markdown": ({"value"}, set()),
    "textarea": ({"label"}, {"description", "placeholder", "value", "render"}),
    "input": ({"label"}, {"description", "placeholder", "value"}),
    "dropdown": ({"label", "options"}, {"description", "multiple", "default"}),
    "checkboxes": ({"label", "options"}, {"description"}),
}
"""Type of an element -> the attributes that it needs, and those that it may have."""


def problems(form: dict) -> list[str]:
    """Why GitHub would refuse a form."""
    found = [f"needs {name}" for name in ("name", "description", "body") if not form.get(name)]
    found += [f"unknown key {name}" for name in form.keys() - TOP]
    elements = form.get("body") or []
    for element in elements:
        needed, allowed = ATTRIBUTES.get(element.get("type"), (set(), set()))
        attributes = element.get("attributes", {})
        if element.get("type") not in ATTRIBUTES:
            found.append(f"unknown type {element.get('type')}")
        found += [f"unknown key {name}" for name in element.keys() - {"type", "id", "attributes", "validations"}]
        found += [f"{element.get('type')} needs {name}" for name in needed if not attributes.get(name)]
        found += [f"{element.get('type')} has no {name}" for name in attributes.keys() - needed - allowed]
        found += [f"validations know no {name}" for name in element.get("validations", {}).keys() - {"required"}]
        if not re.fullmatch(r"[\w-]*", str(element.get("id", ""))):
            found.append(f"id {element['id']}")
    for name, values in (
        ("id", [element["id"] for element in elements if "id" in element]),
        ("label", [element.get("attributes", {}).get("label") for element in elements]),
    ):
        found += [f"{name} {value} twice" for value in {v for v in values if v is not None and values.count(v) > 1}]
    return found


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert problems(form) == []
    required = [e["attributes"]["label"] for e in form["body"] if e.get("validations", {}).get("required")]
    assert any("hiar doctor --json" in label for label in required)
    for command in re.findall(r"`hiar ([^`]+)`", path.read_text(encoding="utf-8")):
        build_parser().parse_args(command.split())


def test_forms_have_names_of_their_own():
    names = [yaml.safe_load(path.read_text(encoding="utf-8"))["name"] for path in FORMS]
    assert len(set(names)) == len(names) >= 2


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"name": "a", "description": "b", "body": []}, "needs body"),
        ({"name": "a", "description": "b", "about": "c", "body": [{"type": "textarea"}]}, "unknown key about"),
        ({"body": [{"type": "textarea", "attributes": {}}]}, "textarea needs label"),
        ({"body": [{"type": "text", "attributes": {"label": "x"}}]}, "unknown type text"),
        ({"body": [{"type": "input", "attributes": {"label": "x", "render": "json"}}]}, "input has no render"),
        ({"body": [{"type": "input", "id": i, "attributes": {"label": i}} for i in "aba"]}, "id a twice"),
        ({"body": [{"type": "input", "id": "a b", "attributes": {"label": "x"}}]}, "id a b"),
    ],
)
def test_a_wrong_form_is_found(form, problem):
    assert problem in problems(form)


# Images

IMAGES = sorted(ROOT.glob("docker/*.Dockerfile"))


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of each line, continued ones joined."""
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def copied(steps: list[tuple[str, str]]) -> set[str]:
    """Paths of the repository that go into an image."""
    words = [arguments.split() for name, arguments in steps if name == "COPY" and "--from" not in arguments]
    return {path for line in words for path in line[:-1]}


def image_problems(text: str) -> list[str]:
    steps = instructions(text)
    found = []
    for name, arguments in steps:
        image = arguments.split()[0]
        if name == "FROM" and not re.search(r":[^:]*\d+\.\d+|@sha256:", image):
            found.append(f"{image} names no version")
        if name == "RUN" and "apt-get install" in arguments and "rm -rf /var/lib/apt/lists" not in arguments:
            found.append("a list of packages stays")
        if name == "RUN" and "pip install" in arguments:
            needed = ("--no-cache-dir", "-c constraints.txt")
            found += [f"pip without {word}" for word in needed if word not in arguments]
    found += [f"{path} does not exist" for path in sorted(copied(steps)) if not (ROOT / path).exists()]
    last = [name for name, _ in steps][::-1].index("FROM")
    users = [arguments for name, arguments in steps[-last:] if name == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("runs as root")
    return found


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images(path):
    text = path.read_text(encoding="utf-8")
    assert image_problems(text) == []
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert "*" in rules and copied(instructions(text)) == {rule[1:] for rule in rules if rule.startswith("!")}
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "setup.py", "constraints.txt"}
    assert needed | {"hiar_kernels", "hiar_model", "csrc"} <= copied(instructions(text))
    assert any(fnmatch("hiar_kernels/_cuda_ops.so", rule) for rule in rules)  # of this machine


def test_a_wrong_image_is_found():
    right = IMAGES[0].read_text(encoding="utf-8")
    for old, new, problem in (
        ("slim-bookworm\nCOPY", "slim-bookworm\nRUN apt-get install -y gcc\nCOPY", "a list of packages stays"),
        ("FROM python:3.12.11-slim-bookworm AS", "FROM python AS", "python names no version"),
        ("USER 10001", "", "runs as root"),
        ("USER 10001", "USER root", "runs as root"),
        ("pip install --no-cache-dir", "pip install", "pip without --no-cache-dir"),
        ("COPY csrc", "COPY cuda", "cuda does not exist"),
    ):
        assert right.count(old) and problem in image_problems(right.replace(old, new)), problem
