"""What is old is deleted, in small batches that wait for nobody, by one process at a time; what is open never."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import wait_until

from checkpointer.hooks import load_hook
from observability.errors import retention
from observability.errors.retention import Retention, run, run_if_due

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointer.hooks import HookContext

NOTHING = dict.fromkeys(retention._BATCHES, 0)


@pytest.fixture
def db(context: HookContext) -> Iterator[psycopg.Connection[Any]]:
    with context.connect_postgres() as connection:
        yield connection


def add_errors(
    db: psycopg.Connection[Any], count: int = 1, *, age: str, resolved: str | None = None, fingerprint: str = "v1:a"
) -> None:
    """Add errors with stack and context, of an age such as `31 days`."""
    db.execute(
        "INSERT INTO system_errors (error_type, severity, error_message, stack_trace, error_context, created_at, "
        "resolved_at, fingerprint) SELECT 'e', 'error', %(age)s::text, 'stack', '{}', "
        "now() - (%(age)s::text)::interval, now() - (%(resolved)s::text)::interval, %(fingerprint)s "
        "FROM generate_series(1, %(count)s)",
        {"age": age, "resolved": resolved, "fingerprint": fingerprint, "count": count},
    )


def messages(db: psycopg.Connection[Any]) -> list[str]:
    return [text for (text,) in db.execute("SELECT error_message FROM system_errors ORDER BY created_at").fetchall()]


def count(db: psycopg.Connection[Any], table: str) -> int:
    [(found,)] = db.execute(f"SELECT count(*) FROM {table}".encode()).fetchall()
    return int(found)


def test_resolved_errors_go_thirty_days_after_their_resolution_and_open_ones_never(
    db: psycopg.Connection[Any],
) -> None:
    add_errors(db, age="40 days", resolved="31 days")
    add_errors(db, age="50 days", resolved="29 days")
    add_errors(db, age="1000 days")
    assert run(db)["errors_deleted"] == 1
    assert messages(db) == ["1000 days", "50 days"]
    assert run(db)["errors_deleted"] == 0


def test_details_go_after_fourteen_days_but_those_of_the_newest_of_a_group(db: psycopg.Connection[Any]) -> None:
    for age in ("30 days", "20 days", "15 days"):
        add_errors(db, age=age)
    add_errors(db, age="16 days", fingerprint="v1:b")
    add_errors(db, age="13 days", fingerprint="v1:b")
    add_errors(db, age="12 days", fingerprint="v1:b")
    assert run(db)["details_removed"] == 3
    with_details = db.execute(
        "SELECT error_message FROM system_errors WHERE stack_trace IS NOT NULL AND error_context IS NOT NULL "
        "ORDER BY created_at"
    ).fetchall()
    assert with_details == [("15 days",), ("13 days",), ("12 days",)]
    assert len(messages(db)) == 6
    assert run(db)["details_removed"] == 0


def test_thread_logs_hours_audit_recoveries_and_groups_go_in_their_time(db: psycopg.Connection[Any]) -> None:
    add_errors(db, age="1 day", fingerprint="v1:rows")
    for old, young, statement in (
        ("31 days", "29 days", "INSERT INTO thread_logs (thread_id, level, message, created_at) "
         "VALUES ('t', 'info', 'm', now() - (%(age)s::text)::interval)"),
        ("31 days", "29 days", "INSERT INTO system_error_recoveries (recovery_key, event, recovered_at) "
         "VALUES (%(age)s::text, 'e', now() - (%(age)s::text)::interval)"),
        ("367 days", "360 days", "INSERT INTO system_error_audit (action, actor, at) "
         "VALUES (%(age)s::text, 'ann', now() - (%(age)s::text)::interval)"),
        ("14 months", "12 months", "INSERT INTO system_error_hourly VALUES "
         "(date_trunc('hour', now() - (%(age)s::text)::interval), 'e', 'error', 'v1:a', 3)"),
        ("14 months", "12 months", "INSERT INTO system_error_groups (fingerprint, error_type, severity, title, status, "
         "first_seen_at, last_seen_at, occurrences) VALUES (%(age)s::text, 'e', 'error', 't', 'resolved', "
         "now() - (%(age)s::text)::interval, now() - (%(age)s::text)::interval, 1)"),
    ):  # fmt: skip
        for age in (old, young):
            db.execute(statement.encode(), {"age": age})
    # An old group that is open, and one that still has a row.
    db.execute(
        "INSERT INTO system_error_groups (fingerprint, error_type, severity, title, status, first_seen_at, "
        "last_seen_at, occurrences) VALUES "
        "('v1:open', 'e', 'error', 't', 'unresolved', now(), now() - interval '14 months', 1), "
        "('v1:rows', 'e', 'error', 't', 'resolved', now(), now() - interval '14 months', 1)"
    )
    done = run(db, actor="ann")
    assert done == {
        **NOTHING,
        "log_lines_deleted": 1,
        "recoveries_deleted": 1,
        "audit_deleted": 1,
        "hours_deleted": 1,
        "groups_deleted": 1,
    }
    assert count(db, "thread_logs") == count(db, "system_error_recoveries") == count(db, "system_error_hourly") == 1
    assert count(db, "system_error_groups") == 3
    audit = db.execute("SELECT action, actor, details FROM system_error_audit ORDER BY id").fetchall()
    assert audit == [
        ("360 days", "ann", {}),
        ("retention", "ann", {name: number for name, number in done.items() if number}),
    ]
    assert run(db) == NOTHING
    assert count(db, "system_error_audit") == 2


def test_many_rows_go_in_batches_each_of_them_a_transaction(
    db: psycopg.Connection[Any], context: HookContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BATCH", 10)
    add_errors(db, 25, age="40 days", resolved="31 days")
    stop = threading.Event()
    left: list[int] = []
    execute = psycopg.Connection.execute

    def watch(connection: Any, *args: Any, **named: Any) -> Any:
        done = execute(connection, *args, **named)
        if b"DELETE FROM system_errors" in args[0]:
            with context.connect_postgres() as other:
                left.append(count(other, "system_errors"))
            if len(left) == 2:
                stop.set()
        return done

    monkeypatch.setattr(psycopg.Connection, "execute", watch)
    assert run(db, stop=stop)["errors_deleted"] == 20
    assert left == [15, 5]
    stop.clear()
    assert run(db)["errors_deleted"] == 5


def test_what_somebody_else_has_locked_is_passed_by(db: psycopg.Connection[Any], context: HookContext) -> None:
    add_errors(db, 3, age="40 days", resolved="31 days")
    with context.connect_postgres() as other, other.transaction():
        other.execute("SELECT FROM system_errors ORDER BY id LIMIT 1 FOR UPDATE")
        # It would wait for the other one without end.
        db.execute("SET lock_timeout = '5s'")
        assert run(db)["errors_deleted"] == 2
    assert run(db)["errors_deleted"] == 1


def test_two_that_run_at_once_share_the_work(
    db: psycopg.Connection[Any], context: HookContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BATCH", 7)
    add_errors(db, 500, age="40 days", resolved="31 days")
    found: list[int] = []

    def work() -> None:
        with context.connect_postgres() as connection:
            found.append(run(connection)["errors_deleted"])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(db)
    assert sum(found) <= 500
    assert count(db, "system_errors") == 0


def test_it_is_due_once_an_hour_for_all_processes_together(db: psycopg.Connection[Any], context: HookContext) -> None:
    results: list[Any] = []

    def work() -> None:
        with context.connect_postgres() as connection:
            results.append(run_if_due(connection))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=str) == [None, None, None, NOTHING] or results.count(None) == 3
    db.execute("UPDATE system_error_jobs SET begun_at = now() - interval '59 minutes'")
    assert run_if_due(db) is None
    db.execute("UPDATE system_error_jobs SET begun_at = now() - interval '61 minutes'")
    assert run_if_due(db) == NOTHING


def test_the_hook_of_any_saver_sees_to_it_and_outlives_an_outage(
    db: psycopg.Connection[Any], context: HookContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(retention, "_PAUSE", 0.02)
    add_errors(db, age="40 days", resolved="31 days")
    db.execute("ALTER TABLE system_error_jobs RENAME TO elsewhere")
    hook: Any = load_hook("system_errors", context)
    try:
        names = [thread.name for thread in threading.enumerate()]
        assert "checkpointer-retention" in names
        threading.Event().wait(0.2)  # it fails a few times
        assert count(db, "system_errors") == 1
        db.execute("ALTER TABLE elsewhere RENAME TO system_error_jobs")
        wait_until(lambda: count(db, "system_errors") == 0)
    finally:
        hook.close()
    wait_until(lambda: "checkpointer-retention" not in [thread.name for thread in threading.enumerate()])


def test_it_can_be_closed_twice_and_is_not_started_after_that(context: HookContext) -> None:
    made = Retention(context.connect_postgres)
    made.start()
    made.start()
    made.close()
    made.close()
    made.start()
    assert "checkpointer-retention" not in [thread.name for thread in threading.enumerate()]
