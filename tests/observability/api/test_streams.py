"""Streams carry what happens as it happens, can be taken up again, and end when the server does."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from helpers import wait_until
from planting import plant

import observability
from observability.api import Streams, feed
from observability.target import open_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import psycopg
    from conftest import Served
    from fastapi import FastAPI

    from checkpointer.embedded import Servers
    from observability import Observability

    Connection = psycopg.Connection[Any]

ERRORS = "/admin/system-errors/events"


def event(lines: Iterator[str]) -> dict[str, Any]:
    """Read the next event of a stream; comments are no events."""
    found: dict[str, Any] = {}
    for line in lines:
        if not line and found:
            return found
        if line.startswith(":") or not line:
            continue
        name, _, value = line.partition(": ")
        found[name] = json.loads(value) if name == "data" else value
    raise AssertionError("the stream has ended")


def connected(lines: Iterator[str]) -> Iterator[str]:
    assert next(lines) == ": connected"
    return lines


@pytest.fixture
def target(api_uri: str, redis_url: str, prefix: str, spool_dir: Path) -> Iterator[Observability]:
    """The same target as that of the application, as another process has it."""
    made = open_target(api_uri, redis_url, prefix=prefix)
    yield made
    made.close(5)


def say(target: Observability, number: int, thread_id: str = "t", **more: Any) -> None:
    view = {"type": "note", "thread_id": thread_id, "number": number, "severity": "warning", **more}
    observability.broadcast_run_event(view, observability=target)
    assert target.flush(30)


def test_new_errors_come_as_they_arrive_without_what_is_sensitive(served: Served, conn: Connection) -> None:
    plant(conn, error_message="before")
    with served.lines(ERRORS) as lines:
        connected(lines)
        # From here on nothing may fall in between.
        planted = plant(
            conn, error_message="a\r\n\r\ndata: forged", stack_trace="needle", error_context='{"a": "needle"}'
        )
        found = event(lines)
        assert (found["event"], found["id"], found["data"]["id"]) == ("system_error", str(planted), planted)
        assert found["data"]["error_message"] == "a\r\n\r\ndata: forged"
        assert "needle" not in json.dumps(found)


def test_errors_missed_in_between_are_delivered_first(served: Served, conn: Connection) -> None:
    planted = [plant(conn) for _ in range(4)]
    with served.lines(ERRORS, **{"Last-Event-ID": str(planted[1])}) as lines:
        assert [event(lines)["data"]["id"] for _ in range(2)] == planted[2:]
        later = plant(conn)
        assert event(lines)["data"]["id"] == later


def test_too_much_missed_is_a_reset(served: Served, conn: Connection) -> None:
    first = plant(conn)
    conn.execute(
        "INSERT INTO system_errors (error_type, severity, error_message) "
        "SELECT 'x', 'error', 'y' FROM generate_series(1, 300)"
    )
    with served.lines(ERRORS, **{"Last-Event-ID": str(first)}) as lines:
        assert event(lines)["event"] == "reset"
    for malformed in ("x", "-1", "9" * 30, "1; DROP TABLE system_errors"):
        with served.lines(ERRORS, **{"Last-Event-ID": malformed}) as lines:
            assert event(lines)["event"] == "reset"


def test_an_error_whose_transaction_ends_late_is_not_passed_over(
    served: Served, conn: Connection, api_uri: str
) -> None:
    import psycopg

    with served.lines(ERRORS, **{"Last-Event-ID": "0"}) as lines, psycopg.connect(api_uri) as late:
        connected(lines)
        slow = plant(late)
        quick = plant(conn, fingerprint="v1:b")
        assert event(lines)["data"]["id"] == quick
        late.commit()
        assert event(lines)["data"]["id"] == slow


def test_a_burst_larger_than_a_look_arrives_whole(served: Served, conn: Connection, monkeypatch: Any) -> None:
    monkeypatch.setattr(feed, "_BATCH", 10)
    first = plant(conn)
    with served.lines(ERRORS, **{"Last-Event-ID": str(first)}) as lines:
        connected(lines)
        conn.execute(
            "INSERT INTO system_errors (error_type, severity, error_message) "
            "SELECT 'x', 'error', 'y' FROM generate_series(1, 95)"
        )
        seen = [event(lines)["data"]["id"] for _ in range(95)]
        assert seen == list(range(first + 1, first + 96))


def test_the_events_of_a_thread_come_live_and_of_no_other(served: Served, target: Observability) -> None:
    with served.lines("/threads/tenant/42/events") as lines:
        connected(lines)
        say(target, 0, "other")
        say(target, 1, "tenant/42", message="a\n\ndata: forged")
        found = event(lines)
        assert (found["data"]["number"], found["data"]["message"]) == (1, "a\n\ndata: forged")
        assert found["id"] == found["data"]["event_id"]
        assert "event" not in found


def test_the_events_of_a_thread_are_taken_up_where_they_were_left(served: Served, target: Observability) -> None:
    with served.lines("/threads/t/events") as lines:
        connected(lines)
        for number in range(3):
            say(target, number)
        first = event(lines)
    with served.lines("/threads/t/events", **{"Last-Event-ID": first["id"]}) as lines:
        assert [event(lines)["data"]["number"] for _ in range(2)] == [1, 2]
    for unknown in ("00000000-0000-7000-8000-000000000000", "nonsense", "x" * 5_000):
        with served.lines("/threads/t/events", **{"Last-Event-ID": unknown}) as lines:
            assert event(lines)["event"] == "reset"
            assert event(lines)["data"]["number"] == 0


def test_an_id_of_the_applications_own_cannot_forge_a_line(served: Served, target: Observability) -> None:
    with served.lines("/threads/t/events") as lines:
        connected(lines)
        say(target, 1, event_id="x\nevent: reset")
        say(target, 2)
        first, second = event(lines), event(lines)
        assert "id" not in first
        assert (first.get("event"), first["data"]["number"], second["data"]["number"]) == (None, 1, 2)


def test_a_ticket_opens_a_stream_without_a_header(served: Served, target: Observability, conn: Connection) -> None:
    with httpx.Client(base_url=served.url) as client:
        ticket = client.post("/threads/a b/events/ticket", headers=served.headers).json()
        assert ticket["expires_in"] == 60
        with client.stream("GET", ticket["url"], timeout=60) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = connected(response.iter_lines())
            say(target, 1, "a b")
            seen = event(lines)
            assert seen["data"]["number"] == 1
        say(target, 2, "a b")
        with client.stream("GET", f"{ticket['url']}&after={seen['id']}", timeout=60) as response:
            assert event(response.iter_lines())["data"]["number"] == 2
        first = plant(conn)
        later = plant(conn)
        ticket = client.post(f"{ERRORS}/ticket", headers=served.headers).json()
        with client.stream("GET", f"{ticket['url']}&after={first}", timeout=60) as response:
            assert event(response.iter_lines())["data"]["id"] == later


def test_secrets_in_events_are_blanked(served: Served, target: Observability) -> None:
    with served.lines("/threads/t/events") as lines:
        connected(lines)
        say(target, 1, message="postgres://me:hunter2@db", token="hunter2", nested={"password": "hunter2"})
        assert "hunter2" not in json.dumps(event(lines))


def test_a_quiet_stream_is_kept_alive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import routing

    monkeypatch.setattr(routing, "_PING_INTERVAL", 0.1)
    for path in (ERRORS, "/threads/t/events"):
        with served.lines(path) as lines:
            comments = [next(lines) for _ in range(5)]
            assert ": ping" in comments


def test_open_streams_end_when_the_server_is_told_to(served: Served) -> None:
    ended: list[float] = []
    opened = threading.Barrier(3)

    def watch(path: str) -> None:
        with served.lines(path) as lines:
            connected(lines)
            opened.wait(60)
            for _ in lines:
                pass
            ended.append(time.monotonic())

    threads = [threading.Thread(target=watch, args=[path]) for path in (ERRORS, "/threads/t/events")]
    for thread in threads:
        thread.start()
    opened.wait(60)
    served.streams.end()
    served.streams.end()
    served.server.should_exit = True
    for thread in [*threads, served.thread]:
        thread.join(60)
        assert not thread.is_alive()
    assert len(ended) == 2


def test_there_is_room_for_so_many_streams(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from observability.api import streams

    monkeypatch.setattr(streams, "_MOST", 1)
    with served.lines("/threads/t/events") as lines:
        connected(lines)
        wait_until(lambda: len(served.streams._open) == 1)
        full = httpx.get(f"{served.url}{ERRORS}", headers=served.headers)
        assert (full.status_code, full.headers["retry-after"]) == (503, "5")
    wait_until(lambda: not served.streams._open)
    with served.lines("/threads/t/events") as lines:
        connected(lines)


def test_a_stream_ends_after_its_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from observability.api import streams

    monkeypatch.setattr(streams, "_LIFETIME", 0.2)
    with served.lines("/threads/t/events") as lines:
        assert ": connected" in list(lines)


def test_a_threads_log_is_read_also_while_postgres_is_away(
    own_servers: Servers, prefix: str, serve: Callable[[FastAPI, Streams], Served], spool_dir: Path
) -> None:
    import psycopg

    from checkpointer.store import schema
    from observability.api import create_app

    with psycopg.connect(own_servers.postgres_uri, autocommit=True) as connection:
        schema.setup(connection)
    streams = Streams()
    app = create_app(
        postgres_uri=own_servers.postgres_uri,
        redis_url=own_servers.redis_url,
        admin_token="an-administrators-token",
        prefix=prefix,
        streams=streams,
    )
    served = serve(app, streams)
    target = open_target(own_servers.postgres_uri, own_servers.redis_url, prefix=prefix)
    try:
        for number in range(3):
            observability.emit_log(f"line {number}", thread_id="t", observability=target)
        assert target.flush(30)
        url = f"{served.url}/threads/t/logs"
        page = httpx.get(url, params={"limit": 2}, headers=served.headers, timeout=60).json()
        assert [line["message"] for line in page["lines"]] == ["line 1", "line 2"]
        assert (page["complete"], page["count"]) == (True, 2)
        earlier = httpx.get(url, params={"cursor": page["next_cursor"]}, headers=served.headers, timeout=60).json()
        assert [line["message"] for line in earlier["lines"]] == ["line 0"]
        own_servers.postgres.kill()
        kept = httpx.get(url, headers=served.headers, timeout=60).json()
        assert [line["message"] for line in kept["lines"]] == ["line 0", "line 1", "line 2"]
        assert kept["complete"] is False
        older = httpx.get(url, params={"cursor": page["next_cursor"]}, headers=served.headers, timeout=60)
        assert older.status_code == 503
    finally:
        target.close(5)
