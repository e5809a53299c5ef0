"""What a worker answers over HTTP: `/healthz`, `/readyz` and, for Prometheus, `/metrics`.

Not here: what the answers mean (`worker.py`). There is no access control: the answers hold no state, no ids and no
credentials, but the port is for the operator's network alone.
"""

from __future__ import annotations

import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from checkpointer.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from checkpointer.worker import Worker

_SILENCE_SECONDS = 10  # how long a client may take to say what it wants


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int


def parse_address(text: str) -> Address:
    """Read `host:port` or `[v6-address]:port`.

    Raises:
        ConfigurationError: It is neither.
    """
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.netloc != text or "@" in text:
        raise ConfigurationError(f"http={text!r}: use host:port, such as 127.0.0.1:8081 or [::1]:8081.")
    return Address(host, port)


class Server:
    """The HTTP server of one worker, in daemon threads.

    Raises:
        ConfigurationError: The address cannot be used, or the Prometheus library is not installed.
    """

    def __init__(self, address: Address, worker: Worker) -> None:
        metrics, content_type = _metrics_of(worker)

        answers: dict[str, Callable[[], tuple[int, str, bytes]]] = {
            "/healthz": lambda: _verdict(worker.why_unhealthy()),
            "/readyz": lambda: _verdict(worker.why_not_ready()),
            "/metrics": lambda: (HTTPStatus.OK, content_type, metrics()),
        }

        class Handler(BaseHTTPRequestHandler):
            timeout = _SILENCE_SECONDS
            server_version = "checkpointer"
            sys_version = ""

            def do_GET(self) -> None:
                answer = answers.get(self.path.partition("?")[0])
                if answer is None:
                    self.send_error(HTTPStatus.NOT_FOUND)
                    return
                status, kind, body = answer()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """Say nothing: a probe every few seconds is no news."""

        class HTTPServer(ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET

        try:
            self._server = HTTPServer(address, Handler)
        except OSError as exc:
            raise ConfigurationError(f"http={address.host}:{address.port} cannot be used: {exc}.") from exc
        host = f"[{address.host}]" if ":" in address.host else address.host
        self.url = f"http://{host}:{self._server.server_port}"

    def start(self) -> None:
        """Begin to answer."""
        threading.Thread(target=self._server.serve_forever, name="checkpointer-worker-http", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


def _verdict(problem: str | None) -> tuple[int, str, bytes]:
    status = HTTPStatus.OK if problem is None else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "text/plain; charset=utf-8", f"{problem or 'ok'}\n".encode()


def _metrics_of(worker: Worker) -> tuple[Callable[[], bytes], str]:
    """Return a function that renders the worker's metrics, and their content type."""
    try:
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
        from prometheus_client.registry import Collector, CollectorRegistry
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            'Health and metrics over HTTP need: pip install "langgraph-checkpoint-buffered[cli]"'
        ) from exc

    class WorkerCollector(Collector):
        def collect(self) -> Iterator[Metric]:
            return _collect(worker)

    registry = CollectorRegistry()
    registry.register(WorkerCollector())
    return lambda: generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def _collect(worker: Worker) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

    label = [worker.prefix]

    def gauge(name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"checkpointer_{name}", text, labels=["prefix"])
        family.add_metric(label, value)
        return family

    def counter(name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"checkpointer_{name}", text, labels=["prefix"])
        family.add_metric(label, value)
        return family

    # While Redis is away the backlog is not known, and no number says so.
    if (backlog := worker.backlog) is not None:
        yield gauge("backlog_records", "Records in the buffer that are not in Postgres.", backlog.records)
        yield gauge("backlog_bytes", "Size of those records.", backlog.held_bytes)
        yield gauge("backlog_threads", "Threads with such records.", backlog.threads)
        yield gauge("backlog_oldest_age_seconds", "Age of the oldest such record.", backlog.oldest_seconds)
    totals = worker.totals()
    yield counter("flushed_checkpoints", "Checkpoints that this worker brought to Postgres.", totals.checkpoints)
    yield counter("flushed_blobs", "Channel versions that this worker brought to Postgres.", totals.blobs)
    yield counter("flushed_writes", "Pending writes that this worker brought to Postgres.", totals.writes)
    yield counter("flush_failures", "Flushes of this worker that ended in an error.", totals.failures)
    batches = SummaryMetricFamily(
        "checkpointer_flush_batch_seconds",
        "Batches that this worker brought to Postgres, and how long they took.",
        labels=["prefix"],
    )
    batches.add_metric(label, totals.batches, totals.seconds)
    yield batches
    if totals.flushed_at:
        yield gauge("last_flush_timestamp_seconds", "When this worker's last batch was done.", totals.flushed_at)
    tiers = GaugeMetricFamily(
        "checkpointer_tier_up", "Whether the server answered at the last look.", labels=["prefix", "tier"]
    )
    tiers.add_metric([*label, "redis"], float(worker.redis_trouble is None))
    tiers.add_metric([*label, "postgres"], float(worker.postgres_trouble is None))
    yield tiers
