"""An application on real servers, in which things can be made to go wrong, and all who look at it from outside.

A *scene* is one application on a database of its own, with the standard hooks and Prometheus, and everybody who looks
at it: a console, a user with a browser, an administrator with psql, one with the HTTP interface, a scraper. What they
have got in the end is a `Sight`. Not here: what goes wrong (`failures.py`), and how a sight is written down
(`failure_guide.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import psycopg
import redis
from helpers import wait_until, with_database
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql
from psycopg.rows import dict_row
from savers import NOTHING, config, reachable

import observability
from checkpointer import BufferedPostgresSaver, CheckpointEvent, TierUnavailableError
from observability.api import create_app
from observability.prometheus import PrometheusMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointer.embedded import Servers

THREAD = "chat-1"
"""The thread that the browser shows."""
OTHER = "chat-2"

_PREFIX = "support"
_ADMIN = "an-administrators-token"
_ROWS = "SELECT * FROM system_errors ORDER BY created_at, id"
_LOG = "SELECT * FROM thread_logs ORDER BY created_at, id"


@dataclass(frozen=True)
class Sight:
    """What those who look have got.

    Attributes:
        raised: Name and text of the exceptions that the application got.
        console: The entries of the program's log, each with its level.
        log: The lines of all threads' logs.
        browser: What the browser was sent, in the order in which it happened.
        rows: The table `system_errors`.
        listed: What the HTTP interface lists.
        details: What it answers for each of these.
        lines: What it answers for the log of `THREAD`.
        metrics: What it answers for Prometheus: the counters of events by name and severity, all others by their text.
    """

    raised: list[tuple[str, str]]
    console: list[str]
    log: list[dict[str, Any]]
    browser: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    listed: list[dict[str, Any]]
    details: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    metrics: dict[str, float]


class Scene:
    """An application, and all who look at it.

    Attributes:
        servers: Its servers; they are its own for as long as the scene lasts.
        prefix: What its keys begin with.
        postgres_uri: Its database.
        redis_url: Its Redis.
        events: What the savers have emitted.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.prefix = _PREFIX
        self.events: list[CheckpointEvent] = []
        self._name = f"test_{uuid4().hex}"
        self.postgres_uri = with_database(servers.postgres_uri, self._name)
        self.redis_url = servers.redis_url
        self._raised: list[tuple[str, str]] = []
        self._console: list[str] = []
        self._browser: list[dict[str, Any]] = []
        self._savers: list[BufferedPostgresSaver] = []
        self._registry = CollectorRegistry()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Scene:
        with psycopg.connect(self.servers.postgres_uri, autocommit=True) as admin:
            made = sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'")
            admin.execute(made.format(sql.Identifier(self._name)))
        self._stack.enter_context(_console(self._console))
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.servers.valkey, self.servers.postgres):
            if not server.is_alive():
                server.start()
        for saver in self._savers:
            saver.close()
        self._stack.close()
        with psycopg.connect(self.servers.postgres_uri, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self._name)))
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()

    # -- for those who make something go wrong ---------------------------------------------------------------------

    def saver(self, **options: Any) -> BufferedPostgresSaver:
        """Open a saver that flushes only when it is told to, and set it up."""
        saver = self.bare_saver(**options)
        saver.setup()
        return saver

    def bare_saver(self, **options: Any) -> BufferedPostgresSaver:
        """Open a saver without setting it up."""
        defaults = {"triggers": NOTHING, "postgres_timeout": 1.0, "redis_timeout": 1.0, "close_timeout": 2.0}
        saver = BufferedPostgresSaver.from_conn_string(
            self.postgres_uri, redis_url=self.redis_url, prefix=self.prefix, **{**defaults, **options}
        )
        self._savers.append(saver)
        saver.hooks.add(self.events.append, name="recorder")
        PrometheusMetrics(saver, registry=self._registry)
        if len(self._savers) == 1:
            self._stack.enter_context(_browser(self._browser))
        return saver

    @property
    def latest(self) -> BufferedPostgresSaver:
        """The saver that was opened last, also if it could not be set up."""
        return self._savers[-1]

    @contextlib.contextmanager
    def raises(self, error: type[Exception]) -> Iterator[None]:
        """Expect that the application gets an exception."""
        try:
            yield
        except error as exc:
            self._raised.append((type(exc).__name__, str(exc)))
        else:
            raise AssertionError(f"no {error.__name__} was raised")

    @contextlib.contextmanager
    def postgres(self) -> Iterator[psycopg.Connection[Any]]:
        """Connect to the database, around the savers."""
        with psycopg.connect(self.postgres_uri, autocommit=True, row_factory=dict_row) as conn:
            yield conn

    @contextlib.contextmanager
    def locked_partitions(self) -> Iterator[None]:
        """Be another worker, which holds all partitions."""
        with psycopg.connect(self.postgres_uri) as other:
            other.execute("SELECT 1 FROM checkpoint_buffer_partitions FOR UPDATE")
            yield

    def named(self, name: str) -> list[CheckpointEvent]:
        """Return the events of this name so far."""
        return [event for event in self.events if event.name == name]

    def wait_for(self, name: str) -> CheckpointEvent:
        """Wait for an event, and return the first of this name."""
        return wait_until(lambda: self.named(name), message=f"{name} is emitted")[0]

    def wait_for_server(self, name: str) -> None:
        """Go on working with a server until the application has noticed that it is back."""

        def is_noticed() -> bool:
            if name == "redis":
                reachable(self.latest)
            else:
                with contextlib.suppress(TierUnavailableError):
                    list(self.latest.list(config("nobody")))
            return any(event.context["backend"] == name for event in self.named("backend.up"))

        wait_until(is_noticed, message=f"{name} is back")

    def wait_for_row(self, name: str) -> dict[str, Any]:
        """Wait for the row of an event, and return it."""
        return wait_until(
            lambda: [row for row in self.rows() if row["error_context"]["event"] == name], message=f"{name} is stored"
        )[0]

    def wait_for_resolution(self, *names: str) -> None:
        """Wait until the system has seen that the errors of these names are over."""

        def is_resolved() -> bool:
            found = [row for row in self.rows() if row["error_context"]["event"] in names]
            return {row["error_context"]["event"] for row in found} == {*names} and all(
                row["resolved_by"] == "system" for row in found
            )

        wait_until(is_resolved, message=f"{names} are resolved")

    def rows(self) -> list[dict[str, Any]]:
        """Return what an administrator finds."""
        with self.postgres() as conn:
            return conn.execute(_ROWS).fetchall()

    # -- for those who look at it ----------------------------------------------------------------------------------

    def look(self) -> Sight:
        """Wait until everybody has got what is meant for them, and return it; fail if somebody does not get it."""
        for saver in self._savers:
            saver.hooks.flush(10)
        with contextlib.suppress(AssertionError):  # what is missing says more
            wait_until(lambda: not self._missing(), timeout=30)
        assert not self._missing()
        with self.postgres() as conn:
            log = conn.execute(_LOG).fetchall()
        listed, details, lines, metrics = asyncio.run(self._ask())
        return Sight(
            raised=self._raised,
            console=self._console,
            log=log,
            browser=sorted(self._browser, key=lambda view: (view["timestamp"], view["event_id"])),
            rows=self.rows(),
            listed=listed,
            details=details,
            lines=lines,
            metrics=metrics,
        )

    def _missing(self) -> set[str]:
        """Return what the servers have not brought to somebody yet."""
        with self.postgres() as conn:
            logged = {("line", line["event_id"]) for line in conn.execute(_LOG)}
        stored = {("row", row["event_id"]) for row in self.rows()}
        shown = {("screen", view["event_id"]) for view in self._browser}
        found = {(way, str(identity)) for way, identity in stored | logged | shown}
        return {f"{way}: {event.name}" for way, event in self._owed() if (way, str(event.event_id)) not in found}

    def _owed(self) -> Iterator[tuple[str, CheckpointEvent]]:
        """Yield each event, with each of the ways that take their time."""
        for event in self.events:
            if event.error_type and event.severity != "info":
                yield "row", event
            if event.user_notice and event.thread_id:
                yield "line", event
                if event.thread_id == THREAD:
                    yield "screen", event

    async def _ask(self) -> tuple[list[Any], list[Any], list[Any], dict[str, float]]:
        """Ask the HTTP interface, as a part of the application's process."""
        app = create_app(
            postgres_uri=self.postgres_uri,
            redis_url=self.redis_url,
            prefix=self.prefix,
            admin_token=_ADMIN,
            registry=self._registry,
        )
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers={"Authorization": f"Bearer {_ADMIN}"}
        )

        async def get(path: str) -> httpx.Response:
            return (await client.get(path)).raise_for_status()

        async with app.router.lifespan_context(app), client:
            listed = (await get("/admin/system-errors?state=all&limit=100")).json()["errors"]
            details = [(await get(f"/admin/system-errors/{each['id']}")).json()["error"] for each in listed]
            lines = (await get(f"/threads/{THREAD}/logs")).json()["lines"]
            text = (await get("/metrics")).text
        return listed, details, lines, dict(_samples(text))


def _samples(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            yield f"{sample.name}{{{labels}}}", sample.value


@contextlib.contextmanager
def _console(lines: list[str]) -> Iterator[None]:
    """Keep what the console hook logs."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    logger, handler = logging.getLogger("checkpointer.events"), Keep()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _browser(views: list[dict[str, Any]]) -> Iterator[None]:
    """Be the browser that shows the thread, in a loop and a thread of its own."""
    loop, ready, target = asyncio.new_event_loop(), threading.Event(), observability.target.current()

    async def watch() -> None:
        async with observability.subscribe_run_events(THREAD, observability=target) as found:
            ready.set()
            async for view in found:
                views.append(view)

    async def end(task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait([task])

    watching = loop.create_task(watch())
    thread = threading.Thread(target=loop.run_forever, name="browser", daemon=True)
    thread.start()
    assert ready.wait(30)
    yield
    asyncio.run_coroutine_threadsafe(end(watching), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
