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
    from collections.abc import Callable

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
        answers: dict[str, Callable[[], tuple[int, str, bytes]]] = {
            "/healthz": lambda: _verdict(worker.why_unhealthy()),
            "/readyz": lambda: _verdict(worker.why_not_ready()),
            "/metrics": _metrics_of(worker),
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


def _metrics_of(worker: Worker) -> Callable[[], tuple[int, str, bytes]]:
    """Return a function that answers with the worker's metrics."""
    try:
        from checkpointer.exposition import CONTENT_TYPE, render
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            'Health and metrics over HTTP need: pip install "langgraph-checkpoint-buffered[cli]"'
        ) from exc

    def metrics() -> tuple[int, str, bytes]:
        return HTTPStatus.OK, CONTENT_TYPE, render({worker.prefix: worker.instruments.read()})

    return metrics
