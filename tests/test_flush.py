"""When and how what is buffered gets to Postgres."""

from __future__ import annotations

import asyncio
import operator
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypedDict
from uuid import uuid4

import psycopg
import pytest
from helpers import await_until, wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from savers import put_chain, stock_tuples

from checkpointer import BufferedPostgresSaver
from checkpointer.flush import flusher
from checkpointer.flush.session import LockedElsewhereError
from checkpointer.records import Address
from checkpointer.store import reads, threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointer import CheckpointEvent

RUN_END_ONLY = frozenset({"run_end"})


class State(TypedDict):
    xs: Annotated[list[int], operator.add]


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


class Rows:
    """Counts a thread's checkpoints in Postgres, around the saver."""

    def __init__(self, uri: str) -> None:
        self.conn = psycopg.connect(uri, autocommit=True)

    def checkpoints(self, thread: str) -> int:
        row = self.conn.execute("SELECT count(*) FROM checkpoints WHERE thread_id = %s", (thread,)).fetchone()
        assert row is not None
        return int(row[0])


@pytest.fixture
def rows(postgres_uri: str) -> Iterator[Rows]:
    found = Rows(postgres_uri)
    yield found
    found.conn.close()


@pytest.fixture
def make(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Any]:
    savers = []

    def _make(**options: Any) -> BufferedPostgresSaver:
        options = {"hooks": (), "prefix": prefix, **options}
        saver = BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, **options)
        saver.setup()
        savers.append(saver)
        return saver

    yield _make
    for saver in savers:
        saver.close()


