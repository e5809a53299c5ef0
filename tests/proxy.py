"""A small TCP proxy between a client and a server: counts round trips, cuts connections, lets them go silent, or
holds single messages back.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Iterator


class Hold:
    """Holds back the first message of a client that has a token in it, or the reply to that message.

    Attributes:
        taken: Set once the message is held.
        gone: Set once it was released and sent on.
    """

    def __init__(self, token: bytes, *, reply: bool) -> None:
        self._token = token
        self._reply = reply
        self._connection: object = None
        self._released = threading.Event()
        self.taken = threading.Event()
        self.gone = threading.Event()

    def pass_by(self, data: bytes, speaker: str, connection: object) -> bool:
        """Return when the message may go on: whether it was held."""
        if speaker == "client" and self._connection is None and self._token in data:
            self._connection = connection
            if self._reply:
                return False
        elif not (self._reply and speaker == "server" and self._connection is connection):
            return False
        self.taken.set()
        self._released.wait()
        return True

    def release(self) -> None:
        """Let everything pass from now on."""
        self._released.set()


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
        self._hold: Hold | None = None
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
                held = (hold := self._hold) is not None and hold.pass_by(data, speaker, last)
                sink.sendall(data)
                if held and hold is not None:
                    hold.gone.set()
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

    def hold(self, token: bytes, *, reply: bool) -> Hold:
        """Hold the next message that has this token in it, or the reply to it; one at a time."""
        self._hold = Hold(token, reply=reply)
        return self._hold

    def close(self) -> None:
        if self._hold is not None:
            self._hold.release()
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
