"""A saver's metrics and spans by the API of OpenTelemetry. Loaded only where the extra `opentelemetry` is installed.

Where they go is up to the SDK and its exporters, which are the application's. Without an SDK nothing is recorded. Names
and units are those of `checkpointer/metrics.py`, with the unit apart as OpenTelemetry has it: what its exporter for
Prometheus makes of them are the names that a registry of `prometheus_client` shows.

A put, a read and a flush are a *span*, during which it is the active one: what the clients of Redis and Postgres trace
is below it, and an event that happens in it is noted on it. An event that happens later, in the background, gets the
trace in which its thread was last put. No span holds a value of the state, a message with a secret, or an address.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpointer.events import describe_error
from checkpointer.instruments import BATCH_BOUNDS, LAG_BOUNDS, OPERATION_BOUNDS, Distribution, Recorder
from checkpointer.metrics import FLUSH_BATCH, FLUSH_LAG, METRICS, OPERATION_DURATION
from observability.extras import missing_extra
from observability.measured import Joint
from observability.scrub import safe_name, safe_text

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ModuleNotFoundError as exc:
    raise missing_extra("To show metrics and spans to OpenTelemetry", "opentelemetry") from exc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextvars import Token

    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import Span, TracerProvider

    from checkpointer.events import CheckpointEvent
    from checkpointer.instruments import Operation
    from checkpointer.metrics import Metric
    from observability.measured import HasInstruments

__all__ = ["OpenTelemetry"]

_SCOPE = "langgraph-checkpoint-buffered"
_KNOWN_THREADS = 10_000
_PUTS = ("put", "put_writes")


class OpenTelemetry:
    """Shows the metrics of a saver and makes spans of what it does, until `close` or until the saver is closed.

    It is a hook as well, by the name `opentelemetry`, with the providers that are set for the process.

    Args:
        source: The saver, a worker that was started, or a `HookContext`.
        meter_provider: Takes the metrics; the one of the process by default.
        tracer_provider: Takes the spans; the one of the process by default.
    """

    def __init__(
        self,
        source: HasInstruments,
        *,
        meter_provider: MeterProvider | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        instruments = source.instruments
        provider = meter_provider or metrics.get_meter_provider()
        meters = _Meters.on(provider)
        meters.provider = provider
        self._hide = meters.add(instruments)
        self._stop = instruments.install(_Spans(instruments.prefix, meters, tracer_provider))
        instruments.at_close(self.close)

    def __call__(self, event: CheckpointEvent) -> None:
        """Do nothing with an event: it is counted, and noted on the span, where it happens."""

    def close(self) -> None:
        """Show the saver no more, and make no more spans. May be called again."""
        self._stop()
        self._hide()


class _Meters(Joint):
    """What a meter provider has of ours. It takes nothing back: at the end its instruments stay, and say nothing."""

    provider: MeterProvider
    histograms: dict[Metric, Histogram] | None = None

    def begin(self) -> None:
        if self.histograms is not None:
            return
        meter = metrics.get_meter(_SCOPE, meter_provider=self.provider)
        bounds = {OPERATION_DURATION: OPERATION_BOUNDS, FLUSH_BATCH: BATCH_BOUNDS, FLUSH_LAG: LAG_BOUNDS}
        self.histograms = {}
        for metric in METRICS:
            name = f"checkpointer.{metric.bare_name}"
            if metric.kind == "histogram":
                self.histograms[metric] = meter.create_histogram(
                    name, metric.unit, metric.text, explicit_bucket_boundaries_advisory=bounds[metric]
                )
            elif metric.kind == "counter":
                meter.create_observable_counter(name, [self._observer(metric)], metric.unit, metric.text)
            else:
                meter.create_observable_gauge(name, [self._observer(metric)], metric.unit, metric.text)

    def record(self, metric: Metric, value: float, attributes: dict[str, str]) -> None:
        if self.histograms is not None:
            self.histograms[metric].record(value, attributes)

    def _observer(self, metric: Metric) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [
                Observation(value, {"prefix": prefix, **dict(zip(metric.labels, labels, strict=True))})
                for prefix, readings in self.read().items()
                for reading in readings
                if reading.metric is metric
                for labels, value in reading.samples.items()
                if not isinstance(value, Distribution)
            ]

        return observe


class _Begun(NamedTuple):
    span: Span
    token: Token[context.Context] | None


class _Spans(Recorder):
    """Makes a span of each operation, and records how long it took."""

    def __init__(self, prefix: str, meters: _Meters, provider: TracerProvider | None) -> None:
        self._prefix = prefix
        self._meters = meters
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=provider)
        # In which trace a thread was last put; each operation on it is atomic.
        self._traces: OrderedDict[str, str] = OrderedDict()

    def begin(self, operation: Operation, thread_id: str | None) -> _Begun:
        attributes = {"checkpointer.prefix": self._prefix, "checkpointer.operation": operation}
        if isinstance(thread_id, str):
            attributes["gen_ai.conversation.id"] = safe_name(thread_id)
        span = self._tracer.start_span(f"checkpointer {operation}", kind=SpanKind.INTERNAL, attributes=attributes)
        found = span.get_span_context()
        if found.is_valid and operation in _PUTS and isinstance(thread_id, str):
            self._traces[thread_id] = f"{found.trace_id:032x}"
            while len(self._traces) > _KNOWN_THREADS:
                self._traces.popitem(last=False)
        return _Begun(span, context.attach(trace.set_span_in_context(span)) if span.is_recording() else None)

    def end(self, token: Any, operation: Operation, seconds: float, error: BaseException | None) -> None:
        begun: _Begun | None = token
        if begun is not None:
            if begun.token is not None:
                context.detach(begun.token)
            if isinstance(error, Exception):
                # Not by `record_exception`, which takes the message and the stack as they are.
                said = describe_error(error)
                facts = {"exception.type": said.type, "exception.message": safe_text(said.message)}
                begun.span.add_event("exception", facts)
                begun.span.set_status(Status(StatusCode.ERROR, said.type))
            begun.span.end()
        if operation in (*_PUTS, "get_tuple", "list"):
            self._meters.record(OPERATION_DURATION, seconds, {"prefix": self._prefix, "operation": operation})

    def batch(self, seconds: float, lags: Sequence[float]) -> None:
        self._meters.record(FLUSH_BATCH, seconds, {"prefix": self._prefix})
        for lag in lags:
            self._meters.record(FLUSH_LAG, lag, {"prefix": self._prefix})

    def event(self, event: CheckpointEvent) -> CheckpointEvent:
        span = trace.get_current_span()
        if span.is_recording():
            facts = {"checkpointer.severity": event.severity, "checkpointer.message": safe_text(event.message)}
            span.add_event(safe_name(event.name, 200), facts)
        if event.trace_id is not None or event.thread_id is None:
            return event
        trace_id = self._traces.get(event.thread_id)
        return event if trace_id is None else replace(event, trace_id=trace_id)
