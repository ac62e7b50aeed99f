"""What README, CONTRIBUTING, docs/ and the model card show works as it stands there.

Every block of Python runs, unless its first line says what it needs that is not here. Every command line is read by the
parser that would read it, with its files standing in by name; the cheap ones of README run.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import pkgutil
import re
import shlex
from argparse import ArgumentError
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_layout import UNITS

from hiar_model.cli import build_parser, main
from hiar_model.cli.choices import INPUT_FILES, check_choices
from hiar_model.cli.config_file import config_first
from hiar_model.cli.main import COMMANDS
from hiar_model.cli.train import _override
from hiar_model.common.image_file import image_files
from hiar_model.common.lora_file import lora_files
from hiar_model.config import SHIPPED, WanConfig
from hiar_model.train.config.reading import load_recipe

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "bench/README.md"]
for pattern in ("docs/**/*.md", "hiar_model/toy/*/README.md"):
    PAGES += [page.relative_to(ROOT).as_posix() for page in sorted(ROOT.glob(pattern))]
KERNEL_PAGES = [page.relative_to(ROOT).as_posix() for page in sorted(ROOT.glob("hiar_kernels/*/README.md"))]
NEEDS = ("GPU", "published weights", "make hub", "running server")  # of the last: tests/serve/ runs it
SEED, ANY_OVERRIDES = "SEED", "OVERRIDES"  # as docs write them: a number, and key=value words or none


class Snippet(NamedTuple):
    """A block of code of a page: between fences, or indented (language "")."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: str, text: str) -> list[Snippet]:
    found, language, begin, code, indented, before = [], None, 0, [], False, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fence = line.startswith("```")
        if language is None and (fence or (line.startswith("    ") and not before.strip())):
            language, begin, code = line[3:] if fence else "", number, [] if fence else [line[4:]]
            indented = not fence
        elif language is not None and (fence if not indented else not line.startswith("    ")):
            found.append(Snippet(page, begin, language, "\n".join(code) + "\n"))
            language = None
        elif language is not None:
            code.append(line[4:] if indented else line)
        before = line
    return found


def named_files(text: str) -> dict[str, str]:
    """What a page says stands in a file: "`NAME`, ...:" and an indented block."""
    return {
        name: "\n".join(line[4:] for line in body.splitlines()) + "\n"
        for name, body in re.findall(r"^`([\w.]+)`[^\n]*:\n\n((?:    .*\n)+)", text, re.MULTILINE)
    }


TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SNIPPETS = [snippet for page, text in TEXTS.items() for snippet in snippets(page, text)]
PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]


# Python


