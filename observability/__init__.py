"""Carries what happens on a checkpoint's way to people: the store of errors, the thread log, live run events.

The functions here are for the application's own reports; the saver's events come by its hooks
(`observability.hooks`). They hand a report over and return: none waits for a server or raises because one is
away. Each takes `observability=`; without it the report goes to the target of the most recently opened saver
that is not yet closed, else to the one that the environment variables POSTGRES_URI and REDIS_URL name.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from checkpointer.errors import ConfigurationError
from checkpointer.events import CheckpointEvent, Severity, describe_error, uuid7
from observability.log_handler import ThreadLogHandler
from observability.mappings import ag_ui_event, cloud_event, stream_chunk
from observability.projections import user_view
from observability.target import Observability, current

if TYPE_CHECKING:
    from collections.abc import Mapping

    from observability.following import AsyncFollower, Follower
    from observability.runs import RunEventSubscription

__all__ = [
    "Observability",
    "ThreadLogHandler",
    "log_system_error",
    "log_system_error_sync",
    "emit_log",
    "broadcast_run_event",
    "subscribe_run_events",
    "read_thread_log",
    "aread_thread_log",
    "follow_thread_log",
    "afollow_thread_log",
    "ag_ui_event",
    "cloud_event",
    "stream_chunk",
]


async def log_system_error(
    *,
    error_type: str,
    severity: Severity,
    error_message: str,
    thread_id: str | None = None,
    error_context: Mapping[str, Any] | None = None,
    exc: BaseException | None = None,
    observability: Observability | None = None,
) -> None:
    """Report an error of the application: it becomes a row of `system_errors`.

    Args:
        error_type: The class of trouble, for example `redis_connection_error`.
        severity: `info`, `warning`, `error` or `critical`.
        error_message: One sentence for operators.
        thread_id: The LangGraph thread, if it is about one.
        error_context: Anything that helps, JSON-like; secrets are blanked.
        exc: The exception; its type, message, SQLSTATE and stack are stored.
        observability: Where it goes, if not to the active target.
    """
    log_system_error_sync(
        error_type=error_type,
        severity=severity,
        error_message=error_message,
        thread_id=thread_id,
        error_context=error_context,
        exc=exc,
        observability=observability,
    )


def log_system_error_sync(
    *,
    error_type: str,
    severity: Severity,
    error_message: str,
    thread_id: str | None = None,
    error_context: Mapping[str, Any] | None = None,
    exc: BaseException | None = None,
    observability: Observability | None = None,
) -> None:
    """As `log_system_error`, for code that is not async."""
    event = CheckpointEvent(
        name="application.error",
        error_type=error_type,
        severity=severity,
        message=error_message,
        thread_id=thread_id,
        component="application",
        error=None if exc is None else describe_error(exc),
        context=dict(error_context or {}),
    )
    (observability or current()).submit(event)


def emit_log(message: str, *, thread_id: str, level: str = "info", observability: Observability | None = None) -> None:
    """Write a line to the log of a thread, for the people behind it.

    Args:
        message: The line.
        thread_id: The LangGraph thread.
        level: `info`, `warning`, `error`, or any other word.
        observability: Where it goes, if not to the active target.
    """
    (observability or current()).submit_log_line(message, thread_id=thread_id, level=level)


def broadcast_run_event(
    event: CheckpointEvent | Mapping[str, Any], *, observability: Observability | None = None
) -> None:
    """Send an event to everyone who watches its thread.

    Args:
        event: An event of the saver, of which only the user's view is sent; or a mapping of JSON values with
            a `thread_id`, sent as it is with secrets blanked. `type`, `timestamp` and `event_id` are added
            if they are missing.
        observability: Where it goes, if not to the active target.

    Raises:
        ConfigurationError: The event has no thread.
    """
    view = user_view(event) if isinstance(event, CheckpointEvent) else dict(event)
    thread_id = view.get("thread_id")
    if not isinstance(thread_id, str) or not thread_id:
        raise ConfigurationError("a run event needs the thread_id of the thread that it is about")
    view.setdefault("type", "custom")
    view.setdefault("timestamp", datetime.now(UTC).isoformat())
    view.setdefault("event_id", str(uuid7()))
    (observability or current()).submit_run_event(view, thread_id=thread_id)


def subscribe_run_events(
    thread_id: str, *, last_event_id: str | None = None, observability: Observability | None = None
) -> RunEventSubscription:
    """Watch a thread: an async iterator over dicts, each with `type`, `event_id`, `thread_id`, `timestamp`.

    Call it in a running event loop. It is subscribed from the call on; under `async with` it is also sure to
    be connected to the other processes before the block begins. It ends with `aclose()`, with the block, or
    when the target is closed.

    Args:
        thread_id: The LangGraph thread.
        last_event_id: The `event_id` of the last dict seen before a reconnect. What came after it (at most
            256 events of ten minutes) is delivered first; a dict `{"type": "reset"}` comes before it if
            something in between may be missing.
        observability: Where to listen, if not at the active target.
    """
    return (observability or current()).runs.subscribe(thread_id, last_event_id)


def read_thread_log(
    thread_id: str, limit: int = 100, *, observability: Observability | None = None
) -> list[dict[str, Any]]:
    """Return the last lines of a thread's log, oldest first.

    Args:
        thread_id: The LangGraph thread.
        limit: How many lines at most.
        observability: Where to read, if not from the active target.

    Returns:
        Dicts with `thread_id`, `level`, `message`, `event_id`, `context` and `created_at` (ISO 8601, UTC).
        With Postgres away, what is left of the last 256 lines of ten minutes.

    Raises:
        StoreUnavailableError: Neither Postgres nor Redis can be reached.
    """
    return (observability or current()).log.read(thread_id, limit)


async def aread_thread_log(
    thread_id: str, limit: int = 100, *, observability: Observability | None = None
) -> list[dict[str, Any]]:
    """As `read_thread_log`, without blocking the event loop."""
    return await asyncio.to_thread(read_thread_log, thread_id, limit, observability=observability)


def follow_thread_log(thread_id: str, *, lines: int = 10, observability: Observability | None = None) -> Follower:
    """Follow the log of a thread: an iterator over its last lines and then over each new one, as it arrives.

    It waits for the next line, about half a second behind, and ends with `close()` or with its `with` block. A line
    whose transaction commits after later ones is delivered all the same (how: `observability/following.py`). While
    Postgres is away it waits, and goes on without a gap: what could not be stored meanwhile arrives after it.

    Args:
        thread_id: The LangGraph thread.
        lines: With how many of the lines that are there already it begins.
        observability: Where to read, if not from the active target.

    Returns:
        An iterator over dicts like those of `read_thread_log`.
    """
    return (observability or current()).log.follow(thread_id, lines)


def afollow_thread_log(thread_id: str, *, lines: int = 10, observability: Observability | None = None) -> AsyncFollower:
    """As `follow_thread_log`: an async iterator, which ends with `aclose()` or with its `async with` block."""
    return (observability or current()).log.afollow(thread_id, lines)
