"""A saver's metrics in a registry of `prometheus_client`. Loaded only where the extra `prometheus` is installed.

The registry is the application's, so what it serves has our metrics beside its own. Not here: which metrics there are
(`checkpointer/metrics.py`), and a worker's own `/metrics`, which needs none of this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointer.instruments import Reading
from checkpointer.metrics import METRICS
from observability.extras import missing_extra
from observability.measured import Joint

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.registry import Collector

    from checkpointer.exposition import families, render
except ModuleNotFoundError as exc:
    raise missing_extra("To show metrics to Prometheus", "prometheus") from exc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric as Family

    from checkpointer.events import CheckpointEvent
    from observability.measured import HasInstruments

__all__ = ["PrometheusMetrics"]


class PrometheusMetrics:
    """Shows the metrics of a saver in a registry, until `close` or until the saver is closed.

    Several savers can be in one registry; the label `prefix` tells them apart, and those with one prefix are shown as
    one. From now on puts and reads are timed. It is a hook as well, by the name `prometheus`, with the library's usual
    registry.

    Args:
        source: The saver, a worker that was started, or a `HookContext`.
        registry: Where to be shown; `prometheus_client.REGISTRY` by default.

    Raises:
        ValueError: The registry has metrics of other origin under our names.
    """

    def __init__(self, source: HasInstruments, *, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self._instruments = source.instruments
        joint = _Collector.on(registry)
        joint.registry = registry
        self._hide = joint.add(self._instruments)
        self._stop = self._instruments.install()
        self._instruments.at_close(self.close)

    def __call__(self, event: CheckpointEvent) -> None:
        """Do nothing with an event: the saver counts them."""

    def render(self) -> bytes:
        """Return the metrics of this saver alone, in the text format."""
        return render({self._instruments.prefix: self._instruments.read()})

    def close(self) -> None:
        """Show the saver no more, and the registry nothing of ours once it was the last. May be called again."""
        self._stop()
        self._hide()


class _Collector(Joint, Collector):
    """What a registry has of ours."""

    registry: CollectorRegistry

    def begin(self) -> None:
        self.registry.register(self)

    def end(self) -> None:
        self.registry.unregister(self)

    def describe(self) -> Iterator[Family]:
        return families({"": [Reading(metric, {}) for metric in METRICS]})

    def collect(self) -> Iterator[Family]:
        return families(self.read())
