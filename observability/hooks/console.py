"""The hook that writes each event to the program's log: one line, and the stack of a critical one.

It uses the logger `checkpointer.events`: where the lines go and from which level on is the program's choice.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from observability.scrub import one_line, safe_text

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent, Severity
    from checkpointer.hooks import Hook, HookContext

logger = logging.getLogger("checkpointer.events")

_LEVELS: dict[Severity, int] = {
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def create(context: HookContext) -> Hook:
    """Return the console hook; it needs no connection."""
    return log_event


def log_event(event: CheckpointEvent) -> None:
    """Log an event."""
    level = _LEVELS[event.severity]
    if logger.isEnabledFor(level):
        logger.log(level, "%s", _line(event))


def _line(event: CheckpointEvent) -> str:
    facts = {
        "type": event.error_type,
        "thread": event.thread_id,
        "run": event.run_id,
        "step": event.step,
        "checkpoints": event.checkpoint_count,
        "attempt": event.attempt if event.attempt > 1 else None,
        "outcome": event.outcome,
        "lost_from_step": event.lost_from_step,
        "exception": event.error and f"{event.error.type}: {event.error.message}",
    }
    said = [f"{name}={value}" for name, value in facts.items() if value is not None]
    line = one_line(safe_text(" ".join([f"{event.name}: {event.message}", *said])))
    if event.severity == "critical" and event.error and event.error.stack:
        # Behind a bar, so that no line of a message in it can pass for one of the log.
        stack = safe_text(event.error.stack, 16_000).rstrip("\n").split("\n")
        return "\n".join([line, *(f"  | {one_line(part)}" for part in stack)])
    return line
