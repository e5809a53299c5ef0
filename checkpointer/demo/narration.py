"""What the demo tells, line by line, and how a terminal shows it.

A *line* says what kind of thing it tells: what happens (`say`), a fault that the demo causes (`fault`), an event as an
operator gets it (`event`), what the user of a thread sees (`screen`), where to look (`look`), a command and what it
prints (`shell`), what was just shown to be true (`proved`) or not (`failed`). Not here: what is told.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from checkpointer.cli_output import block, print_json_line

__all__ = ["Kind", "Line", "Tell", "Terminal", "tell_in_json"]

Kind = Literal["title", "say", "fault", "event", "screen", "look", "shell", "output", "proved", "failed"]

_LABELS: dict[Kind, tuple[str, str]] = {
    "say": ("", ""),
    "fault": ("FAULT", "bold red"),
    "event": ("event", "yellow"),
    "screen": ("user sees", "cyan"),
    "look": ("look", "bold blue"),
    "shell": ("try", "bold"),
    "output": ("", "dim"),
    "proved": ("proved", "bold green"),
    "failed": ("FAILED", "bold red"),
}
_INDENT = 11
_WIDEST = 110
# Without a terminal there is no width to keep, and lines are to be found whole.
_UNBOUND = 100_000


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that is told.

    Attributes:
        kind: See the module.
        text: The words; those of an `output` may have several lines.
    """

    kind: Kind
    text: str


Tell = Callable[[Line], None]
"""Takes a line; called from any thread."""


def tell_in_json(line: Line) -> None:
    """Print a line as a JSON object, for programs."""
    print_json_line(asdict(line))


class Terminal:
    """Shows lines on standard output, in colours if it is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._lock = threading.Lock()
        is_terminal = sys.stdout.isatty()
        self._width = min(shutil.get_terminal_size().columns, _WIDEST) if is_terminal else _UNBOUND

    def __call__(self, line: Line) -> None:
        """Show a line."""
        from rich.text import Text

        words = block(line.text)
        with self._lock:
            if line.kind == "title":
                self._console.print(Text(f"\n== {words} ==", style="bold"))
            else:
                label, style = _LABELS[line.kind]
                shown = Text().append(f"{label:>{_INDENT - 2}}  ", style=style)
                self._console.print(shown.append(self._folded(line.kind, words), style=_style(line.kind, style)))
            sys.stdout.flush()

    def _folded(self, kind: Kind, words: str) -> str:
        """Break between words; never what somebody may want to copy."""
        space = " " * _INDENT
        if kind in ("shell", "output"):
            return f"\n{space}".join(words.splitlines())
        width = max(self._width - _INDENT, 30)
        return f"\n{space}".join(textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False))


def _style(kind: Kind, of_label: str) -> str:
    return of_label if kind in ("fault", "output", "failed") else ""
