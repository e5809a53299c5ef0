"""Secrets that stand in a state, an address or an exception come out nowhere: no event, row, log, metric or frame."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
from helpers import put_one, wait_until
from langgraph.checkpoint.base import empty_checkpoint

import observability
from checkpointer import BufferedPostgresSaver, UnserializableValueError
from observability.api import Streams, create_app

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import psycopg
    from conftest import Served
    from fastapi import FastAPI

    from checkpointer import CheckpointEvent

    Connection = psycopg.Connection[Any]

ERRORS = "/admin/system-errors"
IN_STATE, IN_URI, IN_EXCEPTION, IN_CONTEXT = (
    f"hunter2-in-{place}" for place in ("state", "uri", "exception", "context")
)
TABLES = ("system_errors", "system_error_groups", "system_error_hourly", "system_error_audit", "thread_logs")


class Opaque:
    """Nothing that a serializer takes, and it shows what it holds."""

    def __repr__(self) -> str:
        return IN_STATE


def with_password(uri: str) -> str:
    parts = urlsplit(uri)
    user = parts.username or ""
    return urlunsplit(parts._replace(netloc=f"{user}:{IN_URI}@{parts.hostname}:{parts.port}"))


def fail_in_every_way(saver: BufferedPostgresSaver, cut_off: BufferedPostgresSaver, conn: Connection) -> None:
    """A flush is refused, a value cannot be stored, a server is away, and the application reports its own."""
    put_one(saver, "t", IN_STATE)
    conn.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'refused' USING DETAIL = to_jsonb(NEW)::text, HINT = to_jsonb(NEW)::text; END $$"
    )
    for table in ("checkpoints", "checkpoint_blobs"):
        conn.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()".encode())
    assert not saver.flush("t")
    for table in ("checkpoints", "checkpoint_blobs"):
        conn.execute(f"DROP TRIGGER refuse ON {table}".encode())
    checkpoint = empty_checkpoint() | {"channel_values": {"a": [IN_STATE, Opaque()]}, "channel_versions": {"a": "1"}}
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    with pytest.raises(UnserializableValueError):
        saver.put(config, checkpoint, {}, {"a": "1"})  # type: ignore[arg-type]
    put_one(cut_off, "t", IN_STATE)
    try:
        raise ConnectionError(f"cannot reach {with_password('postgresql://me@db:5432/x')}, password={IN_EXCEPTION}")
    except ConnectionError as exc:
        observability.log_system_error_sync(
            error_type="postgres_connection_error",
            severity="critical",
            error_message=str(exc),
            thread_id="t",
            error_context={"password": IN_CONTEXT, "url": f"redis://:{IN_URI}@r"},
            exc=exc,
        )
    observability.emit_log(f"token={IN_EXCEPTION}", thread_id="t", level="error")
    observability.broadcast_run_event(
        {"type": "note", "thread_id": "t", "message": f"redis://:{IN_URI}@r", "api_key": IN_CONTEXT}
    )


def test_planted_secrets_come_out_nowhere(
    api_uri: str,
    redis_url: str,
    prefix: str,
    conn: Connection,
    spool_dir: Path,
    serve: Callable[[FastAPI, Streams], Served],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG, "checkpointer")
    uri, streams = with_password(api_uri), Streams()
    app = create_app(
        postgres_uri=uri, redis_url=redis_url, prefix=prefix, admin_token="an-administrators-token", streams=streams
    )
    served = serve(app, streams)
    frames: list[str] = []

    def watch(path: str) -> None:
        with served.lines(path) as lines:
            frames.extend(lines)

    watchers = [threading.Thread(target=watch, args=[path]) for path in (f"{ERRORS}/events", "/threads/t/events")]
    for watcher in watchers:
        watcher.start()
    wait_until(lambda: frames.count(": connected") == 2)

    events: list[CheckpointEvent] = []
    with contextlib.ExitStack() as stack:
        for url in (redis_url, f"redis://me:{IN_URI}@127.0.0.1:1/0"):
            saver = stack.enter_context(
                BufferedPostgresSaver.from_conn_string(uri, redis_url=url, prefix=prefix, triggers=frozenset())
            )
            saver.hooks.add(events.append)
            if url == redis_url:
                good = saver
        fail_in_every_way(good, saver, conn)
        for one in (good, saver):
            assert one.hooks.flush(30)
    assert {"put.refused", "put.around", "backend.down"} <= {event.name for event in events}
    assert any(event.name.startswith(("flush.", "dead_letter.")) for event in events)

    with httpx.Client(base_url=served.url, headers=served.headers, timeout=60) as client:
        wait_until(lambda: "postgres_connection_error" in client.get(ERRORS).text)
        wait_until(lambda: len(client.get("/threads/t/logs").json()["lines"]) >= 4)
        wait_until(lambda: "postgres_connection_error" in "".join(frames) and '"note"' in "".join(frames))
        answers = [
            client.get(path).text
            for path in (
                *(f"{ERRORS}{rest}" for rest in ("", "/groups", "/audit", "/stats", "/trends?by=error_type")),
                *(f"{ERRORS}/{error['id']}" for error in client.get(ERRORS).json()["errors"]),
                "/threads/t/logs",
                "/metrics",
                "/readyz",
            )
        ]
    streams.end()
    for watcher in watchers:
        watcher.join(60)

    rows = {table: str(conn.execute(f"SELECT * FROM {table}".encode()).fetchall()) for table in TABLES}
    # Each place has got something to look at, and the stack traces are there.
    assert "Traceback" in "".join(answers) or ".py" in "".join(answers)
    assert "[scrubbed]" in rows["system_errors"]
    printed = capfd.readouterr()
    found = {
        "events": repr(events),
        **rows,
        "answers": "".join(answers),
        "frames": "\n".join(frames),
        "logs": "\n".join(record.getMessage() for record in caplog.records),
        "console": printed.out + printed.err,
        "spool": "".join(path.read_bytes().decode("latin-1") for path in spool_dir.rglob("*") if path.is_file()),
    }
    assert {
        (place, secret)
        for place, text in found.items()
        for secret in (IN_STATE, IN_URI, IN_EXCEPTION, IN_CONTEXT)
        if secret in text or secret in json.dumps(text)
    } == set()
