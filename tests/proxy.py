"""A small TCP proxy between a client and a server: counts round trips, cuts connections, or lets them go silent."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Iterator


class Proxy:
    """Forwards to one server.

    Attributes:
        turns: Round trips so far: how often a client spoke after the server, or first.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._silent: set[socket.socket] = set()
        self._refusing = False
        self.turns = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            last = ["server"]
            threading.Thread(target=self._pump, args=(client, server, "client", last), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, "server", last), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, speaker: str, last: list[str]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if source in self._silent:
                    continue
                with self._lock:
                    if speaker == "client" and last[0] == "server":
                        self.turns += 1
                    last[0] = speaker
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            with self._lock:
                self._sockets.discard(end)

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            ends = list(self._sockets)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Keep the connections of now open, and swallow what comes on them."""
        with self._lock:
            self._silent |= self._sockets

    def refuse(self) -> None:
        """End all connections and take no new ones."""
        self._refusing = True
        self.cut()

    def allow(self) -> None:
        """Take connections again."""
        self._refusing = False

    def close(self) -> None:
        self._listener.close()
        self.cut()


@contextlib.contextmanager
def proxied(uri: str) -> Iterator[tuple[str, Proxy]]:
    """Put a proxy before the server of a URI; yields the URI that goes through it."""
    parts = urlsplit(uri)
    assert parts.hostname
    assert parts.port
    proxy = Proxy(parts.hostname, parts.port)
    user = parts.netloc.rpartition("@")[0]
    netloc = f"{user}@127.0.0.1:{proxy.port}" if user else f"127.0.0.1:{proxy.port}"
    try:
        yield urlunsplit(parts._replace(netloc=netloc)), proxy
    finally:
        proxy.close()
