"""Alerts reach people: once for each firing however many processes run, and again only with the same id."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from alert_process import SECRET
from helpers import wait_until
from worker_process import WorkerProcess

from checkpointer import BufferedPostgresSaver
from checkpointer.errors import ConfigurationError
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import HookContext, Hooks, load_hook
from observability.alerts import (
    AlertDeliveryError,
    Alerts,
    Channel,
    Message,
    Webhook,
    apprise_channels,
    ledger,
    messages,
    rules,
)
from observability.alerts.channels import sign
from observability.alerts.job import _SETTLE
from observability.alerts.rules import Firing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointer.embedded import Servers

KEY = base64.b64decode(SECRET.removeprefix("whsec_"))


@dataclass
class Request:
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def kind(self) -> str:
        return str(self.event["type"]).rpartition(".")[2]


def is_signed(request: Request) -> bool:
    signed = f"{request.id}.{request.headers['webhook-timestamp']}.".encode() + request.body
    expected = "v1," + base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    is_recent = abs(time.time() - int(request.headers["webhook-timestamp"])) < 300
    return is_recent and hmac.compare_digest(request.headers["webhook-signature"], expected)


class Receiver:
    """A real HTTP server that keeps what it gets; `answers` are given in order, then 204 for ever."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.holds = threading.Event()
        self.is_free = threading.Event()
        self.is_free.set()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append(Request({":path": self.path, **headers}, body))
                receiver.holds.set()
                receiver.is_free.wait(60)
                status, more = receiver.answers.pop(0) if receiver.answers else (204, {})
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in more.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/alerts"

    def kinds(self) -> list[str]:
        return [request.kind for request in self.requests]

    def of(self, kind: str) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    def close(self) -> None:
        self.is_free.set()
        self._server.shutdown()
        self._server.server_close()


