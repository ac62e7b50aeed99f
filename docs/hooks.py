"""What mkdocs does beyond copying the pages: pages made from the code, and links that leave docs/.

Made at build time: the command line from its parser, the recipes' keys from their dataclasses, and pages of files that
live beside the code (the kernels' READMEs, CONTRIBUTING, the model card). A link to any other file of the repository
gets a page that shows the file, or a copy of it, so that the site is whole without a network.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

KERNELS = {
    "attention": (
        "attention attention_with_lse BlockCausal KVContext attention_layout AttentionLayout takes_layout "
        "attention_schedule AttentionSchedule takes_schedule"
    ),
    "attention_fp8": "attention_fp8",
    "flow_step": "flow_step",
    "merge_attention": "merge_attention",
    "norm": "layer_norm rms_norm ada_layer_norm gated_residual gated_residual_layer_norm gated_residual_ada_layer_norm "
    "ada_layer_norm_quantized gated_residual_ada_layer_norm_quantized",
    "qk_norm_rope": "qk_norm_rope qk_norm_rope_append",
    "append_fp8": "append_fp8 qk_norm_rope_append_fp8 pack_values unpack_values",
    "ring_advance": "ring_advance",
    "rms_silu_pad": "rms_silu_pad",
    "quantize_rows": "quantize_rows",
    "int8_linear": "int8_linear",
}
"""Folder of hiar_kernels -> its public functions, shown below its README."""

PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "CHANGELOG.md": "contributing/changelog.md",
    "bench/README.md": "contributing/benchmarks.md",
    "hiar_model/toy/weights/README.md": "evidence/toy_model.md",
    "hiar_model/toy/scenes/README.md": "evidence/scenes_model.md",
    **{f"hiar_kernels/{folder}/README.md": f"kernels/{folder}.md" for folder in KERNELS},
}
"""File of the repository -> its page."""

EXAMPLES = "howto/examples.md"
SHOWN = {
    ".py": "python",
    ".Dockerfile": "docker",
    ".cu": "cuda",
    ".h": "c",
    ".cpp": "cpp",
    ".yaml": "yaml",
    ".toml": "toml",
    ".log": "text",
}
LINK = re.compile(r"(?<!`)(\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)
FENCE = re.compile(r"^(`{3,}).*?^\1$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_origins: dict[str, str] = {}
"""Page -> the file of the repository that its links are relative to."""


def prose(text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a page, and whether each is text (not code)."""
    at = 0
    for code in FENCE.finditer(text):
        yield text[at : code.start()], True
        yield code[0], False
        at = code.end()
    yield text[at:], True


def linked_files(text: str, origin: str) -> list[str]:
    """The files of the repository that a page links to, from the root; a folder ends with "/"."""
    parts = [part for part, is_text in prose(text) if is_text]
    targets = [match[2] for part in parts for match in LINK.finditer(part)]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(origin), target)) for target in targets]


