"""A small TCP proxy between a client and a server: counts round trips, and is the network that fails.

Not here: the servers' own failures (`embedded.Server` kills and pauses them). A *link* is one client connection with
the connection to the server that it became. A *turn* begins when a client speaks after the server, or first: a round
trip. A *trap* waits for a request that contains some bytes.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(eq=False)
class _Link:
    client: socket.socket
    server: socket.socket
    answered: bool = True
    """Whether the server spoke last."""
    silent: bool = False
    at_reply: list[_Trap] = field(default_factory=list)
    """What is to happen when the server answers."""

    def end(self) -> None:
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, eq=False)
class _Trap:
    containing: bytes
    on: Literal["request", "reply"]
    act: Callable[[], object]
    passing: int | None
    sent: Callable[[], object] = lambda: None


class Hold:
    """A message that is held back.

    Attributes:
        taken: Set once the message is held.
        gone: Set once it was released and sent on.
    """

    def __init__(self) -> None:
        self._released = threading.Event()
        self.taken = threading.Event()
        self.gone = threading.Event()

    def keep(self) -> None:
        """Return once the message may go on."""
        self.taken.set()
        self._released.wait()

    def release(self) -> None:
        """Let it pass, now or when it comes."""
        self._released.set()


class Proxy:
    """Forwards to one server.

    Attributes:
        turns: Round trips so far.
        request_bytes: Bytes sent by clients so far.
        request_delay: Seconds that each piece of a request is held up.
        reply_delay: Seconds that each piece of a reply is held up.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._traps: list[_Trap] = []
        self._refusing = self._silent = False
        self._holds: list[Hold] = []
        self.turns = self.request_bytes = 0
        self.request_delay = self.reply_delay = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    # -- forwarding ----------------------------------------------------------------------------------------------

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
            link = _Link(client, server, silent=self._silent)
            with self._lock:
                self._links.add(link)
            if self._refusing:
                link.end()
            threading.Thread(target=self._pump, args=(link, client, server, self._request), daemon=True).start()
            threading.Thread(target=self._pump, args=(link, server, client, self._reply), daemon=True).start()

    def _pump(
        self,
        link: _Link,
        source: socket.socket,
        sink: socket.socket,
        look: Callable[[_Link, bytes], tuple[bytes, list[_Trap]]],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if link.silent:
                    continue
                if delay := self.request_delay if source is link.client else self.reply_delay:
                    time.sleep(delay)
                passed, sprung = look(link, data)
                sink.sendall(passed)
                for trap in sprung:
                    trap.sent()
                if len(passed) < len(data):
                    break
        link.end()
        source.close()
        with self._lock:
            self._links.discard(link)

    def _request(self, link: _Link, data: bytes) -> tuple[bytes, list[_Trap]]:
        with self._lock:
            self.turns += link.answered
            self.request_bytes += len(data)
            link.answered = False
            sprung = [trap for trap in self._traps if trap.containing in data]
            self._traps = [trap for trap in self._traps if trap not in sprung]
        for trap in sprung:
            if trap.on == "reply":
                link.at_reply.append(trap)
        return self._spring([trap for trap in sprung if trap.on == "request"], data)

    def _reply(self, link: _Link, data: bytes) -> tuple[bytes, list[_Trap]]:
        with self._lock:
            link.answered = True
            sprung, link.at_reply = link.at_reply, []
        return self._spring(sprung, data)

    @staticmethod
    def _spring(traps: list[_Trap], data: bytes) -> tuple[bytes, list[_Trap]]:
        for trap in traps:
            trap.act()
            if trap.passing is not None:
                return data[: min(trap.passing, len(data) - 1)], traps
        return data, traps

    # -- failing -------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.end()

    def refuse(self) -> None:
        """End all connections and take no new ones."""
        self._refusing = True
        self.cut()

    def silence(self, *, new_ones: bool = False) -> None:
        """Keep the connections of now open, and swallow what comes on them, from both sides: half-open connections.

        With `new_ones`, those that are taken from now on too, until `allow()`.
        """
        with self._lock:
            self._silent = new_ones
            for link in self._links:
                link.silent = True

    def allow(self) -> None:
        """Take connections again; those that missed something end."""
        self._refusing = self._silent = False
        with self._lock:
            silent = [link for link in self._links if link.silent]
        for link in silent:
            link.end()

    def hold(self, token: bytes, *, reply: bool) -> Hold:
        """Hold the next message that has this token in it, or the reply to it."""
        hold = Hold()
        self._holds.append(hold)
        with self._lock:
            self._traps.append(_Trap(token, "reply" if reply else "request", hold.keep, None, hold.gone.set))
        return hold

    def trap(
        self,
        containing: bytes,
        act: Callable[[], object] = lambda: None,
        *,
        on: Literal["request", "reply"] = "request",
        passing: int | None = None,
    ) -> None:
        """Call `act`, once, at the next request that contains these bytes: before it, or its reply, is passed on.

        With `passing`, only so many bytes of it are, and the connection ends.
        """
        with self._lock:
            self._traps.append(_Trap(containing, on, act, passing))

    def cut_reply(self, containing: bytes = b"", *, after: int = 0) -> None:
        """End the connection of the next request that contains these bytes after so many bytes of its reply.

        The server has done the work, and the client does not learn it.
        """
        self.trap(containing, on="reply", passing=after)

    def close(self) -> None:
        for hold in self._holds:
            hold.release()
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
