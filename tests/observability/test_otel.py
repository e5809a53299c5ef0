"""A saver's metrics and spans by the API of OpenTelemetry, as an SDK gets them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from helpers import put_one, wait_until
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from savers import NOTHING, Recording, config, make_checkpoint, put

from checkpointer.instruments import Instruments, Measured
from checkpointer.metrics import METRICS
from observability.otel import OpenTelemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointer.embedded import Servers

THREAD = "gen_ai.conversation.id"


class Sdk:
    """Both providers, and what they were told."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    def show(self, source: Any) -> OpenTelemetry:
        return OpenTelemetry(source, meter_provider=self.meters, tracer_provider=self.tracers)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics by name."""
        data = self.reader.get_metrics_data()
        return {
            metric.name: metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str, /, **labels: str) -> list[Any]:
        metric = self.metrics().get(f"checkpointer.{name}")
        points = metric.data.data_points if metric else []
        return [point for point in points if labels.items() <= dict(point.attributes).items()]

    def spans(self, operation: str = "") -> list[Any]:
        found = self.exporter.get_finished_spans()
        return [span for span in found if span.name.startswith(f"checkpointer {operation}")]


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    made = Sdk()
    yield made
    made.meters.shutdown()
    made.tracers.shutdown()


def test_an_sdk_gets_the_same_metrics_with_the_unit_apart(make: Callable[..., Any], prefix: str, sdk: Sdk) -> None:
    saver = make(hooks=("system_errors",))
    sdk.show(saver)
    put(saver, "t", 0)
    put_one(saver, "u", float("nan"))
    assert saver.flush()
    wait_until(lambda: sdk.points("backlog_records"))
    found = sdk.metrics()
    assert {(metric.name, metric.unit) for metric in found.values()} == {
        (f"checkpointer.{metric.bare_name}", metric.unit) for metric in METRICS
    }
    (puts,) = sdk.points("operation_duration", operation="put")
    assert (puts.count, puts.attributes["prefix"]) == (2, prefix)
    assert 0.0005 in puts.explicit_bounds
    (lag,) = sdk.points("flush_lag")
    assert lag.count == 2
    assert sdk.points("flush_batch")[0].count >= 1
    assert sdk.points("flushed_checkpoints")[0].value == 2
    assert sdk.points("events", name="put.sanitized")[0].value == 1
    assert [point.value for point in sdk.points("tier_up")] == [1, 1]
    assert "thread" not in {
        label for metric in found.values() for p in metric.data.data_points for label in p.attributes
    }


def test_savers_come_and_go_on_one_provider(
    make: Callable[..., Any], prefix: str, sdk: Sdk, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    shown = sdk.show(first)
    put(first, "t", 0)
    assert first.flush()
    shown.close()
    shown.close()
    assert not sdk.points("flushed_checkpoints")
    spans = len(sdk.spans())
    put(first, "t", 1)
    assert len(sdk.spans()) == spans
    second, third = make(prefix=f"{prefix}-2"), make(prefix=f"{prefix}-3")
    for saver in (second, third):
        sdk.show(saver)
        put(saver, "t", 0)
        assert saver.flush()
    assert {point.attributes["prefix"] for point in sdk.points("flushed_checkpoints")} == {
        f"{prefix}-2", f"{prefix}-3",
    }  # fmt: skip
    second.close()
    assert [point.attributes["prefix"] for point in sdk.points("flushed_checkpoints")] == [f"{prefix}-3"]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


def test_a_put_is_a_span_below_the_active_one_and_its_events_are_in_that_trace(
    make: Callable[..., Any], sdk: Sdk
) -> None:
    saver = make()
    sdk.show(saver)
    with sdk.tracers.get_tracer("app").start_as_current_span("request") as request:
        put_one(saver, "t", float("nan"))
        assert trace.get_current_span() is request
    (span,) = sdk.spans("put")
    assert span.parent.span_id == request.get_span_context().span_id
    assert span.attributes[THREAD] == "t"
    assert span.status.status_code is StatusCode.UNSET
    assert [event.name for event in span.events] == ["put.sanitized"]
    (event,) = saver.named("put.sanitized")
    assert event.trace_id == f"{request.get_span_context().trace_id:032x}"


async def test_asynchronous_puts_at_once_keep_their_spans_apart(make: Callable[..., Any], sdk: Sdk) -> None:
    saver = make()
    sdk.show(saver)
    tracer = sdk.tracers.get_tracer("app")

    async def request(thread: str) -> Any:
        with tracer.start_as_current_span(thread) as span:
            checkpoint, metadata, new = make_checkpoint(0)
            await saver.aput(config(thread), checkpoint, metadata, new)
            await saver.aget_tuple(config(thread))
            assert trace.get_current_span() is span
            return span.get_span_context().span_id

    threads = [f"t{number}" for number in range(5)]
    parents = dict(zip(threads, await asyncio.gather(*map(request, threads)), strict=True))
    spans = sdk.spans()
    assert len(spans) == 10
    assert all(span.parent.span_id == parents[span.attributes[THREAD]] for span in spans)
    await saver.aclose()


def test_a_flush_is_a_span_and_what_the_background_does_is_one_of_its_own(make: Callable[..., Any], sdk: Sdk) -> None:
    saver = make()
    sdk.show(saver)
    put(saver, "t", 0)
    with sdk.tracers.get_tracer("app").start_as_current_span("request") as request:
        assert saver.flush("t")
    named = {span.name: span for span in sdk.spans("flush")}
    assert named["checkpointer flush"].parent.span_id == request.get_span_context().span_id
    assert named["checkpointer flush"].attributes[THREAD] == "t"
    assert named["checkpointer flush_in_background"].parent is None


def test_an_event_of_the_background_has_the_trace_in_which_its_thread_was_put(
    own_servers: Servers, prefix: str, sdk: Sdk
) -> None:
    with Recording(
        own_servers.postgres_uri, own_servers.redis_url, prefix=prefix, hooks=(), triggers=NOTHING, close_timeout=0.5
    ) as saver:
        saver.setup()
        sdk.show(saver)
        traces = {}
        for thread in ("a", "b"):
            with sdk.tracers.get_tracer("app").start_as_current_span("request") as request:
                put(saver, thread, 0)
            traces[thread] = f"{request.get_span_context().trace_id:032x}"
        own_servers.postgres.kill()
        assert not saver.flush()
        failed = saver.named("flush.failed")
        assert {event.thread_id: event.trace_id for event in failed} == traces


def test_an_operation_that_raises_marks_its_span_and_tells_no_secret(sdk: Sdk) -> None:
    instruments = Instruments("p")

    class Source:
        pass

    source: Any = Source()
    source.instruments = instruments
    sdk.show(source)
    with pytest.raises(ValueError, match="hunter2"), Measured(instruments, "put", config("t")):
        raise ValueError("no access with postgresql://me:hunter2@host/db")
    with pytest.raises(asyncio.CancelledError), Measured(instruments, "put", config("t")):
        raise asyncio.CancelledError
    failed, cancelled = sdk.spans("put")
    assert failed.status.status_code is StatusCode.ERROR
    assert [event.name for event in failed.events] == ["exception"]
    assert failed.events[0].attributes["exception.type"] == "ValueError"
    assert "hunter2" not in failed.to_json()
    assert cancelled.status.status_code is StatusCode.UNSET


def test_a_thread_of_any_text_is_shown(make: Callable[..., Any], sdk: Sdk) -> None:
    saver = make()
    sdk.show(saver)
    put(saver, "t" * 2_000 + "\u2028<b>", 0)
    (span,) = sdk.spans("put")
    assert len(span.attributes[THREAD]) <= 1_000


def test_without_an_sdk_nothing_is_recorded_and_nothing_breaks(make: Callable[..., Any]) -> None:
    saver = make(hooks=("opentelemetry",))
    put_one(saver, "t", float("nan"))
    assert saver.flush()
    (event,) = saver.named("put.sanitized")
    assert event.trace_id is None
    saver.close()
    assert not saver.instruments.is_on
