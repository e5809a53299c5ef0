"""Where reports go: one `Observability` for each target, and which one is meant if none is named.

A *target* is a database, a Redis and a key prefix. The standard hooks of a saver share one object, which is
*active* from the first of them until the last is closed. Not here: the stores themselves.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from datetime import UTC
from typing import TYPE_CHECKING, Any

import psycopg
import redis
from psycopg.conninfo import conninfo_to_dict

from checkpointer.events import CheckpointEvent, Severity
from checkpointer.hooks import HookContext, Hooks, redis_client, renew_in_child
from checkpointer.instruments import Reading
from checkpointer.metrics import SPOOLED_ROWS
from checkpointer.search_path import key_prefix, with_search_path
from observability.errors import SYSTEM_ERRORS, SystemErrorStore
from observability.errors.recoveries import RECOVERIES
from observability.errors.retention import Retention
from observability.links import PostgresLink, RedisLink
from observability.logs import THREAD_LOGS, ThreadLog
from observability.outbox import Outbox
from observability.projections import user_view
from observability.runs import RunEvents
from observability.scrub import safe_json, safe_text
from observability.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NOTICE_FACTS = ("type", "checkpoint_count", "lost_from_step", "outcome")
_LOG_LINE = "application.log"
_RUN_EVENT = "application.run_event"
_SEVERITY_OF_LEVEL: dict[str, Severity] = {
    "warning": "warning",
    "error": "error",
    "critical": "critical",
}


class Observability:
    """The stores of one target, and a queue in front of them for the application's own reports.

    Nothing is connected or started until it is needed. After a fork the child has connections and threads
    of its own.

    Args:
        context: The target.
    """

    def __init__(self, context: HookContext) -> None:
        self._postgres = PostgresLink(context)
        self._redis = RedisLink(context)
        self.spool = Spool(context.identity)
        self._unmeasure = context.instruments.add_source(self._readings)
        tables = (SYSTEM_ERRORS, THREAD_LOGS, RECOVERIES)
        self._outbox = Outbox(self._postgres, self._redis, self.spool, context.prefix, tables, context.emit)
        self.errors = SystemErrorStore(self._outbox, context.prefix)
        self.retention = Retention(context.connect_postgres)
        self.log = ThreadLog(self._outbox, self._postgres, self._redis, context.prefix)
        self.runs = RunEvents(context, self._postgres, self._redis)
        # The application's reports get what the saver's events get: a bounded queue, a share of it for
        # criticals, and a thread that waits for the servers in the caller's place.
        self._queue = Hooks()
        self._queue.add(self._handle, name="observability")

    def submit(self, event: CheckpointEvent) -> None:
        """Queue a report; never waits and never raises. One about the storing of another one is not stored."""
        if not self._outbox.is_storing():
            self._queue.emit(event)

    def write_notice(self, event: CheckpointEvent) -> None:
        """Write the user's view of an event to its thread's log; waits for the servers."""
        view = user_view(event)
        self.log.add(
            view["message"],
            thread_id=view["thread_id"],
            level=view["severity"],
            event_id=event.event_id,
            occurred_at=event.occurred_at.astimezone(UTC),
            context={key: view[key] for key in _NOTICE_FACTS if key in view},
        )

    def submit_log_line(self, message: str, *, thread_id: str, level: str) -> None:
        """Queue a line for a thread's log; never waits and never raises."""
        severity = _SEVERITY_OF_LEVEL.get(level, "info")
        self.submit(
            CheckpointEvent(
                name=_LOG_LINE,
                severity=severity,
                message=message,
                thread_id=thread_id,
                component="application",
                context={"level": level},
            )
        )

    def submit_run_event(self, view: Mapping[str, Any], *, thread_id: str) -> None:
        """Queue a view for those who watch a thread; never waits and never raises."""
        critical = view.get("severity") == "critical"
        self.submit(
            CheckpointEvent(
                name=_RUN_EVENT,
                severity="critical" if critical else "info",
                message="",
                thread_id=thread_id,
                component="application",
                context=view,
            )
        )

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until what was submitted before has been stored; return whether it has."""
        is_done = self._queue.flush(timeout)
        self.errors.flush()
        return is_done

    def close(self, timeout: float = 5.0) -> None:
        """Store what was submitted, then end threads and connections; calling it again does nothing."""
        self._unmeasure()
        self._queue.close(timeout)
        self.runs.close(timeout)
        self.retention.close(timeout)
        self.errors.close(timeout)
        self._outbox.close(timeout)
        self._redis.close()
        self._postgres.close()

    def _readings(self) -> Iterator[Reading]:
        if (rows := self.spool.count()) is not None:
            yield Reading(SPOOLED_ROWS, {(): rows})

    def _handle(self, event: CheckpointEvent) -> None:
        if event.name == _LOG_LINE:
            self.log.add(
                event.message,
                thread_id=event.thread_id or "",
                level=event.context["level"],
                event_id=event.event_id,
                occurred_at=event.occurred_at,
            )
        elif event.name == _RUN_EVENT:
            self.runs.publish({**safe_json(event.context), "thread_id": event.thread_id})
        else:
            self.errors.add(event)


class _Registry:
    """The process's active targets, innermost last; guarded by a lock."""

    def __init__(self) -> None:
        self._active: dict[HookContext, tuple[Observability, int]] = {}
        self._from_environment: dict[tuple[str | None, ...], Observability] = {}
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def acquire(self, context: HookContext) -> Observability:
        with self._lock:
            observability, users = self._active.get(context) or (Observability(context), 0)
            self._active[context] = (observability, users + 1)
            return observability

    def release(self, context: HookContext, timeout: float) -> None:
        with self._lock:
            if context not in self._active:
                return
            observability, users = self._active[context]
            if users > 1:
                self._active[context] = (observability, users - 1)
                return
            del self._active[context]
        observability.close(timeout)

    def current(self) -> Observability:
        with self._lock:
            if self._active:
                return next(reversed(self._active.values()))[0]
            names = ("POSTGRES_URI", "REDIS_URL", "CHECKPOINTER_SCHEMA")
            addresses = tuple(os.environ.get(name) or None for name in names)
            if addresses not in self._from_environment:
                postgres_uri, redis_url, schema = addresses
                opened = open_target(postgres_uri, redis_url, schema=schema)
                self._from_environment[addresses] = opened
                if postgres_uri is None:
                    _warn(opened, redis_url)
            return self._from_environment[addresses]


