"""How long a statement may go without an answer, which psycopg does not limit.

A Postgres that is stopped, or a network that drops packets, leaves the connection open and silent for ever. Here is
the clock that ends such a wait, for synchronous and asynchronous connections alike: psycopg hands each of its
I/O-free generators to `Connection.wait`, which resumes it every 0.1 s if nothing has come, and `watched` stands in
between. It counts *silence*, not duration: a large result that keeps coming is not cut, and nothing is
read from the clock while answers come at once. The same place lets a synchronous caller use the wait: what is to be
done *meanwhile* is done once the statement is on its way. Not here: connecting, which `connect_timeout` limits.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import psycopg
from psycopg.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Self

T = TypeVar("T")


class NoAnswerError(psycopg.OperationalError):
    """The server was silent for too long; the connection is closed, what became of the statement is not known."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a statement may be silent.

    Attributes:
        seconds: After so many the statement is given up, or the server is asked, if there is `answers`.
        answers: Asks the server on another connection, in a thread of its own. While it answers there, the
            statement is only slow and goes on; it is asked again after each further `seconds`.
        longest: After so many the statement is given up though the server answers others: this connection is cut.
    """

    seconds: float
    answers: Callable[[], bool] | None = None
    longest: float = math.inf


class _Limited(Protocol):
    limit: Limit | None
    meanwhile: Callable[[], None] | None

    @property
    def pgconn(self) -> psycopg.pq.abc.PGconn: ...


def watched(gen: Generator[Any, Any, T], conn: _Limited) -> Generator[Any, Any, T]:
    """Pass a psycopg generator through; close the connection and raise when the server is silent for too long.

    While the server works on the first statement, `meanwhile` is called, if the connection has it.

    Raises:
        NoAnswerError: It is.
    """
    silence: _Silence | None = None
    try:
        wanted = next(gen)
        if conn.meanwhile is not None:
            meanwhile, conn.meanwhile = conn.meanwhile, None
            meanwhile()
        while True:
            ready = yield wanted
            if ready:
                silence = None
            elif conn.limit is not None:
                silence = silence or _Silence()
                if silence.is_too_long(conn.limit):
                    # Not conn.close(): asynchronous there, and in a pool it may only mean "give it back".
                    conn.pgconn.finish()
                    raise NoAnswerError(f"Postgres has not answered for {silence.seconds:.1f} s.")
            wanted = gen.send(ready)
    except StopIteration as stop:
        result: T = stop.value
        return result


class _Silence:
    """The time since the server was last heard of in a statement."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._last_answer = self._begun
        self._asked: Future[bool] | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def is_too_long(self, limit: Limit) -> bool:
        now = time.monotonic()
        if self._asked is not None and self._asked.done():
            if not self._asked.result():
                return True
            self._asked, self._last_answer = None, now
        if now - self._last_answer < limit.seconds:
            return False
        if limit.answers is None or now - self._begun >= limit.longest:
            return True
        if self._asked is None:
            self._asked = _in_thread(limit.answers)
        return False


def _in_thread(ask: Callable[[], bool]) -> Future[bool]:
    future: Future[bool] = Future()

    def run() -> None:
        try:
            future.set_result(ask())
        except Exception:  # noqa: BLE001 - no answer, whatever the reason
            future.set_result(False)

    # A daemon: nobody has to wait for it when the process ends.
    threading.Thread(target=run, name="checkpointer-asks-postgres", daemon=True).start()
    return future


class LimitedConnection(psycopg.Connection[Row]):
    """A connection whose statements have the limit that is set on it."""

    limit: Limit | None = None
    meanwhile: Callable[[], None] | None = None

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """As psycopg's."""
        return super().wait(watched(gen, self), *args, **kwargs)

    def give_up(self) -> None:
        """From another thread: end a statement that is waiting for an answer, and any later one that has to."""
        self.limit = Limit(0.0)


class LimitedAsyncConnection(psycopg.AsyncConnection[Row]):
    """See `LimitedConnection`."""

    limit: Limit | None = None
    meanwhile: Callable[[], None] | None = None

    async def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """As psycopg's."""
        return await super().wait(watched(gen, self), *args, **kwargs)


class limited:  # noqa: N801 - a context manager, named like one
    """Put a limit on a pool's connection while it is in use here.

    A connection of the user's own pool has it just for the block, and gets back to the pool as it was.

    Args:
        conn: The connection.
        limit: How long its statements may be silent.
        meanwhile: Is called once, while the server works on the first statement.
    """

    def __init__(
        self,
        conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any],
        limit: Limit,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        self._conn = conn
        self.limit: Limit | None = limit
        self.meanwhile = meanwhile

    @property
    def pgconn(self) -> psycopg.pq.abc.PGconn:
        """The libpq connection."""
        return self._conn.pgconn

    def __enter__(self) -> Self:
        conn: Any = self._conn
        if isinstance(conn, LimitedConnection | LimitedAsyncConnection):
            conn.limit = self.limit
            conn.meanwhile = self.meanwhile
        else:
            wait = conn.wait
            conn.wait = lambda gen, *args, **kwargs: wait(watched(gen, self), *args, **kwargs)
        return self

    def __exit__(self, *exc: object) -> None:
        self._conn.__dict__.pop("wait", None)
        self._conn.__dict__.pop("meanwhile", None)