class Clock:
    """The time of the rules; starts where the server's is."""

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **span: float) -> None:
        self.now += timedelta(**span)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def database(migrated_uri: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(migrated_uri, autocommit=True) as connection:
        yield connection


@pytest.fixture
def start(migrated_uri: str, receiver: Receiver) -> Iterator[Callable[..., Alerts]]:
    """Starts alerts that look often, and closes them after the test."""
    started: list[Alerts] = []

    def _start(postgres: Any = migrated_uri, **options: Any) -> Alerts:
        channels = options.pop("channels", None) or [Webhook(receiver.url, secret=SECRET)]
        alerts = Alerts(postgres, channels, **{"interval": 0.05, "digest_hour": None, **options})
        started.append(alerts)
        return alerts

    yield _start
    for alerts in started:
        alerts.close()
        alerts.close()


def plant(database: psycopg.Connection[Any], count: int = 1, **facts: Any) -> None:
    values = {"error_type": "checkpoint_lost", "severity": "critical", "error_message": "it is lost", **facts}
    names, marks = ", ".join(values), ", ".join(["%s"] * len(values))
    statement = f"INSERT INTO system_errors ({names}) SELECT {marks} FROM generate_series(1, %s)"
    database.execute(statement.encode(), [*values.values(), count])


def looks(database: psycopg.Connection[Any], rule: str = "critical") -> Any:
    (row,) = database.execute("SELECT last_run FROM system_alerts WHERE rule = %s", [rule]).fetchall() or [(None,)]
    return row[0]


def wait_for_looks(database: psycopg.Connection[Any], clock: Clock, count: int = 3) -> None:
    """Wait until the rule was looked after several times from now on."""
    for _ in range(count):
        clock.advance(seconds=1)
        wait_until(lambda: looks(database) == clock.now)


def waiting(database: psycopg.Connection[Any]) -> int:
    row = database.execute("SELECT count(*) FROM system_alert_messages WHERE done_at IS NULL").fetchone()
    assert row is not None
    return int(row[0])


def error(**facts: Any) -> CheckpointEvent:
    values: dict[str, Any] = {
        "name": "checkpoint.lost",
        "severity": "critical",
        "error_type": "checkpoint_lost",
        "message": "Redis has lost it.",
        "thread_id": "t1",
    }
    return CheckpointEvent(**(values | facts))


# What is told.


def test_criticals_that_arrive_are_told_of_once_in_a_signed_cloud_event(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    plant(database, 3, thread_id="t1", occurrences=2)
    plant(database, error_type="checkpoint_flush_error", thread_id="t2")
    plant(database, severity="error", error_type="slow")
    clock = Clock()
    start(clock=clock)
    (request,) = wait_until(lambda: receiver.requests)
    wait_for_looks(database, clock)
    assert receiver.requests == [request]
    assert is_signed(request)
    assert request.headers["content-type"].startswith("application/cloudevents+json")
    assert request.headers[":path"] == "/alerts"
    event = request.event
    assert event["specversion"] == "1.0"
    assert event["type"] == "langgraph.checkpoint.alert.critical"
    assert event["id"] == request.id
    data = event["data"]
    assert (data["severity"], data["read_from"], data["types"]) == ("critical", "table", 2)
    assert data["title"] == "Critical: 2 types of error, 7 times"
    found = [(one["error_type"], one["occurrences"], one["threads"], one["why"]) for one in data["alerts"]]
    assert found == [("checkpoint_lost", 6, 1, "new"), ("checkpoint_flush_error", 1, 1, "new")]
    assert data["text"].splitlines()[0].startswith("- checkpoint_lost: 6 times in 1 threads (new), from ")
    wait_until(lambda: not waiting(database))


def test_what_an_outage_held_back_is_told_of_when_it_arrives_and_what_is_muted_or_old_is_not(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    database.execute(
        "INSERT INTO system_error_groups (fingerprint, error_type, severity, title, status, first_seen_at, "
        "last_seen_at, occurrences) VALUES ('v1:m', 'muted', 'critical', 't', 'muted', now(), now(), 1)"
    )
    before = datetime.now(UTC) - timedelta(minutes=25)
    plant(database, error_type="muted", fingerprint="v1:m")
    plant(database, error_type="old", created_at=before, recorded_at=before)
    plant(database, error_type="resolved", resolved_at=datetime.now(UTC))
    clock = Clock()
    start(clock=clock)
    wait_until(lambda: looks(database))
    wait_for_looks(database, clock)
    assert receiver.requests == []
    plant(database, 40, created_at=before, delivery="spool")
    clock.advance(seconds=1)
    (request,) = wait_until(lambda: receiver.requests)
    (told,) = request.event["data"]["alerts"]
    assert (told["error_type"], told["occurrences"]) == ("checkpoint_lost", 40)
    assert datetime.fromisoformat(told["first_seen"]) == before.replace(microsecond=0)


def test_the_same_trouble_is_held_back_told_when_it_grows_and_after_the_cooldown(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    clock = Clock()
    start(clock=clock, cooldown=3_600)
    plant(database)
    clock.advance(seconds=1)
    wait_until(lambda: len(receiver.requests) == 1)
    plant(database, 8)
    clock.advance(minutes=1)
    wait_for_looks(database, clock)
    assert len(receiver.requests) == 1
    plant(database)
    clock.advance(minutes=1)
    wait_until(lambda: len(receiver.requests) == 2)
    clock.advance(minutes=59)
    wait_for_looks(database, clock)
    assert len(receiver.requests) == 2
    clock.advance(minutes=1)
    wait_until(lambda: len(receiver.requests) == 3)
    whys = [request.event["data"]["alerts"][0]["why"] for request in receiver.requests]
    assert whys == ["new", "grown", "still"]
    assert len({request.id for request in receiver.requests}) == 3


def test_when_it_is_over_that_is_told_and_what_comes_then_is_new(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    clock = Clock()
    plant(database)
    start(clock=clock)
    wait_until(lambda: len(receiver.requests) == 1)
    database.execute("UPDATE system_errors SET recorded_at = now() - interval '6 minutes'")
    clock.advance(minutes=9)
    wait_for_looks(database, clock)
    assert receiver.kinds() == ["critical"]
    clock.advance(minutes=1)
    wait_until(lambda: receiver.kinds() == ["critical", "cleared"])
    data = receiver.requests[1].event["data"]
    assert (data["severity"], data["title"]) == ("info", "Over: checkpoint_lost")
    wait_for_looks(database, clock)
    plant(database)
    clock.advance(minutes=1)
    wait_until(lambda: receiver.kinds() == ["critical", "cleared", "critical"])
    assert receiver.requests[2].event["data"]["alerts"][0]["why"] == "new"


def test_the_digest_is_sent_once_a_day_and_also_late_on_its_day(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    today = datetime.now(UTC).replace(hour=6, minute=59, second=0, microsecond=0)
    yesterday = today - timedelta(days=1)
    plant(database, severity="error", error_type="flush", created_at=yesterday, recorded_at=yesterday, occurrences=4)
    plant(database, outcome="lost", created_at=yesterday, recorded_at=yesterday)
    plant(database, severity="warning", error_type="slow", created_at=yesterday - timedelta(days=1))
    clock = Clock(today)
    alerts = start(clock=clock, digest_hour=7)
    wait_until(lambda: looks(database))
    wait_for_looks(database, clock)
    assert receiver.requests == []
    # Nobody runs at seven, and somebody at eleven.
    alerts.close()
    clock.advance(hours=4)
    start(clock=clock, digest_hour=7)
    (request,) = wait_until(lambda: receiver.requests)
    assert request.kind == "digest"
    data = request.event["data"]
    assert data["title"] == f"Errors of {yesterday.date()}: 5 (5 unresolved, 1 lost)"
    assert data["text"].splitlines()[:2] == [
        "- critical checkpoint_lost: 1 (1 unresolved, 1 lost)",
        "- error flush: 4 (4 unresolved)",
    ]
    assert [day["day"] for day in data["days"]] == [str(yesterday.date()), str((yesterday - timedelta(days=1)).date())]
    start(clock=clock, digest_hour=7)
    wait_for_looks(database, clock)
    assert len(receiver.requests) == 1
    clock.advance(hours=20, minutes=1)
    wait_until(lambda: receiver.kinds() == ["digest", "digest"])
    assert receiver.requests[1].event["data"]["title"].startswith(f"Errors of {today.date()}: none")


# However many processes.


@contextlib.contextmanager
def processes(count: int, uri: str, url: str, lease: float = 60) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, str(Path(__file__).with_name("alert_process.py")), uri, url, str(lease)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "runs\n"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_four_processes_send_one_message_for_each_firing_and_one_digest(
    database: psycopg.Connection[Any], receiver: Receiver, migrated_uri: str
) -> None:
    with processes(4, migrated_uri, receiver.url):
        wait_until(lambda: receiver.kinds() == ["digest"])
        plant(database, 5)
        wait_until(lambda: len(receiver.requests) == 2)
        plant(database, error_type="another")
        wait_until(lambda: len(receiver.requests) == 3)
        # Each of them has had time to do it again.
        for _ in range(8):
            before = looks(database)
            wait_until(lambda before=before: looks(database) > before)
        assert receiver.kinds() == ["digest", "critical", "critical"]
        types = [[one["error_type"] for one in request.event["data"]["alerts"]] for request in receiver.requests[1:]]
        assert types == [["checkpoint_lost"], ["another"]]
        assert all(is_signed(request) for request in receiver.requests)


def test_a_message_of_a_process_that_is_killed_while_sending_is_sent_by_another_with_the_same_id(
    database: psycopg.Connection[Any], receiver: Receiver, migrated_uri: str
) -> None:
    with processes(1, migrated_uri, receiver.url, lease=3) as (process,):
        wait_until(lambda: receiver.kinds() == ["digest"] and not waiting(database))
        receiver.holds.clear()
        receiver.is_free.clear()
        plant(database)
        assert receiver.holds.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        receiver.is_free.set()
        with processes(1, migrated_uri, receiver.url, lease=3):
            wait_until(lambda: not waiting(database))
    first, second = receiver.of("critical")
    assert (first.id, first.body) == (second.id, second.body)
    assert is_signed(first)
    assert is_signed(second)
    (attempts,) = database.execute("SELECT attempts FROM system_alert_messages WHERE id = %s", [first.id]).fetchone()  # type: ignore[misc]
    assert attempts == 2


def test_a_rule_that_another_process_is_looking_after_is_left_to_it(
    database: psycopg.Connection[Any], migrated_uri: str
) -> None:
    plant(database)
    ledger.prepare(database)
    database.execute("SET lock_timeout = '2s'")

    def look() -> bool:
        return ledger.look_for_criticals(
            database, clock=None, interval=timedelta(minutes=1), cooldown=timedelta(hours=1), source="/s"
        )

    with psycopg.connect(migrated_uri) as another:
        another.execute("SELECT state FROM system_alerts FOR UPDATE")
        assert not look()
        ledger.write_digest(database, clock=None, hour=0, source="/s")
        assert waiting(database) == 0
        another.rollback()
    assert look()
    assert not look(), "it is not due again"
    ledger.write_digest(database, clock=None, hour=0, source="/s")
    assert waiting(database) == 2


def test_a_message_that_a_living_process_is_sending_is_not_sent_by_another(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    plant(database)
    receiver.is_free.clear()
    start(channels=[Webhook(receiver.url, timeout=60)], lease=3_600)
    assert receiver.holds.wait(60)
    clock = Clock()
    start(clock=clock)
    wait_for_looks(database, clock, 5)
    receiver.is_free.set()
    wait_until(lambda: not waiting(database))
    assert len(receiver.requests) == 1


# When a channel fails.


def test_a_503_is_tried_again_not_before_the_time_it_asks_for_and_with_the_same_id(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    events: list[CheckpointEvent] = []
    receiver.answers += [(503, {"Retry-After": "4"})]
    plant(database)
    start(emit=events.append)
    wait_until(lambda: len(receiver.requests) == 2 and not waiting(database))
    first, second = receiver.requests
    assert (first.id, first.body) == (second.id, second.body)
    assert second.at - first.at >= 3.9
    assert is_signed(second)
    (event,) = events
    assert (event.name, event.severity, event.error_type) == ("alert.failed", "error", "alert_failed")
    assert event.message == "An alert could not be sent by webhook (HTTP 503); it is tried again."
    assert event.context == {"alert_id": first.id, "rule": "critical", "channel": "webhook", "given_up": False}


def test_a_refusal_is_not_repeated_and_the_next_alert_is_sent(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    events: list[CheckpointEvent] = []
    receiver.answers += [(410, {}), (302, {"Location": receiver.url + "/elsewhere"})]
    start(emit=events.append)
    for name in ("one", "two", "three"):
        plant(database, error_type=name)
        wait_until(lambda name=name: any(name in str(request.event) for request in receiver.requests))
        wait_until(lambda: not waiting(database))
    assert [request.headers[":path"] for request in receiver.requests] == ["/alerts"] * 3
    assert [event.context["given_up"] for event in events] == [True, True]
    assert "HTTP 302, and redirects are not followed" in events[1].message
    failures = database.execute("SELECT refused, failure FROM system_alert_messages ORDER BY created_at").fetchall()
    assert failures[0] == (["webhook"], "webhook: HTTP 410")
    assert failures[2] == ([], None)


class Broken:
    """A channel that fails as often as it is told to."""

    def __init__(self, name: str, failures: int, failure: Exception) -> None:
        self.name = name
        self.failures = failures
        self.failure = failure
        self.sent: list[Message] = []
        self.attempts = 0

    def send(self, message: Message) -> None:
        self.attempts += 1
        if self.attempts <= self.failures:
            raise self.failure
        self.sent.append(message)


def test_a_channel_that_has_a_message_does_not_get_it_again_because_another_failed(
    database: psycopg.Connection[Any], start: Callable[..., Alerts]
) -> None:
    well = Broken("well", 0, ValueError())
    broken = Broken("broken", 1, AlertDeliveryError("busy"))
    buggy = Broken("buggy", 1, ZeroDivisionError("postgresql://bob:hunter2@db"))
    plant(database)
    events: list[CheckpointEvent] = []
    start(channels=[well, broken, buggy], emit=events.append)
    wait_until(lambda: broken.sent and buggy.sent)
    wait_until(lambda: not waiting(database))
    assert len(well.sent) == len(broken.sent) == len(buggy.sent) == 1
    assert well.sent[0] == broken.sent[0] == buggy.sent[0]
    assert "hunter2" not in str(events)
    assert {event.context["channel"] for event in events} == {"broken", "buggy"}
    row = database.execute("SELECT delivered, failure FROM system_alert_messages").fetchone()
    assert row == (["broken", "buggy", "well"], None)


def test_an_alert_that_fails_makes_no_alert(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    clock = Clock()
    hooks = Hooks()
    receiver.answers += [(400, {})]
    alerts = start(clock=clock, emit=hooks.emit)
    stored: list[CheckpointEvent] = []

    def store(event: CheckpointEvent) -> None:
        plant(database, severity=event.severity, error_type=event.error_type, error_message=event.message)
        stored.append(event)

    hooks.add(store)
    hooks.add(alerts)
    plant(database)
    wait_until(lambda: stored)
    wait_until(lambda: looks(database))
    wait_for_looks(database, clock)
    assert len(receiver.requests) == 1
    hooks.close()


def test_what_cannot_be_delivered_for_hours_is_given_up(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    events: list[CheckpointEvent] = []
    receiver.answers += [(500, {})] * 2
    plant(database)
    start(emit=events.append)
    wait_until(lambda: events)
    database.execute("UPDATE system_alert_messages SET created_at = now() - interval '7 hours', not_before = now()")
    wait_until(lambda: not waiting(database))
    assert [event.context["given_up"] for event in events] == [False, True]


# While Postgres is away.


@pytest.mark.parametrize(("end", "begin"), [("kill", "start"), ("pause", "resume")])
def test_while_postgres_is_away_criticals_are_told_from_memory_and_not_again_when_they_arrive(
    own_servers: Servers, own_context: HookContext, receiver: Receiver, end: str, begin: str
) -> None:
    hooks = Hooks()
    alerts = Alerts(
        own_context.connect_postgres,
        [Webhook(receiver.url, secret=SECRET)],
        interval=0.2,
        digest_hour=None,
        away_after=0.5,
    )
    hooks.add(alerts)
    hooks.add(load_hook("system_errors", own_context))
    with own_context.connect_postgres() as database:
        wait_until(lambda: looks(database))
    getattr(own_servers.postgres, end)()
    hooks.emit(error(name="backend.down", severity="error", context={"backend": "postgres"}))
    for number in range(6):
        hooks.emit(error(thread_id=f"t{number}"))
    hooks.emit(error(severity="warning", error_type="slow"))
    wait_until(lambda: receiver.of("critical") and receiver.of("away"))
    (direct,) = receiver.of("critical")
    assert is_signed(direct)
    assert direct.event["data"]["read_from"] == "memory"
    (told,) = direct.event["data"]["alerts"]
    # How many of them depends on when it looked; fewer than ten times as many are no news.
    assert told["error_type"] == "checkpoint_lost"
    assert told["occurrences"] == told["threads"] in range(1, 7)
    for number in range(3):
        hooks.emit(error(thread_id=f"t{number}"))
    assert hooks.flush(30)
    began = time.monotonic()
    getattr(own_servers.postgres, begin)()
    wait_until(lambda: receiver.of("back"))
    with own_context.connect_postgres() as database:
        last = looks(database)
        wait_until(lambda: looks(database) != last)
        # Other processes, too, had time to write down what they have told.
        assert time.monotonic() - began >= _SETTLE

        def arrived() -> int:
            statement = "SELECT COALESCE(SUM(occurrences), 0) FROM system_errors WHERE severity = 'critical'"
            (row,) = database.execute(statement).fetchall()
            return int(row[0])

        wait_until(lambda: arrived() == 9)
        for _ in range(4):
            before = looks(database)
            wait_until(lambda before=before: looks(database) > before)
        # It is another type that is told, and not what was told from memory.
        plant(database, error_type="after")
        wait_until(lambda: len(receiver.of("critical")) == 2)
    assert receiver.of("critical")[1].event["data"]["alerts"][0]["error_type"] == "after"
    assert sorted(receiver.kinds()) == ["away", "back", "critical", "critical"]
    hooks.close()


def test_what_could_not_be_told_during_an_outage_is_told_when_it_arrives(
    own_servers: Servers, own_context: HookContext, receiver: Receiver
) -> None:
    channel = Broken("broken", 10**6, AlertDeliveryError("no network either"))
    alerts = Alerts(own_context.connect_postgres, [channel], interval=0.2, digest_hour=None)
    with own_context.connect_postgres() as database:
        wait_until(lambda: looks(database))
    own_servers.postgres.kill()
    alerts(error())
    wait_until(lambda: channel.attempts)
    own_servers.postgres.start()
    channel.failures = 0
    database = wait_until(lambda: _connect(own_context))
    with database:
        plant(database)
        wait_until(lambda: channel.sent)
    (message,) = channel.sent
    assert json.loads(message.body)["data"]["read_from"] == "table"
    alerts.close()


class Flapping:
    """A Postgres that comes and goes, as one process sees it."""

    def __init__(self, uri: str, database: psycopg.Connection[Any]) -> None:
        self._uri = uri
        self._database = database
        self._is_away = threading.Event()

    def connect(self) -> psycopg.Connection[Any]:
        if self._is_away.is_set():
            raise psycopg.OperationalError("away")
        return psycopg.connect(self._uri, autocommit=True)

    def go(self) -> None:
        self._is_away.set()
        self._database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    def come(self, alerts: Alerts) -> None:
        self._is_away.clear()
        wait_until(lambda: alerts._outage is None)


def test_a_postgres_that_comes_and_goes_is_no_reason_to_tell_the_same_each_time(
    database: psycopg.Connection[Any], migrated_uri: str, receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    postgres = Flapping(migrated_uri, database)
    alerts = start(postgres.connect)
    wait_until(lambda: looks(database))
    for names in (["checkpoint_lost"], ["checkpoint_lost", "another"]):
        told = len(receiver.requests)
        postgres.go()
        for name in names:
            alerts(error(error_type=name))
        wait_until(lambda told=told: len(receiver.requests) > told)
        postgres.come(alerts)
    types = [[one["error_type"] for one in request.event["data"]["alerts"]] for request in receiver.requests]
    assert types == [["checkpoint_lost"], ["another"]]


def test_what_an_outage_kept_from_being_told_is_told_in_the_next_one(
    database: psycopg.Connection[Any], migrated_uri: str, start: Callable[..., Alerts]
) -> None:
    postgres = Flapping(migrated_uri, database)
    channel = Broken("broken", 10**6, AlertDeliveryError("no network either"))
    alerts = start(postgres.connect, channels=[channel])
    wait_until(lambda: looks(database))
    postgres.go()
    alerts(error())
    wait_until(lambda: channel.attempts)
    postgres.come(alerts)
    channel.failures = 0
    postgres.go()
    alerts(error())
    (message,) = wait_until(lambda: channel.sent)
    assert json.loads(message.body)["data"]["alerts"][0]["error_type"] == "checkpoint_lost"


def _connect(context: HookContext) -> psycopg.Connection[Any] | None:
    try:
        return context.connect_postgres()
    except psycopg.OperationalError:
        return None


def test_missing_tables_are_said_to_be_missing(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    database.execute("DROP TABLE system_alerts")
    start(away_after=0)
    (request,) = wait_until(lambda: receiver.requests)
    assert request.kind == "away"
    assert "run `checkpointer migrate`" in request.event["data"]["text"]


# As a hook.


def test_after_closing_an_event_starts_nothing(start: Callable[..., Alerts]) -> None:
    alerts = start()
    alerts.close()
    alerts._renew()  # as after a fork
    before = set(threading.enumerate())
    alerts(error())
    assert not {thread.name for thread in set(threading.enumerate()) - before} & {"checkpointer-alerts"}


def test_the_hook_is_set_up_by_the_environment_and_works_in_a_saver(
    postgres_uri: str, redis_url: str, prefix: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINTER_ALERT_WEBHOOK", receiver.url)
    monkeypatch.setenv("CHECKPOINTER_ALERT_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("CHECKPOINTER_ALERT_DIGEST_HOUR", "0")
    hooks = ("system_errors", "alerts")
    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, hooks=hooks) as saver:
        saver.setup()
        wait_until(lambda: receiver.of("digest"))
        # Closing looks a last time, so that what ends a process is not left to the next one.
        saver.hooks.emit(error())
        with psycopg.connect(postgres_uri) as database:
            wait_until(lambda: database.execute("SELECT 1 FROM system_errors").fetchall())
    (request,) = wait_until(lambda: receiver.of("critical"))
    assert request.event["source"] == f"/checkpointer/{prefix}"
    assert is_signed(request)


def test_an_alert_that_fails_is_an_event_of_the_saver(
    postgres_uri: str, redis_url: str, prefix: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINTER_ALERT_WEBHOOK", receiver.url)
    monkeypatch.delenv("CHECKPOINTER_ALERT_DIGEST_HOUR", raising=False)
    receiver.answers += [(404, {})]
    seen: list[CheckpointEvent] = []
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=("system_errors", "alerts")
    ) as saver:
        saver.hooks.add(seen.append)
        saver.setup()
        saver.hooks.emit(error())
        (event,) = wait_until(lambda: [one for one in seen if one.name == "alert.failed"])
        assert "HTTP 404" in event.message


def test_a_worker_sends_alerts_if_it_is_given_the_hook(
    postgres_uri: str,
    redis_url: str,
    prefix: str,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, hooks=()) as saver:
        saver.setup()
    monkeypatch.setenv("CHECKPOINTER_ALERT_WEBHOOK", receiver.url)
    with psycopg.connect(postgres_uri, autocommit=True) as database:
        plant(database)
    worker = WorkerProcess(tmp_path, postgres_uri, redis_url, "--prefix", prefix, "--hook", "alerts")
    try:
        wait_until(lambda: receiver.of("critical"), message=worker.output)
    finally:
        worker.close()


def test_an_error_written_by_hand_without_its_time_is_told_of(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    plant(database, created_at=None)
    start()
    (request,) = wait_until(lambda: receiver.requests)
    assert request.event["data"]["alerts"][0]["first_seen"] is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "CHECKPOINTER_ALERT_WEBHOOK or CHECKPOINTER_ALERT_APPRISE"),
        ({"CHECKPOINTER_ALERT_WEBHOOK": "ftp://bob:hunter2@example.org/x"}, "https://host/path"),
        ({"CHECKPOINTER_ALERT_WEBHOOK": "file:///etc/passwd"}, "https://host/path"),
        ({"CHECKPOINTER_ALERT_WEBHOOK": "https://"}, "https://host/path"),
        ({"CHECKPOINTER_ALERT_WEBHOOK": "https://example.org:hunter2/"}, "https://host/path"),
        ({"CHECKPOINTER_ALERT_WEBHOOK": "https://example.org/a\r\nX: hunter2"}, "https://host/path"),
        ({"CHECKPOINTER_ALERT_WEBHOOK": "https://example.org/\u00fc"}, "percent-encoded"),
        (
            {
                "CHECKPOINTER_ALERT_WEBHOOK": "https://example.org",
                "CHECKPOINTER_ALERT_WEBHOOK_SECRET": "whsec_hunter2!",
            },
            "base64",
        ),
        ({"CHECKPOINTER_ALERT_APPRISE": "nonsense://hunter2"}, "does not know one of the addresses"),
        ({"CHECKPOINTER_ALERT_WEBHOOK": "https://example.org", "CHECKPOINTER_ALERT_DIGEST_HOUR": "24"}, "0 to 23"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start_without_quoting_secrets(
    context: HookContext, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("WEBHOOK", "WEBHOOK_SECRET", "APPRISE", "DIGEST_HOUR"):
        monkeypatch.delenv(f"CHECKPOINTER_ALERT_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_hook("alerts", context)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "options",
    [
        {"channels": []},
        {"channels": [Webhook("http://a"), Webhook("http://b")]},
        {"digest_hour": 24},
        {"cooldown": 0},
    ],
)
def test_options_that_cannot_work_are_refused(migrated_uri: str, options: dict[str, Any]) -> None:
    channels: list[Channel] = options.pop("channels", [Webhook("http://a")])
    with pytest.raises(ConfigurationError):
        Alerts(migrated_uri, channels, **options)


def test_a_forked_child_runs_a_thread_of_its_own_from_its_first_event_on(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    alerts = start()
    wait_until(lambda: looks(database))
    child = os.fork()
    if child == 0:
        try:
            assert alerts._thread is None
            alerts(error())
            assert alerts._thread is not None
            wait_until(lambda: looks_anew(alerts), timeout=30)
            alerts.close()
            alerts.close()
        except BaseException:  # noqa: BLE001 - nothing of the test may go on in the child
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    plant(database)
    wait_until(lambda: receiver.of("critical"))


def looks_anew(alerts: Alerts) -> bool:
    return alerts._is_prepared


def test_alerts_by_apprise_reach_the_service_with_text_and_id(
    database: psycopg.Connection[Any], receiver: Receiver, start: Callable[..., Alerts]
) -> None:
    channels = apprise_channels(
        f"{receiver.url.replace('http', 'json')}/one, {receiver.url.replace('http', 'json')}/two"
    )
    assert [channel.name for channel in channels] == ["apprise-1", "apprise-2"]
    receiver.answers += [(500, {})]
    plant(database, error_message="<b>&amp;\\n")
    start(channels=channels)
    wait_until(lambda: len(receiver.requests) == 3 and not waiting(database))
    assert sorted(request.headers[":path"] for request in receiver.requests) == ["/alerts/one"] * 2 + ["/alerts/two"]
    sent = json.loads(receiver.requests[0].body)
    assert sent["title"] == "Critical: checkpoint_lost, once"
    assert "<b>&amp;\\n" in sent["message"]
    (identity,) = database.execute("SELECT id::text FROM system_alert_messages").fetchone() or ("",)
    assert sent["message"].endswith(f"Alert {identity}")


# The document.


def test_the_verification_in_the_document_takes_what_is_genuine_and_nothing_else(receiver: Receiver) -> None:
    text = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def is_genuine" in code]
    names: dict[str, Any] = {}
    exec(code, names)
    is_genuine = names["is_genuine"]
    Webhook(receiver.url, secret=SECRET).send(message())
    (request,) = receiver.requests
    assert is_genuine(request.headers, request.body, SECRET)
    assert not is_genuine(request.headers, request.body + b" ", SECRET)
    assert not is_genuine({**request.headers, "webhook-id": "another"}, request.body, SECRET)
    assert not is_genuine(request.headers, request.body, "whsec_bm90IHRoaXM=")
    # A year ago, and signed then: a request that somebody has kept.
    old = str(int(request.headers["webhook-timestamp"]) - 31_000_000)
    kept = {**request.headers, "webhook-timestamp": old, "webhook-signature": sign(KEY, request.id, old, request.body)}
    assert not is_genuine(kept, request.body, SECRET)


def test_the_example_of_the_document_has_the_fields_of_a_message() -> None:
    text = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
    example = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
    now = datetime.now(UTC)
    made = json.loads(
        messages.critical([Firing("e", 1, 1, now, now, "m")], source="/s", now=now, read_from="table").body
    )
    assert list(example) == list(made)
    assert list(example["data"]) == list(made["data"])
    assert list(example["data"]["alerts"][0]) == list(made["data"]["alerts"][0])


# The webhook by itself.


def message() -> Message:
    return messages.away("gone", since=datetime.now(UTC), source="/s", now=datetime.now(UTC))


def test_credentials_of_the_url_become_a_header_and_any_text_is_a_secret(receiver: Receiver) -> None:
    url = receiver.url.replace("://", "://bob:s%40crt@") + "?token=1#part"
    one = message()
    Webhook(url, secret="plain text").send(one)
    (request,) = receiver.requests
    assert request.headers[":path"] == "/alerts?token=1"
    assert base64.b64decode(request.headers["authorization"].removeprefix("Basic ")) == b"bob:s@crt"
    signed = f"{one.id}.{request.headers['webhook-timestamp']}.{one.body}".encode()
    expected = base64.b64encode(hmac.new(b"plain text", signed, "sha256").digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{expected}"


def test_without_a_secret_nothing_is_signed(receiver: Receiver) -> None:
    Webhook(receiver.url).send(message())
    assert "webhook-signature" not in receiver.requests[0].headers


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ({"Retry-After": "17"}, 17, 17),
        ({"Retry-After": format_datetime(datetime.now(UTC) + timedelta(minutes=30), usegmt=True)}, 1_000, 1_800),
        ({"Retry-After": "999999999999"}, 3_600, 3_600),
        ({"Retry-After": "-5"}, None, None),
        ({"Retry-After": "soon"}, None, None),
        ({}, None, None),
    ],
)
def test_the_time_that_an_answer_asks_for_is_read(
    receiver: Receiver, given: dict[str, str], low: float | None, high: float | None
) -> None:
    receiver.answers += [(429, given)]
    with pytest.raises(AlertDeliveryError) as caught:
        Webhook(receiver.url).send(message())
    assert caught.value.retryable
    if low is None or high is None:
        assert caught.value.retry_after is None
    else:
        assert caught.value.retry_after is not None
        assert low <= caught.value.retry_after <= high


@pytest.mark.parametrize(
    ("status", "retryable"), [(301, False), (307, False), (400, False), (404, False), (408, True), (500, True)]
)
def test_only_what_may_pass_is_tried_again(receiver: Receiver, status: int, retryable: bool) -> None:
    receiver.answers += [(status, {"Location": receiver.url, "Retry-After": "5"})]
    with pytest.raises(AlertDeliveryError, match=f"HTTP {status}") as caught:
        Webhook(receiver.url).send(message())
    assert caught.value.retryable == retryable
    assert len(receiver.requests) == 1


def test_a_server_that_is_not_there_or_never_ends_its_answer_is_given_up_in_time() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = threading.Event()

        def trickle() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not ended.wait(0.1):
                    connection.sendall(b"a")

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        with pytest.raises(AlertDeliveryError, match="no answer") as caught:
            Webhook(f"http://127.0.0.1:{port}/hunter2", timeout=1).send(message())
        ended.set()
        thread.join()
    assert caught.value.retryable
    with pytest.raises(AlertDeliveryError, match="ConnectionRefusedError") as caught:
        Webhook(f"http://127.0.0.1:{port}/hunter2").send(message())
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


# What a message says.


def test_hostile_text_stays_in_its_line_and_secrets_are_blanked() -> None:
    now = datetime.now(UTC)
    hostile = "a\x00b\nFAKE LINE \u202e\ud800 password=hunter2 postgresql://bob:hunter2@db/x"
    made = messages.critical([Firing(hostile, 1, 0, now, now, hostile, "new")], source="/s", now=now, read_from="table")
    assert made.body.isascii()
    assert "hunter2" not in made.body
    assert len(made.text.splitlines()) == 1
    assert len(made.title.splitlines()) == 1


def test_a_message_is_bounded_however_many_types_there_are() -> None:
    now = datetime.now(UTC)
    many = [Firing(f"type {n}" * 100, 1, 0, now, now, "m" * 10_000, "new") for n in range(5_000)]
    made = messages.critical(many, source="/s", now=now, read_from="table")
    assert len(made.body) < 40_000
    assert made.text.endswith("and 4980 types more.")
    assert json.loads(made.body)["data"]["types"] == 5_000
    over = messages.cleared({f"type {n}": now for n in range(5_000)}, source="/s", now=now)
    assert len(over.body) < 20_000


def test_what_a_process_has_told_counts_as_told_until_it_grows() -> None:
    now = datetime.now(UTC)
    row = {"error_type": "e", "threads": 1, "first_seen": now, "last_seen": now, "last_message": "m"}
    state = rules.absorb({}, {"e": 4}, now=now)

    def told(count: int, later: timedelta = timedelta()) -> list[str]:
        verdict = rules.judge(state, [{**row, "occurrences": count}], now=now + later, cooldown=timedelta(hours=1))
        return [one.why for one in verdict.firing]

    assert told(4) == told(39) == []
    assert told(40) == ["grown"]
    assert told(4, timedelta(hours=1)) == ["still"]