_registry: _Registry | None = None
_registry_lock = threading.Lock()


def _the_registry() -> _Registry:
    global _registry
    if _registry is None:
        with _registry_lock:
            if _registry is None:
                _registry = _Registry()
    return _registry


def acquire(context: HookContext) -> Observability:
    """Return the object that the hooks of one saver share, and make it active."""
    return _the_registry().acquire(context)


def release(context: HookContext, timeout: float = 5.0) -> None:
    """Undo one `acquire`; the last one closes the object."""
    _the_registry().release(context, timeout)


def current() -> Observability:
    """Return the target that is meant if none is named.

    That is the one of the most recently opened saver that is not yet closed; without one, the one that
    POSTGRES_URI, REDIS_URL and CHECKPOINTER_SCHEMA name; without those, one that can only keep errors in the local
    spool file.
    """
    return _the_registry().current()


def open_target(
    postgres_uri: str | None, redis_url: str | None, *, prefix: str = "checkpointer", schema: str | None = None
) -> Observability:
    """Make the object for a target that addresses name; whoever calls this closes it.

    Args:
        postgres_uri: Where Postgres is; without it errors wait in Redis or in the local spool file.
        redis_url: Where Redis is; without it errors of an outage wait in the local spool file.
        prefix: The saver's.
        schema: The saver's.
    """

    def connect_postgres() -> psycopg.Connection[Any]:
        if postgres_uri is None:
            raise psycopg.OperationalError("POSTGRES_URI is not set")
        # Unprepared: a pooler may stand between, and nothing here is hot.
        settings: dict[str, Any] = {"prepare_threshold": None}
        if schema is not None:
            options = conninfo_to_dict(postgres_uri).get("options")
            settings["options"] = with_search_path(None if options is None else str(options), schema)
        return psycopg.connect(postgres_uri, autocommit=True, connect_timeout=3, **settings)

    def connect_redis() -> redis.Redis:
        if redis_url is None:
            raise redis.ConnectionError("REDIS_URL is not set")
        return redis_client(redis_url, timeout=2)

    others = [name for name in (schema, prefix if prefix != "checkpointer" else None) if name]
    addresses = (postgres_uri, redis_url, *others)
    digest = hashlib.sha256(repr(addresses).encode()).hexdigest()[:16]
    return Observability(HookContext(connect_postgres, connect_redis, key_prefix(prefix, schema), f"env-{digest}"))


def _warn(opened: Observability, redis_url: str | None) -> None:
    sys.stderr.write(
        safe_text(
            "observability: no saver is open and POSTGRES_URI is not set; "
            f"errors wait in {'Redis or in ' if redis_url else ''}{opened.spool.path}"
        )
        + "\n"
    )
