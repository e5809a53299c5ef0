"""An error is resolved by the event that shows that it is over, by when the two happened, and never a loss."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import put_one, wait_until
from psycopg.rows import dict_row

from checkpointer import BufferedPostgresSaver
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import Hooks, load_hook
from observability import Observability
from observability.errors.recoveries import recoveries_of, recovery_key
from observability.errors.retention import run_if_due

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpointer.embedded import Servers
    from checkpointer.hooks import HookContext

    Rows = Callable[..., list[dict[str, Any]]]

NOW = datetime.now(UTC) - timedelta(hours=1)


def event(name: str, at: float = 0.0, **facts: Any) -> CheckpointEvent:
    """Return an event `at` seconds after a fixed time; without a severity one that is no error."""
    if "severity" in facts:
        facts = {"error_type": "checkpoint_flush_error", **facts}
    return CheckpointEvent(
        **{"severity": "info", "message": name, "name": name, "occurred_at": NOW + timedelta(seconds=at), **facts}
    )


def failed(at: float = 0.0, thread: str = "t", **facts: Any) -> CheckpointEvent:
    return event("flush.failed", at, **{"severity": "critical", "thread_id": thread, "outcome": "retrying", **facts})


def recovered(at: float, thread: str = "t") -> CheckpointEvent:
    return event("flush.recovered", at, thread_id=thread, outcome="recovered")


def tell(target: Observability, *events: CheckpointEvent) -> None:
    """Do with events what the hook does."""
    for one in events:
        if one.error_type is None:
            target.errors.add_recoveries(one)
        else:
            target.errors.add(one)


def groups(context: HookContext) -> list[dict[str, Any]]:
    with context.connect_postgres() as connection, connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM system_error_groups ORDER BY first_seen_at").fetchall()


def test_a_recovery_resolves_the_error_before_it_and_says_why(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    over = recovered(10.0)
    tell(target, failed(0.0), over)
    (row,) = rows(context)
    assert (row["resolved_at"], row["resolved_by"]) == (over.occurred_at, "system")
    moment = over.occurred_at.strftime("%Y-%m-%d %H:%M:%S")
    assert row["resolution_notes"] == f"flush.recovered of {moment} UTC shows that this is over."
    (group,) = groups(context)
    assert (group["status"], group["resolved_at"], group["resolved_by"]) == ("resolved", over.occurred_at, "system")
    assert group["resolution_notes"] == row["resolution_notes"]
    (line,) = rows(context, "system_error_audit")
    assert (line["action"], line["actor"], line["error_id"]) == ("resolve", "system", row["id"])
    assert line["fingerprint"] == row["fingerprint"]
    assert line["details"]["event"] == "flush.recovered"
    assert line["details"]["event_id"] == str(over.event_id)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_times_decide_and_not_the_order_of_arrival(
    target: Observability, context: HookContext, rows: Rows, order: tuple[int, ...]
) -> None:
    """Also what waited in Redis or in a file, and arrives after the sign that it is over."""
    events = [failed(0.0), recovered(10.0), failed(20.0)]
    tell(target, *(events[n] for n in order))
    found = {row["event_id"]: row["resolved_by"] for row in rows(context)}
    assert found == {events[0].event_id: "system", events[2].event_id: None}
    (group,) = groups(context)
    assert group["status"] in ("unresolved", "regressed")


def test_an_earlier_recovery_that_arrives_later_takes_nothing_back(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    tell(target, recovered(10.0), recovered(5.0), failed(8.0))
    assert [row["resolved_by"] for row in rows(context)] == ["system"]


def test_a_burst_is_over_only_if_its_last_error_is(target: Observability, context: HookContext, rows: Rows) -> None:
    tell(target, *(failed(n / 100) for n in range(50)), failed(30.0), recovered(20.0))
    target.errors.flush()
    folded = [row for row in rows(context) if row["occurrences"] > 1]
    assert [row["resolved_at"] for row in folded] == [None]
    tell(target, recovered(30.0))
    assert all(row["resolved_by"] == "system" for row in rows(context))
    assert [group["status"] for group in groups(context)] == ["resolved"]


def test_an_error_after_an_automatic_resolution_regresses_the_group(
    target: Observability, context: HookContext
) -> None:
    tell(target, failed(0.0), recovered(10.0), failed(5.0))
    assert [(group["status"], group["regressions"]) for group in groups(context)] == [("resolved", 0)]
    tell(target, failed(10.5))
    assert [(group["status"], group["regressions"]) for group in groups(context)] == [("regressed", 1)]
    tell(target, recovered(11.0))
    assert [(group["status"], group["regressions"]) for group in groups(context)] == [("resolved", 1)]


def test_another_threads_recovery_resolves_nothing_and_leaves_the_group_open(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    tell(target, failed(0.0, "t1"), failed(0.0, "t2"), recovered(10.0, "t1"))
    assert [row["resolved_by"] for row in rows(context)] == ["system", None]
    assert [group["status"] for group in groups(context)] == ["unresolved"]
    tell(target, recovered(20.0, "t2"))
    (group,) = groups(context)
    assert (group["status"], group["resolved_at"]) == ("resolved", NOW + timedelta(seconds=20))


def test_what_a_killed_process_has_stored_and_not_resolved_is_resolved_within_the_hour(
    target: Observability, context: HookContext, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed after it had stored the recovery, or the error, and before it resolved anything."""
    with monkeypatch.context() as patch:
        for module in ("ingest", "recoveries"):
            patch.setattr(f"observability.errors.{module}.resolve_arrived", lambda connection, keys: None)
        tell(
            target, failed(0.0), recovered(10.0), failed(20.0), failed(0.0, "u"), failed(0.0, "v"), recovered(1.0, "v")
        )
    assert [row["resolved_by"] for row in rows(context)] == [None] * 4
    with context.connect_postgres() as connection:
        assert run_if_due(connection) is not None
    assert [row["resolved_by"] for row in rows(context)] == ["system", None, None, "system"]


