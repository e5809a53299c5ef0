"""The hook that gives a saver's metrics and spans to OpenTelemetry, while the saver is open."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpointer.hooks import Hook, HookContext


def create(context: HookContext) -> Hook:
    """Return the hook.

    Raises:
        ConfigurationError: The library is not installed.
    """
    from observability.otel import OpenTelemetry

    return OpenTelemetry(context)
