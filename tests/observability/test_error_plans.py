"""What is done with each error, and what retention looks for, finds its rows by an index in a large table too."""

from __future__ import annotations

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


def used(connection: psycopg.Connection[Any], statement: str, params: list[Any]) -> set[str]:
    """Return the indexes that a statement goes by, and the tables that it reads from end to end."""
    [(plan,)] = connection.execute(f"EXPLAIN (FORMAT JSON) {statement}".encode(), params).fetchall()
    found: set[str] = set()

    def walk(node: dict[str, Any]) -> None:
        if node["Node Type"] == "Seq Scan":
            found.add(node["Relation Name"])
        elif "Index Name" in node:
            found.add(node["Index Name"])
        for inner in node.get("Plans", ()):
            walk(inner)

    walk(plan[0]["Plan"])
    return found


KEYS = ['["flush", "p", "t17"]']


def test_errors_that_a_recovery_ends_are_found_by_its_key(large: psycopg.Connection[Any]) -> None:
    for names in (
        used(large, recoveries._FIND, [KEYS]),
        used(large, recoveries._RESOLVE, [KEYS, ["v1:17"]]),
    ):
        assert "idx_system_errors_recovery_key" in names
        assert "system_errors" not in names


@pytest.mark.parametrize(
    ("kind", "index"),
    [("errors_deleted", "idx_system_errors_resolved_at"), ("details_removed", "idx_system_errors_details")],
)
def test_a_batch_of_old_errors_is_found_by_age(large: psycopg.Connection[Any], kind: str, index: str) -> None:
    names = used(large, retention._BATCHES[kind].decode(), [100])
    assert index in names
    assert "system_errors" not in names
