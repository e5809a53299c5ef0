"""Failures of every kind, produced on real servers through the public API.

A *failure* is a function that makes something go wrong in a scene. Not here: the scenes (`scenes.py`), the document
that is made of some of them (`failure_guide.py`) and the claims about all of them (`test_failure_guide.py`).
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict
from unittest.mock import patch

import redis
from command_line import command
from helpers import wait_until
from langgraph.graph import END, START, StateGraph
from poisoning import allow, forbid, put_steps
from savers import config, make_checkpoint, put, put_chain
from scenes import OTHER, THREAD

import observability
from checkpointer import (
    AcknowledgementError,
    BufferedPostgresSaver,
    BufferUnavailableError,
    CheckpointEvent,
    CheckpointLostError,
    ClosedError,
    ConfigurationError,
    FlushIncompleteError,
    InvalidConfigError,
    MigrationError,
    NonFiniteValueError,
    NotSetUpError,
    StoreUnavailableError,
    UnknownDeadLetterError,
    UnserializableValueError,
    UnsupportedServerError,
    WrongLoopError,
    hooks,
)
from checkpointer.worker import Worker
from observability import spool
from observability.alerts import Alerts, Webhook

if TYPE_CHECKING:
    from collections.abc import Callable

    from scenes import Scene

# -- values ----------------------------------------------------------------------------------------------------------


class Review(TypedDict):
    score: Any


def review(saver: BufferedPostgresSaver, score: Any) -> None:
    """Run a graph whose node returns a value."""
    builder = StateGraph(Review)
    builder.add_node("review", lambda state: {"score": score})
    builder.add_edge(START, "review")
    builder.add_edge("review", END)
    builder.compile(checkpointer=saver).invoke({"score": 0.0}, config(THREAD))


def a_nan_is_replaced(here: Scene) -> None:
    saver = here.saver()
    review(saver, float("nan"))
    assert saver.get_tuple(config(THREAD)).checkpoint["channel_values"]["score"] is None


def a_nan_is_refused(here: Scene) -> None:
    saver = here.saver(non_finite="raise")
    with here.raises(NonFiniteValueError):
        review(saver, float("nan"))


def a_value_cannot_be_serialised(here: Scene) -> None:
    saver = here.saver()
    with here.raises(UnserializableValueError):
        review(saver, threading.Lock())


# -- Redis -----------------------------------------------------------------------------------------------------------


def redis_is_away(here: Scene) -> None:
    saver = here.saver()
    parent = put(saver, OTHER, 0)
    here.servers.valkey.kill()
    put_chain(saver, THREAD, range(3))
    with here.raises(BufferUnavailableError):
        saver.get_tuple(parent)
    here.servers.valkey.start()
    here.wait_for_server("redis")
    here.wait_for_resolution("backend.down")


def redis_is_full(here: Scene) -> None:
    saver = here.saver()
    with redis.Redis.from_url(here.redis_url) as client:
        client.config_set("maxmemory", "1")
        try:
            put(saver, THREAD, 0)
        finally:
            client.config_set("maxmemory", "0")
    here.wait_for_server("redis")


def redis_has_forgotten(here: Scene) -> None:
    saver = here.saver()
    parent = put(saver, THREAD, 0)
    assert saver.flush()
    parent = put(saver, THREAD, 2, put(saver, THREAD, 1, parent))
    with redis.Redis.from_url(here.redis_url) as client:
        client.flushall()
    put(saver, THREAD, 3, parent)
    (lost,) = wait_until(lambda: here.named("checkpoint.lost"))
    assert lost.context["steps"] == [1, 2]


def a_redis_is_given_up(here: Scene) -> None:
    saver = here.saver()
    put(saver, THREAD, 0)
    here.servers.valkey.kill()
    done = command("buffer", "abandon", "--yes", "--prefix", here.prefix, POSTGRES_URI=here.postgres_uri)
    assert done.out.splitlines() == [THREAD, "1 threads were given up."], done
    here.servers.valkey.start()


def the_buffer_is_high(here: Scene) -> None:
    saver = here.saver(high_water_bytes=40_000, triggers={"age"}, flush_age=0.2)
    put(saver, THREAD, 0, big=["x" * 12_000])
    here.wait_for("buffer.normal")
    here.wait_for_resolution("buffer.high")


def redis_confirms_nothing(here: Scene) -> None:
    here.saver()
    with here.raises(UnsupportedServerError):
        here.saver(ack="replicated", redis_timeout=0.5)
    put(here.latest, THREAD, 0)


def a_server_is_unsafe(here: Scene) -> None:
    with redis.Redis.from_url(here.redis_url) as client:
        (before,) = client.config_get("appendonly").values()
        client.config_set("appendonly", "no")
        try:
            here.saver()
        finally:
            client.config_set("appendonly", before)
    here.wait_for("server.unsafe")


# -- Postgres --------------------------------------------------------------------------------------------------------


def postgres_is_away(here: Scene) -> None:
    saver = here.saver()
    put(saver, THREAD, 0)
    here.servers.postgres.kill()
    for _ in range(3):
        assert not saver.flush()
    with here.raises(StoreUnavailableError):
        saver.get_tuple(config(OTHER))
    here.servers.postgres.start()
    wait_until(saver.flush)
    here.wait_for_server("postgres")
    here.wait_for_resolution("backend.down", "flush.failed")


def a_read_is_not_verified(here: Scene) -> None:
    saver = here.saver(on_unverifiable="serve")
    here.servers.postgres.kill()
    for _ in range(3):
        assert saver.get_tuple(config(THREAD)) is None
    here.servers.postgres.start()
    here.wait_for_server("postgres")


def both_are_away(here: Scene) -> None:
    saver = here.saver()
    parent = put(saver, THREAD, 0)
    before = _spooled()
    here.servers.valkey.kill()
    here.servers.postgres.kill()
    with here.raises(CheckpointLostError):
        put(saver, THREAD, 1, parent)
    wait_until(lambda: _spooled() > before, message="the error waits in the spool")
    here.servers.valkey.start()
    here.servers.postgres.start()
    here.wait_for_server("redis")
    here.wait_for_server("postgres")
    row = here.wait_for_row("put.failed")
    assert (row["delivery"], row["recorded_at"] > row["created_at"]) == ("spool", True)
    here.wait_for_resolution("backend.down")


def _spooled() -> int:
    return sum(rows or 0 for rows in spool.backlog().values())


def postgres_refuses_a_row(here: Scene) -> None:
    saver = here.saver()
    with here.postgres() as conn:
        forbid(conn)
        put_steps(saver, THREAD, 3, {1: "checkpoint"})
        assert not saver.flush()
        with here.raises(FlushIncompleteError):
            list(saver.list(config(THREAD)))
        allow(conn)
    (done,) = saver.dead_letters.replay()
    assert done.resolution == "replayed"
    assert saver.flush()
    here.wait_for_resolution("dead_letter.added")


def a_dead_letter_is_dropped(here: Scene) -> None:
    saver = here.saver()
    with here.postgres() as conn:
        forbid(conn)
        put_steps(saver, THREAD, 3, {1: "checkpoint"})
        assert not saver.flush()
    (letter,) = saver.dead_letters.list()
    assert saver.dead_letters.drop(letter.id).resolution == "dropped"


def another_worker_holds_the_partition(here: Scene) -> None:
    saver = here.saver(postgres_timeout=0.3)
    put(saver, THREAD, 0)
    with here.locked_partitions():
        assert not saver.flush(THREAD)
    assert saver.flush(THREAD)


def a_put_is_not_acknowledged(here: Scene) -> None:
    saver = here.saver(postgres_timeout=0.3)
    checkpoint, metadata, new = make_checkpoint(0)
    with here.locked_partitions(), here.raises(AcknowledgementError):
        saver.put(config(THREAD, ack="flushed"), checkpoint, metadata, new)
    assert saver.flush()


def a_flush_loses_its_locks(here: Scene) -> None:
    saver = here.saver()
    with here.postgres() as conn:
        # What the server says when it ends a transaction that has stood still; here it says so at once.
        forbid(conn, "25P03")
        put_steps(saver, THREAD, 1, {0: "checkpoint"})
        assert not saver.flush()
        allow(conn)
    assert saver.flush()


# -- processes -------------------------------------------------------------------------------------------------------


def a_process_has_ended_too_early(here: Scene) -> None:
    saver = here.saver()
    put(saver, THREAD, 0)
    saver.close()
    here.saver(triggers={"start"})
    here.wait_for("recovery.found")


def a_worker_has_no_time_left(here: Scene) -> None:
    saver = here.saver(postgres_timeout=0.3)
    put(saver, THREAD, 0)
    worker = Worker(
        here.postgres_uri,
        here.redis_url,
        prefix=here.prefix,
        concurrency=1,
        drain_timeout=0.1,
        postgres_timeout=0.3,
        flush_age=60,
    )
    with here.locked_partitions(), worker:
        pass
    here.wait_for_row("worker.not_drained")


def a_thread_is_deleted_while_it_runs(here: Scene) -> None:
    saver = here.saver()
    parent = put(saver, THREAD, 0)
    saver.delete_thread(THREAD)
    put(saver, THREAD, 1, parent)


# -- hooks and alerts ------------------------------------------------------------------------------------------------


def note(severity: Any = "info") -> CheckpointEvent:
    return CheckpointEvent(name="application.note", severity=severity, message="Something to tell.")


def a_hook_fails(here: Scene) -> None:
    saver = here.saver()
    works = threading.Event()

    def webhook(event: CheckpointEvent) -> None:
        if not works.is_set():
            raise ConnectionError("no route to the webhook")

    saver.hooks.add(webhook)
    for _ in range(5):
        saver.hooks.emit(note())
    here.wait_for("hook.failing")
    works.set()
    # What it is given after its rest: criticals at once.
    saver.hooks.emit(note("critical"))
    here.wait_for("hook.recovered")


def a_hook_is_too_slow(here: Scene) -> None:
    saver = here.saver(hooks=("console", "thread_log", "run_events", "system_errors"))
    gate = threading.Event()
    saver.hooks.add(lambda _: gate.wait(), name="webhook")

    def is_full() -> bool:
        for _ in range(200):
            saver.hooks.emit(note())
        return saver.hooks.stats()["webhook"].dropped_full > 0

    wait_until(is_full)
    gate.set()
    here.wait_for("hook.dropped")


def a_hook_does_not_come_back(here: Scene) -> None:
    saver = here.saver()
    gate = threading.Event()
    with patch.object(hooks, "_DEADLINE", 0.05):
        saver.hooks.add(lambda _: gate.wait(), name="webhook")

        def is_told() -> bool:
            saver.hooks.emit(note())
            return bool(here.named("hook.stuck"))

        wait_until(is_told)
        gate.set()
        here.wait_for("hook.recovered")


def an_alert_cannot_be_sent(here: Scene) -> None:
    saver = here.saver()
    # Port 9 is for discarding, and nobody listens there.
    channel = Webhook("http://127.0.0.1:9/", timeout=1.0)
    alerts = Alerts(here.postgres_uri, [channel], interval=0.1, digest_hour=0, emit=saver.hooks.emit)
    saver.hooks.add(alerts)
    here.wait_for("alert.failed")
    alerts.close()


def the_application_reports_an_error(here: Scene) -> None:
    here.saver()
    observability.log_system_error_sync(
        error_type="payment_error", severity="error", error_message="The payment service did not answer."
    )
    here.wait_for_row("application.error")


def a_resolved_error_happens_again(here: Scene) -> None:
    saver = here.saver()
    review(saver, float("nan"))
    number = here.wait_for_row("put.sanitized")["id"]
    done = command(
        "errors", "resolve", number, "--notes", "The mean of nothing is 0 now.", POSTGRES_URI=here.postgres_uri
    )
    assert done.code == 0, done
    review(saver, float("nan"))
    here.wait_for("error.regressed")


# -- wrong use -------------------------------------------------------------------------------------------------------


def the_saver_is_used_wrongly(here: Scene) -> None:
    with here.raises(ConfigurationError):
        here.bare_saver(flush_age=-1)
    saver = here.bare_saver()
    with here.raises(NotSetUpError):
        put(saver, THREAD, 0)
    saver.setup()
    with here.raises(InvalidConfigError):
        saver.get_tuple({"configurable": {}})
    with here.raises(UnknownDeadLetterError):
        saver.dead_letters.replay(17)

    async def close_in_the_loop() -> None:
        await saver.aget_tuple(config(THREAD))
        with here.raises(WrongLoopError):
            saver.close()
        await saver.aclose()

    asyncio.run(close_in_the_loop())
    with here.raises(ClosedError):
        put(saver, THREAD, 0)
    with here.postgres() as conn:
        conn.execute("UPDATE checkpointer_migrations SET checksum = 'another'")
    with here.raises(MigrationError):
        here.saver()


@dataclass(frozen=True)
class Failure:
    """Something that goes wrong.

    Attributes:
        name: Its name.
        produce: Makes it go wrong, in a scene.
        shows: The events and exceptions in the document that it is the proof of.
    """

    name: str
    produce: Callable[[Scene], None]
    shows: frozenset[str]


def _failure(name: str, produce: Callable[[Scene], None], *shows: str) -> Failure:
    return Failure(name, produce, frozenset(shows))


FAILURES = (
    _failure("nan-replaced", a_nan_is_replaced, "put.sanitized"),
    _failure("nan-refused", a_nan_is_refused, "put.refused", "NonFiniteValueError"),
    _failure("unserialisable", a_value_cannot_be_serialised, "put.refused", "UnserializableValueError"),
    _failure("redis-away", redis_is_away, "put.around", "backend.down", "backend.up", "BufferUnavailableError"),
    _failure("redis-full", redis_is_full, "put.around"),
    _failure("redis-forgot", redis_has_forgotten, "checkpoint.lost"),
    _failure("redis-given-up", a_redis_is_given_up, "buffer.abandoned"),
    _failure("buffer-high", the_buffer_is_high, "buffer.high", "buffer.normal"),
    _failure("unconfirmed", redis_confirms_nothing, "put.unconfirmed", "UnsupportedServerError"),
    _failure("unsafe", a_server_is_unsafe, "server.unsafe"),
    _failure(
        "postgres-away",
        postgres_is_away,
        "backend.down",
        "flush.failed",
        "flush.recovered",
        "backend.up",
        "StoreUnavailableError",
    ),
    _failure("unverified", a_read_is_not_verified, "read.unverified"),
    _failure("both-away", both_are_away, "put.failed", "CheckpointLostError"),
    _failure(
        "row-refused", postgres_refuses_a_row, "dead_letter.added", "dead_letter.replayed", "FlushIncompleteError"
    ),
    _failure("letter-dropped", a_dead_letter_is_dropped, "dead_letter.dropped"),
    _failure("partition-held", another_worker_holds_the_partition, "flush.incomplete"),
    _failure("unacknowledged", a_put_is_not_acknowledged, "put.unacknowledged", "AcknowledgementError"),
    _failure("locks-lost", a_flush_loses_its_locks, "flush.lock_lost"),
    _failure("ended-early", a_process_has_ended_too_early, "recovery.found"),
    _failure("not-drained", a_worker_has_no_time_left, "worker.not_drained"),
    _failure("deleted", a_thread_is_deleted_while_it_runs, "put.late"),
    _failure("hook-fails", a_hook_fails, "hook.failing", "hook.recovered"),
    _failure("hook-slow", a_hook_is_too_slow, "hook.dropped"),
    _failure("hook-stuck", a_hook_does_not_come_back, "hook.stuck"),
    _failure("alert-failed", an_alert_cannot_be_sent, "alert.failed"),
    _failure("application", the_application_reports_an_error, "application.error"),
    _failure("regressed", a_resolved_error_happens_again, "error.regressed"),
    _failure(
        "wrong-use",
        the_saver_is_used_wrongly,
        "ConfigurationError",
        "NotSetUpError",
        "InvalidConfigError",
        "UnknownDeadLetterError",
        "WrongLoopError",
        "ClosedError",
        "MigrationError",
    ),
)
