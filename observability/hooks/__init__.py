"""The standard hooks, one module each with a factory `create(context)`; found by entry point.

The three that store something share the target of their saver (`observability.target.acquire`), and let go
of it in `close()`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from observability.target import Observability, acquire, release

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.events import CheckpointEvent
    from checkpointer.hooks import HookContext


class TargetHook:
    """A hook that handles events with the shared `Observability` of its saver.

    Args:
        context: The saver's target.
        handle: Called with each event.
    """

    def __init__(self, context: HookContext, handle: Callable[[Observability, CheckpointEvent], None]) -> None:
        self._context = context
        self._handle = handle
        self._lock = threading.Lock()
        self._held = True
        self.observability = acquire(context)

    def __call__(self, event: CheckpointEvent) -> None:
        """Handle an event; waits for the servers."""
        self._handle(self.observability, event)

    def close(self) -> None:
        """Let go of the target; calling it again does nothing."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            release(self._context)
