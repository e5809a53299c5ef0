"""What the commands print: tables, fields, JSON, progress and errors, none of which hostile text can steer.

Ids, messages and stack traces come from applications and from their users: what a terminal takes for more than a
character is spelled out, as `ascii()` does, and nothing is read as markup. JSON is ASCII. What is for programs goes to
standard output, what is for people beside it (progress, notes, errors) to standard error. Not here: what is printed.

*Plain* text has no line breaks, so that no id can forge a line; *block* text keeps them.
"""

# No `from __future__ import annotations`: see `cli.py`.

import contextlib
import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, NoReturn

from checkpointer.errors import CheckpointerError
from observability.scrub import safe_text

__all__ = [
    "Advance",
    "block",
    "fail",
    "note",
    "plain",
    "print_fields",
    "print_json",
    "print_json_line",
    "print_line",
    "print_table",
    "progress",
    "tolerate_any_text",
    "written",
]

_WIDTH = 200
_LEAST = 12

Advance = Callable[[int], None]
"""Says how much of the whole is done by now."""


def plain(value: object) -> str:
    """Return a value as text for a line."""
    return "".join(char if _is_harmless(char) else _spelled(char) for char in _text(value))


def block(value: object) -> str:
    """Return a value as text that may have several lines."""
    return "".join(char if char == "\n" or _is_harmless(char) else _spelled(char) for char in _text(value))


def print_line(value: object = "") -> None:
    """Print one line."""
    sys.stdout.write(plain(value) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys; nothing is cut, since the end of an id or a message can be what matters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Without a terminal whose width there is to keep, lines are to be found whole.
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if narrow else _WIDTH)
    if not rows:
        console.print("No rows.")
        return
    columns = {name: [block(row[name]) for row in rows] for name in rows[0]}
    unfolded = _unfolded({name: max(len(name), *map(len, cells)) for name, cells in columns.items()}, console.width)
    table = Table()
    for name in columns:
        table.add_column(Text(name), overflow="fold", no_wrap=name in unfolded)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    console.print(table)


def _unfolded(widths: Mapping[str, int], width: int) -> set[str]:
    """Return the columns that keep their width, the narrowest first, as far as that leaves room for the others."""
    found: set[str] = set()
    left = width - 3 * len(widths) - 1
    for name in sorted(widths, key=lambda one: widths[one]):
        others = len(widths) - len(found) - 1
        if left - widths[name] < others * _LEAST:
            break
        found.add(name)
        left -= widths[name]
    return found


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print a name and a value on each line, without those that have no value."""
    given = {name: value for name, value in fields.items() if value is not None}
    width = max((len(name) for name in given), default=0)
    for name, value in given.items():
        print_line(f"{name:<{width}}  {_text(value)}")


def print_json(value: Any) -> None:
    """Print a value as one indented JSON document."""
    sys.stdout.write(_dump(value, indent=2) + "\n")


def print_json_line(value: Any) -> None:
    """Print a value as JSON on one line, at once."""
    sys.stdout.write(_dump(value, indent=None) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell people something that is no part of the output."""
    sys.stderr.write(plain(" ".join(safe_text(text).split())) + "\n")


def fail(message: str, code: int = 1) -> NoReturn:
    """Say in one line what happened and what to do, without secrets, and exit."""
    note(message)
    sys.exit(code)


@contextlib.contextmanager
def progress(what: str, total: int | None, *, quiet: bool) -> Iterator[Advance]:
    """Show on standard error how far something long is; nothing if that is not a terminal.

    Args:
        what: What is being done.
        total: How much there is to do, if that is known.
        quiet: Show nothing, since JSON was asked for.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def tolerate_any_text() -> None:
    """Have characters that the terminal's encoding lacks spelled out, instead of failing at them."""
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def written() -> Iterator[None]:
    """See that all that is printed gets out, and exit in good order if it does not.

    Whoever reads no more, such as `head`, wants no more, which is nothing to complain of.
    """
    if sys.stdout is None:  # closed by whoever started this, who does not want to know
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _give_up()
        sys.exit(1)
    except OSError as exc:
        if isinstance(exc, CheckpointerError):
            raise
        _give_up()
        fail(f"The system has refused something, such as to take the output: {exc.strerror or exc}.")


def _give_up() -> None:
    # What is still to be written would fail once more when the interpreter ends.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    return _dump(value, indent=None) if isinstance(value, dict | list | tuple) else str(value)


def _is_harmless(char: str) -> bool:
    # Spaces other than the usual one are not printable for Python, and stand in many a language's text.
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _spelled(char: str) -> str:
    return ascii(char)[1:-1]


def _dump(value: Any, indent: int | None) -> str:
    separators = (",", ":") if indent is None else None
    text = json.dumps(_json(value), indent=indent, separators=separators, allow_nan=False)
    # ASCII only, and of that no control character.
    return text.replace("\x7f", "\\u007f")


def _json(value: Any) -> Any:
    """Make JSON of what a database returns; times are ISO 8601 in UTC."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return (value if value.tzinfo is None else value.astimezone(UTC)).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return str(value)
