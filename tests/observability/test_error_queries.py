"""The tables are as promised, and the shipped queries answer right."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from checkpointer.errors import ConfigurationError
from observability import queries

if TYPE_CHECKING:
    from collections.abc import Iterator

MIGRATIONS = Path(__file__).parents[2] / "migrations"

COLUMNS = [
    ("id", "bigint", "NO"),
    ("error_type", "text", "NO"),
    ("severity", "text", "NO"),
    ("thread_id", "text", "YES"),
    ("error_message", "text", "NO"),
    ("stack_trace", "text", "YES"),
    ("error_context", "jsonb", "YES"),
    ("created_at", "timestamp with time zone", "YES"),
    ("resolved_at", "timestamp with time zone", "YES"),
    ("resolved_by", "text", "YES"),
    ("resolution_notes", "text", "YES"),
]

INDEXES = {
    "(error_type)",
    "(created_at) WHERE (resolved_at IS NULL)",
    "(created_at)",
    "(thread_id)",
    "(severity, created_at)",
    "(error_type) WHERE (resolved_at IS NULL)",
}


@pytest.fixture
def connection(postgres_uri: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres_uri, autocommit=True) as connection:
        yield connection


def migrate(connection: psycopg.Connection[Any]) -> None:
    for path in sorted(MIGRATIONS.glob("*.sql")):
        connection.execute(path.read_bytes())


def test_the_table_has_the_promised_columns_and_indexes(connection: psycopg.Connection[Any]) -> None:
    migrate(connection)
    migrate(connection)
    columns = connection.execute(
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns "
        "WHERE table_name = 'system_errors' ORDER BY ordinal_position"
    ).fetchall()
    assert columns[: len(COLUMNS)] == COLUMNS
    definitions = connection.execute(
        "SELECT indexdef FROM pg_indexes WHERE tablename = 'system_errors' AND indexdef NOT LIKE '%UNIQUE%'"
    ).fetchall()
    found = {definition.split("USING btree ")[1] for (definition,) in definitions}
    assert found >= INDEXES
    checks = connection.execute(
        "SELECT count(*) FROM pg_constraint WHERE conrelid = 'system_errors'::regclass AND contype IN ('c', 'f')"
    ).fetchone()
    assert checks == (0,)


def test_an_existing_table_is_upgraded_and_its_old_rows_raise_no_alert(
    connection: psycopg.Connection[Any],
) -> None:
    connection.execute(
        "CREATE TABLE system_errors (id BIGSERIAL PRIMARY KEY, error_type TEXT NOT NULL, severity TEXT NOT NULL, "
        "thread_id TEXT, error_message TEXT NOT NULL, stack_trace TEXT, error_context JSONB, "
        "created_at TIMESTAMPTZ DEFAULT now(), resolved_at TIMESTAMPTZ, resolved_by TEXT, resolution_notes TEXT)"
    )
    connection.execute(
        "INSERT INTO system_errors (error_type, severity, error_message, created_at) "
        "VALUES ('e', 'critical', 'old', now() - interval '1 day')"
    )
    migrate(connection)
    assert queries.run(connection, "critical_alert_5m") == []
    connection.execute(
        "INSERT INTO system_errors (error_type, severity, error_message) VALUES ('e', 'critical', 'by hand')"
    )
    (alert,) = queries.run(connection, "critical_alert_5m")
    assert alert["occurrences"] == 1


@pytest.mark.skipif(shutil.which("psql") is None, reason="needs psql")
def test_psql_runs_migrations_twice_and_queries(postgres_uri: str) -> None:
    files = [*sorted(MIGRATIONS.glob("*.sql"))] * 2
    files += [Path(queries.__file__).parent / f"{name}.sql" for name in queries.names()]
    for file in files:
        subprocess.run(
            ["psql", postgres_uri, "-v", "ON_ERROR_STOP=1", "-qf", str(file)],
            check=True,
            capture_output=True,
            timeout=30,
        )


def plant(connection: psycopg.Connection[Any], **facts: Any) -> None:
    values = {"error_type": "flush", "severity": "critical", "error_message": "m", **facts}
    names = ", ".join(values)
    marks = ", ".join(["%s"] * len(values))
    connection.execute(f"INSERT INTO system_errors ({names}) VALUES ({marks})".encode(), list(values.values()))


def ago(**span: float) -> datetime:
    return datetime.now(UTC) - timedelta(**span)


@pytest.fixture
def planted(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    migrate(connection)
    plant(connection, thread_id="a", error_message="new", occurrences=3)
    plant(connection, thread_id="a", severity="warning", error_type="slow")
    # Happened long ago, arrived just now.
    plant(connection, thread_id="b", error_message="late", created_at=ago(hours=30), outcome="lost")
    plant(connection, thread_id="c", created_at=ago(hours=1), recorded_at=ago(hours=1), error_message="older")
    plant(connection, thread_id="c", resolved_at=ago(minutes=1), error_message="resolved", error_type="done")
    plant(connection, thread_id="d", severity="error", error_type="slow")
    plant(connection, severity="error", error_type="slow", occurrences=9)
    return connection


def test_unresolved_criticals(planted: psycopg.Connection[Any]) -> None:
    rows = queries.run(planted, "unresolved_criticals")
    assert [row["error_message"] for row in rows] == ["new", "older", "late"]


def test_frequency_by_type(planted: psycopg.Connection[Any]) -> None:
    rows = queries.run(planted, "frequency_by_type_24h")
    assert [(r["error_type"], r["occurrences"], r["threads"], r["worst_severity"], r["unresolved"]) for r in rows] == [
        ("slow", 11, 2, "error", 11),
        ("flush", 4, 2, "critical", 4),
        ("done", 1, 1, "critical", 0),
    ]


def test_threads_with_several_unresolved(planted: psycopg.Connection[Any]) -> None:
    (row,) = queries.run(planted, "threads_with_several_unresolved")
    assert (row["thread_id"], row["unresolved"], row["worst_severity"]) == ("a", 4, "critical")
    assert row["error_types"] == ["flush", "slow"]


def test_the_alert_counts_what_arrived_late(planted: psycopg.Connection[Any]) -> None:
    (row,) = queries.run(planted, "critical_alert_5m")
    assert (row["error_type"], row["occurrences"], row["threads"]) == ("flush", 4, 2)
    assert row["last_message"] == "new"


def test_the_alert_leaves_out_what_is_muted_for_as_long_as_it_is(connection: psycopg.Connection[Any]) -> None:
    migrate(connection)
    kinds = {
        "for good": ("muted", None),
        "for a while": ("muted", ago(hours=-1)),
        "no longer": ("muted", ago(minutes=1)),
        "not": ("unresolved", None),
        "back": ("regressed", None),
    }
    for kind, (status, until) in kinds.items():
        connection.execute(
            "INSERT INTO system_error_groups (fingerprint, error_type, severity, title, status, muted_until, "
            "first_seen_at, last_seen_at, occurrences) VALUES (%s, %s, 'critical', 't', %s, %s, now(), now(), 1)",
            [kind, kind, status, until],
        )
        plant(connection, error_type=kind, fingerprint=kind)
    plant(connection, error_type="of no group", fingerprint=None)
    plant(connection, error_type="of two groups", fingerprint="for good", occurrences=7)
    plant(connection, error_type="of two groups", fingerprint="not", occurrences=2)
    found = {row["error_type"]: row["occurrences"] for row in queries.run(connection, "critical_alert_5m")}
    assert found == {"no longer": 1, "not": 1, "back": 1, "of no group": 1, "of two groups": 2}
    assert len(queries.run(connection, "unresolved_criticals")) == 8


def test_what_was_folded_counts_as_often_as_it_happened_and_ends_when_the_last_did(
    connection: psycopg.Connection[Any],
) -> None:
    migrate(connection)
    last = ago(minutes=1)
    plant(connection, thread_id="a", occurrences=500, created_at=ago(minutes=4), last_seen_at=last)
    for name in ("critical_alert_5m", "frequency_by_type_24h", "threads_with_several_unresolved"):
        (row,) = queries.run(connection, name)
        assert row["last_seen"] == last
        assert 500 in row.values()
    (row,) = queries.run(connection, "daily_digest")
    assert (row["occurrences"], row["unresolved"]) == (500, 500)


def test_forty_criticals_that_an_outage_held_back_raise_the_alert_when_they_arrive(
    connection: psycopg.Connection[Any],
) -> None:
    migrate(connection)
    for number in range(40):
        plant(connection, thread_id=f"t{number}", created_at=ago(minutes=25), delivery="spool")
    (row,) = queries.run(connection, "critical_alert_5m")
    assert (row["occurrences"], row["threads"]) == (40, 40)
    connection.execute("UPDATE system_errors SET recorded_at = now() - interval '6 minutes'")
    assert queries.run(connection, "critical_alert_5m") == []


def test_the_daily_digest(planted: psycopg.Connection[Any]) -> None:
    rows = queries.run(planted, "daily_digest")
    assert sum(row["occurrences"] for row in rows) == 3 + 1 + 1 + 1 + 1 + 1 + 9
    assert sum(row["lost"] for row in rows) == 1
    days = [row["day"] for row in rows]
    assert days == sorted(days, reverse=True)
    today = [row["severity"] for row in rows if row["day"] == days[0]]
    assert today == sorted(today, key=["critical", "error", "warning"].index)


async def test_every_query_runs_from_async_code_and_opens_with_its_question(
    planted: psycopg.Connection[Any], postgres_uri: str
) -> None:
    assert len(queries.names()) == 5
    async with await psycopg.AsyncConnection.connect(postgres_uri) as connection:
        for name in queries.names():
            first = queries.sql(name).splitlines()[0]
            assert first.startswith("-- ")
            assert "?" in first
            assert await queries.arun(connection, name) == queries.run(planted, name)


def test_an_unknown_query_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigurationError, match=r"daily_digest.*unresolved_criticals"):
        queries.sql("nope")
