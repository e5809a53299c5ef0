"""The hook that shows a saver's metrics in the usual registry of `prometheus_client`, while the saver is open."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpointer.hooks import Hook, HookContext


def create(context: HookContext) -> Hook:
    """Return the hook.

    Raises:
        ConfigurationError: The library is not installed.
    """
    from observability.prometheus import PrometheusMetrics

    return PrometheusMetrics(context)
