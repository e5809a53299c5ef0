"""The store of errors: each becomes a row of `system_errors`, also one that happens while Postgres is away.

Not here: the ways that a row can take (`observability/outbox.py`), and which events are errors
(`observability/hooks/system_errors.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from observability.outbox import Outbox, Table, Values
from observability.projections import operator_view

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent

__all__ = ["SYSTEM_ERRORS", "SystemErrorStore"]


def _stand_in(event_id: str, message: str) -> Values:
    return {
        "event_id": event_id,
        "error_type": "system_error_unreadable",
        "severity": "error",
        "error_message": message,
        "error_context": {},
        "occurrences": 1,
        "component": "observability",
    }


SYSTEM_ERRORS = Table(
    name="system_errors",
    stream="errors",
    columns={
        "event_id": "uuid",
        "error_type": "text",
        "severity": "text",
        "thread_id": "text",
        "error_message": "text",
        "stack_trace": "text",
        "error_context": "jsonb",
        "created_at": "timestamptz",
        "delivery": "text",
        "occurrences": "int",
        "error_code": "text",
        "run_id": "text",
        "checkpoint_ns": "text",
        "checkpoint_id": "text",
        "component": "text",
        "operation": "text",
        "outcome": "text",
    },
    stand_in=_stand_in,
)
"""Where rows of errors go."""


class SystemErrorStore:
    """Takes errors and sees that each becomes one row.

    Args:
        outbox: Knows `SYSTEM_ERRORS`.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def add(self, event: CheckpointEvent) -> str:
        """Store an event as a row; waits for the server, so not for the saver's own thread.

        Returns:
            The way it took: `direct`, `redis`, `spool` or `stderr`.
        """
        return self._outbox.add(SYSTEM_ERRORS, operator_view(event))

    def collect_leftovers(self) -> None:
        """Start moving what an earlier process could not bring into the table."""
        self._outbox.drain_soon()
