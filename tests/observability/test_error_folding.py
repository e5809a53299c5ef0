"""A burst becomes few rows with counts, a process stores no more than its quota, and no error goes uncounted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.events import CheckpointEvent
from observability import Observability
from observability.errors import SystemErrorStore
from observability.errors.folding import QUOTAS, Folding, Quota

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from checkpointer.hooks import HookContext

    Rows = Callable[..., list[dict[str, Any]]]

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def row(at: float = 0.0, **values: Any) -> dict[str, Any]:
    """Return a row of an error that happened `at` seconds after noon."""
    facts: dict[str, Any] = {
        "event_id": str(uuid4()),
        "error_type": "e",
        "severity": "error",
        "fingerprint": "v1:a",
        "outcome": None,
        "thread_id": "t1",
        "run_id": None,
        "checkpoint_ns": None,
        "checkpoint_id": None,
        "trace_id": None,
        "recovery_key": None,
        "component": "c",
        "error_message": f"at {at}",
        "error_context": {"at": at},
        "created_at": (NOON + timedelta(seconds=at)).isoformat(),
        "last_seen_at": None,
        "occurrences": 1,
    }
    return {**facts, **values}


def offer(folding: Folding, *rows: dict[str, Any], now: float = 0.0) -> list[dict[str, Any]]:
    return [stored for one in rows if (stored := folding.offer(one, now)) is not None]


def test_the_first_of_a_burst_are_rows_and_the_others_one_row_that_counts_them() -> None:
    folding = Folding()
    rows = [row(n / 100, run_id="r", checkpoint_id=str(n)) for n in range(100)]
    stored = offer(folding, *rows)
    assert stored == rows[:10]
    assert folding.due(0.9) == []
    assert folding.next_due() == 1.0
    (folded,) = folding.due(1.0)
    assert folded == {
        **rows[99],
        "event_id": rows[10]["event_id"],
        "created_at": rows[10]["created_at"],
        "last_seen_at": rows[99]["created_at"],
        "occurrences": 90,
        "checkpoint_id": None,  # in this they differ
    }
    assert folding.next_due() is None
    assert folding.rest() == []


def test_after_a_silence_errors_are_rows_again() -> None:
    folding = Folding()
    offer(folding, *(row() for _ in range(20)))
    assert offer(folding, row(), now=9.0) == []
    assert len(offer(folding, row(), now=19.5)) == 1


def test_a_single_one_that_was_held_is_as_it_was() -> None:
    folding = Folding()
    rows = [row(n) for n in range(11)]
    offer(folding, *rows)
    assert folding.rest() == [rows[10]]


def test_bursts_of_other_kinds_severities_outcomes_and_threads_do_not_hide_each_other() -> None:
    folding = Folding()
    offer(folding, *(row() for _ in range(50)))
    for other in ({"fingerprint": "v1:b"}, {"severity": "critical"}, {"outcome": "lost"}, {"thread_id": "t2"}):
        assert len(offer(folding, *(row(**other) for _ in range(50)))) == 10, other
    assert [one["occurrences"] for one in folding.rest()] == [40] * 5


def test_rows_of_another_hour_are_counted_in_theirs() -> None:
    folding = Folding()
    offer(folding, *(row() for _ in range(10)))
    assert offer(folding, row(3599), row(3600), row(-1), row(3598)) == []
    found = {one["created_at"][:13]: one["occurrences"] for one in folding.rest()}
    assert found == {"2026-01-02T12": 2, "2026-01-02T13": 1, "2026-01-02T11": 1}


def test_a_folded_row_has_the_facts_of_the_latest_in_whatever_order_they_come() -> None:
    folding = Folding()
    offer(folding, *(row() for _ in range(10)))
    assert offer(folding, row(5), row(9), row(2)) == []
    (folded,) = folding.rest()
    assert folded["error_message"] == "at 9"
    assert folded["created_at"] == row(2)["created_at"]
    assert folded["last_seen_at"] == row(9)["created_at"]


def test_over_the_quota_threads_are_folded_and_counted() -> None:
    folding = Folding((Quota(30, 300.0),))
    rows = [row(thread_id=f"t{n}") for n in range(100)]
    assert len(offer(folding, *rows)) == 30
    assert folding.due(9.9) == []
    (folded,) = folding.due(10.0)
    assert folded["occurrences"] == 70
    assert folded["error_context"]["folded_threads"] == 70
    assert folded["thread_id"] is None
    assert len(offer(folding, row(thread_id="t1000"), now=299.0)) == 0
    assert len(offer(folding, row(thread_id="t1001"), now=300.0)) == 1


def test_folded_rows_use_up_the_quota_too() -> None:
    folding = Folding((Quota(30, 300.0),))
    second = 0.0
    stored = 0
    while second < 100:
        stored += len(offer(folding, *(row(thread_id="t1") for _ in range(5)), now=second))
        stored += len(folding.due(second))
        second += 1
    # 30 of the quota, and then one each ten seconds.
    assert stored <= 30 + 100 / 10 + 1


def test_each_quota_counts() -> None:
    folding = Folding((Quota(10, 1.0), Quota(15, 100.0)))
    assert len(offer(folding, *(row(thread_id=f"a{n}") for n in range(20)))) == 10
    assert len(offer(folding, *(row(thread_id=f"b{n}") for n in range(20)), now=1.0)) == 5


def test_the_first_critical_of_each_thread_is_a_row_over_the_quota_too() -> None:
    folding = Folding((Quota(5, 300.0),))
    rows = [row(thread_id=f"t{n}", severity="critical") for n in range(50)]
    assert offer(folding, *rows) == rows
    assert offer(folding, *(row(thread_id=f"t{n}", severity="critical") for n in range(50))) == []


def test_very_many_kinds_over_the_quota_become_one_for_each_type_and_severity() -> None:
    folding = Folding((Quota(0, 300.0),))
    for n in range(500):
        assert folding.offer(row(fingerprint=f"v1:{n}", error_type="ab"[n % 2], stack_trace="secret"), 0.0) is None
    found = folding.rest()
    assert len(found) == 102
    assert sum(one["occurrences"] for one in found) == 500
    others = [one for one in found if "very many kinds" in one["error_message"]]
    assert {one["error_type"]: one["occurrences"] for one in others} == {"a": 200, "b": 200}
    assert all(one["stack_trace"] is None and one["component"] is None for one in others)
    assert len({one["fingerprint"] for one in others}) == 2


_rows = st.builds(
    row,
    at=st.floats(-4000, 4000, allow_nan=False),
    fingerprint=st.sampled_from([f"v1:{n}" for n in range(3)]),
    severity=st.sampled_from(["warning", "critical"]),
    thread_id=st.sampled_from(["t1", "t2", None]),
    occurrences=st.integers(1, 3),
)


@given(
    st.lists(st.tuples(_rows, st.floats(0, 3), st.booleans()), max_size=200),
    st.sampled_from([QUOTAS, (), (Quota(0, 1.0),), (Quota(5, 2.0), Quota(20, 100.0))]),
)
def test_every_error_is_counted_once_in_its_kind_and_hour(
    offered: list[tuple[dict[str, Any], float, bool]], quotas: tuple[Quota, ...]
) -> None:
    folding = Folding(quotas)
    stored: list[dict[str, Any]] = []
    now = 0.0
    for one, later, look in offered:
        now += later
        stored += offer(folding, one, now=now)
        stored += folding.due(now) if look else []
    stored += folding.rest()

    def counted(rows: list[dict[str, Any]]) -> Counter[tuple[str, ...]]:
        counts: Counter[tuple[str, ...]] = Counter()
        for one in rows:
            counts[one["fingerprint"], one["severity"], one["created_at"][:13]] += one["occurrences"]
        return counts

    given_rows = [one for one, _, _ in offered]
    assert counted(stored) == counted(given_rows)
    assert len({one["event_id"] for one in stored}) == len(stored)
    if given_rows:
        assert min(one["created_at"] for one in stored) == min(one["created_at"] for one in given_rows)
        assert max(one["last_seen_at"] or one["created_at"] for one in stored) == max(
            one["created_at"] for one in given_rows
        )


# -- in the store --------------------------------------------------------------------------------------------------


def error(message: str = "the flush failed", **facts: Any) -> CheckpointEvent:
    values: dict[str, Any] = {"name": "application.error", "severity": "error", "error_type": "e", "thread_id": "t"}
    return CheckpointEvent(message=message, **(values | facts))


def test_a_burst_is_stored_by_itself_after_a_second(target: Observability, context: HookContext, rows: Rows) -> None:
    ways = [target.errors.add(error(f"failed after {n} s")) for n in range(500)]
    assert ways[:10] == ["direct"] * 10
    assert set(ways[10:]) == {"folded"}
    found = wait_until(lambda: sum(one["occurrences"] for one in rows(context)) == 500 and rows(context))
    assert len(found) < 30
    assert found[-1]["last_seen_at"] > found[-1]["created_at"]
    (group,) = context.connect_postgres().execute("SELECT occurrences FROM system_error_groups").fetchall()
    assert group == (500,)
    wait_until(lambda: not [one for one in threading.enumerate() if one.name == "checkpointer-folder"])


def test_what_is_held_is_stored_at_a_flush_and_when_it_is_closed(context: HookContext, rows: Rows) -> None:
    target = Observability(context)
    for _ in range(50):
        target.errors.add(error())
    target.flush(10)
    assert sum(one["occurrences"] for one in rows(context)) == 50
    for _ in range(50):
        target.errors.add(error())
    target.close(10)
    target.close(10)
    assert sum(one["occurrences"] for one in rows(context)) == 100
    # What comes after that has nobody to wait for.
    assert target.errors.add(error()) == "direct"


def test_several_threads_lose_no_count(target: Observability, context: HookContext, rows: Rows) -> None:
    def work(number: int) -> None:
        for n in range(500):
            target.errors.add(error(thread_id=f"t{number % 2}-{n % 3}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target.errors.flush()
    assert sum(one["occurrences"] for one in rows(context)) == 2000


def test_a_process_stores_no_more_than_its_quota(target: Observability, context: HookContext, rows: Rows) -> None:
    store = SystemErrorStore(target._outbox, context.prefix, quotas=(Quota(20, 3600.0),))
    for n in range(300):
        store.add(error(thread_id=f"t{n}"))
    store.close(10)
    found = rows(context)
    assert sum(one["occurrences"] for one in found) == 300
    assert len(found) <= 22


PROGRAM = """
import os, sys
import psycopg, redis
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import HookContext
from observability import Observability
uri, url, prefix = sys.argv[1:]
target = Observability(HookContext(lambda: psycopg.connect(uri, autocommit=True),
    lambda: redis.Redis.from_url(url), prefix, "at-exit"))
