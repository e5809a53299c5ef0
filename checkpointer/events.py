"""What happened: one frozen record for each thing that an operator or a user may want to know.

Not here: who gets it (`hooks.py`) and what becomes of it (`observability/`). An event never holds live
objects: an exception is reduced to text by `describe_error`, which leaves out what quotes row values.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import psycopg

if TYPE_CHECKING:
    from collections.abc import Mapping

Severity = Literal["info", "warning", "error", "critical"]
Outcome = Literal["retrying", "buffered", "recovered", "lost"]

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error", "critical")
"""Severities in ascending order of rank."""

_STACK_LIMIT = 16_000
_MESSAGE_LIMIT = 2_000


def uuid7() -> UUID:
    """Return a UUID of version 7: sorts by creation time in milliseconds (RFC 9562, section 5.7)."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def active_trace_id() -> str | None:
    """Return the trace of the active OpenTelemetry span; None without one, or if nobody has imported the library."""
    # Absent while the module is being imported by another thread.
    current = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current is None:
        return None
    context = current().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An exception as text.

    Attributes:
        type: Qualified class name, for example `psycopg.errors.AdminShutdown`.
        message: The message; of a Postgres error only the primary one, since DETAIL and CONTEXT quote rows.
        sqlstate: The five-character code of a Postgres error, else None.
        stack: The formatted stack trace, at most 16,000 characters.
        causes: `type: message` of each exception in the cause chain, outermost first.
    """

    type: str
    message: str
    sqlstate: str | None = None
    stack: str = ""
    causes: tuple[str, ...] = ()


def _message_of(exc: BaseException) -> str:
    if isinstance(exc, psycopg.Error) and exc.diag.message_primary:
        return exc.diag.message_primary[:_MESSAGE_LIMIT]
    return str(exc)[:_MESSAGE_LIMIT]


def _type_of(exc: BaseException) -> str:
    cls = type(exc)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def describe_error(exc: BaseException) -> ErrorInfo:
    """Reduce an exception to text; no frame, local variable or row value is kept."""
    chain: list[BaseException] = []
    seen = exc.__cause__ or exc.__context__
    while seen is not None and len(chain) < 10 and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    frames: list[str] = []
    for link in [*reversed(chain), exc]:
        # Without marks under the lines, for which Python parses them: before 3.11.8 a thread that parses can make
        # ast.parse fail in another one (python/cpython#106905), and this runs in threads of the saver's own.
        places = traceback.extract_tb(link.__traceback__)
        frames += traceback.format_list(
            [traceback.FrameSummary(at.filename, at.lineno, at.name, line=at.line) for at in places]
        )
        frames.append(f"{_type_of(link)}: {_message_of(link)}\n")
    return ErrorInfo(
        type=_type_of(exc),
        message=_message_of(exc),
        sqlstate=exc.sqlstate if isinstance(exc, psycopg.Error) else None,
        stack="".join(frames)[-_STACK_LIMIT:],
        causes=tuple(f"{_type_of(link)}: {_message_of(link)}" for link in chain),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvent:
    """One thing that happened on a checkpoint's way.

    Attributes:
        event_id: UUIDv7 made where the event happened; replaying an event keeps it.
        name: What happened, dotted: `flush.failed`, `flush.recovered`, `backend.down`, `put.sanitized`, ...
        error_type: The class of trouble for the error store: `checkpoint_flush_error`,
            `checkpoint_buffer_error`, `redis_connection_error`, `postgres_connection_error`,
            `checkpoint_lost`, ...; None for an event that is no error.
        severity: `info`, `warning`, `error` or `critical`.
        message: One sentence for people, without row values or credentials.
        occurred_at: When it happened, UTC.
        thread_id: The LangGraph thread, if the event is about one.
        run_id: The run, if known.
        checkpoint_ns: The namespace, if known.
        checkpoint_id: The checkpoint, if known.
        step: The superstep of the checkpoint, if known.
        component: The part that speaks: `saver`, `buffer`, `store`, `flusher`, `application`.
        operation: What it was doing: `put`, `put_writes`, `get_tuple`, `flush`, ...
        attempt: How many times it was tried, from 1.
        outcome: What became of the data: `retrying`, `buffered`, `recovered` or `lost`.
        lost_from_step: With `lost`: the first step that is not saved.
        checkpoint_count: How many checkpoints are concerned (always set for a flush).
        error: The exception, as text.
        context: Anything else, JSON-like.
        user_notice: True if the thread's user is to be told (operators always are).
        trace_id: Of the OpenTelemetry span that was active, 32 hexadecimal digits; None without one.
    """

    name: str
    severity: Severity
    message: str
    error_type: str | None = None
    event_id: UUID = field(default_factory=uuid7)
    occurred_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    thread_id: str | None = None
    run_id: str | None = None
    checkpoint_ns: str | None = None
    checkpoint_id: str | None = None
    step: int | None = None
    component: str = "saver"
    operation: str | None = None
    attempt: int = 1
    outcome: Outcome | None = None
    lost_from_step: int | None = None
    checkpoint_count: int | None = None
    error: ErrorInfo | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    user_notice: bool = False
    trace_id: str | None = field(default_factory=active_trace_id)
