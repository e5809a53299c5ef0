"""The hook that writes what a thread's user is to know into the log of that thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from observability.hooks import TargetHook
from observability.projections import is_for_user

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent
    from checkpointer.hooks import Hook, HookContext
    from observability.target import Observability


def create(context: HookContext) -> Hook:
    """Return the thread log hook."""
    return TargetHook(context, _handle)


def _handle(observability: Observability, event: CheckpointEvent) -> None:
    if is_for_user(event):
        observability.write_notice(event)
