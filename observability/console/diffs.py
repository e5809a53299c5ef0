"""What has changed between two texts, as lines to be shown, however long the texts are.

Not here: what the texts are (`checkpointer/inspection.py`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

__all__ = ["Line", "differences"]

_CONTEXT = 3
_LINES = 400
_LONGEST_LINE = 500
# Comparing costs the product of both lengths in the worst case.
_COMPARED = 2_000


@dataclass(frozen=True, slots=True)
class Line:
    """A line.

    Attributes:
        kind: `gone`, `new`, `kept`, or `note` for what is said about the others.
        text: It.
    """

    kind: str
    text: str


def differences(before: str | None, after: str | None) -> list[Line]:
    """Return the lines that were taken away and added, and some around them; None has no lines."""
    first, second = ([] if text is None else text.split("\n") for text in (before, after))
    left_out = len(first) + len(second)
    first, second = first[:_COMPARED], second[:_COMPARED]
    left_out -= len(first) + len(second)
    found: list[Line] = []
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for number, group in enumerate(matcher.get_grouped_opcodes(_CONTEXT)):
        if number:
            found.append(Line("note", "…"))
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                found += [Line("kept", _cut(line)) for line in first[i1:i2]]
                continue
            found += [Line("gone", _cut(line)) for line in first[i1:i2]]
            found += [Line("new", _cut(line)) for line in second[j1:j2]]
        if len(found) > _LINES:
            break
    if len(found) > _LINES or left_out:
        found = [*found[:_LINES], Line("note", "… It goes on; this is as much as a page shows.")]
    return found


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…"
