"""The site of the documents: its pages made from the code, its links, and that it fetches nothing from elsewhere.

The build itself, which is strict, is `make docs`.
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import hiar_kernels
import hiar_model
from hiar_model.cli.main import COMMANDS
from hiar_model.io.video import Video
from hiar_model.train.config.recipe import RECIPES

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import hooks  # noqa: E402
import loop  # noqa: E402
import self_contained  # noqa: E402


def entries(nav: object) -> list[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in entries(part)]


def test_every_page_is_in_the_navigation_once():
    nav = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    written = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    made = {page for origin, page in hooks.PLACES.items() if (ROOT / origin).exists() and page != "index.md"}
    assert len(nav) == len(set(nav))
    assert set(nav) - hooks.absent() == written | made | set(hooks.MADE)


def test_the_build_is_strict():
    """mkdocs counts only the warnings that it prints."""
    build = re.search(r"^.*-m mkdocs build.*$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert build and not re.search("--quiet|-q", build[0])
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["strict"]


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: .*?(\w+)$", text, re.M))
    assert {name for name in hiar_model.__all__ if name not in ("rollout", "train")} <= shown
    text = (ROOT / "docs/kernels/index.md").read_text(encoding="utf-8")
    shown = {*" ".join(hooks.KERNELS.values()).split(), *re.findall(r"^::: .*?(\w+)$", text, re.M)}
    assert set(hiar_kernels.__all__) - {"EMPTY", "layers", "reference"} == shown


def test_the_command_line_has_every_command_and_its_options():
    text = hooks.command_line()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## hiar {name}" for name in COMMANDS]
    generate = text[text.index("## hiar generate") : text.index("## hiar train")]
    assert {"`--num-frames`", "`-o`, `--out`", "`--kv-dtype`", "`prompt`"} <= set(
        re.findall(r"^\| (.*?) \|", generate, re.M)
    )
    assert "required" in next(line for line in generate.splitlines() if "`--out`" in line)


def test_recipes_have_every_key_and_say_what_it_is():
    text = hooks.recipe_keys()
    sections = dict(re.findall(r"^## (.*)\n\n([\s\S]*?)(?=^## |\Z)", text, re.M))
    for stage, kind in RECIPES.items():
        shown = sections[f"stage: {stage}"]
        for base in kind.__mro__:
            shown += sections.get(base.__name__, "")
        for field in dataclasses.fields(kind):
            assert re.search(rf"^\| `{field.name}\.?` \| \S+", shown, re.M), (stage, field.name)
    assert "| `lr` | float | `0.002` | peak learning rate. |" in sections["OptimizerRecipe"]
    assert set(re.findall(r"\]\(#(.*?)\)", text)) <= {name.lower() for name in sections}


@pytest.mark.parametrize(
    ("link", "origin", "page", "written"),
    [
        ("../howto/wan.md#limits", "docs/evidence/index.md", "evidence/index.md", "../howto/wan.md#limits"),
        ("../../hiar_model/a.py", "docs/concepts/grid.md", "concepts/grid.md", "../files/hiar_model/a.py.md"),
        ("../../docs/evidence/a.md", "hiar_kernels/norm/README.md", "kernels/norm.md", "../evidence/a.md"),
        ("docs/index.md", "CONTRIBUTING.md", "contributing/index.md", "../index.md"),
        ("../../hiar_kernels/attention/README.md#by", "docs/kernels/index.md", "kernels/index.md", "attention.md#by"),
        ("../../bench/results/a.json", "docs/howto/train.md", "howto/train.md", "../files/bench/results/a.json"),
        ("https://arxiv.org/abs/2603.08703", "README.md", "index.md", "https://arxiv.org/abs/2603.08703"),
        ("#limits", "docs/howto/wan.md", "howto/wan.md", "#limits"),
    ],
)
def test_links_from_their_place_in_the_site(link, origin, page, written):
    text = f"[a]({link}) and `[b](c.md)`\n\n```python\nx[1](y)\n```\n"
    assert hooks.relinked(text, origin, page) == text.replace(f"]({link})", f"]({written})", 1)


@pytest.mark.parametrize(
    "fetched",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img src="http://example/x.png">',
        "<style>@import 'https://example/x.css';</style>",
        '<p style="background: url(https://example/x.png)">',
    ],
)
def test_what_is_fetched_from_elsewhere_is_told(tmp_path, fetched):
    page = '<a href="https://arxiv.org">paper</a><link rel="canonical" href="https://x"><img src="a.png">'
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "a.css").write_text("p { background: url(a.png) }")
    assert not list(self_contained.outside(tmp_path))
    (tmp_path / "index.html").write_text(page + fetched)
    (line,) = self_contained.outside(tmp_path)
    assert line.startswith("index.html: ") and "example" in line
    (tmp_path / "a.css").write_text("p { background: url('https://example/a.png') }")
    assert len(list(self_contained.outside(tmp_path))) == 2


def test_the_loop_of_the_readme(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    path = Video(frames, fps=8).save(tmp_path / "a.mp4")
    with Image.open(io.BytesIO(loop.loop(path, 100_000))) as picture:
        assert (picture.format, picture.size, picture.n_frames, picture.info["loop"]) == (
            "WEBP", (384, 256), 4, 0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="more than 100"):
        loop.loop(path, 100)
