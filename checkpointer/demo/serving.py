"""The console and the HTTP interface, served by this process for as long as a block lasts, to this machine only.

Not here: the pages and routes (`observability/`), and `checkpointer serve`, which does it as a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import uvicorn

from checkpointer.errors import CheckpointerError, ConfigurationError
from observability.api import Streams, create_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointer.embedded import Servers

__all__ = ["Console", "listening", "serving"]

_HOST = "127.0.0.1"
_START_SECONDS = 30.0
_GRACE_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Console:
    """Where the console is, and what lets one in.

    Attributes:
        url: Of the HTTP interface, without a slash at its end.
        token: Has every scope.
    """

    url: str
    token: str

    @property
    def link(self) -> str:
        """The address that signs in by itself: what stands behind # goes to no server, log or Referer."""
        return f"{self.page('/')}#token={quote(self.token, safe='')}"

    def page(self, path: str) -> str:
        """Return the address of a page."""
        return f"{self.url}/console{path}"

    def get(self, path: str) -> tuple[int, Any]:
        """Ask the HTTP interface; returns the status and the answer."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, json.load(exc)


@contextlib.contextmanager
def serving(servers: Servers, listener: socket.socket) -> Iterator[Console]:
    """Serve.

    Args:
        servers: What the console shows; the tables have to be there.
        listener: Where to listen; it stays open.

    Raises:
        CheckpointerError: It did not start.
    """
    token = secrets.token_urlsafe(32)
    streams = Streams()
    app = create_app(postgres_uri=servers.postgres_uri, redis_url=servers.redis_url, admin_token=token, streams=streams)
    config = uvicorn.Config(
        app, access_log=False, server_header=False, log_config=None, timeout_graceful_shutdown=_GRACE_SECONDS
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="console", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise CheckpointerError("The console did not start.")
            time.sleep(0.01)
        yield Console(f"http://{_HOST}:{listener.getsockname()[1]}", token)
    finally:
        streams.end()
        server.should_exit = True
        thread.join(_START_SECONDS)


def listening(port: int) -> socket.socket:
    """Take a port.

    Args:
        port: Its number; 0 for any free one.

    Raises:
        ConfigurationError: It is taken, or is not for everybody.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
    except OSError as exc:
        listener.close()
        raise ConfigurationError(
            f"Port {port} cannot be used ({exc.strerror}): give another one with --port, or leave it away for any."
        ) from exc
    listener.listen()
    return listener