def undefined(code: str) -> set[str]:
    """Names that a block reads and neither makes nor imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    made |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return {node.id for node in names} - made - set(vars(builtins))


def lacking(code: str) -> str | None:
    """What a block says that it needs and is not here; None: it can run."""
    found = re.match(r"# needs (.+)", code)
    return found[1] if found and any(word in found[1] for word in NEEDS) else None


def imports_of(code: str) -> str:
    lines = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(map(ast.unparse, lines))


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_runs(snippet, here):
    assert not undefined(snippet.code)
    for name, text in named_files(TEXTS[snippet.page]).items():
        Path(here, name).write_text(text)
    code = snippet.code if lacking(snippet.code) is None else imports_of(snippet.code)
    code = re.sub(r"\bnum_frames=(24|48)\b", "num_frames=12", code)  # as well, and sooner
    names: dict = {}
    exec(compile(code, str(snippet), "exec"), names)
    if "BlockCausal(" in code:  # what it shows of the kernels is also true
        out, q, k, v = (names[name] for name in ("out", "q", "k", "v"))
        kept = torch.cat([torch.arange(10), torch.arange(20, 30)])  # both slots of its own block, and frames 2 and 3
        visible = [x.transpose(1, 2) for x in (q, k[:, kept], v[:, kept])]
        expected = torch.nn.functional.scaled_dot_product_attention(*visible)
        assert out.shape == (1, 10, 2, 16) and torch.allclose(out, expected.transpose(1, 2), atol=1e-6)


# Command lines

PROGRAMS = ("hiar", "make", "python", "torchrun", "pytest", "nsys", "ncu")
RUN = ("hiar doctor", 'hiar generate "a blue square moving up fast" -o square.mp4 --num-frames 48 --seed 3')  # seconds


def commands(snippet: Snippet) -> list[list[str]]:
    """The words of every command of a block, variables and placeholders filled in, without what stands before the
    program. What is indented may be no shell: only lines that begin with a program count.
    """
    found, variables = [], {}
    for line in snippet.code.replace("\\\n", " ").replace(SEED, "1").splitlines():
        if snippet.language == "" and not re.match(rf"([A-Z_]+=\S* )?({'|'.join(PROGRAMS)}) ", line):
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            words, following = words[:end], words[end + 1 :]
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, value = words.pop(0).split("=", 1)
                variables[name] = value
            if words and words[0] in PROGRAMS:
                found.append([word for word in words if word != ANY_OVERRIDES])
            words = following
    return found


def understand(words: list[str]) -> None:
    """Hand a command line to what would read it; AssertionError or its own error if it is not understood."""
    program, *rest = words
    hiar = next((i for i, word in enumerate(words) if Path(word).name in ("hiar", "hiar_model")), None)
    if hiar is not None:  # behind torchrun, nsys and ncu too
        understand_hiar(words[hiar + 1 :])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, value, _ = word.partition("=")
            known = rf"^{name} \?=" if value else rf"^\.PHONY:.* {name}( |$)"
            assert re.search(known, makefile, re.MULTILINE), f"make knows no {word}"
    elif program == "python" and rest[0] == "-m":
        assert find_spec(rest[1]) is not None, rest[1]
    elif program in ("python", "pytest"):
        for word in rest:
            assert not re.fullmatch(r"[\w/]+(\.py|/)", word) or (ROOT / word).exists(), f"there is no {word}"


def understand_hiar(words: list[str]) -> None:
    for name in (after for word, after in pairwise(words) if word == "--config"):
        Path(name).write_text("seed: 1\n")  # stands in for what an earlier command writes
    words = config_first(words)
    parsed = build_parser(next((word for word in words if word in COMMANDS), None)).parse_args(words)
    command, options = parsed.subcommand, parsed[parsed.subcommand]
    for name in ("model", *INPUT_FILES.get(command, ())):
        value = options.get(name)
        for file in value if isinstance(value, list) else [value]:
            if file is not None and file not in (*SHIPPED, *WanConfig.names()):
                Path(file).mkdir(parents=True, exist_ok=True)  # stands in for what is published, or made before
    for file in (*lora_files(options.get("lora")), *image_files(options.get("image"))):
        Path(file.path).mkdir(parents=True, exist_ok=True)
    check_choices(command, options)
    if command == "train":
        load_recipe(options.recipe, dict(_override(word) for word in options.overrides))


SHELL = [snippet for snippet in SNIPPETS if snippet.language in ("", "sh") and commands(snippet)]


@pytest.mark.parametrize("snippet", SHELL, ids=str)
def test_command_lines_are_understood(snippet):
    for words in commands(snippet):
        understand(words)


def outputs(page: str) -> list[str]:
    """The videos that the commands and the Python of a page write, in its order."""
    names = []
    for snippet in SNIPPETS:
        if snippet.page == page and snippet.language == "python":
            names += re.findall(r'\.save\("([^"]+)"\)', snippet.code)
        elif snippet.page == page:
            lines = [words for words in commands(snippet) if "--overwrite" not in words]
            names += [after for words in lines for word, after in pairwise(words) if word == "-o"]
    return names


@pytest.mark.parametrize("page", PAGES)
def test_no_command_of_a_page_finds_the_video_of_another(page):
    """Where it exists, hiar generate refuses to write it: whoever follows the page would stop there."""
    names = outputs(page)
    assert [name for name in names if names.count(name) > 1] == []


QUALIFIED = re.compile(r"`(hiar_model(?:\.\w+)+)\(([\w, ]+)\)`")


def test_calls_in_the_text_name_the_arguments():
    calls = [(page, *call) for page, text in TEXTS.items() for call in QUALIFIED.findall(text)]
    assert {name for _, name, _ in calls} >= {"hiar_model.infill"}
    for page, name, arguments in calls:
        function = pkgutil.resolve_name(name.replace(".", ":", 1) if name.count(".") == 1 else name)
        unknown = set(re.split(", *", arguments)) - set(inspect.signature(function).parameters)
        assert not unknown, f"{page}: {name} has no {unknown}"


def test_the_first_command_lines_run(here, capsys):
    for line in RUN:
        assert any(line in snippet.code for snippet in SHELL if snippet.page == "docs/index.md"), line
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert {path.name for path in here.iterdir()} == {"square.mp4", "square.mp4.json"}


def test_how_to_install_is_said():
    text = " ".join(TEXTS["docs/index.md"].split())
    assert "source .venv/bin/activate" in text and "first install torch's small CPU build" in text


def test_the_tree_is_that_of_the_repository():
    """CONTRIBUTING shows every folder of hiar_model, in the order in which they may import each other."""
    tree = next(snippet for snippet in SNIPPETS if snippet.page == "CONTRIBUTING.md").code.splitlines()
    shown = [line.split("/")[0].strip() for line in tree if re.match(r"  \w+/", line)]
    units = [unit.removeprefix("hiar_model.") for unit in UNITS if (ROOT / unit.replace(".", "/")).is_dir()]
    assert shown == [unit for unit in units if unit not in ("hiar_kernels", "hiar_model")]
    assert all((ROOT / line.split("/")[0]).is_dir() for line in tree if re.match(r"\w+/", line))


# Links

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(text: str) -> set[str]:
    """What a link may name of a page: its headings, as the site and GitHub spell them."""
    code = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", code.sub("", text), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def broken_links(page: str, text: str) -> list[str]:
    broken = []
    for path, anchor in LINK.findall(text):
        target = (ROOT / page).parent / path if path else ROOT / page
        made = target.resolve().is_relative_to(ROOT / "docs" / "reference")  # written when the site is built
        if not target.is_file() and not (made and target.stem in ("command_line", "recipes")):
            broken.append(f"{page}: {path} is no file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{page}: {path} has no heading {anchor}")
    return broken


@pytest.mark.parametrize("page", PAGES + KERNEL_PAGES)
def test_links_lead_somewhere(page):
    assert not broken_links(page, (ROOT / page).read_text(encoding="utf-8"))


# What others' libraries do


def test_behaviours_say_their_version_and_what_depends_on_them():
    """Of each row the behaviour or the source names a version; scripts that show one are there."""
    page = TEXTS["docs/contributing/behaviour.md"]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| (?!behaviour)", line)]
    assert len(rows) > 40
    for behaviour, *more in rows:
        assert len(more) == 2 and all(more), f"three columns: {behaviour}"
        assert re.search(r"\d\.\d+", behaviour + more[0]), f"no version: {behaviour}"
    for page, text in TEXTS.items():
        for script in re.findall(r"findings/[\w.-]+", text):
            assert (ROOT / script).is_file(), f"{page}: {script} is no file"


@pytest.mark.parametrize("script", sorted((ROOT / "findings").glob("*.sh")), ids=lambda script: script.stem)
def test_a_finding_says_when_it_was_seen_and_when_it_has_changed(script):
    """And hides no error: "changed: ..." would be lost with the standard error."""
    text = script.read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.splitlines()[1:] if line.startswith("#"))
    assert re.search(r"Seen on \d{4}-\d\d-\d\d\b", comment) and "Fails if" in comment and "Needs " in comment
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert re.search(r"\bexit(\(| 1)|\bassert ", text) and text.endswith('\necho "as described"\n')
    hidden = [line for line in text.splitlines() if re.search(r"(2|&) ?> ?/dev/null|\|\| true", line)]
    assert not hidden, hidden
    assert not re.search(r"(?<![\w$}\"])/(home|root|opt|work|Users)/|https?://|--index-url", text)


# The checks themselves: each must be able to fail.


@pytest.mark.parametrize("link", ["docs/nothing.md", "docs/index.md#nothing", "bench", "#nothing"])
def test_a_broken_link_is_told(link):
    assert len(broken_links("README.md", f"[a]({link}) [b](docs/index.md#see-it-yourself) [c](https://x.org/y)")) == 1


def test_what_runs_is_found():
    assert {snippet.language for snippet in SNIPPETS} <= {"python", "sh", ""}  # all that is looked at here
    runnable = {snippet.page for snippet in PYTHON if lacking(snippet.code) is None}
    assert runnable >= {"README.md", "docs/index.md", "docs/howto/interactive.md", "docs/kernels/index.md"}
    shown = {"README.md", "CONTRIBUTING.md", "docs/howto/wan.md", "docs/evidence/runs.md"}
    assert {snippet.page for snippet in SHELL} >= shown
    every = [words for snippet in SHELL for words in commands(snippet)]
    assert {words[0] for words in every} == set(PROGRAMS) and len(every) > 50


def test_a_block_of_python_that_cannot_run_is_told():
    assert undefined("import a.b, c as d\nfor x in range(f(a, d)):\n    x.y = g") == {"f", "g"}
    assert lacking("# needs published weights\nx = 1") == "published weights"
    assert lacking("# needs a good mood\nx = 1") is None
    with pytest.raises(ImportError):
        exec(imports_of("# needs a GPU\nfrom hiar_model import Rollout, Nothing\nx"), {})


@pytest.mark.parametrize(
    "line",
    [
        "hiar generate a -o a.mp4 --ordr stream",
        "hiar generate a -o a.mp4 --order zigzag",
        "torchrun --nproc-per-node 8 -m hiar_model train toy/teach",
        "hiar train toy/hiar && hiar train toy/hiar optimizer.rate=1",
        "W=data.wrld=varied\nhiar train toy/teacher $W",
        "nsys profile -o rollout \\\n    hiar bench --depth 4",
        "make tests",
        "make test JOB=2",
        "python bench/nothing.py",
        "python -m hiar_model.nothing",
        "pytest tests/nothing/",
    ],
)
def test_a_wrong_command_line_is_told(line):
    with pytest.raises((AssertionError, ValueError, ArgumentError)):
        for words in commands(Snippet("page", 1, "sh", line + "\n")):
            understand(words)
