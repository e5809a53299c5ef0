"""The two views of an event: everything for operators, a chosen sentence for the user of a thread.

The *user view* is built from nothing but an allow-list of sentences and a few numbers, so that no exception
text, stack, host or connection string can reach a browser. The *operator view* is a row of `system_errors`.
"""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Any

from observability.scrub import safe_json, safe_name, safe_text

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent, Severity

_USER_SEVERITY: dict[Severity, str] = {
    "info": "info",
    "warning": "warning",
    "error": "critical",
    "critical": "critical",
}

_USER_MESSAGES = {
    "flush.failed": "This conversation could not be saved to permanent storage yet. It is buffered.",
    "flush.incomplete": "Saving this conversation takes longer than usual. It is buffered.",
    "flush.recovered": "This conversation is saved again.",
    "put.failed": "This conversation can no longer be saved.",
    "put.refused": "A value in this conversation cannot be stored, and the conversation can no longer be saved.",
    "put.around": "Saving this conversation is slower than usual, but nothing is lost.",
    "put.late": "This conversation was deleted while it was going on; what is still going on is not saved.",
    "put.unacknowledged": "Saving this conversation takes longer than usual. It is buffered.",
    "put.sanitized": "Some values in this conversation could not be stored as they were and were replaced.",
    "backend.down": "A part of the storage for this conversation is not available at the moment.",
    "backend.up": "The storage for this conversation is available again.",
    "read.unverified": "This conversation was loaded without confirming that it is the latest version.",
    "dead_letter.added": "A part of this conversation cannot be saved to permanent storage. It is buffered, and an "
    "administrator has to look at it.",
    "dead_letter.replayed": "This conversation is saved again.",
    "checkpoint.lost": "A part of this conversation was lost.",
    "recovery.found": "Unsaved progress of this conversation was found after a restart, and is saved now.",
}
# Losses that have a sentence of their own.
_NOT_SAVED = ("put.failed", "put.refused")
_UNKNOWN_MESSAGE = "There was a problem with saving this conversation."
_UNKNOWN_INFO_MESSAGE = "The storage of this conversation reported a change."

_CONTEXT_BYTES = 64_000


def is_for_user(event: CheckpointEvent) -> bool:
    """Return whether the thread's user is to be told of this event."""
    return event.user_notice and event.thread_id is not None


def user_view(event: CheckpointEvent) -> dict[str, Any]:
    """Return what a thread's user may see of an event."""
    view: dict[str, Any] = {
        "type": event.error_type or event.name,
        "severity": _USER_SEVERITY[event.severity],
        "message": _user_message(event),
        "thread_id": event.thread_id,
        "timestamp": event.occurred_at.astimezone(UTC).isoformat(),
        "event_id": str(event.event_id),
        "checkpoint_count": event.checkpoint_count,
    }
    if event.lost_from_step is not None:
        view["lost_from_step"] = event.lost_from_step
    if event.outcome is not None:
        view["outcome"] = event.outcome
    return view


def _user_message(event: CheckpointEvent) -> str:
    unknown = _UNKNOWN_INFO_MESSAGE if event.severity == "info" else _UNKNOWN_MESSAGE
    name = "checkpoint.lost" if event.outcome == "lost" and event.name not in _NOT_SAVED else event.name
    message = _USER_MESSAGES.get(name, unknown)
    if event.lost_from_step is not None:
        step = int(event.lost_from_step)
        is_over = event.name == "checkpoint.lost"  # the run goes on, and later steps are saved
        message += f" It begins with step {step}." if is_over else f" Steps {step} onward are not saved."
    return message


def operator_view(event: CheckpointEvent) -> dict[str, Any]:
    """Return everything about an event as the values of a `system_errors` row, fit to be stored."""
    error = event.error
    return {
        "event_id": str(event.event_id),
        "error_type": safe_name(event.error_type or event.name, 200),
        "severity": event.severity,
        "thread_id": _name(event.thread_id),
        "error_message": safe_text(event.message or (error.message if error else "")),
        "stack_trace": safe_text(error.stack, 16_000) if error and error.stack else None,
        "error_context": _error_context(event),
        "created_at": event.occurred_at.astimezone(UTC).isoformat(),
        "occurrences": 1,
        "error_code": safe_name(error.sqlstate, 20) if error and error.sqlstate else None,
        "run_id": _name(event.run_id),
        "checkpoint_ns": _name(event.checkpoint_ns),
        "checkpoint_id": _name(event.checkpoint_id),
        "component": _name(event.component),
        "operation": _name(event.operation),
        "outcome": event.outcome,
    }


def _name(value: str | None) -> str | None:
    return None if value is None else safe_name(value)


def _error_context(event: CheckpointEvent) -> dict[str, Any]:
    facts: dict[str, Any] = {"event": event.name, "attempt": event.attempt}
    if event.checkpoint_count is not None or event.name.startswith("flush."):
        facts["checkpoint_count"] = event.checkpoint_count or 0
    if event.step is not None:
        facts["step"] = event.step
    if event.lost_from_step is not None:
        facts["lost_from_step"] = event.lost_from_step
    if event.error is not None:
        facts["exception_type"] = event.error.type
        facts["exception_message"] = event.error.message
        facts["sqlstate"] = event.error.sqlstate
        if event.error.causes:
            facts["causes"] = event.error.causes
    clean: dict[str, Any] = safe_json(facts)
    # What the event says of itself wins over a context key of the same name.
    context: dict[str, Any] = safe_json({**event.context, **facts})
    size = len(repr(context))
    return context if size <= _CONTEXT_BYTES else {**clean, "context_left_out_bytes": size}
