"""With half a million errors in the table each shipped query reads only what it answers with, by an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from helpers import with_database
from psycopg import sql

from observability import queries

if TYPE_CHECKING:
    from collections.abc import Iterator

MIGRATIONS = Path(__file__).parents[2] / "migrations"

ROWS = 500_000
# 87 days of errors, the newest an hour old: one in 50 is unresolved, one in 1,000 critical.
FILL = """
INSERT INTO system_errors (
    error_type, severity, thread_id, error_message, stack_trace, error_context, created_at, recorded_at,
    resolved_at, resolved_by, event_id, delivery, occurrences, fingerprint, outcome, component, operation
)
SELECT
    'type_' || n % 12,
    CASE WHEN n % 1000 = 7 THEN 'critical' WHEN n % 10 = 7 THEN 'error' ELSE 'warning' END,
    CASE WHEN n % 7 > 0 THEN 'thread-' || n::bigint * 7919 % 40000 END,
    'The flush failed: the server closed the connection unexpectedly, at attempt ' || n,
    CASE WHEN n % 10 = 7 THEN repeat('  File "flusher.py", line 1, in flush' || chr(10), 20) END,
    jsonb_build_object('event', 'flush.failed', 'attempt', n % 5, 'checkpoint_count', 3),
    at,
    at + interval '1 second',
    CASE WHEN n % 50 > 0 AND n % 25000 <> 7 THEN at + interval '1 hour' END,
    CASE WHEN n % 50 > 0 AND n % 25000 <> 7 THEN 'ada' END,
    gen_random_uuid(), 'direct', 1 + n % 3, 'v1:' || n % 2000,
    CASE WHEN n % 4000 = 7 THEN 'lost' END, 'flusher', 'flush'
FROM
    generate_series(1, %(rows)s) AS n,
    LATERAL (SELECT now() - interval '1 hour' - (%(rows)s - n) * interval '15 seconds' AS at) AS happened
"""
GROUPS = """
INSERT INTO system_error_groups
    (fingerprint, error_type, severity, title, status, first_seen_at, last_seen_at, occurrences)
SELECT 'v1:' || n, 'type', 'error', 'title', CASE WHEN n % 100 = 0 THEN 'muted' ELSE 'unresolved' END, now(), now(), 1
FROM generate_series(0, 1999) AS n
"""
ARRIVED = """
INSERT INTO system_errors (error_type, severity, thread_id, error_message, fingerprint, created_at)
SELECT 'checkpoint_lost', 'critical', 'thread-' || n, 'late', 'v1:' || n, now() - interval '25 minutes'
FROM generate_series(1, 40) AS n
"""
PAGE = """
SELECT * FROM system_errors
WHERE resolved_at IS NULL AND (created_at, id) < (now() - interval '30 days', 5)
ORDER BY created_at DESC, id DESC
LIMIT 50
"""


@pytest.fixture(scope="module")
def full(servers: Any) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database of this file's own, with a full table in it."""
    name = f"test_{uuid4().hex}"
    database = sql.Identifier(name)
    with psycopg.connect(servers.postgres_uri, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(database))
        try:
            with psycopg.connect(with_database(servers.postgres_uri, name), autocommit=True) as connection:
                _fill(connection)
                yield connection
        finally:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(database))


def _fill(connection: psycopg.Connection[Any]) -> None:
    def migrate() -> None:
        for path in sorted(MIGRATIONS.glob("*.sql")):
            connection.execute(path.read_bytes())

    migrate()
    # Filled first and indexed afterwards, which is several times faster; the migrations make the indexes again.
    indexes = connection.execute(
        "SELECT indexname FROM pg_indexes WHERE tablename = 'system_errors' AND indexname NOT LIKE '%pkey'"
    ).fetchall()
    for (index,) in indexes:
        connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(index)))
    with psycopg.ClientCursor(connection) as cursor:
        cursor.execute(FILL.replace("% ", "%% "), {"rows": ROWS})
    connection.execute(GROUPS)
    migrate()
    connection.execute(ARRIVED)
    connection.execute("ANALYZE")


def scans(connection: psycopg.Connection[Any], statement: str) -> list[dict[str, Any]]:
    """Run a statement; return the nodes of its plan that read `system_errors` or an index of it."""
    text = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}"
    ((explained,),) = connection.execute(text.encode()).fetchall()
    found = []
    nodes = [explained[0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if node.get("Relation Name") == "system_errors" or "system_errors" in node.get("Index Name", ""):
            found.append(node)
    assert found
    return found


def rows_read(nodes: list[dict[str, Any]]) -> float:
    """Return how many rows the busiest node touched."""
    return max(
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0))
        * node["Actual Loops"]
        for node in nodes
    )


def rows_expected(nodes: list[dict[str, Any]]) -> float:
    return max(node["Plan Rows"] for node in nodes)


def count(connection: psycopg.Connection[Any], condition: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM system_errors WHERE {condition}".encode()).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("name", queries.names())
def test_no_query_reads_the_whole_table(full: psycopg.Connection[Any], name: str) -> None:
    nodes = scans(full, queries.sql(name))
    assert {node["Node Type"] for node in nodes} <= {
        "Index Scan",
        "Index Only Scan",
        "Bitmap Heap Scan",
        "Bitmap Index Scan",
    }
    assert rows_read(nodes) < ROWS / 10
    assert rows_expected(nodes) < ROWS / 10


@pytest.mark.parametrize(
    ("name", "concerned"),
    [
        (
            "critical_alert_5m",
            "severity = 'critical' AND recorded_at > now() - interval '5 minutes'",
        ),
        ("unresolved_criticals", "severity = 'critical' AND resolved_at IS NULL"),
        ("frequency_by_type_24h", "created_at > now() - interval '24 hours'"),
        ("threads_with_several_unresolved", "resolved_at IS NULL"),
        ("daily_digest", "created_at > now() - interval '7 days'"),
    ],
)
def test_a_query_reads_the_rows_that_it_is_about_and_few_more(
    full: psycopg.Connection[Any], name: str, concerned: str
) -> None:
    about = count(full, concerned)
    assert about >= 40
    assert rows_read(scans(full, queries.sql(name))) <= about * 1.1
    assert len(queries.run(full, name)) >= 1


def test_the_alert_finds_its_rows_by_an_index_of_nothing_but_unresolved_criticals(
    full: psycopg.Connection[Any],
) -> None:
    nodes = scans(full, queries.sql("critical_alert_5m"))
    assert {node["Index Name"] for node in nodes if "Index Name" in node} == {"idx_system_errors_critical_arrivals"}
    (row,) = queries.run(full, "critical_alert_5m")
    assert (row["error_type"], row["occurrences"]) == ("checkpoint_lost", 40)


def test_a_page_of_the_unresolved_reads_little_more_than_itself(full: psycopg.Connection[Any]) -> None:
    nodes = scans(full, PAGE)
    # Of one created_at there are few rows, so Postgres takes the shorter index and sorts those few by id.
    used = {node["Index Name"] for node in nodes}
    assert used <= {"idx_system_errors_page_unresolved", "idx_system_errors_unresolved"}
    assert rows_read(nodes) <= 60
    assert len(full.execute(PAGE.encode()).fetchall()) == 50
