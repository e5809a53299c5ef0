"""Runs the command line, inside this process or as one of its own, and plants what it is to find."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import unicodedata
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from uuid import uuid4

import typer
from helpers import wait_until

from checkpointer import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

NOON = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)

# What a terminal would obey, and what rich would.
HOSTILE = "a\x1b[31m\x9b2J\u202eb\r\x07\x7f[bold]c[/bold]\nd"


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    code: int | str | None
    out: str
    err: str

    def json(self) -> Any:
        """Return what it printed, which holds nothing that a terminal takes for more than a character."""
        assert self.out.isascii()
        assert all(char.isprintable() or char == "\n" for char in self.out)
        return json.loads(self.out, parse_constant=lambda name: f"{name} is no JSON")

    def failed(self, code: int = 1) -> str:
        """Assert that it said in one line why it failed, and return the line."""
        assert self.code == code, self
        assert self.err.count("\n") == 1, self.err
        return self.err


# As the installed script does.
SCRIPT = "import sys; from checkpointer.cli import main; sys.exit(main())"

_ADDRESSES = ("POSTGRES_URI", "REDIS_URL", "CHECKPOINTER_PREFIX", "CHECKPOINTER_SCHEMA", "COLUMNS")
# Without a buffer what is printed goes out at once, and cannot fail at the end.
_LEFT_OUT = (*_ADDRESSES, "PYTHONUNBUFFERED")


def tree() -> dict[str, Any]:
    """Return all commands, by what is typed for them."""

    def walk(found: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if not (commands := getattr(found, "commands", None)):
            yield " ".join(path), found
            return
        for name, one in commands.items():
            yield from walk(one, (*path, name))

    return dict(walk(typer.main.get_command(cli._app()), ()))


def takes(command: Any, option: str) -> bool:
    """Return whether a command has an option."""
    return any(option in param.opts for param in command.params)


def obeyed(text: str) -> set[str]:
    """Return the characters of a text by which a terminal would do something else than show them."""
    return {char for char in text if not (char.isprintable() or char == "\n" or unicodedata.category(char) == "Zs")}


@dataclass
class Running:
    """A command that goes on, as a process of its own."""

    process: subprocess.Popen[str]
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def line_with(self, text: str) -> str:
        """Wait for a line that holds a text, and return it."""

        def found() -> str | None:
            return next((line for line in [*self.out, *self.err] if text in line), None)

        wait_until(lambda: found() or self.process.poll() is not None, message=f"{self.out} {self.err}")
        line = found()
        assert line is not None, f"it ended before: {self.out} {self.err}"
        return line

    def ended(self, signal: int | None = None) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        if signal is not None:
            self.process.send_signal(signal)
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join(60)
        return code

    def __post_init__(self) -> None:
        pairs = ((self.process.stdout, self.out), (self.process.stderr, self.err))
        self._readers = [threading.Thread(target=kept.extend, args=(stream,)) for stream, kept in pairs]
        for reader in self._readers:
            reader.start()


@contextlib.contextmanager
def running(*arguments: object, **environment: str) -> Iterator[Running]:
    """Run a command that goes on until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=alone(environment),
    )
    found = Running(process)
    try:
        yield found
    finally:
        process.kill()
        found.ended()


def alone(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment without any addresses but these."""
    return {name: value for name, value in os.environ.items() if name not in _LEFT_OUT} | {
        "NO_COLOR": "1",
        **environment,
    }


def command(*arguments: object, **environment: str) -> Done:
    """Run a command as a process would, in an environment without any addresses but these."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["checkpointer", *map(str, arguments)]),
        patch.dict(os.environ, alone(environment), clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            return Done(end.code, out.getvalue(), err.getvalue())
    raise AssertionError("the command line did not exit")


def plant_error(conn: psycopg.Connection[Any], **values: Any) -> int:
    """Insert an error, and its group if there is none yet, and return its number."""
    row = {
        "error_type": "checkpoint_flush_error",
        "severity": "error",
        "error_message": "The flush failed.",
        "created_at": NOON,
        "event_id": uuid4(),
        "fingerprint": "v1:a",
        "occurrences": 1,
        **values,
    }
    names = ", ".join(row)
    marks = ", ".join(f"%({name})s" for name in row)
    found = conn.execute(f"INSERT INTO system_errors ({names}) VALUES ({marks}) RETURNING id".encode(), row).fetchone()
    assert found
    conn.execute(
        "INSERT INTO system_error_groups (fingerprint, error_type, severity, title, first_seen_at, last_seen_at, "
        "occurrences) VALUES (%(fingerprint)s, %(error_type)s, %(severity)s, %(error_message)s, %(created_at)s, "
        "%(created_at)s, %(occurrences)s) ON CONFLICT (fingerprint) DO NOTHING",
        row,
    )
    return int(found[0])


def plant_line(conn: psycopg.Connection[Any], thread_id: str, message: str, **values: Any) -> int:
    """Insert a line of a thread's log, and return its number."""
    row = {"thread_id": thread_id, "level": "info", "message": message, "created_at": NOON, **values}
    names = ", ".join(row)
    marks = ", ".join(f"%({name})s" for name in row)
    found = conn.execute(f"INSERT INTO thread_logs ({names}) VALUES ({marks}) RETURNING id".encode(), row).fetchone()
    assert found
    return int(found[0])
