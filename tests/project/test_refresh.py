"""docs/refresh.py finds what is stale in README and docs, and renews it; a small tree stands in for the repository."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import refresh  # noqa: E402

TABLES = {
    "README.md": 1,
    "docs/evidence/eight_bits.md": 1,
    "docs/evidence/one_gpu.md": 3,
    "docs/evidence/parallel.md": 10,
    "docs/evidence/runs.md": 5,
    "docs/howto/memory.md": 2,
    "docs/howto/quantised_files.md": 1,
}
SAYS = "<!-- python -m says {} -->\n\n{}\n\n<!-- end -->\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A page whose two blocks are as printed; the command's second paragraph is always the same."""
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    (tmp_path / "says.py").write_text(
        "import sys\nprint(sys.argv[1], 'the legend', sep='\\n\\n')\nsys.exit(len(sys.argv) - 2)"
    )
    (tmp_path / "README.md").write_text("no table\n")
    (tmp_path / "docs" / "a.md").write_text(
        SAYS.format("one", "one\n\nthe legend") + "text\n" + SAYS.format("two", "two")
    )
    (tmp_path / "docs" / "pictures" / "a.svg").write_text("<svg/>")
    monkeypatch.setattr(refresh, "pictures", lambda: {"a.svg": "<svg/>"})
    monkeypatch.setattr(refresh, "sentences", lambda: iter([("README.md", "no table")]))
    return tmp_path


def test_pages_as_printed_are_left_alone(root):
    assert refresh.stale(root) == []


def test_a_stale_block_is_named_and_renewed(root):
    page = root / "docs" / "a.md"
    good = page.read_text()
    page.write_text(good.replace("two\n\n<!-- end", "three\n\n<!-- end"))
    assert refresh.stale(root) == ["docs/a.md is stale, run make docs-refresh; first at line 11: three"]
    assert refresh.stale(root, write=True) == [] and page.read_text() == good


def test_a_stale_picture_and_a_sentence_are_named(root, monkeypatch):
    (root / "docs" / "pictures" / "a.svg").write_text("<svg></svg>")
    monkeypatch.setattr(refresh, "sentences", lambda: iter([("README.md", "7 tables")]))
    picture, sentence = refresh.stale(root)
    assert (
        picture.startswith("docs/pictures/a.svg is stale, run make docs-refresh") and "by hand: '7 tables'" in sentence
    )
    assert refresh.stale(root, write=True) == [sentence], "a sentence is written by a person"


def test_a_command_that_fails_and_an_unknown_table_are_told(root):
    (root / "docs" / "b.md").write_text("<!-- python -m says one two -->\n<!-- end -->\n")
    (root / "README.md").write_text("no table\n<!-- table gains -->\n<!-- end -->\n")
    unknown, fails = refresh.stale(root)
    assert unknown.startswith("README.md: table 'gains' is unknown: give one of grid, limits")
    assert fails == "docs/b.md: `python -m says one two` fails with exit status 1: it says nothing"


def test_every_generated_block_of_the_pages_is_seen():
    """A marker without an end would be passed over in silence."""
    for page in refresh.pages(ROOT):
        text = page.read_text(encoding="utf-8")
        blocks = len(refresh.BLOCK.findall(text))
        assert blocks == TABLES.get(page.relative_to(ROOT).as_posix(), 0) == text.count("<!-- end -->"), page
