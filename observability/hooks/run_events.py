"""The hook that sends what a thread's user is to know to those who watch that thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from observability.hooks import TargetHook
from observability.projections import is_for_user, user_view

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent
    from checkpointer.hooks import Hook, HookContext
    from observability.target import Observability


def create(context: HookContext) -> Hook:
    """Return the run-event hook."""
    return TargetHook(context, _handle)


def _handle(observability: Observability, event: CheckpointEvent) -> None:
    if is_for_user(event):
        observability.runs.publish(user_view(event))
