"""Each error becomes one row of `system_errors`, whatever is away at the time and whatever it contains."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
from helpers import wait_until
from opentelemetry.sdk.trace import TracerProvider

import observability
from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.hooks import HookContext, Hooks, load_hook
from observability import Observability
from observability.outbox import _BATCH
from observability.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from checkpointer.embedded import Servers

    Rows = Callable[..., list[dict[str, Any]]]


def error(message: str = "the flush failed", **facts: Any) -> CheckpointEvent:
    values: dict[str, Any] = {
        "name": "flush.failed",
        "severity": "critical",
        "error_type": "checkpoint_flush_error",
        "checkpoint_count": 3,
    }
    return CheckpointEvent(message=message, **(values | facts))


def raised() -> BaseException:
    try:
        raise psycopg.OperationalError("connection to postgresql://bob:hunter2@db/app failed")
    except psycopg.Error as exc:
        return exc


def test_an_event_becomes_a_row_with_all_its_facts(target: Observability, context: HookContext, rows: Rows) -> None:
    event = error(
        thread_id="t1",
        run_id="r1",
        checkpoint_ns="ns",
        checkpoint_id="c1",
        step=4,
        attempt=2,
        outcome="lost",
        lost_from_step=4,
        component="flusher",
        operation="flush",
        error=describe_error(psycopg.errors.AdminShutdown("terminating")),
        context={"partition": 7},
    )
    assert target.errors.add(event) == "direct"
    (row,) = rows(context)
    expected = {
        "event_id": event.event_id,
        "error_type": "checkpoint_flush_error",
        "severity": "critical",
        "thread_id": "t1",
        "error_message": "the flush failed",
        "created_at": event.occurred_at,
        "delivery": "direct",
        "occurrences": 1,
        "error_code": "57P01",
        "run_id": "r1",
        "checkpoint_ns": "ns",
        "checkpoint_id": "c1",
        "component": "flusher",
        "operation": "flush",
        "outcome": "lost",
        "resolved_at": None,
    }
    assert {key: row[key] for key in expected} == expected
    assert "AdminShutdown" in row["stack_trace"]
    assert row["recorded_at"] is not None
    assert row["error_context"] == {
        "event": "flush.failed",
        "attempt": 2,
        "checkpoint_count": 3,
        "step": 4,
        "lost_from_step": 4,
        "exception_type": "psycopg.errors.AdminShutdown",
        "exception_message": "terminating",
        "sqlstate": "57P01",
        "partition": 7,
    }


def test_a_row_written_while_postgres_is_away_waits_in_redis_and_arrives_once(
    own_servers: Servers, own_context: HookContext, own_target: Observability, rows: Rows, spool_dir: Path
) -> None:
    assert own_target.errors.add(error("before")) == "direct"
    own_servers.postgres.kill()
    during = [error(f"during {n}") for n in range(5)]
    assert [own_target.errors.add(event) for event in during] == ["redis"] * 5
    assert not list(spool_dir.glob("*.sqlite3"))
    own_servers.postgres.start()
    found = wait_until(lambda: len(rows(own_context)) >= 6 and rows(own_context))
    assert [row["error_message"] for row in found] == ["before", *(e.message for e in during)]
    assert [row["delivery"] for row in found] == ["direct", *["redis"] * 5]
    with own_context.connect_redis() as client:
        wait_until(lambda: client.xlen(f"{own_context.prefix}:ev:errors") == 0)
    assert wait_until(lambda: own_target.errors.add(error("after")) == "direct")


def test_closing_tries_a_server_once_more_that_has_just_come_back(
    own_servers: Servers, own_context: HookContext, rows: Rows
) -> None:
    made = Observability(own_context)
    own_servers.postgres.kill()
    assert made.errors.add(error("during")) == "redis"
    own_servers.postgres.start()
    made._postgres._retry_at = time.monotonic() + 60  # a long outage has made it wait long
    made.close(10)
    assert [row["error_message"] for row in rows(own_context)] == ["during"]


def test_with_both_servers_away_rows_wait_in_a_private_file(
    own_servers: Servers, own_context: HookContext, own_target: Observability, rows: Rows, spool_dir: Path
) -> None:
    own_servers.postgres.kill()
    own_servers.valkey.kill()
    during = [error(f"during {n}") for n in range(3)]
    assert [own_target.errors.add(event) for event in during] == ["spool"] * 3
    assert own_target.spool.path.parent == spool_dir
    for path in spool_dir.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    own_servers.valkey.start()
    own_servers.postgres.start()
    found = wait_until(lambda: len(rows(own_context)) >= 3 and rows(own_context))
    assert [row["error_message"] for row in found] == [event.message for event in during]
    assert {row["delivery"] for row in found} == {"spool"}
    wait_until(lambda: not own_target.spool.read(("system_errors",), 10))


def test_rows_in_the_file_arrive_although_redis_stays_away(
    own_servers: Servers, own_context: HookContext, own_target: Observability, rows: Rows
) -> None:
    own_servers.valkey.kill()
    own_servers.postgres.kill()
    assert own_target.errors.add(error()) == "spool"
    own_servers.postgres.start()
    assert wait_until(lambda: rows(own_context))[0]["delivery"] == "spool"


def test_a_stopped_postgres_holds_a_row_up_for_seconds_only(
    own_servers: Servers, own_context: HookContext, own_target: Observability, rows: Rows
) -> None:
    own_target.errors.add(error("before"))
    own_servers.postgres.pause()
    begun = time.monotonic()
    try:
        assert own_target.errors.add(error("during")) == "redis"
        assert time.monotonic() - begun < 12
    finally:
        own_servers.postgres.resume()
    wait_until(lambda: {row["error_message"] for row in rows(own_context)} == {"before", "during"})


def test_a_row_that_is_delivered_twice_is_stored_once(target: Observability, context: HookContext, rows: Rows) -> None:
    event = error()
    target.errors.add(event)
    target.errors.add(event)
    assert len(rows(context)) == 1


def test_rows_wait_while_the_tables_are_missing(postgres_uri: str, context: HookContext, rows: Rows) -> None:
    with psycopg.connect(postgres_uri, autocommit=True) as connection:
        connection.execute("ALTER TABLE system_errors RENAME TO elsewhere")
        target = Observability(context)
        try:
            assert target.errors.add(error()) == "redis"
            connection.execute("ALTER TABLE elsewhere RENAME TO system_errors")
            assert wait_until(lambda: rows(context))[0]["delivery"] == "redis"
        finally:
            target.close(5)


PROGRAM = """
import os, sys, signal
import psycopg, redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import HookContext
from observability import Observability
def away():
    raise psycopg.OperationalError("away")