def test_another_prefix_has_other_threads(target: Observability, context: HookContext, rows: Rows) -> None:
    tell(target, failed(0.0))
    for row in recoveries_of(recovered(10.0), "other", "i"):
        assert row["recovery_key"] != recovery_key(failed(), context.prefix, "i")
        target._outbox.add(target._outbox._tables["system_error_recoveries"], row)
    assert [row["resolved_by"] for row in rows(context)] == [None]


def test_a_loss_is_never_resolved_nor_what_came_before_it(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    lost = event(
        "checkpoint.lost", 5.0, severity="critical", error_type="checkpoint_lost", thread_id="t", outcome="lost"
    )
    tell(target, failed(0.0), lost, failed(6.0), failed(0.0, "u"), recovered(10.0), recovered(10.0, "u"))
    found = {(row["thread_id"], row["created_at"]): row["resolved_by"] for row in rows(context)}
    assert found == {
        ("t", NOW): None,
        ("t", NOW + timedelta(seconds=5)): None,
        ("t", NOW + timedelta(seconds=6)): "system",
        ("u", NOW): "system",
    }


@pytest.mark.parametrize(
    ("trouble", "sign"),
    [
        (failed(), recovered(1.0)),
        (event("flush.incomplete", severity="warning", thread_id="t"), recovered(1.0)),
        (event("put.unconfirmed", severity="warning", thread_id="t"), recovered(1.0)),
        (event("put.unacknowledged", severity="error", thread_id="t"), recovered(1.0)),
        (failed(), event("recovery.found", 1.0, context={"threads": 2, "thread_ids": ["s", "t"]})),
        (
            event("dead_letter.added", severity="critical", thread_id="t", context={"dead_letter": 17}),
            event("dead_letter.replayed", 1.0, thread_id="t", context={"dead_letter": 17}),
        ),
        (
            event("backend.down", severity="error", context={"backend": "postgres"}),
            event("backend.up", 1.0, context={"backend": "postgres"}),
        ),
        (
            event("put.around", severity="warning", thread_id="t", outcome="recovered"),
            event("backend.up", 1.0, context={"backend": "redis"}),
        ),
        (event("buffer.high", severity="warning"), event("buffer.normal", 1.0)),
    ],
    ids=lambda one: one.name,
)
def test_each_trouble_has_its_sign(
    target: Observability, context: HookContext, rows: Rows, trouble: CheckpointEvent, sign: CheckpointEvent
) -> None:
    tell(target, trouble, sign)
    assert [row["resolved_by"] for row in rows(context)] == ["system"]


@pytest.mark.parametrize(
    ("trouble", "sign"),
    [
        (
            event("dead_letter.added", severity="critical", thread_id="t", context={"dead_letter": 17}),
            event("dead_letter.replayed", 1.0, thread_id="t", context={"dead_letter": 18}),
        ),
        (
            event("dead_letter.added", severity="critical", thread_id="t", context={"dead_letter": 17}),
            event("dead_letter.dropped", 1.0, thread_id="t", outcome="lost", context={"dead_letter": 17}),
        ),
        (
            event("dead_letter.added", severity="critical", thread_id="t", context={"dead_letter": 17}),
            recovered(1.0),
        ),
        (
            event("backend.down", severity="error", context={"backend": "postgres"}),
            event("backend.up", 1.0, context={"backend": "redis"}),
        ),
        (event("put.failed", severity="critical", thread_id="t", outcome="lost"), recovered(1.0)),
        (event("put.sanitized", severity="warning", thread_id="t"), recovered(1.0)),
        (event("application.error", severity="error", thread_id="t"), recovered(1.0)),
        (failed(outcome="lost"), recovered(1.0)),
    ],
    ids=lambda one: one.name,
)
def test_what_shows_nothing_resolves_nothing(
    target: Observability, context: HookContext, rows: Rows, trouble: CheckpointEvent, sign: CheckpointEvent
) -> None:
    tell(target, trouble, sign)
    assert [row["resolved_by"] for row in rows(context)] == [None]


def test_the_same_server_is_back_only_for_the_process_that_says_so() -> None:
    down = event("backend.down", severity="error", context={"backend": "postgres"})
    up = event("backend.up", context={"backend": "postgres"})
    assert recovery_key(down, "p", "host:1") == recoveries_of(up, "p", "host:1")[0]["recovery_key"]
    assert recovery_key(down, "p", "host:1") != recoveries_of(up, "p", "host:2")[0]["recovery_key"]


def test_thread_ids_cannot_be_made_up_to_be_the_key_of_another() -> None:
    keys = {
        recovery_key(failed(thread=thread), prefix, "i")
        for prefix, thread in (
            ("p", "a"),
            ("p", 'a", "b'),
            ('p", "a', "b"),
            ("p\0", "a"),
            ("p", "\ud800"),
            ("p", "x" * 9999),
        )
    }
    assert len(keys) == 6
    assert all(key and len(key.encode()) <= 600 for key in keys)


def test_a_group_that_was_resolved_or_muted_by_a_person_stays_so(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    tell(target, failed(0.0))
    with context.connect_postgres() as connection:
        connection.execute("UPDATE system_error_groups SET status = 'muted', muted_by = 'ann'")
    tell(target, recovered(10.0))
    assert [row["resolved_by"] for row in rows(context)] == ["system"]
    assert [group["status"] for group in groups(context)] == ["muted"]


def test_a_recovery_while_postgres_is_away_waits_with_the_errors(
    own_servers: Servers, own_context: HookContext, own_target: Observability, rows: Rows
) -> None:
    own_servers.postgres.kill()
    tell(own_target, failed(0.0), recovered(10.0))
    own_servers.valkey.kill()
    tell(own_target, failed(20.0, "u"), recovered(30.0, "u"), failed(40.0, "u"))
    own_servers.valkey.start()
    own_servers.postgres.start()
    found = wait_until(lambda: len(rows(own_context)) == 3 and rows(own_context))
    wait_until(lambda: sum(row["resolved_by"] == "system" for row in rows(own_context)) == 2)
    assert [row["created_at"] for row in rows(own_context) if row["resolved_at"] is None] == [
        NOW + timedelta(seconds=40)
    ]
    assert len(found) == 3


def test_rows_and_recoveries_at_the_same_time_leave_nothing_open(
    context: HookContext, target: Observability, rows: Rows
) -> None:
    """Whichever of the two is later sees the other, and an administrator's lock deadlocks with neither."""
    other = Observability(context)
    threads = [f"t{n}" for n in range(60)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def administrate() -> None:
        try:
            with context.connect_postgres() as connection:
                while not stop.is_set():
                    with connection.transaction():
                        connection.execute("SELECT FROM system_error_groups ORDER BY fingerprint FOR UPDATE")
                        connection.execute("UPDATE system_errors SET resolution_notes = 'seen'")
        except BaseException as exc:  # noqa: BLE001 - told below
            failures.append(exc)

    workers = [
        threading.Thread(target=lambda: tell(target, *(failed(n, thread) for n, thread in enumerate(threads)))),
        threading.Thread(target=lambda: tell(other, *(recovered(n + 0.5, thread) for n, thread in enumerate(threads)))),
    ]
    administrator = threading.Thread(target=administrate)
    administrator.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    administrator.join()
    other.close(10)
    assert not failures
    wait_until(lambda: len(rows(context)) == 60 and all(row["resolved_at"] for row in rows(context)))
    wait_until(lambda: [group["status"] for group in groups(context)] == ["resolved"])
    with context.connect_postgres() as connection:
        [(deadlocks,)] = connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchall()
    assert deadlocks == 0


def test_the_hook_resolves_what_it_is_told_is_over(context: HookContext, rows: Rows) -> None:
    hooks = Hooks()
    hooks.add(load_hook("system_errors", context))
    hooks.emit(failed(0.0))
    hooks.emit(recovered(10.0))
    assert hooks.flush(10)
    hooks.close(5)
    assert [row["resolved_by"] for row in rows(context)] == ["system"]


def resolutions(servers: Servers) -> set[tuple[str, str | None]]:
    with psycopg.connect(servers.postgres_uri) as connection:
        return set(connection.execute("SELECT error_type, resolved_by FROM system_errors").fetchall())


def test_after_an_outage_of_postgres_its_errors_are_resolved(own_servers: Servers, spool_dir: Path) -> None:
    """With a saver: the failed flush and the server that was away, once the checkpoint is stored."""
    with BufferedPostgresSaver.from_conn_string(
        own_servers.postgres_uri, redis_url=own_servers.redis_url, postgres_timeout=1.0, hooks=("system_errors",)
    ) as saver:
        saver.setup()
        own_servers.postgres.kill()
        put_one(saver, "t1")
        assert not saver.flush()
        own_servers.postgres.start()
        assert wait_until(saver.flush)
        wait_until(
            lambda: (
                resolutions(own_servers)
                == {("checkpoint_flush_error", "system"), ("postgres_connection_error", "system")}
            )
        )


def test_the_errors_of_a_process_that_has_ended_are_resolved_by_the_one_that_saves_what_it_left(
    own_servers: Servers, spool_dir: Path
) -> None:
    options: dict[str, Any] = {
        "redis_url": own_servers.redis_url,
        "postgres_timeout": 1.0,
        "close_timeout": 1.0,
        "hooks": ("system_errors",),
    }
    with BufferedPostgresSaver.from_conn_string(own_servers.postgres_uri, **options) as saver:
        saver.setup()
        own_servers.postgres.kill()
        put_one(saver, "t1")
        assert not saver.flush()
    own_servers.postgres.start()
    with BufferedPostgresSaver.from_conn_string(own_servers.postgres_uri, **options) as saver:
        saver.setup()
        wait_until(lambda: ("checkpoint_flush_error", "system") in resolutions(own_servers))
