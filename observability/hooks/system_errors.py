"""The hook that makes each event that is an error a row of `system_errors`, and resolves what is over by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointer.events import SEVERITIES
from observability.hooks import TargetHook

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent
    from checkpointer.hooks import Hook, HookContext
    from observability.target import Observability

_STORED = SEVERITIES[SEVERITIES.index("warning") :]


def create(context: HookContext) -> Hook:
    """Return the error store's hook, and start moving what an earlier process could not deliver; see to retention."""
    hook = TargetHook(context, _handle)
    hook.observability.errors.collect_leftovers()
    hook.observability.retention.start()
    return hook


def _handle(observability: Observability, event: CheckpointEvent) -> None:
    if event.error_type is not None and event.severity in _STORED:
        observability.errors.add(event)
    else:
        observability.errors.add_recoveries(event)
