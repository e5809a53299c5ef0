"""What is done with each error, and what retention looks for, finds its rows by an index in a large table too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from observability.errors import recoveries, retention

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from checkpointer.hooks import HookContext

_PLANT = """
INSERT INTO system_errors (event_id, error_type, severity, thread_id, error_message, stack_trace, created_at,
    resolved_at, outcome, fingerprint, recovery_key)
SELECT gen_random_uuid(), 'e' || n % 20, 'error', 't' || n % 5000, 'm', 's', now() - n * interval '1 minute',
    CASE WHEN n % 50 > 0 THEN now() - n * interval '50 seconds' END, CASE WHEN n % 500 = 0 THEN 'lost' END,
    'v1:' || n % 300, '["flush", "p", "t' || n % 5000 || '"]'
FROM generate_series(1, 60000) n
"""


@pytest.fixture
def large(context: HookContext) -> Iterator[psycopg.Connection[Any]]:
    with context.connect_postgres() as connection:
        connection.execute(_PLANT.encode())
        connection.execute(
            "INSERT INTO system_error_recoveries SELECT DISTINCT recovery_key, 'flush.recovered', NULL::uuid, now() "
            "FROM system_errors"
        )
        connection.execute("VACUUM ANALYZE system_errors")
        connection.execute("VACUUM ANALYZE system_error_recoveries")
        yield connection


def scans(connection: psycopg.Connection[Any], statement: str, params: list[Any]) -> list[str]:
    """Return the tables that a statement reads from end to end."""
    [(plan,)] = connection.execute(f"EXPLAIN (FORMAT JSON) {statement}".encode(), params).fetchall()
    found: list[str] = []

    def walk(node: dict[str, Any]) -> None:
        if node["Node Type"] == "Seq Scan":
            found.append(node["Relation Name"])
        for inner in node.get("Plans", ()):
            walk(inner)

    walk((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])
    return found


KEYS = ['["flush", "p", "t17"]']


def test_errors_that_a_recovery_ends_are_found_by_an_index(large: psycopg.Connection[Any]) -> None:
    assert "system_errors" not in scans(large, recoveries._FIND, [KEYS])
    assert "system_errors" not in scans(large, recoveries._RESOLVE, [KEYS, ["v1:17"]])


@pytest.mark.parametrize("kind", ["errors_deleted", "details_removed"])
def test_a_batch_of_old_errors_is_found_by_an_index(large: psycopg.Connection[Any], kind: str) -> None:
    assert scans(large, retention._BATCHES[kind].decode(), [100]) == []
