"""The error store is read and changed right: pages, filters, counts, and acts that happen once."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import NOON, plant

from checkpointer.errors import CheckpointerError, ConfigurationError
from observability.errors import acting, reading
from observability.errors.reading import Filters
from observability.errors.statements import Cursor, InvalidCursorError, Statement, arun, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from observability.errors.statements import Page

MIGRATIONS = Path(__file__).parents[2] / "migrations"
Connection = psycopg.Connection[Any]


@pytest.fixture
def store(conn: Connection) -> Connection:
    for name in ("0002_system_errors.sql", "0003_thread_logs.sql", "0006_error_groups.sql"):
        conn.execute((MIGRATIONS / name).read_bytes())
    return conn


def ids(page: Page) -> list[int]:
    return [row["id"] for row in page.rows]


def audited(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute("SELECT action, actor, error_id, fingerprint FROM system_error_audit ORDER BY id").fetchall()


def status(conn: Connection, fingerprint: str = "v1:a") -> str:
    row = run(conn, reading.group(fingerprint))
    assert row is not None
    return str(row["status"])


# Reading


def test_pages_walk_all_unresolved_errors_once_the_newest_first(store: Connection) -> None:
    # Three share each moment, so that pages end between rows of the same time.
    planted = [plant(store, created_at=NOON + timedelta(seconds=n // 3)) for n in range(10)]
    resolved = plant(store, resolved_at=NOON)
    seen: list[int] = []
    cursor = None
    while True:
        page = run(store, reading.find(limit=4, cursor=cursor))
        seen += ids(page)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == planted[::-1]
    assert resolved not in seen


def test_rows_that_arrive_meanwhile_do_not_move_the_pages(store: Connection) -> None:
    planted = [plant(store, created_at=NOON + timedelta(seconds=n)) for n in range(6)]
    first = run(store, reading.find(limit=3))
    plant(store, created_at=NOON + timedelta(days=1))
    second = run(store, reading.find(limit=3, cursor=first.next_cursor))
    assert ids(first) + ids(second) == planted[::-1]


def test_rows_without_a_time_are_not_left_out_of_the_pages(store: Connection) -> None:
    planted = {plant(store, created_at=NOON)}
    for _ in range(3):
        found = store.execute(
            "INSERT INTO system_errors (error_type, severity, error_message, created_at) "
            "VALUES ('x', 'error', 'y', NULL) RETURNING id"
        ).fetchone()
        assert found
        planted.add(found[0])
    seen: list[int] = []
    cursor = None
    for _ in range(4):
        page = run(store, reading.find(limit=1, cursor=cursor))
        seen += ids(page)
        cursor = page.next_cursor
    assert (set(seen), len(seen), cursor) == (planted, 4, None)


def test_each_filter_finds_its_errors_and_no_other(store: Connection) -> None:
    wanted = plant(
        store,
        severity="critical",
        error_type="redis_connection_error",
        thread_id="t-1",
        component="buffer",
        fingerprint="v1:b",
        created_at=NOON + timedelta(hours=1),
        error_message="Redis at 100% of memory_limit",
    )
    other = plant(store, thread_id="t-2", component="flusher", error_message="Redis at 1000 of memoryXlimit")
    done = plant(store, resolved_at=NOON)
    for filters in (
        Filters(severities=("critical",)),
        Filters(error_type="redis_connection_error"),
        Filters(thread_id="t-1"),
        Filters(component="buffer"),
        Filters(fingerprint="v1:b"),
        Filters(since=NOON + timedelta(minutes=1)),
        Filters(text="100% OF"),
        Filters(text="memory_limit"),
    ):
        assert ids(run(store, reading.find(filters))) == [wanted], filters
    assert ids(run(store, reading.find(Filters(until=NOON + timedelta(minutes=1))))) == [other]
    assert ids(run(store, reading.find(Filters(severities=("critical", "error"))))) == [wanted, other]
    assert ids(run(store, reading.find(Filters(state="resolved")))) == [done]
    assert ids(run(store, reading.find(Filters(state="all")))) == [wanted, done, other]
    assert ids(run(store, reading.find(Filters(text="\\")))) == []


@pytest.mark.parametrize("hostile", ["'; DROP TABLE system_errors; --", "%s %(id)s", "\0", "\ud800", "\\", "a" * 9_000])
def test_hostile_text_in_a_filter_is_only_text(store: Connection, hostile: str) -> None:
    planted = plant(store)
    for name in ("error_type", "thread_id", "component", "fingerprint", "text"):
        assert run(store, reading.find(Filters(**{name: hostile}))).rows == []
    assert ids(run(store, reading.find())) == [planted]


def test_a_malformed_cursor_is_a_typed_error(store: Connection) -> None:
    good = Cursor("errors", NOON, 5).encode()
    assert Cursor.decode("errors", good, int) == Cursor("errors", NOON, 5)
    others = [
        Cursor("groups", NOON, "v1:a").encode(),
        Cursor("errors", NOON, "5").encode(),
        Cursor("errors", NOON.replace(tzinfo=None), 5).encode(),
        Cursor("errors", NOON, 2**63).encode(),
        Cursor("errors", NOON, True).encode(),
        good[:-3],
        good + "!",
        "",
        "é",
        "A" * 10_000,
        "W" * 3_000,
    ]
    for text in others:
        with pytest.raises(InvalidCursorError, match="without a cursor"):
            reading.find(cursor=text)
    with pytest.raises(InvalidCursorError):
        reading.groups(cursor=good)
    assert issubclass(InvalidCursorError, CheckpointerError)


@given(st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda raw: raw.decode("latin-1"))))
@settings(max_examples=300)
def test_any_text_is_a_cursor_or_a_typed_error(text: str) -> None:
    with contextlib.suppress(InvalidCursorError):
        reading.groups(cursor=text)


def test_a_limit_out_of_range_is_refused() -> None:
    for limit in (0, -1, 501):
        with pytest.raises(ConfigurationError, match="500"):
            reading.find(limit=limit)
        with pytest.raises(ConfigurationError, match="500"):
            reading.log("t", limit=limit)


def test_groups_come_by_their_last_occurrence_and_by_status(store: Connection) -> None:
    for number, name in enumerate("abcd"):
        plant(store, fingerprint=f"v1:{name}", created_at=NOON + timedelta(hours=number // 2))
    store.execute(
        "UPDATE system_error_groups SET status = 'muted', muted_until = now() - interval '1 minute' "
        "WHERE fingerprint = 'v1:a'"
    )
    store.execute("UPDATE system_error_groups SET status = 'muted' WHERE fingerprint = 'v1:b'")
    first = run(store, reading.groups(limit=3))
    second = run(store, reading.groups(limit=3, cursor=first.next_cursor))
    assert [row["fingerprint"] for row in first.rows + second.rows] == ["v1:d", "v1:c", "v1:b", "v1:a"]
    assert second.next_cursor is None
    muted = run(store, reading.groups(statuses=["muted"]))
    assert [row["fingerprint"] for row in muted.rows] == ["v1:b"]
    # A mute that has run out is none.
    assert status(store, "v1:a") == "unresolved"
    open_ones = run(store, reading.groups(statuses=["unresolved", "regressed"], text="FLUSH", severities=["error"]))
    assert len(open_ones.rows) == 3
    assert run(store, reading.groups(error_type="other")).rows == []


def test_a_threads_log_is_paged_back_from_its_last_lines(store: Connection) -> None:
    for n in range(5):
        store.execute("INSERT INTO thread_logs (thread_id, level, message) VALUES ('t', 'info', %s)", [f"line {n}"])
    store.execute("INSERT INTO thread_logs (thread_id, level, message) VALUES ('u', 'info', 'other')")
    first = run(store, reading.log("t", limit=3))
    second = run(store, reading.log("t", limit=3, cursor=first.next_cursor))
    assert [row["message"] for row in first.rows] == ["line 2", "line 3", "line 4"]
    assert [row["message"] for row in second.rows] == ["line 0", "line 1"]
    assert second.next_cursor is None


def test_stats_sum_occurrences_and_rank_severities_by_number(store: Connection) -> None:
    now = datetime.now(UTC)
    plant(store, occurrences=40, thread_id="t", created_at=now - timedelta(days=3))
    plant(store, severity="critical", thread_id="t", created_at=now)
    plant(store, severity="warning", error_type="other", resolved_at=now, created_at=now, occurrences=5)
    plant(store, severity="warning", error_type="old", resolved_at=now, created_at=now - timedelta(days=9))
    found = run(store, reading.stats())
    assert (found.unresolved, found.unresolved_rows, found.last_24h, found.threads) == (41, 2, 6, 1)
    assert found.oldest_unresolved_at == now - timedelta(days=3)
    assert [row["severity"] for row in found.by_severity] == ["critical", "error", "warning", "info"]
    assert [row["unresolved"] for row in found.by_severity] == [1, 40, 0, 0]
    assert [row["last_24h"] for row in found.by_severity] == [1, 0, 5, 0]
    assert found.by_type == [
        {"error_type": "checkpoint_flush_error", "unresolved": 41, "last_24h": 1, "worst_severity": "critical"},
        {"error_type": "other", "unresolved": 0, "last_24h": 5, "worst_severity": "warning"},
    ]
    assert found.groups == {"unresolved": 1, "regressed": 0, "muted": 0, "resolved": 0}


def test_stats_of_an_empty_store_are_zeros(store: Connection) -> None:
    found = run(store, reading.stats())
    assert (found.unresolved, found.last_24h, found.by_type) == (0, 0, [])
    assert found.oldest_unresolved_at is None


def count_hour(
    conn: Connection, hour: datetime, occurrences: int, error_type: str = "x", severity: str = "error"
) -> None:
    conn.execute(
        "INSERT INTO system_error_hourly VALUES (%s, %s, %s, %s, %s)",
        [hour, error_type, severity, f"v1:{error_type}", occurrences],
    )


def test_trends_have_a_count_for_every_hour_also_those_without_errors(store: Connection) -> None:
    count_hour(store, NOON, 3)
    count_hour(store, NOON + timedelta(hours=2), 4, "y", "critical")
    count_hour(store, NOON + timedelta(hours=3), 9)
    span = {"since": NOON + timedelta(minutes=30), "until": NOON + timedelta(hours=3)}
    total = run(store, reading.trends(**span))
    assert total.starts == [NOON + timedelta(hours=n) for n in range(3)]
    assert [(one.key, one.counts, one.total) for one in total.series] == [(None, [3, 0, 4], 7)]
    by_type = run(store, reading.trends(**span, by="error_type"))
    assert [(one.key, one.counts) for one in by_type.series] == [("y", [0, 0, 4]), ("x", [3, 0, 0])]
    by_severity = run(store, reading.trends(**span, by="severity", severity="critical"))
    assert [(one.key, one.total) for one in by_severity.series] == [("critical", 4)]
    assert run(store, reading.trends(**span, fingerprint="v1:x")).series[0].total == 3


def test_trends_by_day_are_days_of_utc_whatever_the_time_zone_of_the_session(store: Connection) -> None:
    store.execute("SET TIME ZONE 'Pacific/Auckland'")
    count_hour(store, datetime(2026, 3, 14, 23, tzinfo=UTC), 1)
    count_hour(store, datetime(2026, 3, 15, 0, tzinfo=UTC), 2)
    found = run(store, reading.trends(since=NOON, until=NOON + timedelta(days=1), bucket="day"))
    assert found.starts == [datetime(2026, 3, 14, tzinfo=UTC), datetime(2026, 3, 15, tzinfo=UTC)]
    assert found.series[0].counts == [1, 2]


def test_trends_fold_the_rare_types_into_one_series(store: Connection) -> None:
    for n in range(25):
        count_hour(store, NOON, 100 - n, f"type_{n}")
    found = run(store, reading.trends(since=NOON, until=NOON + timedelta(hours=1), by="error_type"))
    assert [one.key for one in found.series] == [*(f"type_{n}" for n in range(20)), None]
    assert found.series[-1].total == sum(100 - n for n in range(20, 25))


def test_a_range_of_trends_that_cannot_be_is_refused() -> None:
    for since, until in (
        (NOON, NOON),
        (NOON, NOON + timedelta(days=32)),
        (NOON.replace(tzinfo=None), NOON),
        (datetime.max.replace(tzinfo=UTC) - timedelta(minutes=1), datetime.max.replace(tzinfo=UTC)),
    ):
        with pytest.raises(ConfigurationError):
            reading.trends(since=since, until=until)


async def test_the_async_runner_answers_the_same(store: Connection, postgres_uri: str) -> None:
    error_id = plant(store)
    async with await psycopg.AsyncConnection.connect(postgres_uri, autocommit=True) as connection:
        assert await arun(connection, reading.find()) == run(store, reading.find())
        assert await arun(connection, reading.stats()) == run(store, reading.stats())
        changed = await arun(connection, acting.resolve(error_id, actor="ann"))
    assert changed is not None
    assert changed.changed
    assert audited(store) == [("resolve", "ann", error_id, "v1:a")]


# Acting


def test_resolving_is_idempotent_and_keeps_who_was_first(store: Connection) -> None:
    error_id = plant(store)
    first = run(store, acting.resolve(error_id, actor="ann", notes="restarted"))
    second = run(store, acting.resolve(error_id, actor="bob", notes="me too"))
    assert first is not None
    assert second is not None
    assert (first.changed, second.changed) == (True, False)
    assert first.row["resolved_at"] is not None
    assert (second.row["resolved_by"], second.row["resolution_notes"]) == ("ann", "restarted")
    assert audited(store) == [("resolve", "ann", error_id, "v1:a")]
    assert run(store, acting.resolve(404, actor="ann")) is None


def test_a_group_is_resolved_with_its_last_unresolved_error(store: Connection) -> None:
    one, two = plant(store), plant(store)
    run(store, acting.resolve(one, actor="ann"))
    assert status(store) == "unresolved"
    run(store, acting.resolve(two, actor="bob", notes="done"))
    row = run(store, reading.group("v1:a"))
    assert row is not None
    assert (row["status"], row["resolved_by"], row["resolution_notes"]) == ("resolved", "bob", "done")


def test_of_two_who_resolve_the_last_two_errors_at_once_one_resolves_the_group(
    store: Connection, postgres_uri: str
) -> None:
    for _ in range(10):
        pair = [plant(store), plant(store)]
        store.execute("UPDATE system_error_groups SET status = 'unresolved'")
        barrier = threading.Barrier(2)

        def work(error_id: int, barrier: threading.Barrier = barrier) -> None:
            with psycopg.connect(postgres_uri, autocommit=True) as connection:
                barrier.wait()
                run(connection, acting.resolve(error_id, actor="ann"))

        threads = [threading.Thread(target=work, args=[error_id]) for error_id in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert status(store) == "resolved"


def test_two_bulk_resolves_at_once_do_not_wait_for_each_other_for_ever(store: Connection, postgres_uri: str) -> None:
    planted = [plant(store, fingerprint=f"v1:{n % 7}") for n in range(200)]
    results: list[acting.Bulk] = []

    def work() -> None:
        with psycopg.connect(postgres_uri, autocommit=True) as connection:
            results.append(run(connection, acting.bulk_resolve(Filters(), actor="ann")))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(result.count for result in results) == len(planted)
    assert run(store, reading.groups(statuses=["unresolved"])).rows == []


def test_a_muted_group_stays_muted_when_its_errors_are_resolved(store: Connection) -> None:
    error_id = plant(store)
    run(store, acting.mute("v1:a", actor="ann"))
    run(store, acting.resolve(error_id, actor="ann"))
    assert status(store) == "muted"
    run(store, acting.unmute("v1:a", actor="ann"))
    assert status(store) == "unresolved"  # nobody has resolved it


def test_reopening_an_error_opens_its_group(store: Connection) -> None:
    error_id = plant(store)
    run(store, acting.resolve(error_id, actor="ann", notes="n"))
    outcomes = [run(store, acting.reopen(error_id, actor="bob")) for _ in range(2)]
    assert [outcome.changed for outcome in outcomes if outcome] == [True, False]
    row = run(store, reading.one(error_id))
    assert row is not None
    assert (row["resolved_at"], row["resolved_by"], row["resolution_notes"]) == (None, None, None)
    assert status(store) == "unresolved"
    assert [line[0] for line in audited(store)] == ["resolve", "reopen"]
    assert run(store, acting.reopen(404, actor="ann")) is None


def test_a_group_that_is_reopened_has_an_open_error_also_when_its_last_one_was_deleted(store: Connection) -> None:
    resolved = plant(store)
    run(store, acting.resolve(resolved, actor="ann"))
    again = plant(store)
    store.execute("UPDATE system_error_groups SET status = 'regressed'")
    run(store, acting.delete(again, actor="ann"))
    assert status(store) == "resolved"
    run(store, acting.reopen_group("v1:a", actor="ann"))
    assert ids(run(store, reading.find())) == [resolved]


def test_a_group_is_resolved_and_reopened_with_those_of_its_errors_that_were_open(store: Connection) -> None:
    before = plant(store)
    run(store, acting.resolve(before, actor="ann"))
    run(store, acting.reopen_group("v1:a", actor="ann"))
    run(store, acting.resolve(before, actor="ann"))
    both = {plant(store), plant(store)}
    other = plant(store, fingerprint="v1:b")
    store.execute("UPDATE system_error_groups SET status = 'regressed' WHERE fingerprint = 'v1:a'")
    outcomes = [run(store, acting.resolve_group("v1:a", actor="bob", notes="n")) for _ in range(2)]
    assert [(outcome.changed, outcome.more) for outcome in outcomes if outcome] == [(True, False), (False, False)]
    assert status(store) == "resolved"
    assert ids(run(store, reading.find())) == [other]
    outcomes = [run(store, acting.reopen_group("v1:a", actor="bob")) for _ in range(2)]
    assert [outcome.changed for outcome in outcomes if outcome] == [True, False]
    assert set(ids(run(store, reading.find()))) == {*both, other}
    assert status(store) == "unresolved"
    for act in (acting.resolve_group, acting.reopen_group, acting.mute, acting.unmute):
        assert run(store, act("v1:none", actor="ann")) is None


def test_a_big_group_is_resolved_in_parts(store: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acting, "_GROUP_ROWS", 2)
    for _ in range(3):
        plant(store)
    first = run(store, acting.resolve_group("v1:a", actor="ann"))
    assert first is not None
    assert (first.more, first.row["status"]) == (True, "unresolved")
    second = run(store, acting.resolve_group("v1:a", actor="ann"))
    assert second is not None
    assert (second.more, second.row["status"]) == (False, "resolved")


def test_muting_is_idempotent_and_its_end_can_be_moved(store: Connection) -> None:
    plant(store)
    until = datetime.now(UTC) + timedelta(hours=1)
    outcomes = [run(store, acting.mute("v1:a", actor="ann", until=when)) for when in (None, None, until, until)]
    assert [outcome.changed for outcome in outcomes if outcome] == [True, False, True, False]
    assert outcomes[-1] is not None
    assert outcomes[-1].row["muted_until"] == until
    outcome = run(store, acting.unmute("v1:a", actor="ann"))
    assert outcome is not None
    assert (outcome.row["status"], outcome.row["muted_until"]) == ("unresolved", None)
    assert [line[0] for line in audited(store)] == ["mute", "mute", "unmute"]


def test_bulk_resolve_takes_the_oldest_that_match_and_says_if_more_do(store: Connection) -> None:
    planted = [plant(store, created_at=NOON + timedelta(seconds=n)) for n in range(5)]
    other = plant(store, error_type="other", fingerprint="v1:b")
    filters = Filters(error_type="checkpoint_flush_error", state="resolved")
    dry = run(store, acting.bulk_resolve(filters, actor="ann", limit=3, dry_run=True))
    assert (dry.count, dry.more, dry.dry_run) == (3, True, True)
    assert audited(store) == []
    done = run(store, acting.bulk_resolve(filters, actor="ann", notes="n", limit=3))
    assert (done.count, done.more) == (3, True)
    assert ids(run(store, reading.find())) == [*planted[:2:-1], other]
    line = run(store, reading.audit()).rows[0]
    assert line["details"] == {
        "count": 3,
        "filters": {"error_type": "checkpoint_flush_error"},
        "notes": "n",
        "ids": planted[:3],
    }


def test_bulk_delete_takes_only_what_was_resolved_before(store: Connection) -> None:
    old = [plant(store, resolved_at=NOON - timedelta(days=n)) for n in range(1, 4)]
    kept = [plant(store, resolved_at=NOON), plant(store, created_at=NOON - timedelta(days=99))]
    dry = run(store, acting.bulk_delete(NOON, actor="ann", dry_run=True))
    assert (dry.count, dry.more) == (3, False)
    first = run(store, acting.bulk_delete(NOON, actor="ann", limit=2))
    second = run(store, acting.bulk_delete(NOON, actor="ann", limit=2))
    assert [(one.count, one.more) for one in (first, second)] == [(2, True), (1, False)]
    assert sorted(ids(run(store, reading.find(Filters(state="all"))))) == sorted(kept)
    lines = run(store, reading.audit(action="bulk_delete")).rows
    assert sorted(number for line in lines for number in line["details"]["ids"]) == old
    for limit in (0, 1_001):
        with pytest.raises(ConfigurationError, match=r"1 to 1,?000"):
            run(store, acting.bulk_delete(NOON, actor="ann", limit=limit))


def test_an_act_can_say_how_it_was_done_and_answers_the_same(store: Connection) -> None:
    error_id = plant(store)
    how = {"way": "http", "password": "hunter2"}
    outcome = run(store, acting.by_way_of(how, acting.resolve(error_id, actor="ann", notes="n")))
    assert outcome is not None
    assert (outcome.changed, outcome.row["resolved_by"]) == (True, "ann")
    details = run(store, reading.audit()).rows[0]["details"]
    assert details == {"notes": "n", "how": {"way": "http", "password": "[scrubbed]"}}
    assert run(store, acting.by_way_of(how, acting.resolve(404, actor="ann"))) is None


def test_deleting_an_error_is_audited_and_closes_a_group_without_others(store: Connection) -> None:
    error_id = plant(store, thread_id="t")
    gone = run(store, acting.delete(error_id, actor="ann"))
    assert gone is not None
    assert gone["id"] == error_id
    assert status(store) == "resolved"
    line = run(store, reading.audit(error_id=error_id)).rows[0]
    assert (line["action"], line["actor"], line["details"]["thread_id"]) == ("delete", "ann", "t")
    assert run(store, acting.delete(error_id, actor="ann")) is None
    assert len(audited(store)) == 1


def test_an_error_without_a_group_can_be_resolved_reopened_and_deleted(store: Connection) -> None:
    error_id = plant(store, fingerprint=None)
    for act in (acting.resolve, acting.reopen):
        outcome = run(store, act(error_id, actor="ann"))
        assert outcome is not None
        assert outcome.changed
    assert run(store, acting.delete(error_id, actor="ann")) is not None
    assert [line[0] for line in audited(store)] == ["resolve", "reopen", "delete"]


@pytest.mark.parametrize(
    "act",
    [
        lambda error_id: acting.resolve(error_id, actor="ann"),
        lambda error_id: acting.resolve_group("v1:a", actor="ann"),
        lambda error_id: acting.mute("v1:a", actor="ann"),
        lambda error_id: acting.delete(error_id, actor="ann"),
        lambda error_id: acting.bulk_resolve(Filters(), actor="ann"),
    ],
)
def test_nothing_is_done_that_the_audit_cannot_keep(store: Connection, act: Callable[[int], Any]) -> None:
    error_id = plant(store)
    before = run(store, reading.one(error_id)), run(store, reading.group("v1:a"))
    store.execute("ALTER TABLE system_error_audit ADD CHECK (actor <> 'ann')")
    with pytest.raises(psycopg.errors.CheckViolation):
        run(store, act(error_id))
    assert (run(store, reading.one(error_id)), run(store, reading.group("v1:a"))) == before


def test_what_people_write_is_stored_without_secrets_and_whatever_it_holds(store: Connection) -> None:
    error_id = plant(store)
    notes = "see postgres://me:hunter2@db/x \0 \ud800"
    outcome = run(store, acting.resolve(error_id, actor="an\0n", notes=notes))
    assert outcome is not None
    assert "hunter2" not in outcome.row["resolution_notes"]
    run(store, acting.note("refuse", "anonymous", details={"authorization": "Bearer abcdefghijklm"}))
    text = str(store.execute("SELECT details FROM system_error_audit").fetchall())
    assert "hunter2" not in text
    assert "abcdefghijklm" not in text


def test_the_audit_is_paged_and_filtered(store: Connection) -> None:
    for number in range(5):
        run(store, acting.note("refuse", "ann" if number % 2 else "bob", fingerprint="v1:a"))
    first = run(store, reading.audit(limit=3))
    second = run(store, reading.audit(limit=3, cursor=first.next_cursor))
    seen = ids(first) + ids(second)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == 5
    assert len(run(store, reading.audit(actor="ann")).rows) == 2
    assert len(run(store, reading.audit(action="refuse", fingerprint="v1:a")).rows) == 5
    assert run(store, reading.audit(action="resolve")).rows == []


def test_every_statement_names_no_schema_and_has_no_value_in_its_text() -> None:
    statement = reading.find(Filters(thread_id="needle", text="needle", error_type="needle"))
    assert isinstance(statement, Statement)
    assert "needle" not in statement.sql
    assert "public." not in statement.sql


def test_a_page_of_a_log_is_in_the_order_in_which_things_happened(store: Connection) -> None:
    for message, seconds in (("over", 60), ("begun", 0), ("later", 90)):  # the second had to wait for Postgres
        store.execute(
            "INSERT INTO thread_logs (thread_id, level, message, created_at) VALUES ('t', 'info', %s, %s)",
            [message, NOON + timedelta(seconds=seconds)],
        )
    page = run(store, reading.log("t", limit=2))
    assert [row["message"] for row in page.rows] == ["begun", "later"]
    assert [row["message"] for row in run(store, reading.log("t")).rows] == ["begun", "over", "later"]
    (earlier,) = run(store, reading.log("t", limit=2, cursor=page.next_cursor)).rows
    assert earlier["message"] == "over"
