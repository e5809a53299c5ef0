"""Runs the command line inside this process, and plants what it is to find."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from uuid import uuid4

from checkpointer import cli

if TYPE_CHECKING:
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


def command(*arguments: object, **environment: str) -> Done:
    """Run a command as a process would, in an environment without any addresses but these."""
    names = ("POSTGRES_URI", "REDIS_URL", "CHECKPOINTER_PREFIX", "CHECKPOINTER_SCHEMA", "COLUMNS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["checkpointer", *map(str, arguments)]),
        patch.dict(os.environ, clean | {"NO_COLOR": "1"} | environment, clear=True),
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
