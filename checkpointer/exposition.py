"""Readings as Prometheus shows them. Loaded only where the extra `prometheus` or `cli` is installed.

Not here: what is measured (`metrics.py`, `instruments.py`, `readings.py`), and where it is shown: a worker's `/metrics`
(`worker_http.py`), or a registry of the application's (`observability/prometheus.py`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from checkpointer.instruments import Distribution
from checkpointer.metrics import PREFIX, Metric

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prometheus_client.core import Metric as Family

    from checkpointer.instruments import Reading

__all__ = ["CONTENT_TYPE", "families", "render"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""The content type of what `render` returns."""

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


def families(by_prefix: Mapping[str, Sequence[Reading]]) -> Iterator[Family]:
    """Return the metrics of several buffers, each metric once.

    Args:
        by_prefix: By the value of the label `prefix`, what was read there.
    """
    found: dict[Metric, CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily] = {}
    for prefix, readings in by_prefix.items():
        for metric, samples in readings:
            family = found.get(metric)
            if family is None:
                made = _FAMILIES[metric.kind]
                family = found[metric] = made(PREFIX + metric.name, metric.text, labels=("prefix", *metric.labels))
            for labels, value in samples.items():
                _add(family, [_text(label) for label in (prefix, *labels)], value)
    yield from found.values()


def render(by_prefix: Mapping[str, Sequence[Reading]]) -> bytes:
    """Return the metrics of several buffers in the text format."""

    class _Once(Collector):
        def collect(self) -> Iterator[Family]:
            return families(by_prefix)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once())
    return generate_latest(registry)


def _add(
    family: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily,
    labels: list[str],
    value: float | Distribution,
) -> None:
    if isinstance(value, Distribution):
        assert isinstance(family, HistogramMetricFamily)
        bounds = [*map(floatToGoString, value.bounds), "+Inf"]
        counts = accumulate(value.counts)
        family.add_metric(labels, list(zip(bounds, counts, strict=True)), value.total)
    else:
        assert not isinstance(family, HistogramMetricFamily)
        family.add_metric(labels, value)


def _text(value: str) -> str:
    """Return a label's value that can be encoded: a hook may have any name."""
    return str(value).encode("utf-8", "replace").decode()
