"""An event in the formats of others: CloudEvents, AG-UI, and LangGraph's custom stream.

Each is a plain dict of JSON values, so none needs a library. What goes to a browser is built from the user's view
alone (`projections`).
"""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Any, Literal

from observability.projections import operator_view, user_view
from observability.scrub import safe_name

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent

HEALTH = "checkpoint_health"
"""The name under which clients find these events in AG-UI and in LangGraph's custom stream."""


def cloud_event(
    event: CheckpointEvent, *, source: str, audience: Literal["operator", "user"] = "operator"
) -> dict[str, Any]:
    """Return an event as a CloudEvent in the JSON format (CloudEvents 1.0.2).

    Args:
        event: The event.
        source: Who speaks, a URI reference: `/my-service/checkpoints`. With the id it is unique, so a consumer can
            tell a repeated delivery from a new event.
        audience: For whom `data` is: everything for operators, or what a thread's user may see.

    Returns:
        `id` is the event's id, `type` is `langgraph.checkpoint.` and its name, `subject` the thread, if there is one.
    """
    found = {
        "specversion": "1.0",
        "id": str(event.event_id),
        "source": source,
        "type": f"langgraph.checkpoint.{event.name}",
        "time": event.occurred_at.astimezone(UTC).isoformat(),
        "datacontenttype": "application/json",
        "data": operator_view(event) if audience == "operator" else user_view(event),
    }
    if event.thread_id:
        found["subject"] = safe_name(event.thread_id)
    return found


def ag_ui_event(event: CheckpointEvent) -> dict[str, Any]:
    """Return the user's view of an event as one of AG-UI.

    It is a `CUSTOM` event, also for what is critical: `RUN_ERROR` would end the run for AG-UI's clients, while the
    agent goes on.
    """
    return {
        "type": "CUSTOM",
        "name": HEALTH,
        "value": user_view(event),
        "timestamp": int(event.occurred_at.timestamp() * 1_000),
    }


def stream_chunk(event: CheckpointEvent) -> dict[str, Any]:
    """Return the user's view of an event as a chunk of LangGraph's custom stream."""
    return {"name": HEALTH, "payload": user_view(event)}
