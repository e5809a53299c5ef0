"""The faults that the demo causes in Postgres, each as somebody else's deed: the saver is not told.

Not here: killing processes (`workers.py`, `embedded.py`).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LIMIT", "held_inserts", "is_held", "lift_limit", "limit_blobs"]

LIMIT = 16_384
"""The most bytes of a blob, once they are limited."""

_ADD = f"ALTER TABLE checkpoint_blobs ADD CONSTRAINT blobs_are_small CHECK (octet_length(blob) <= {LIMIT}) NOT VALID"
_DROP = "ALTER TABLE checkpoint_blobs DROP CONSTRAINT blobs_are_small"

_HELD = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = %s AND wait_event_type = 'Lock' AND query LIKE '%%checkpoint_blobs%%'
"""


def limit_blobs(conn: psycopg.Connection[Any]) -> None:
    """Have Postgres refuse large values, as a constraint does that somebody has added."""
    conn.execute(_ADD.encode())


def lift_limit(conn: psycopg.Connection[Any]) -> None:
    """Take that back."""
    conn.execute(_DROP.encode())


@contextlib.contextmanager
def held_inserts(postgres_uri: str) -> Iterator[None]:
    """Have every flush stand still in the middle of its transaction, as a long migration would; reads go on."""
    with psycopg.connect(postgres_uri) as conn:
        conn.execute("LOCK TABLE checkpoint_blobs IN SHARE MODE")
        yield
        conn.rollback()


def is_held(conn: psycopg.Connection[Any], application_name: str) -> bool:
    """Tell whether a program stands still in the middle of a flush."""
    row = conn.execute(_HELD, (application_name,)).fetchone()
    return row is not None and row[0] > 0
