"""Tells which pages of a built site would make a browser ask another machine for something.

    python docs/self_contained.py out/site

Links that a reader may follow are no such thing; scripts, style sheets, fonts, pictures and frames are. Exit status 1
and a line for each page and address.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

OUTSIDE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
IN_CSS = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
FOLLOWED = {"a", "area"}  # by the reader, not by the browser
NOT_FETCHED = {"canonical", "author", "license", "alternate", "next", "prev"}


class Page(HTMLParser):
    """Collects the outside addresses that a page fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in FOLLOWED or (tag == "link" and values.get("rel") in NOT_FETCHED):
            return
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            if OUTSIDE.match(values.get(name, "")):
                self.fetched.append(values[name])
        self.fetched += IN_CSS.findall(values.get("style", ""))


def outside(site: Path) -> Iterator[str]:
    """ "page: address" of everything that pages and style sheets fetch from elsewhere."""
    for path in sorted(site.rglob("*")):
        fetched: list[str] = []
        if path.suffix == ".html":
            text = path.read_text(encoding="utf-8")
            page = Page()
            page.feed(text)
            styles = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
            fetched = page.fetched + [address for style in styles for address in IN_CSS.findall(style)]
        elif path.suffix == ".css":
            fetched = IN_CSS.findall(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(site)}: {address}" for address in fetched)


def main() -> int:
    site = Path(sys.argv[1])
    if not (site / "index.html").is_file():
        print(f"{site} is no site: it has no index.html", file=sys.stderr)
        return 1
    problems = list(outside(site))
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
