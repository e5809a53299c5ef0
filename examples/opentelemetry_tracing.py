"""Spans and metrics of the saver in OpenTelemetry, printed by exporters that print.

Run it: python examples/opentelemetry_tracing.py   (needs opentelemetry-sdk as well)
"""

# Not named opentelemetry.py: Python looks for modules in a script's own folder first, so that name would hide the
# library from this example and from every other one beside it.

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, TypedDict

from _agent import addresses, thread
from langgraph.graph import START, StateGraph
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from checkpointer import BufferedPostgresSaver
from checkpointer.hooks import STANDARD_HOOKS

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricsData
    from opentelemetry.sdk.trace import ReadableSpan


class State(TypedDict, total=False):
    """The state of a graph that yields a NaN, which the saver replaces and reports."""

    score: float


def set_up() -> tuple[TracerProvider, MeterProvider]:
    """Set the providers of the process, as an application does once at its start."""
    resource = Resource.create({"service.name": "ratings"})
    tracing = TracerProvider(resource=resource)
    # In production: BatchSpanProcessor(OTLPSpanExporter()), and OTLPMetricExporter() below. The exporters print JSON
    # if they are not told how to print.
    tracing.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=one_line)))
    trace.set_tracer_provider(tracing)
    reader = PeriodicExportingMetricReader(ConsoleMetricExporter(formatter=lines), export_interval_millis=60_000)
    measuring = MeterProvider([reader], resource=resource)
    metrics.set_meter_provider(measuring)
    return tracing, measuring


def one_line(span: ReadableSpan) -> str:
    """Return a span as a line."""
    milliseconds = ((span.end_time or 0) - (span.start_time or 0)) / 1e6
    below = f" below {span.parent.span_id:016x}" if span.parent else ""
    noted = "".join(f"; noted: {event.name}" for event in span.events)
    return f"   span {span.context.span_id:016x}{below}: {span.name}, {milliseconds:.1f} ms{noted}\n"


def lines(data: MetricsData) -> str:
    """Return metrics, a line for each; what has not happened yet is left out."""
    found = []
    for metric in json.loads(data.to_json())["resource_metrics"][0]["scope_metrics"][0]["metrics"]:
        for point in metric["data"]["data_points"]:
            value = point["value"] if "value" in point else f"{point['count']} times, {point['sum']:.3f} in all"
            labels = ", ".join(f"{name}={value}" for name, value in point["attributes"].items() if name != "prefix")
            if value:
                found.append(f"   {metric['name']}{{{labels}}}: {value} {metric['unit']}".rstrip())
    return "\n".join(found) + "\n"


def main() -> None:
    """Run the example."""
    tracing, measuring = set_up()
    config = thread("traced")
    with addresses() as at:
        # The hook takes the providers of the process; `observability.otel.OpenTelemetry(saver, ...)` takes others.
        with BufferedPostgresSaver.from_conn_string(
            at.postgres_uri, redis_url=at.redis_url, hooks=(*STANDARD_HOOKS, "opentelemetry")
        ) as saver:
            saver.setup()
            builder = StateGraph(State)
            builder.add_node("rate", lambda state: {"score": math.nan})
            builder.add_edge(START, "rate")
            graph = builder.compile(checkpointer=saver)

            print("Spans, each when it ends; the saver's are below the one of the application:")
            with trace.get_tracer("ratings").start_as_current_span("rate an answer"):
                graph.invoke({"score": 1.0}, config)
            saver.flush(config["configurable"]["thread_id"])

            print("\nMetrics, as they are at the end:")
            measuring.shutdown()
        tracing.shutdown()


if __name__ == "__main__":
    main()
