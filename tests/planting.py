"""Rows for tests of what reads and changes the store of errors."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

NOON = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)


def plant(conn: Connection, **values: Any) -> int:
    """Insert an error and its group, and return its id."""
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
    if row["fingerprint"] is not None:
        conn.execute(
            "INSERT INTO system_error_groups (fingerprint, error_type, severity, title, first_seen_at, last_seen_at, "
            "occurrences) VALUES (%(fingerprint)s, %(error_type)s, %(severity)s, %(error_message)s, %(created_at)s, "
            "%(created_at)s, %(occurrences)s) ON CONFLICT (fingerprint) DO NOTHING",
            row,
        )
    return int(found[0])
