"""One word for one thing: names that were given up do not come back as classes, functions, arguments, attributes or
variables of hiar_kernels, hiar_model and bench, and no two classes share a name.

    python tests/project/test_words.py     prints TO_DO as the tree stands: shrink the table below to that

A name is split into its words (`forwards_by_visit`, `VisitList`: both hold "visit"). Where an old word is only wrong as
a whole name (`enter`, but not `enter_block`), it stands in NAMES.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hiar_kernels", "hiar_model", "bench")

WORDS = {
    "visit": "task", "visits": "tasks", "visited": "done", "visiting": "task",
    "walk": "order, task order", "walks": "orders", "lent": "shared", "lends": "shares", "bundle": "registry",
    "withheld": "quarantined", "sentinel": "NaNGuard", "texts": "prompt_embeds",
    "told": "the thing itself: header, message, line", "found": "the thing itself: tensors, rows, match",
    "wanted": "the thing itself: expected, enabled",
    "asked": "the thing itself: request, requested", "given": "conditioning_frames, or the thing itself",
}  # fmt: skip
"""Old word, anywhere in a name -> what to say."""

NAMES = {
    "kept": "the thing itself: stored, states", "Live": "OutputSelection",
    "way": "strategy", "ways": "strategies", "stands": "slot_frames, write_position", "held": "slot_frames",
    "made": "the thing itself: frames, latents, rollout", "record": "metadata",
    "Kind": "GraphKey", "Launch": "BatchedForward", "Attend": "SelfAttention", "RingAttend": "CachedAttention",
    "UlyssesAttend": "a SelfAttention", "FullSequence": "DenseAttention", "Pending": "DeferredResidual",
    "_settle": "add_residual_and_norm", "stand_at": "seek", "enter": "prepare_host",
    "Place": "NaNLocation, DistContext", "find_place": "init_distributed",
    "synchronise": "set_requires_gradient_sync", "TextKV": "CrossAttentionKV", "Script": "PromptSchedule",
    "Show": "PromptSchedule", "Turn": "UpdateStep", "Matched": "DMDResult",
    "Watch": "Watchdog, MetricsLogger, NaNTracer", "cache_source": "kv_source",
    "cache_dtype": "kv_dtype", "on_new_text": "on_prompt_change", "decode_apart": "dedicated_decoder_rank",
}  # fmt: skip
"""Old name, as a whole -> what to say."""

KERNELS = {"total": "l_i", "highest": "m_i", "keep": "alpha", "live": "mask"}
"""Names of hiar_kernels, where they mean one thing; elsewhere they are ordinary words."""

PUBLIC = {
    "bench/ops/attention_cases.py": {"visit"},  # a shape, as committed measurements name it
    "hiar_kernels/common/extension.py": {"record"},  # of the last build
    "hiar_model/rollout/flat.py": {"pairs", "trajectory", "cache_source", "cache_dtype", "on_new_text", "on_visit"},
    "hiar_model/toy/backdrop.py": {"texture_kept"}, "hiar_model/toy/reading.py": {"texture_kept"},
}  # fmt: skip
"""Keywords of the function hiar_model.rollout, and a field of published results, which stay as they are."""

TO_DO: dict[str, int] = {}
"""Old word -> places that still have it, as long as a branch brings some. It may only shrink."""


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of everything that a module names: what it only reads was named elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.attr, node.lineno
        elif isinstance(node, (ast.alias, ast.ExceptHandler)):
            name = node.asname if isinstance(node, ast.alias) else node.name
            if name is not None:
                yield name, node.lineno


def old_words(name: str, path: str) -> list[str]:
    """The entries of the tables that a name breaks."""
    if name in PUBLIC.get(path, ()):
        return []
    broken = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name) if word.lower() in WORDS]
    whole = name.lstrip("_") if name not in NAMES else name
    if whole in NAMES or (whole in KERNELS and path.startswith("hiar_kernels/")):
        broken.append(whole)
    return broken


def places(root: Path) -> dict[str, list[str]]:
    """Old word -> where it stands, "path:line: name"."""
    result: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            for name, line in names(ast.parse(file.read_text(encoding="utf-8"))):
                for word in old_words(name, path):
                    result[word].append(f"{path}:{line}: {name}")
    return result


def problems(root: Path, to_do: dict[str, int]) -> list[str]:
    """A line for every old word that stands in more places than it may."""
    better = {**WORDS, **NAMES, **KERNELS}
    return [
        f"{word!r} stands in {len(where)} places, at most {to_do.get(word, 0)} may; say {better[word]}: "
        + ", ".join(where)
        for word, where in sorted(places(root).items())
        if len(where) > to_do.get(word, 0)
    ]


def repeated_classes(root: Path) -> list[str]:
    """A line for every class name that stands in two places, test doubles included."""
    files = [file for package in (*PACKAGES, "tests") for file in sorted((root / package).rglob("*.py"))]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    named = {file: re.findall(r"\bclass\s+(\w+)\s*[(:\[]", text) for file, text in texts.items()}
    count = Counter(name for classes in named.values() for name in classes)  # of those in strings too
    where: dict[str, list[str]] = defaultdict(list)
    for file in (file for file in files if any(count[name] > 1 for name in named[file])):
        for node in ast.walk(ast.parse(texts[file])):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(f"{file.relative_to(root).as_posix()}:{node.lineno}")
    return [f"class {name}: {', '.join(places)}" for name, places in sorted(where.items()) if len(places) > 1]


def test_a_class_name_has_one_meaning(tmp_path):
    assert not repeated_classes(ROOT), "\n".join(repeated_classes(ROOT))
    for folder in ("bench", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("def f():\n    class Choice: pass\n")
    assert repeated_classes(tmp_path) == ["class Choice: bench/a.py:2, tests/a.py:2"]


def test_options_of_a_rollout_are_spelled_in_few_places():
    """Everything else hands on the config; these few define, document or calculate with the sink."""
    files = sorted((ROOT / "hiar_model").rglob("*.py"))
    where = [f for f in files if re.search(r"\bsink_frames\b", f.read_text(encoding="utf-8"))]
    assert len(where) <= 8, where


def test_old_words_do_not_come_back():
    assert not problems(ROOT, TO_DO), "\n".join(problems(ROOT, TO_DO))


def test_the_tables_are_of_one_mind():
    assert set(TO_DO) <= {*WORDS, *NAMES, *KERNELS}
    new = {word for text in (*WORDS.values(), *NAMES.values(), *KERNELS.values()) for word in re.findall(r"\w+", text)}
    assert not new & {*NAMES}, "an old name is no better name for another one"


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("def tasks_of(visit): pass", "visit"),
        ("class VisitList: pass", "visit"),
        ("x.visited = 1", "visited"),
        ("for way in x: pass", "way"),
        ("import a as told", "told"),
        ("try: pass\nexcept E as found: pass", "found"),
        ("class RingAttend: pass", "RingAttend"),
        ("f = lambda cache_source: 0", "cache_source"),
        ("if (kept := f()): pass", "kept"),
    ],
)
def test_an_old_word_is_seen(tmp_path, source, word):
    (tmp_path / "hiar_model").mkdir()
    (tmp_path / "hiar_model" / "a.py").write_text(source + "\n")
    (line,) = problems(tmp_path, {})
    assert line.startswith(f"{word!r} stands in 1 places, at most 0 may") and "hiar_model/a.py:" in line
    assert not problems(tmp_path, {word: 1})


def test_what_is_only_read_or_said_or_public_is_no_name(tmp_path):
    folder = tmp_path / "hiar_model" / "rollout"
    folder.mkdir(parents=True)
    (folder / "flat.py").write_text("def f(pairs, cache_source): pass\n")
    (folder / "a.py").write_text('x = "visit"\nf(visit, pairs=told.visited)\nenter_block = keep = foundation = 1\n')
    assert not problems(tmp_path, {})


if __name__ == "__main__":
    counts = [f'"{word}": {len(where)}, ' for word, where in sorted(places(ROOT).items())]
    print("TO_DO: dict[str, int] = {", *textwrap.wrap("".join(counts), 110), "}  # fmt: skip", sep="\n")
