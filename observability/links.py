"""The two connections of the observability: each fails fast and comes back by itself.

A *link* opens its connection at the first use, drops it when it fails, and then refuses work for a moment
instead of trying again at once, so that the caller can take the next best way. Not here: the saver's own
connections, and which way that is (`outbox.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import redis

from checkpointer.hooks import renew_in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointer.hooks import HookContext

T = TypeVar("T")

logger = logging.getLogger("checkpointer.observability")

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
_STATEMENT_SECONDS = 3.0


class AwayError(Exception):
    """The server cannot be used right now; the cause, if it was tried, is chained."""


class RowRefusedError(Exception):
    """Postgres is there but refuses the values of a row."""


class _Link:
    """The part of a link that knows when to try and when not to."""

    _name: str

    def __init__(self) -> None:
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        # A connection inherited over a fork belongs to the parent: forgotten, not closed.
        self._lock = threading.RLock()
        self._retry_at = 0.0
        self._pause = 0.0

    def _check(self) -> None:
        if time.monotonic() < self._retry_at:
            raise AwayError(f"{self._name} is away")

    def retry_now(self) -> None:
        """Let the next use try the server, however short ago it failed."""
        self._retry_at = 0.0

    def _failed(self, exc: BaseException) -> AwayError:
        if not self._pause:
            # Only the class: messages of connection errors can quote credentials.
            logger.warning("%s cannot be used by the observability (%s)", self._name, type(exc).__name__)
        self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
        self._retry_at = time.monotonic() + self._pause
        return AwayError(f"{self._name} is away")

    def _succeeded(self) -> None:
        if self._pause:
            logger.info("%s can be used by the observability again", self._name)
            self._pause = 0.0


class PostgresLink(_Link):
    """One autocommit connection, used by one thread at a time."""

    _name = "Postgres"

    def __init__(self, context: HookContext) -> None:
        self._context = context
        super().__init__()

    def _renew(self) -> None:
        super()._renew()
        self._connection: psycopg.Connection[Any] | None = None

    def run(self, work: Callable[[psycopg.Connection[Any]], T], *, seconds: float = _STATEMENT_SECONDS) -> T:
        """Call `work` with the connection; once more with a new one if the old one turns out to be dead.

        Args:
            work: What to do.
            seconds: How long it may take.

        Raises:
            AwayError: Postgres cannot be reached, did not answer in time, lacks the table or the right.
            RowRefusedError: The values are at fault.
        """
        with self._lock:
            self._check()
            try:
                if self._connection is not None:
                    try:
                        return self._attempt(self._connection, work, seconds)
                    except (psycopg.OperationalError, psycopg.InterfaceError):
                        self._drop()
                self._connection = self._context.connect_postgres()
                result = self._attempt(self._connection, work, seconds)
            except (psycopg.Error, OSError) as exc:
                self._drop()
                raise self._failed(exc) from exc
            self._succeeded()
            return result

    def _attempt(
        self, connection: psycopg.Connection[Any], work: Callable[[psycopg.Connection[Any]], T], seconds: float
    ) -> T:
        try:
            with deadline(connection, seconds):
                return work(connection)
        except (psycopg.DataError, psycopg.IntegrityError) as exc:
            raise RowRefusedError from exc
        except psycopg.OperationalError as exc:
            # Class 54: a value is longer than an index or a field takes.
            if (exc.sqlstate or "").startswith("54"):
                raise RowRefusedError from exc
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def close(self) -> None:
        """Close the connection; a later use opens a new one."""
        with self._lock:
            self._drop()


class RedisLink(_Link):
    """One client."""

    _name = "Redis"

    def __init__(self, context: HookContext) -> None:
        self._context = context
        super().__init__()

    def _renew(self) -> None:
        super()._renew()
        self._client: redis.Redis | None = None

    def run(self, work: Callable[[redis.Redis], T]) -> T:
        """Call `work` with the client; once more if its connection turns out to be dead.

        Raises:
            AwayError: Redis cannot be reached, is full, or refuses to write.
        """
        with self._lock:
            self._check()
            try:
                if self._client is not None:
                    try:
                        return work(self._client)
                    except redis.ConnectionError:
                        self._drop()
                self._client = self._context.connect_redis()
                result = work(self._client)
            except (redis.RedisError, redis.exceptions.RedisClusterException, OSError) as exc:
                self._drop()
                raise self._failed(exc) from exc
            self._succeeded()
            return result

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()

    def close(self) -> None:
        """Close the client; a later use makes a new one."""
        with self._lock:
            self._drop()


@contextlib.contextmanager
def deadline(connection: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
    """Cut the connection if the block takes longer.

    psycopg waits without limit for a server that is stopped or cut off. Shutting down the socket from
    another thread wakes it with an OperationalError; closing the connection would not.
    """
    timer = threading.Timer(seconds, _shut_down, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(connection: psycopg.Connection[Any]) -> None:
    with contextlib.suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)