def redis_away():
    return redis.Redis(port=1, retry=Retry(NoBackoff(), 0))
target = Observability(HookContext(away, redis_away, "unused", sys.argv[1]))
for n in range(int(sys.argv[2])):
    event = CheckpointEvent(
        name="flush.failed", severity="critical", error_type="e", message=f"row {n}", thread_id=f"t{n}"
    )
    assert target.errors.add(event) == "spool"
print("spooled", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_in_its_file_is_delivered_by_the_next(
    context: HookContext, rows: Rows, spool_dir: Path
) -> None:
    count = _BATCH + 10
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, context.identity, str(count)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "spooled\n", done.stderr
    hook: Any = load_hook("system_errors", context)
    try:
        found = wait_until(lambda: len(rows(context)) >= count and rows(context))
        assert [row["error_message"] for row in found] == [f"row {n}" for n in range(count)]
    finally:
        hook.close()
        hook.close()


def test_several_processes_share_one_file(context: HookContext, rows: Rows, spool_dir: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, context.identity, "20"], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == [b"spooled\n"] * 3
    targets = [Observability(context) for _ in range(2)]
    for target in targets:
        target.errors.collect_leftovers()
    wait_until(lambda: len(rows(context)) == 60)
    for target in targets:
        target.close(5)
    assert len(rows(context)) == 60


def test_the_file_is_bounded_and_then_standard_error_is_used(
    spool_dir: Path, prefix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def away() -> Any:
        raise psycopg.OperationalError("away")

    def redis_away() -> Any:
        raise ConnectionError("away")

    target = Observability(HookContext(away, redis_away, prefix, f"full-{prefix}"))
    target.spool._max_pages = 10
    try:
        ways = [target.errors.add(error("x" * 3_000 + f" row {n}", thread_id=f"t{n}")) for n in range(20)]
        assert ways == sorted(ways)
        assert set(ways) == {"spool", "stderr"}
        assert "row 19" in capfd.readouterr().err
    finally:
        target.close(5)


def test_a_new_file_takes_rows_while_another_process_looks_into_it(
    spool_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, others = os.link, []

    def link_and_look(draft: Path, path: Path) -> None:
        link(draft, path)
        other = sqlite3.connect(path)
        other.execute("BEGIN")
        other.execute("SELECT * FROM sqlite_master").fetchall()
        others.append(other)

    monkeypatch.setattr(os, "link", link_and_look)
    spool = Spool("new")
    spool.append("system_errors", ['{"a": 1}'])
    (other,) = others
    other.close()
    assert [text for _, _, text in spool.read(("system_errors",), 10)] == ['{"a": 1}']


def test_a_file_that_a_power_failure_has_left_empty_takes_rows(spool_dir: Path) -> None:
    spool = Spool("empty")
    spool_dir.mkdir()
    spool.path.touch()
    assert spool.count() == 0
    spool.append("system_errors", ['{"a": 1}'])
    assert [text for _, _, text in spool.read(("system_errors",), 10)] == ['{"a": 1}']


def test_a_damaged_file_is_set_aside(spool_dir: Path) -> None:
    spool = Spool("damaged")
    spool.append("system_errors", ["{}"])
    spool.path.write_bytes(b"this is no database" * 1000)
    spool.append("system_errors", ['{"a": 1}'])
    assert [text for _, _, text in spool.read(("system_errors",), 10)] == ['{"a": 1}']
    assert spool.path.with_suffix(".damaged").exists()


def test_a_full_stream_gives_way_to_the_file_and_nothing_is_trimmed(
    own_servers: Servers, own_context: HookContext, own_target: Observability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("observability.outbox._STREAM_ROWS", 3)
    own_servers.postgres.kill()
    assert [own_target.errors.add(error()) for _ in range(5)] == ["redis"] * 3 + ["spool"] * 2
    own_servers.postgres.start()


def test_rows_that_cannot_be_read_or_stored_do_not_block_others(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    good = {"event_id": "00000000-0000-7000-8000-00000000000%d", "error_type": "e", "severity": "error"}
    entries = [
        b"no json",
        b"[1]",
        b'{"event_id": "no uuid"}',
        json.dumps({**good, "event_id": good["event_id"] % 1, "error_message": "good 1", "occurrences": 1}).encode(),
        json.dumps({**good, "event_id": good["event_id"] % 2, "error_message": "nul \0", "occurrences": 1}).encode(),
        json.dumps({**good, "event_id": good["event_id"] % 3, "error_context": math.nan}).encode(),
        json.dumps({**good, "event_id": good["event_id"] % 4, "error_message": "\ud800", "occurrences": 1}).encode(),
        json.dumps({**good, "event_id": good["event_id"] % 5, "error_message": "good 2", "occurrences": 1}).encode(),
        b"\xff\xfe",
    ]
    with context.connect_redis() as client:
        for entry in entries:
            client.xadd(f"{context.prefix}:ev:errors", {b"row": entry})
        client.xadd(f"{context.prefix}:ev:errors", {b"something": b"else"})
        target.spool.append("system_errors", ["neither json"])
        target.errors.collect_leftovers()
        wait_until(lambda: client.xlen(f"{context.prefix}:ev:errors") == 0)
    found = wait_until(lambda: len(rows(context)) == 11 and rows(context))
    messages = [row["error_message"] for row in found]
    assert {"good 1", "good 2"} <= set(messages)
    replaced = [row for row in found if row["error_type"] == "system_error_unreadable"]
    assert len(replaced) == 9
    assert all(row["created_at"] for row in found if row in replaced)


NASTY = {
    "nul": "a\0b",
    "nul\0key": 1,
    "surrogate": "\ud800",
    "nan": [math.nan, {"deep": -math.inf}],
    "set": {1},
    "bytes": b"\0\xff",
    "huge": 1 << 100_000,
    3: "int key",
    "object": object(),
    "deep": [[[[[[[[[[[[1]]]]]]]]]]]],
}


def test_values_that_postgres_refuses_are_stored_all_the_same(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    event = error(
        "nul \0 and \ud800",
        thread_id="t\0\udfff",
        error=describe_error(ValueError("nul \0 and \ud800")),
        context=NASTY,
    )
    assert target.errors.add(event) == "direct"
    (row,) = rows(context)
    assert row["error_type"] == "checkpoint_flush_error"
    assert row["error_context"]["nan"] == [None, {"deep": None}]
    assert row["error_context"]["set"] == [1]
    assert row["error_context"]["bytes"] == "<2 bytes>"
    assert row["error_context"]["checkpoint_count"] == 3


def test_texts_of_any_length_are_stored(target: Observability, context: HookContext, rows: Rows) -> None:
    # Random text does not compress, and an index entry takes some 2,700 bytes.
    long = "".join(chr(0x4E00 + b) for b in os.urandom(20_000))
    assert target.errors.add(error(long, thread_id=long, error_type=long, context={"a": [long] * 90})) == "direct"
    assert rows(context)[0]["error_type"] != "system_error_unreadable"


SECRETS = {
    "password": "hunter2",
    "OPENAI_API_KEY": "hunter2",
    "headers": {"Authorization": "Bearer hunter2hunter2", "Set-Cookie": "hunter2"},
    "nested": [{"db_password": {"value": "hunter2"}}],
    "uri": "postgresql://bob:hunter2@db.internal/app",
    "redis": "rediss://:hunter2@cache:6379/0",
    "odd": "postgresql://bob:hun@ter2@db/app",
    "conninfo": "host=db user=bob password=hunter2 dbname=app",
    "quoted": "password='hunter2 hunter2' dbname=app",
    "json": '{"secret_token": "hunter2"}',
    "said": "Authorization: Bearer hunter2hunter2",
    "bearer": "got 401 for bearer hunter2hunter2.x",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJodW50ZXIyIjoxfQ.hunter2hunter2",
}


def test_secrets_reach_no_column(target: Observability, context: HookContext, rows: Rows) -> None:
    text = " | ".join(str(value) for key, value in SECRETS.items() if key not in ("password", "OPENAI_API_KEY"))
    try:
        raise ValueError(text) from raised()
    except ValueError as exc:
        info = describe_error(exc)
    target.errors.add(error(text, context={**SECRETS, "prompt_tokens": 5}, error=info))
    (row,) = rows(context)
    everything = json.dumps(row, default=str)
    assert "hunter2" not in everything
    assert "ter2@db" not in everything
    assert row["error_context"]["prompt_tokens"] == 5
    assert "db.internal/app" in row["error_context"]["uri"]


def test_the_application_reports_errors_of_its_own(target: Observability, context: HookContext, rows: Rows) -> None:
    async def report() -> None:
        await observability.log_system_error(
            error_type="redis_connection_error",
            severity="critical",
            error_message="no connection",
            thread_id="t",
            error_context={"host": "cache"},
            exc=raised(),
            observability=target,
        )

    asyncio.run(report())
    observability.log_system_error_sync(
        error_type="mine", severity="info", error_message="second", observability=target
    )
    assert target.flush(10)
    first, second = rows(context)
    assert first["error_type"] == "redis_connection_error"
    assert first["error_context"]["host"] == "cache"
    assert first["error_context"]["exception_type"] == "psycopg.OperationalError"
    assert "raised" in first["stack_trace"]
    assert second["error_message"] == "second"
    assert second["error_context"]["event"] == "application.error"


class Reporter(logging.Handler):
    """An application's handler that files whatever is logged as an error, what the store itself says included."""

    def __init__(self, target: Observability) -> None:
        super().__init__()
        self.target = target
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        observability.log_system_error_sync(
            error_type="logged", severity="critical", error_message=record.getMessage(), observability=self.target
        )


def test_what_the_store_says_of_its_own_errors_is_not_stored_and_leads_to_no_others(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def away() -> Any:
        raise psycopg.OperationalError("away")

    def redis_away() -> Any:
        raise ConnectionError("away")

    # A folder that cannot be made: each row that comes here is logged with an exception.
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHECKPOINTER_SPOOL_DIR", str(tmp_path / "file" / "spool"))
    target = Observability(HookContext(away, redis_away, prefix, f"loop-{prefix}"))
    reporter = Reporter(target)
    logging.getLogger("checkpointer.observability").addHandler(reporter)
    try:
        observability.log_system_error_sync(
            error_type="first", severity="critical", error_message="m", observability=target
        )
        for _ in range(3):
            assert target.flush(10)
        assert reporter.count > 0
        # Also what is stored by the thread that folds.
        for _ in range(50):
            target.errors.add(error(severity="error"))
        target.errors.flush()
        assert target.flush(10)
        assert target._queue.stats()["observability"].delivered == 1
    finally:
        logging.getLogger("checkpointer.observability").removeHandler(reporter)
        target.close(5)
    stored = [json.loads(line.partition(": ")[2]) for line in capfd.readouterr().err.splitlines() if "event_id" in line]
    assert sum(row["occurrences"] for row in stored) == 51
    assert "logged" not in {row["error_type"] for row in stored}


def test_an_error_has_the_trace_in_which_it_happened(
    target: Observability, context: HookContext, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TracerProvider().get_tracer("tests").start_as_current_span("a node") as span:
        target.errors.add(error("in a span"))
    target.errors.add(error("in none"))
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace())  # type: ignore[arg-type]
    target.errors.add(error("while it is imported"))
    assert [row["trace_id"] for row in rows(context)] == [
        f"{span.get_span_context().trace_id:032x}",
        None,
        None,
    ]


def test_reporting_does_not_wait_for_a_server_that_hangs(prefix: str, spool_dir: Path) -> None:
    gate = threading.Event()

    def hang() -> Any:
        gate.wait(20)
        raise psycopg.OperationalError("away")

    target = Observability(HookContext(hang, hang, prefix, f"hang-{prefix}"))
    begun = time.monotonic()
    for _ in range(50):
        observability.log_system_error_sync(error_type="e", severity="error", error_message="m", observability=target)
        observability.emit_log("line", thread_id="t", observability=target)
    assert time.monotonic() - begun < 1
    gate.set()
    assert target.flush(10)
    target.close(5)


def test_the_innermost_open_saver_is_the_target(
    context: HookContext, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise psycopg.OperationalError("away")

    monkeypatch.delenv("POSTGRES_URI", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    outer, inner = Hooks(), Hooks()
    outer.add(load_hook("system_errors", HookContext(away, away, "outer", f"outer-{context.prefix}")))
    for name in ("thread_log", "run_events", "system_errors"):
        inner.add(load_hook(name, context), name=name)
    observability.log_system_error_sync(error_type="e", severity="error", error_message="inner")
    assert observability.target.current().flush(10)
    assert [row["error_message"] for row in rows(context)] == ["inner"]
    inner.close(5)
    outer_target = observability.target.current()
    observability.log_system_error_sync(error_type="e", severity="error", error_message="outer")
    assert outer_target.flush(10)
    assert len(outer_target.spool.read(("system_errors",), 10)) == 1
    outer.close(5)
    assert observability.target.current() not in (outer_target,)
    assert len(rows(context)) == 1


def test_without_a_saver_the_environment_names_the_target(
    context: HookContext, migrated_uri: str, redis_url: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URI", migrated_uri)
    monkeypatch.setenv("REDIS_URL", redis_url)
    observability.log_system_error_sync(error_type="e", severity="error", error_message="from anywhere")
    target = observability.target.current()
    assert target.flush(10)
    assert [row["error_message"] for row in rows(context)] == ["from anywhere"]
    target.close(5)


def test_without_any_target_an_error_is_kept_and_said(
    spool_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("POSTGRES_URI", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr("observability.target._registry", None)
    observability.log_system_error_sync(error_type="e", severity="error", error_message="kept")
    target = observability.target.current()
    assert target.flush(10)
    with sqlite3.connect(target.spool.path) as database:
        assert "kept" in database.execute("SELECT row FROM spool").fetchone()[0]
    said = capfd.readouterr().err
    assert "POSTGRES_URI is not set" in said
    assert str(target.spool.path) in said
    target.close(5)


def test_only_errors_of_rank_warning_and_above_become_rows(context: HookContext, rows: Rows) -> None:
    hooks = Hooks()
    hooks.add(load_hook("system_errors", context))
    hooks.emit(error("info", severity="info"))
    hooks.emit(error("no error", error_type=None))
    for severity in ("warning", "error", "critical"):
        hooks.emit(error(severity, severity=severity))
    assert hooks.flush(10)
    hooks.close(5)
    assert [row["error_message"] for row in rows(context)] == ["warning", "error", "critical"]


def backend(target: Observability) -> int:
    return target._postgres.run(lambda connection: connection.info.backend_pid)


def test_a_forked_child_stores_errors_with_connections_of_its_own(
    target: Observability, context: HookContext, rows: Rows
) -> None:
    target.errors.add(error("parent before"))
    observability.log_system_error_sync(
        error_type="e", severity="error", error_message="parent queued", observability=target
    )
    assert target.flush(10)
    parents_backend = backend(target)
    child = os.fork()
    if child == 0:
        own = backend(target) != parents_backend
        way = target.errors.add(error("child"))
        observability.log_system_error_sync(
            error_type="e", severity="error", error_message="child queued", observability=target
        )
        os._exit(0 if target.flush(10) and way == "direct" and own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert target.errors.add(error("parent after")) == "direct"
    assert [row["error_message"] for row in rows(context)] == [
        "parent before",
        "parent queued",
        "child",
        "child queued",
        "parent after",
    ]


def test_closing_twice_leaves_no_thread(context: HookContext) -> None:
    target = Observability(context)
    target.errors.add(error())
    target.errors.collect_leftovers()
    target.close(5)
    target.close(5)
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith("checkpointer-drainer")]
