"""Errors of one kind are one group; its counts, its hours and its status follow from each row that is stored, once."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import wait_until
from psycopg.rows import dict_row

from checkpointer.events import CheckpointEvent
from observability import Observability
from observability.errors import SYSTEM_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from checkpointer.embedded import Servers
    from checkpointer.hooks import HookContext

MIGRATION = Path(__file__).parents[2] / "migrations" / "0006_error_groups.sql"
NOW = datetime.now(UTC).replace(minute=30, second=0, microsecond=0) - timedelta(hours=1)


def error(message: str = "the flush failed", at: float = 0.0, **facts: Any) -> CheckpointEvent:
    """Return an error that happened `at` seconds after a fixed time."""
    values: dict[str, Any] = {
        "name": "application.error",
        "severity": "error",
        "error_type": "payment_error",
        "occurred_at": NOW + timedelta(seconds=at),
    }
    return CheckpointEvent(message=message, **(values | facts))


class Table:
    """Reads what is in the database."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection

    def all(self, name: str, order: str = "1") -> list[dict[str, Any]]:
        with self.connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(f"SELECT * FROM {name} ORDER BY {order}".encode()).fetchall()

    def group(self) -> dict[str, Any]:
        (found,) = self.all("system_error_groups")
        return found

    def resolve(self, at: float, by: str = "ann") -> None:
        """Resolve all there is, as of a time."""
        moment = NOW + timedelta(seconds=at)
        self.connection.execute("UPDATE system_errors SET resolved_at = %s, resolved_by = %s", [moment, by])
        self.connection.execute(
            "UPDATE system_error_groups SET status = 'resolved', resolved_at = %s, resolved_by = %s", [moment, by]
        )

    def mute(self, until: float | None) -> None:
        moment = None if until is None else NOW + timedelta(seconds=until)
        self.connection.execute(
            "UPDATE system_error_groups SET status = 'muted', muted_at = now(), muted_by = 'ann', muted_until = %s",
            [moment],
        )


@pytest.fixture
def db(context: HookContext) -> Iterator[Table]:
    with context.connect_postgres() as connection:
        yield Table(connection)


def test_a_first_error_makes_a_group_and_an_hour(target: Observability, db: Table) -> None:
    event = error(component="shop", operation="pay", thread_id="t1", severity="warning")
    target.errors.add(event)
    (row,) = db.all("system_errors")
    group = db.group()
    assert group == {
        "fingerprint": row["fingerprint"],
        "error_type": "payment_error",
        "severity": "warning",
        "component": "shop",
        "operation": "pay",
        "error_code": None,
        "title": "the flush failed",
        "status": "unresolved",
        "first_seen_at": event.occurred_at,
        "last_seen_at": event.occurred_at,
        "occurrences": 1,
        "regressions": 0,
        **dict.fromkeys(("resolved_at", "resolved_by", "resolution_notes", "muted_at", "muted_by", "muted_until")),
        "latest_event_id": event.event_id,
        "regression_event_id": None,
    }
    assert db.all("system_error_hourly") == [
        {
            "hour": NOW.replace(minute=0),
            "error_type": "payment_error",
            "severity": "warning",
            "fingerprint": row["fingerprint"],
            "occurrences": 1,
        }
    ]


def test_further_errors_are_added_to_their_group_in_whatever_order_they_arrive(
    target: Observability, db: Table
) -> None:
    latest = error("failed after 3 s", at=4000, severity="warning")
    for event in (error("failed after 1 s", at=10), latest, error("failed after 2 s", at=-10, severity="critical")):
        target.errors.add(event)
    group = db.group()
    assert group["occurrences"] == 3
    assert group["first_seen_at"] == NOW - timedelta(seconds=10)
    assert group["last_seen_at"] == NOW + timedelta(seconds=4000)
    assert group["severity"] == "critical"
    assert (group["title"], group["latest_event_id"]) == ("failed after 3 s", latest.event_id)
    hours = {(hour["hour"], hour["severity"]): hour["occurrences"] for hour in db.all("system_error_hourly")}
    hour = NOW.replace(minute=0)
    assert hours == {(hour, "error"): 1, (hour, "critical"): 1, (hour + timedelta(hours=1), "warning"): 1}


def rows_of(target: Observability, events: list[CheckpointEvent]) -> list[dict[str, Any]]:
    return [target.errors._row(event) for event in events]


def insert(context: HookContext, rows: list[dict[str, Any]]) -> list[CheckpointEvent]:
    with context.connect_postgres() as connection:
        return SYSTEM_ERRORS.insert(connection, rows)


def test_a_batch_that_is_delivered_again_in_part_counts_only_what_is_new(
    target: Observability, context: HookContext, db: Table
) -> None:
    rows = rows_of(target, [error(f"failed after {n} s", at=n) for n in range(10)])
    rows[3]["occurrences"] = 5
    insert(context, rows[:6])
    insert(context, rows)
    insert(context, rows[::-1])
    assert len(db.all("system_errors")) == 10
    assert db.group()["occurrences"] == 14
    assert [hour["occurrences"] for hour in db.all("system_error_hourly")] == [14]


