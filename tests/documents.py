"""Reads the project's documents: the files, their code blocks and the marks before these, their links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]

# Decisions tell what was thought at their time; they are not kept up to date with the code.
_KEPT_AS_WRITTEN = ROOT / "docs" / "decisions"

# <!-- given: graph, saver --> or <!-- proved by: tests/test_x.py -->, in a line of its own before a block.
_MARK = re.compile(r"<!--\s*(given|proved by):\s*(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block of a document.

    Attributes:
        document: The file.
        line: The line of the file in which the code begins, counted from 1.
        language: What stands behind the fence.
        code: The text between the fences.
        given: The names that the block may use though no block before it makes them.
        proved_by: The test file that has this block tested, if not the test of the document itself.
    """

    document: Path
    line: int
    language: str
    code: str
    given: tuple[str, ...] = ()
    proved_by: str | None = None

    @property
    def place(self) -> str:
        """Where it stands, for the message of a test that fails."""
        return f"{name_of(self.document)}:{self.line}"


def name_of(path: Path) -> str:
    """Return a document's name as a person writes it."""
    return path.relative_to(ROOT).as_posix()


def documents() -> list[Path]:
    """Return all documents whose code is executed."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(path for path in found if _KEPT_AS_WRITTEN not in path.parents)


def blocks(document: Path) -> list[Block]:
    """Return the code blocks of a document, in order, also those inside lists and quotes.

    A mark belongs to the block that follows it; text in between ends it.
    """
    found = []
    given: tuple[str, ...] = ()
    proved_by: str | None = None
    for token in MarkdownIt("commonmark").parse(document.read_text()):
        if token.type == "html_block":
            for kind, text in _MARK.findall(token.content):
                if kind == "given":
                    given = tuple(name.strip() for name in text.split(","))
                else:
                    proved_by = text
        elif token.type in ("fence", "code_block"):
            assert token.map
            start = token.map[0] + (2 if token.type == "fence" else 1)
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(document, start, language, token.content, given, proved_by))
            given, proved_by = (), None
        elif token.type == "inline":
            given, proved_by = (), None
    return found


def count_of_marks(document: Path) -> int:
    """Return how many marks a document has, wherever they stand."""
    return len(_MARK.findall(document.read_text()))