def chain(saver: Any, *nodes: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for i, node in enumerate(nodes):
        builder.add_node(f"n{i}", node)
        builder.add_edge(before, f"n{i}")
        before = f"n{i}"
    builder.add_edge(before, END)
    return builder.compile(checkpointer=saver)


def one(state: State) -> State:
    return {"xs": [1]}


def fails(state: State) -> State:
    raise ValueError("node error")


def asks(state: State) -> State:
    return {"xs": [interrupt("how many?")]}


def loops(saver: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("n0", one)
    builder.add_edge(START, "n0")
    builder.add_edge("n0", "n0")
    return builder.compile(checkpointer=saver)


# -- a run's end, of each kind; nothing else may flush here -----------------------------------------------------


def test_a_completed_run_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    chain(saver, one, one).invoke({"xs": []}, config("t"))
    wait_until(lambda: rows.checkpoints("t") == 4)


def test_a_run_that_fails_in_a_node_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    with pytest.raises(ValueError, match="node error"):
        chain(saver, one, fails).invoke({"xs": []}, config("t"))
    wait_until(lambda: rows.checkpoints("t") == 3)
    found = PostgresSaver(rows.conn).get_tuple({"configurable": {"thread_id": "t", "checkpoint_ns": ""}})
    assert found is not None
    assert found.pending_writes[0][1] == "__error__"


def test_an_interrupted_run_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    result = chain(saver, one, asks).invoke({"xs": []}, config("t"))
    assert "__interrupt__" in result
    wait_until(lambda: rows.checkpoints("t") == 3)


async def test_a_cancelled_run_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    reached = asyncio.Event()

    async def hangs(state: State) -> State:
        reached.set()
        await asyncio.Event().wait()
        return {"xs": []}

    running = asyncio.create_task(chain(saver, one, hangs).ainvoke({"xs": []}, config("t")))
    await reached.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await await_until(lambda: rows.checkpoints("t") == 3)
    await saver.aclose()


def test_a_run_that_hits_the_recursion_limit_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    with pytest.raises(GraphRecursionError):
        loops(saver).invoke({"xs": []}, {**config("t"), "recursion_limit": 3})
    wait_until(lambda: rows.checkpoints("t") == 5)


def test_an_abandoned_stream_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    stream = chain(saver, one, one, one).stream({"xs": []}, config("t"))
    next(stream)
    stream.close()
    wait_until(lambda: rows.checkpoints("t") >= 2)
    assert wait_until(lambda: not saver._core.ledger.records)


async def test_an_abandoned_asynchronous_stream_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    stream = chain(saver, one, one, one).astream({"xs": []}, config("t"))
    await anext(stream)
    await stream.aclose()
    await await_until(lambda: rows.checkpoints("t") >= 2)
    await await_until(lambda: not saver._core.ledger.records)
    await saver.aclose()


async def test_an_asynchronous_run_is_flushed(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    await chain(saver, one, one).ainvoke({"xs": []}, config("t"))
    await await_until(lambda: rows.checkpoints("t") == 4)
    await saver.aclose()


def test_an_inner_graph_with_a_thread_of_its_own_is_flushed_at_the_outer_runs_end(make: Any, rows: Rows) -> None:
    saver = make(triggers=RUN_END_ONLY)
    inner = chain(saver, one)

    def calls(state: State) -> State:
        inner.invoke({"xs": []}, config("inner"))
        return {"xs": [2]}

    chain(saver, calls).invoke({"xs": []}, config("outer"))
    wait_until(lambda: rows.checkpoints("outer") == 3 and rows.checkpoints("inner") == 3)


# -- the other triggers -------------------------------------------------------------------------------------------


def update_only(saver: Any, thread: str, times: int = 1) -> None:
    graph = chain(saver, one)
    for _ in range(times):
        graph.update_state(config(thread), {"xs": [7]})  # no callback fires for this


def test_old_records_are_flushed_without_a_runs_end(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset({"age"}), flush_age=0.1)
    update_only(saver, "t")
    wait_until(lambda: rows.checkpoints("t") == 1)


def test_many_records_are_flushed_without_a_runs_end(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset({"size"}), flush_size=5)
    update_only(saver, "t", times=6)
    wait_until(lambda: rows.checkpoints("t") >= 2)


def test_runs_that_end_together_are_flushed_in_one_transaction(
    make: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make(triggers=RUN_END_ONLY)
    core = saver._core.flusher
    wait_until(lambda: core._pause() > 30)  # it has looked for what was left before
    monkeypatch.setattr(flusher, "_GATHER_SECONDS", 20.0)
    for thread in ("t", "u"):
        put_chain(saver, thread, range(2))
        core.wake([thread])
        assert 0 < core._pause() <= 20
    with core._cond:
        core._urgent_at = 0.0  # the moment is over
        core._cond.notify_all()
    wait_until(lambda: rows.checkpoints("t") == rows.checkpoints("u") == 2)
    found = rows.conn.execute("SELECT DISTINCT xmin FROM checkpoints WHERE thread_id IN ('t', 'u')").fetchall()
    assert len(found) == 1


def test_close_flushes_what_this_process_has_put(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset({"close"}))
    update_only(saver, "t")
    assert rows.checkpoints("t") == 0
    saver.close()
    assert rows.checkpoints("t") == 1
    saver.close()


def test_the_start_flushes_what_an_earlier_saver_has_left(make: Any, rows: Rows, redis_url: str) -> None:
    first = make(triggers=frozenset())
    update_only(first, "t", times=3)
    first.close()
    assert rows.checkpoints("t") == 0
    events: list[CheckpointEvent] = []
    second = make(triggers=frozenset())
    second.close()
    third = BufferedPostgresSaver.from_conn_string(
        second._core.postgres.conninfo,
        redis_url=redis_url,
        prefix=second.options.prefix,
        hooks=(),
        triggers=frozenset({"start"}),
    )
    third.hooks.add(events.append)
    with third:
        third.setup()
        wait_until(lambda: rows.checkpoints("t") == 3)
        wait_until(lambda: [e.name for e in events] == ["recovery.found"])
    assert events[0].checkpoint_count == 3


def test_a_savers_own_first_records_are_no_recovery(make: Any, rows: Rows, redis_url: str) -> None:
    first = make(triggers=frozenset())
    events: list[CheckpointEvent] = []
    second = BufferedPostgresSaver.from_conn_string(
        first._core.postgres.conninfo,
        redis_url=redis_url,
        prefix=first.options.prefix,
        hooks=(),
        triggers=frozenset({"start"}),
    )
    second.hooks.add(events.append)
    with second:  # without setup(): the flusher starts at the first use
        start, second._core.flusher.start = second._core.flusher.start, lambda: None
        update_only(second, "mine")
        second._core.flusher.start = start
        start()
        wait_until(lambda: rows.checkpoints("mine") == 1)
        assert second.hooks.flush(5)
    assert not [event for event in events if event.name == "recovery.found"]


def test_without_triggers_nothing_is_flushed_unasked(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset())
    chain(saver, one).invoke({"xs": []}, config("t"))
    saver.close()
    assert rows.checkpoints("t") == 0


# -- reports ------------------------------------------------------------------------------------------------------


def test_a_report_is_true_and_counts_what_it_brought_to_postgres(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset())
    chain(saver, one, one).invoke({"xs": []}, config("t"))
    report = saver.flush("t")
    assert report
    assert (report.threads, report.checkpoints, report.waiting, report.error) == (1, 4, 0, None)
    assert report.writes > 0
    assert report.blobs > 0
    again = saver.flush("t")
    assert again
    assert again.checkpoints == 0


async def test_an_asynchronous_flush_of_everything_brings_all_threads(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset())
    threads = [f"t{i}" for i in range(130)]  # more than one batch
    for thread in threads:
        await chain(saver, one).ainvoke({"xs": []}, config(thread), durability="exit")
    report = await saver.aflush()
    assert report
    assert report.threads == len(threads)
    assert all(rows.checkpoints(thread) == 1 for thread in threads)
    await saver.aclose()


def test_a_long_thread_is_flushed_in_several_batches_in_order(make: Any, rows: Rows, postgres_uri: str) -> None:
    """After each commit stock sees no checkpoint without its channels, and none without its parent."""
    saver = make(triggers=frozenset(), batch_records=4)
    put_chain(saver, "t", range(12), big=["x"])
    session = saver._core.flusher._session
    acknowledge, seen = session._acknowledge, []

    def look(*args: Any) -> None:
        seen.append(stock_tuples(postgres_uri))
        acknowledge(*args)

    session._acknowledge = look
    assert saver.flush("t")
    assert rows.checkpoints("t") == 12
    assert len(seen) > 5
    for found in seen:
        steps = range(len(found) - 1, -1, -1)
        assert [t.checkpoint["channel_values"] for t in found] == [{"step": [step], "big": ["x"]} for step in steps]


def test_a_flush_that_cannot_get_the_partition_is_false_and_a_warning(make: Any, rows: Rows) -> None:
    events: list[CheckpointEvent] = []
    saver = make(triggers=frozenset(), postgres_timeout=0.3)
    saver.hooks.add(events.append)
    update_only(saver, "t")
    with rows.conn.transaction():
        rows.conn.execute("SELECT * FROM checkpoint_buffer_partitions FOR UPDATE")
        report = saver.flush("t")
    assert not report
    assert report.error is None
    assert report.waiting > 0
    assert saver.hooks.flush(5)
    (event,) = events
    assert (event.name, event.severity, event.error_type) == ("flush.incomplete", "warning", "checkpoint_flush_error")
    assert (event.thread_id, event.checkpoint_count) == ("t", 1)
    for _ in range(2):
        assert saver.flush("t")
    assert saver.hooks.flush(5)
    assert [(event.name, event.thread_id) for event in events[1:]] == [("flush.recovered", "t")]


def test_a_row_that_postgres_refuses_is_critical_and_holds_up_no_other_thread(make: Any, rows: Rows) -> None:
    events: list[CheckpointEvent] = []
    saver = make(triggers=frozenset())
    saver.hooks.add(events.append)
    rows.conn.execute("ALTER TABLE checkpoints ADD CONSTRAINT no_bad CHECK (thread_id <> 'bad')")
    for thread in ("a", "bad", "c"):
        update_only(saver, thread)
    report = saver.flush()
    assert not report
    assert report.error is not None
    assert report.error.sqlstate == "23514"
    assert report.waiting_threads == ["bad"]
    assert rows.checkpoints("a") == rows.checkpoints("c") == 1
    assert saver.hooks.flush(5)
    (event,) = events
    assert (event.name, event.error_type) == ("dead_letter.added", "checkpoint_dead_letter")
    assert (event.severity, event.thread_id, event.checkpoint_count) == ("critical", "bad", 1)
    assert event.error is not None
    assert "File" in event.error.stack
    # Its records are still there, and readable.
    assert chain(saver, one).get_state(config("bad")).values == {"xs": [7]}
    rows.conn.execute("ALTER TABLE checkpoints DROP CONSTRAINT no_bad")
    assert not saver.flush("bad"), "it waits for somebody to decide"
    (letter,) = saver.dead_letters.replay(thread_id="bad")
    assert letter.resolution == "replayed"
    assert saver.flush("bad")
    assert rows.checkpoints("bad") == 1


def test_an_event_of_a_refused_row_does_not_quote_it(make: Any, rows: Rows) -> None:
    events: list[CheckpointEvent] = []
    saver = make(triggers=frozenset())
    saver.hooks.add(events.append)
    rows.conn.execute("ALTER TABLE checkpoints ADD CONSTRAINT no_bad CHECK (metadata::text NOT LIKE '%hunter2%')")
    graph = chain(saver, one)
    graph.update_state({"configurable": {"thread_id": "t"}, "metadata": {"word": "hunter2"}}, {"xs": [1]})
    report = saver.flush()
    assert report.error is not None
    assert saver.hooks.flush(5)
    assert "hunter2" not in repr(report)
    assert "hunter2" not in repr(events)


# -- several workers ----------------------------------------------------------------------------------------------


def test_two_savers_share_the_work_and_flush_each_record_once(make: Any, rows: Rows) -> None:
    one_saver, other = make(triggers=frozenset()), make(triggers=frozenset())
    for i in range(40):
        update_only(one_saver if i % 2 else other, f"t{i}")
    reports = []
    workers = [threading.Thread(target=lambda s=s: reports.append(s.flush())) for s in (one_saver, other)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(reports)
    assert all(rows.checkpoints(f"t{i}") == 1 for i in range(40))


def test_a_put_between_a_flushs_read_and_its_acknowledgement_is_not_lost(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset())
    update_only(saver, "t")
    session = saver._core.flusher._session
    acknowledge = session._acknowledge

    def late(*args: Any) -> None:
        update_only(saver, "t")  # after the commit, before the acknowledgement
        acknowledge(*args)

    session._acknowledge = late
    try:
        saver.flush("t")
    finally:
        session._acknowledge = acknowledge
    assert saver.flush("t")
    assert rows.checkpoints("t") == 2


def test_a_worker_that_lost_the_lock_race_reads_nothing_older(make: Any, rows: Rows) -> None:
    """The partition is locked before the buffer is read: an older reading never overwrites a newer row."""
    saver = make(triggers=frozenset())
    session = saver._core.flusher._session
    order: list[str] = []
    drain, lock = session.commands.drain, session.locked

    def noting_drain(*args: Any) -> Any:
        order.append("read")
        return drain(*args)

    @contextmanager
    def noting_lock(*args: Any) -> Any:
        with lock(*args) as held:
            order.append("locked")
            yield held
        order.append("committed")

    session.commands.drain, session.locked = noting_drain, noting_lock
    try:
        update_only(saver, "t")
        saver.flush("t")
    finally:
        session.commands.drain, session.locked = drain, lock
    assert order == ["locked", "read", "committed"]


def test_what_was_put_again_is_saved_by_a_worker_that_had_to_wait_for_the_lock(make: Any, rows: Rows) -> None:
    """Had it read before, it would take that for older than what others have saved meanwhile, and drop it."""
    saver, other = (make(triggers=frozenset(), partitions=1, postgres_timeout=20.0) for _ in range(2))
    update_only(saver, "t")
    assert saver.flush("t")
    again = saver.get_tuple(config("t"))
    saver.put(again.config, again.checkpoint, {**again.metadata, "revision": 2}, {})
    drain, waiting = other._core.flusher._session._drain, []

    def with_the_lock(*args: Any) -> None:
        waiting.append(threading.Thread(target=saver.flush, args=("t",)))
        waiting[0].start()
        wait_until(lambda: waits_for_a_lock(rows))
        update_only(other, "u")
        drain(*args)

    other._core.flusher._session._drain = with_the_lock
    assert other.flush("u")
    waiting[0].join()
    other._core.flusher._session._drain = drain
    assert rows.checkpoints("u") == 1
    assert rows.conn.execute("SELECT metadata -> 'revision' FROM checkpoints WHERE thread_id = 't'").fetchone() == (2,)


def waits_for_a_lock(rows: Rows) -> bool:
    row = rows.conn.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchone()
    assert row is not None
    return bool(row[0])


def test_a_saver_with_another_number_of_partitions_is_refused(make: Any) -> None:
    from checkpointer import ConfigurationError

    make(partitions=8)
    with pytest.raises(ConfigurationError, match="divided into 8"):
        make(partitions=16)


def test_isolation_and_commit_settings_are_forced(make: Any, postgres_uri: str, rows: Rows) -> None:
    rows.conn.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); "
        "EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = ''repeatable read''', "
        "current_database()); END $$"
    )
    saver = make(triggers=frozenset())
    session = saver._core.flusher._session
    with session.locked(["t"], 1.0) as (cur, held, *_):
        assert len(held) == 1
        shown = cur.execute(
            "SELECT current_setting('synchronous_commit') AS s, current_setting('transaction_isolation') AS i"
        ).fetchone()
    assert (shown["s"], shown["i"]) == ("on", "read committed")


def test_an_opening_is_on_disk_before_a_put_relies_on_it(make: Any, rows: Rows, prefix: str) -> None:
    make(triggers=frozenset())
    for sql, params in (
        threads.opening(prefix, "t", 0),
        reads.verify(prefix, Address("u", ""), opening_in=0)[:2],
        reads.latest(prefix, Address("v", ""), opening_in=0)[:2],
    ):
        rows.conn.execute("SET synchronous_commit = off")
        with rows.conn.transaction():
            rows.conn.execute(sql.encode(), params)
            shown = rows.conn.execute("SHOW synchronous_commit").fetchone()
        assert shown == ("on",)


def test_a_lost_race_is_soft(make: Any, rows: Rows) -> None:
    saver = make(triggers=frozenset())
    session = saver._core.flusher._session
    with pytest.raises(LockedElsewhereError), session.locked(["t"], 1.0):
        raise psycopg.errors.DeadlockDetected("deadlock detected")
    assert not saver._core.postgres_tier.is_down


def test_unique_thread_ids_do_not_collide_in_the_ledger(make: Any) -> None:
    saver = make(triggers=frozenset())
    names = [uuid4().hex for _ in range(5)]
    for name in names:
        update_only(saver, name)
    assert set(saver._core.ledger.threads()) == set(names)