def test_the_same_event_twice_in_one_batch_is_counted_once(
    target: Observability, context: HookContext, db: Table
) -> None:
    insert(context, rows_of(target, [error()]) * 3)
    assert db.group()["occurrences"] == 1


def test_the_time_zone_of_the_session_does_not_move_hours(
    target: Observability, context: HookContext, db: Table
) -> None:
    rows = rows_of(target, [error()])
    with context.connect_postgres() as connection:
        connection.execute("SET timezone = 'Asia/Kathmandu'")  # a quarter of an hour beside the full ones
        SYSTEM_ERRORS.insert(connection, rows)
    assert [hour["hour"] for hour in db.all("system_error_hourly")] == [NOW.replace(minute=0)]


def test_an_error_after_the_resolution_regresses_its_group_and_is_told_once(context: HookContext, db: Table) -> None:
    told: list[CheckpointEvent] = []
    target = Observability(replace(context, emit=told.append))
    try:
        target.errors.add(error(at=0))
        db.resolve(at=100)
        assert not told
        again = error(at=101, thread_id="t9", severity="critical")
        target.errors.add(again)
        target.errors.add(error(at=102))
        target.errors.add(again)
    finally:
        target.close(5)
    group = db.group()
    assert (group["status"], group["regressions"]) == ("regressed", 1)
    assert group["regression_event_id"] == again.event_id
    assert (group["resolved_by"], group["resolved_at"]) == ("ann", NOW + timedelta(seconds=100))
    (event,) = told
    assert (event.name, event.severity, event.thread_id) == ("error.regressed", "info", "t9")
    row = next(row for row in db.all("system_errors") if row["event_id"] == again.event_id)
    assert event.context == {
        "fingerprint": group["fingerprint"],
        "error_type": "payment_error",
        "severity": "critical",
        "error_id": row["id"],
        "regressions": 1,
        "resolved_at": (NOW + timedelta(seconds=100)).isoformat(),
        "resolved_by": "ann",
    }
    (line,) = db.all("system_error_audit")
    assert (line["action"], line["actor"], line["error_id"]) == ("regress", "system", row["id"])
    assert line["fingerprint"] == group["fingerprint"]
    assert line["details"]["event_id"] == str(again.event_id)


def test_an_error_from_before_the_resolution_that_arrives_late_regresses_nothing(
    target: Observability, db: Table
) -> None:
    target.errors.add(error(at=0))
    db.resolve(at=100)
    target.errors.add(error(at=99))
    target.errors.add(error(at=100))
    group = db.group()
    assert (group["status"], group["regressions"], group["occurrences"]) == ("resolved", 0, 3)
    # Nobody has seen it yet, so the row itself is to be looked at.
    assert [row["resolved_by"] for row in db.all("system_errors")] == ["ann", None, None]


def test_a_burst_that_lasts_beyond_the_resolution_regresses_its_group(
    target: Observability, context: HookContext, db: Table
) -> None:
    target.errors.add(error(at=0))
    db.resolve(at=100)
    (row,) = rows_of(target, [error(at=99)])
    insert(context, [{**row, "occurrences": 3, "last_seen_at": (NOW + timedelta(seconds=101)).isoformat()}])
    assert db.group()["status"] == "regressed"


def test_a_group_regresses_each_time_that_it_was_resolved(target: Observability, db: Table) -> None:
    target.errors.add(error(at=0))
    for n in range(1, 4):
        db.resolve(at=10 * n)
        target.errors.add(error(at=10 * n + 5))
        target.errors.add(error(at=10 * n + 6))
        assert (db.group()["status"], db.group()["regressions"]) == ("regressed", n)
    assert [line["action"] for line in db.all("system_error_audit")] == ["regress"] * 3


@pytest.mark.parametrize(
    ("until", "at", "status"),
    [(None, 10_000, "muted"), (100, 99, "muted"), (100, 100, "muted"), (100, 101, "unresolved")],
)
def test_a_muted_group_stays_so_until_its_time(
    target: Observability, db: Table, until: float | None, at: float, status: str
) -> None:
    target.errors.add(error(at=0))
    db.mute(until)
    target.errors.add(error(at=at))
    group = db.group()
    assert (group["status"], group["occurrences"], group["regressions"]) == (status, 2, 0)
    assert (group["muted_by"] is None) == (status == "unresolved")
    assert (group["muted_until"] is None) == (status == "unresolved" or until is None)