for n in range(100):
    target.errors.add(CheckpointEvent(name="application.error", severity="error", error_type="e", message=f"row {n}"))
"""


def test_a_program_that_ends_without_closing_leaves_nothing_held(
    context: HookContext, migrated_uri: str, redis_url: str, rows: Rows
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, migrated_uri, redis_url, context.prefix], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert sum(one["occurrences"] for one in rows(context)) == 100


def test_a_forked_child_holds_nothing_of_its_parent(target: Observability, context: HookContext, rows: Rows) -> None:
    for _ in range(20):
        target.errors.add(error())
    child = os.fork()
    if child == 0:
        for _ in range(30):
            target.errors.add(error())
        target.errors.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    target.errors.flush()
    assert sum(one["occurrences"] for one in rows(context)) == 50


def test_release_and_environment_come_from_the_environment(
    target: Observability, context: HookContext, rows: Rows, monkeypatch: pytest.MonkeyPatch, spool_dir: Path
) -> None:
    monkeypatch.setenv("CHECKPOINTER_RELEASE", "1.2.3")
    monkeypatch.setenv("CHECKPOINTER_ENVIRONMENT", "staging")
    target.errors.add(error(context={"trace_id": "0af7651916cd43dd8448eb211c80319c"}))
    (found,) = rows(context)
    assert (found["release"], found["environment"]) == ("1.2.3", "staging")
    assert found["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
