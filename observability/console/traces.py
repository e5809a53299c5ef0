"""Stack traces for reading: the application's own frames are shown, runs of others are folded.

Not here: what a trace is compared by (`errors/fingerprint.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Piece", "fold"]

_FRAME = re.compile(r'^\s*File "([^"\n]{1,1000})", line \d{1,9}, in ')
# Installed packages, the standard library, and what has no file.
_NOT_IN_APP = re.compile(r"[/\\](?:site|dist)-packages[/\\]|[/\\]lib(?:64)?[/\\]python\d|^<")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a trace.

    Attributes:
        text: Its lines.
        folded: How many frames of others it is; 0 for what is shown.
    """

    text: str
    folded: int


def fold(trace: str) -> list[Piece]:
    """Divide a trace into what is shown and what is folded; put together again it is the same lines."""
    blocks: list[tuple[bool, list[str]]] = []
    for line in trace.splitlines():
        if found := _FRAME.match(line):
            blocks.append((bool(_NOT_IN_APP.search(found[1])), [line]))
        elif blocks and line.startswith("    "):
            blocks[-1][1].append(line)
        else:
            blocks.append((False, [line]))
    pieces = []
    for foreign, run in groupby(blocks, key=lambda block: block[0]):
        members = [lines for _, lines in run]
        pieces.append(Piece("\n".join(line for lines in members for line in lines), len(members) if foreign else 0))
    return pieces