def test_what_waited_for_postgres_is_grouped_as_of_when_it_happened(
    own_servers: Servers, own_context: HookContext, own_target: Observability
) -> None:
    """Also that it is replayed twice: once more by a process that found the same rows."""
    own_target.errors.add(error(at=0))
    with own_context.connect_postgres() as connection:
        Table(connection).resolve(at=100)
    own_servers.postgres.kill()
    streamed = [error(at=n) for n in range(4)]
    assert [own_target.errors.add(event) for event in streamed] == ["redis"] * 4
    own_servers.valkey.kill()
    # Also in the stream: its answer did not arrive, so that the row took the next way too.
    assert own_target.errors.add(streamed[0]) == "spool"
    assert own_target.errors.add(error(at=50)) == "spool"
    own_servers.valkey.start()
    own_servers.postgres.start()
    with own_context.connect_redis() as client:
        wait_until(
            lambda: (
                client.xlen(f"{own_context.prefix}:ev:errors") == 0
                and not own_target.spool.read(("system_errors",), 10)
            )
        )
    with own_context.connect_postgres() as connection:
        db = Table(connection)
        assert len(db.all("system_errors")) == 6
        group = db.group()
        assert (group["status"], group["regressions"], group["occurrences"]) == ("resolved", 0, 6)
        assert [hour["occurrences"] for hour in db.all("system_error_hourly")] == [6]


def test_processes_that_insert_the_same_rows_in_other_orders_do_not_deadlock(
    target: Observability, context: HookContext, db: Table
) -> None:
    """Many small groups, each batch in an order of its own, all of them at once."""
    words = [f"{a}{b}" for a in "abcdefghij" for b in "abcdefghij"]
    rows = rows_of(target, [error(f"kind {word}", at=n) for n, word in enumerate(words)])
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            with context.connect_postgres() as connection:
                connection.execute("SET deadlock_timeout = '10ms'")
                # Else the planner sorts also where nobody asks for an order.
                connection.execute("SET enable_sort = off")
                start.wait(30)
                for n in range(20):
                    # Half of the batch is what the others insert too, the rest is new.
                    size = rng.randrange(2, 100)
                    own = [{**row, "event_id": str(error().event_id)} for row in rng.sample(rows, size)]
                    shared = [{**row, "event_id": row["event_id"][:-2] + f"{n:02x}"} for row in rng.sample(rows, size)]
                    batch = own + shared
                    rng.shuffle(batch)
                    SYSTEM_ERRORS.insert(connection, batch)
        except BaseException as exc:  # noqa: BLE001 - told below
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counted = {row["fingerprint"]: 0 for row in db.all("system_errors")}
    for row in db.all("system_errors"):
        counted[row["fingerprint"]] += row["occurrences"]
    assert {group["fingerprint"]: group["occurrences"] for group in db.all("system_error_groups")} == counted
    assert {hour["fingerprint"]: hour["occurrences"] for hour in db.all("system_error_hourly")} == counted


def test_a_row_without_a_fingerprint_gets_one_when_it_arrives(context: HookContext, db: Table) -> None:
    insert(context, [{"event_id": str(error().event_id), "error_type": "e", "severity": "odd", "error_message": "m"}])
    (row,) = db.all("system_errors")
    assert row["fingerprint"].startswith("v1:")
    assert row["created_at"] is not None
    assert (db.group()["occurrences"], db.group()["severity"]) == (1, "info")


def test_the_migration_adopts_rows_from_before_it_once(db: Table) -> None:
    db.connection.execute(
        "INSERT INTO system_errors (error_type, severity, error_message, error_context, created_at, occurrences, "
        "resolved_at, resolved_by, component) VALUES "
        "('a', 'warning', 'a 1', '{\"exception_type\": \"E\"}', %(now)s, 1, NULL, NULL, 'c'), "
        "('a', 'critical', 'a 2', '{\"exception_type\": \"E\"}', %(later)s, 5, %(later)s, 'ann', 'c'), "
        "('a', 'error', 'other', '{\"exception_type\": \"F\"}', %(now)s, 2, %(later)s, 'ann', 'c'), "
        "('b', 'error', 'b', NULL, NULL, 1, NULL, NULL, NULL)",
        {"now": NOW, "later": NOW + timedelta(hours=1)},
    )
    for _ in range(2):
        db.connection.execute(MIGRATION.read_bytes())
    groups = {group["title"]: group for group in db.all("system_error_groups")}
    assert {title: (g["occurrences"], g["status"], g["severity"]) for title, g in groups.items()} == {
        "a 2": (6, "unresolved", "critical"),
        "other": (2, "resolved", "error"),
        "b": (1, "unresolved", "error"),
    }
    assert groups["a 2"]["first_seen_at"] == NOW
    assert groups["a 2"]["last_seen_at"] == NOW + timedelta(hours=1)
    assert groups["other"]["resolved_by"] == "ann"
    assert all(group["fingerprint"].startswith("v0:") for group in groups.values())
    assert sum(hour["occurrences"] for hour in db.all("system_error_hourly")) == 9
    assert len(db.all("system_error_hourly")) == 4
