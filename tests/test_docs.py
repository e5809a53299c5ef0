"""The documents lead where they say, on GitHub and as a site.

The site builds without a warning, and loads nothing from elsewhere.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest
from documents import ROOT, name_of
from markdown_it import MarkdownIt

import checkpointer
import observability
from observability.api import create_app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from markdown_it.token import Token

# What a browser loads by itself, by element and attribute. A link that somebody has to follow is none of it.
LOADED = {
    *(("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("audio", "src")),
    *(("img", "srcset"), ("source", "srcset"), ("link", "href"), ("object", "data"), ("embed", "src"), ("use", "href")),
}


@dataclass
class Page:
    """What a page of the site loads, where its links lead and what can be linked to in it."""

    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            if name == "id" and value:
                self.page.ids.add(value)
            elif tag == "a" and name == "href" and value:
                self.page.links.append(value)
            elif (tag, name) in LOADED and value:
                self.page.loads.append(value)

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.page.loads.extend(_of_css(data))


def _of_css(text: str) -> list[str]:
    """Return what a style sheet loads."""
    return re.findall(r"""(?:url\(|@import\s+)["']?([^"')\s;]+)""", text)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """The pages of the site, by file."""
    found = {}
    for path in site.rglob("*.html"):
        reader = _Reader()
        reader.feed(path.read_text())
        found[path] = reader.page
    assert len(found) > 20
    return found


def test_the_site_loads_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loaded = [(path.name, address) for path, page in pages.items() for address in page.loads]
    for path in site.rglob("*.css"):
        loaded += [(path.name, address) for address in _of_css(path.read_text())]
    for path in site.rglob("*.svg"):
        loaded += [(path.name, address) for address in re.findall(r'href="([^"#]+)"', path.read_text())]
    assert len(loaded) > len(pages)
    assert [one for one in loaded if urlsplit(one[1]).netloc] == []


def test_each_link_of_the_site_leads_to_a_place_that_is_there(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        # The page of what is not found has no place of its own.
        for link in page.links if path.name != "404.html" else []:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            if not target.is_file() or (address.fragment and known and unquote(address.fragment) not in known.ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_the_reference_has_every_public_name(site: Path, pages: dict[Path, Page]) -> None:
    for module in (checkpointer, observability):
        ids = pages[site / "reference" / f"{module.__name__}.html"].ids
        assert {f"{module.__name__}.{name}" for name in module.__all__} - ids == set()


def test_the_reference_has_every_route(site: Path) -> None:
    text = (site / "reference" / "routes.html").read_text()
    paths = create_app(postgres_uri="postgresql://x/y").openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert {route for route in routes if f"<code>{route}</code>" not in text} == set()


# On GitHub.


def _markdown() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
    return sorted(found)


def _inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _inline(token.children or [])


@cache
def _anchors(path: Path) -> set[str]:
    """Return what GitHub lets one link to: the headings, in its way of writing them."""
    found: dict[str, int] = {}
    anchors = set()
    tokens = MarkdownIt("commonmark").parse(path.read_text())
    for opening, token in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found.get(slug, 0)
            found[slug] = count + 1
            anchors.add(f"{slug}-{count}" if count else slug)
    return anchors


@pytest.mark.parametrize("document", _markdown(), ids=name_of)
def test_each_link_of_a_document_leads_to_a_file_and_a_heading(document: Path) -> None:
    broken = []
    parser = MarkdownIt("commonmark").enable("table")
    for token in _inline(parser.parse(document.read_text())):
        link = str(token.attrGet("href") or token.attrGet("src") or "")
        address = urlsplit(link)
        if not link or address.scheme or address.netloc:
            continue
        target = (document.parent / unquote(address.path)).resolve() if address.path else document
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (address.fragment and target.suffix == ".md" and address.fragment not in _anchors(target)):
            broken.append(link)
    assert broken == []


def test_what_stands_in_docs_links_only_to_what_is_in_the_site_too() -> None:
    outside = []
    for document in (ROOT / "docs").rglob("*.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            address = urlsplit(link)
            target = (document.parent / address.path).resolve()
            if address.path and not address.scheme and not target.is_relative_to(ROOT / "docs"):
                outside.append(f"{name_of(document)}: {link}")
    assert outside == []