def place_of(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PLACES:
        return PLACES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    page = Path(path).suffix in (*SHOWN, ".md")
    return f"files/{path}" + (".md" if page and not path.endswith(".md") else "")


def relinked(text: str, origin: str, page: str) -> str:
    """A page with its links as they are from its place in the site."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[2]))
        return f"{match[1]}{posixpath.relpath(place_of(path), posixpath.dirname(page) or '.')}{match[3] or ''})"

    return "".join(LINK.sub(link, part) if is_text else part for part, is_text in prose(text))


# Pages made from the code


def command_line() -> str:
    """Every command of `hiar` with its options, from the parser."""
    from argparse import SUPPRESS

    from hiar_model.cli import build_parser
    from hiar_model.cli.main import COMMANDS

    pages = ["# Command line", "", "Made from the parser; `hiar COMMAND --help` prints the same.", ""]
    commands = next(a.choices for a in build_parser()._actions if isinstance(getattr(a, "choices", None), dict))
    for name, (_, _, summary) in COMMANDS.items():
        pages += [f"## hiar {name}", "", summary, "", "| option | default | |", "|---|---|---|"]
        for action in commands[name]._actions:
            if action.help in (None, SUPPRESS) or action.dest in ("help", "print_config"):
                continue
            names = [f"`{option}`" for option in action.option_strings if not option.endswith("+")]
            default = "required" if action.required else _yaml(action.default)
            pages.append(f"| {', '.join(names) or f'`{action.dest}`'} | {default} | {_cell(action.help)} |")
        pages.append("")
    pages += [
        "Every command also has `--help` and `--print_config`, which prints its options as a file for `--config`."
    ]
    return "\n".join(pages)


def recipe_keys() -> str:
    """Every stage of `hiar train` with the keys of its recipe, from the dataclasses; then the shipped recipes."""
    from hiar_model.train.config.reading import shipped_recipes
    from hiar_model.train.config.recipe import RECIPES, Recipe

    stages = list(RECIPES.values())
    shared = [base for kind in stages for base in reversed(kind.__mro__) if issubclass(base, Recipe)]
    shared = [base for base in dict.fromkeys(shared) if base not in stages]
    sections: list[type] = []
    pages = ["# Recipes", "", "`hiar train RECIPE key=value ...` changes any key below, such as `optimizer.lr=1e-4`. A"]
    pages += ["recipe is a file of YAML; `stage` chooses its keys. Made from the dataclasses.", ""]
    for kind in [*stages, *shared]:
        pages += [f"## stage: {kind.stage}" if kind in stages else f"## {kind.__name__}", "", _first(kind), ""]
        more = [f"[{base.__name__}](#{base.__name__.lower()})" for base in kind.__mro__[1:] if base in shared]
        pages += [*_keys(kind, sections), *([f"And the keys of {', '.join(more)}.", ""] if more else [])]
    for section in sections:  # grows while it is walked: a section may have sections
        pages += [f"## {section.__name__}", "", _first(section), "", *_keys(section, sections)]
    pages += ["## The shipped recipes", ""]
    for name in shipped_recipes():
        text = (ROOT / "hiar_model/train/recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        pages += [f"### {name}", "", f"```yaml\n{text}```", ""]
    return "\n".join(pages)


def _keys(kind: type, sections: list[type]) -> list[str]:
    """The table of a dataclass's own fields; those that are dataclasses are added to `sections`."""
    hints, texts, own = get_type_hints(kind), _arguments(kind), vars(kind).get("__annotations__", {})
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint: Any = hints[field.name]
        if field.name not in own:
            continue
        if dataclasses.is_dataclass(hint):
            sections += [hint] if hint not in sections else []  # type: ignore[list-item]
            link = f"[{hint.__name__}](#{hint.__name__.lower()})"
            rows.append(f"| `{field.name}.` | {link} | | {_cell(texts.get(field.name, ''))} |")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if default is dataclasses.MISSING else _yaml(default)
        rows.append(f"| `{field.name}` | {_cell(_type(hint))} | {shown} | {_cell(texts.get(field.name, ''))} |")
    return [*rows, ""]


def _arguments(kind: type) -> dict[str, str]:
    """Field -> what the docstring of a dataclass says of it: "a, b: text. c: text."."""
    names = "|".join(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    body = re.search(r"Args:\n(.*?)(?:\n\n\s*\w+:|\Z)", kind.__doc__ or "", re.DOTALL)
    parts = re.split(rf"(?:^|(?<=[.;]))\s*((?:(?:{names}), )*(?:{names})): ", " ".join(body[1].split()) if body else "")
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {name: text.strip().rstrip(";") for fields, text in pairs for name in fields.split(", ")}


def _type(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def _first(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n\n")[0]


def _yaml(value: object) -> str:
    if value in (None, "", "==SUPPRESS=="):
        return ""
    shown = str(list(value) if isinstance(value, tuple) else value)
    return f"`{shown.lower() if isinstance(value, bool) else shown}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def kernel_page(folder: str) -> str:
    """README of an op, and below it how it is called."""
    text = (ROOT / f"hiar_kernels/{folder}/README.md").read_text(encoding="utf-8")
    import hiar_kernels

    names = KERNELS[folder].split()  # by their modules: a folder has the name of its op
    calls = "\n\n".join(f"::: {getattr(hiar_kernels, name).__module__}.{name}" for name in names)
    return f"{text}\n## Call it\n\n{calls}\n"


def examples() -> str:
    """What each script of examples/ shows, from its docstring, with the script itself."""
    pages = ["# Examples", "", "Short scripts, each run by a test; start them from the root of the repository.", ""]
    for file in sorted((ROOT / "examples").glob("*.py")):
        code = file.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(code)) or ""
        body = code[code.index('"""', code.index('"""') + 3) + 3 :].strip()
        pages += [f"## {file.stem}", "", about, "", f'```python title="examples/{file.name}"', body, "```", ""]
    pages += [f"[{file.name}](../../examples/{file.name})" for file in sorted((ROOT / "examples").glob("*.ipynb"))]
    return "\n".join(pages)


MADE: dict[str, Callable[[], str]] = {
    "reference/command_line.md": command_line,
    "reference/recipes.md": recipe_keys,
    EXAMPLES: examples,
    **{f"kernels/{folder}.md": (lambda folder=folder: kernel_page(folder)) for folder in KERNELS},
}


# What mkdocs calls


def absent() -> set[str]:
    """The pages whose file is not in the repository (yet): the navigation goes without."""
    return {page for origin, page in PLACES.items() if not (ROOT / origin).exists()}


def on_config(config: Any) -> Any:
    for section in config.nav:
        for name, pages in section.items():
            if isinstance(pages, list):
                section[name] = [each for each in pages if not (isinstance(each, dict) and absent() & {*each.values()})]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File, InclusionLevel

    texts: dict[str, tuple[str, str]] = {}  # file of the repository -> (its page, text)
    for file in files.documentation_pages():
        texts[f"docs/{file.src_uri}"] = (file.src_uri, Path(file.abs_src_path).read_text(encoding="utf-8"))
    for origin, page in PLACES.items():
        if page not in files.src_uris and (ROOT / origin).exists():
            text = (ROOT / origin).read_text(encoding="utf-8")
            texts[origin] = (page, MADE[page]() if page in MADE else text)
    for page, make in MADE.items():
        if page not in (place for place, _ in texts.values()):
            texts[f"docs/{page}"] = (page, make())

    known, copies = list(texts), set()
    for origin in known:  # grows while it is walked: a page of a file may link to further files
        for path in linked_files(texts[origin][1], origin):
            if path in texts or path in copies or path in PLACES or path.startswith("docs/"):
                continue
            target = ROOT / path
            if not target.is_file():
                raise PluginError(f"{origin} links to {path}, which is no file; a folder has no page")
            if target.suffix == ".md":
                texts[path] = (place_of(path), target.read_text(encoding="utf-8"))
                known.append(path)
            elif target.suffix in SHOWN:
                code = target.read_text(encoding="utf-8")
                shown = f"---\nhide: [toc]\n---\n# {path}\n\n````{SHOWN[target.suffix]}\n{code}\n````\n"
                texts[path] = (place_of(path), shown)
            else:
                copies.add(path)
    for origin, (page, text) in texts.items():
        _origins[page] = origin
        if page not in files.src_uris:
            unlisted = InclusionLevel.NOT_IN_NAV if page.startswith("files/") else InclusionLevel.UNDEFINED
            files.append(File.generated(config, page, content=text, inclusion=unlisted))
    for path in copies:
        files.append(File.generated(config, place_of(path), abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    uri = page.file.src_uri
    origin = _origins[uri]
    if Path(origin).suffix != ".md":
        return markdown  # the text of a file of code
    text = "".join(COMMENT.sub("", part) if is_text else part for part, is_text in prose(markdown))
    return relinked(text, origin, uri)
