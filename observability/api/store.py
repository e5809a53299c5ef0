"""The connections of the HTTP interface to Postgres: a pool, and limits that hold also when the server is stopped.

Not here: what is asked (`observability/errors/`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool

from checkpointer.errors import ConfigurationError, NotSetUpError, StoreUnavailableError
from checkpointer.search_path import check_name, with_search_path
from observability.errors.statements import Act, Statement, arun

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

T = TypeVar("T")

_POOL_SIZE = 5
_CONNECT_SECONDS = 3.0
_STATEMENT_SECONDS = 5.0
# Longer than the server's own limit: it is for a server that does not answer at all.
_ANSWER_SECONDS = 8.0


class Store:
    """Carries out statements and acts.

    Opens at the first use, in the event loop that it is used in. Closing it twice is fine, and so is using it again.

    Args:
        postgres_uri: Where Postgres is; by default POSTGRES_URI.
        pool: An `AsyncConnectionPool` of the application's own instead; it is neither opened nor closed here, and
            needs `prepare_threshold=None` behind a pooler.
        schema: The Postgres schema of the tables, for connections that are made here; by default
            CHECKPOINTER_SCHEMA.

    Raises:
        ConfigurationError: There is no connection string and no pool, or both, or one that cannot be read.
    """

    def __init__(
        self,
        postgres_uri: str | None = None,
        *,
        pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] | None = None,
        schema: str | None = None,
    ) -> None:
        if pool is not None and (postgres_uri is not None or schema is not None):
            raise ConfigurationError("Give the store a pool or a connection string, not both.")
        self._given = pool
        self._made: AsyncConnectionPool[psycopg.AsyncConnection[Any]] | None = None
        if pool is None:
            self._uri, self._settings = _connection_settings(postgres_uri, schema)

    async def run(self, what: Statement[T] | Act[T]) -> T:
        """Carry out a statement or an act in one transaction.

        Raises:
            StoreUnavailableError: Postgres cannot be reached, or has not answered in time.
            NotSetUpError: A table is missing.
        """
        try:
            pool = self._given or await self._own_pool()
            async with pool.connection(timeout=_CONNECT_SECONDS) as connection, _deadline(connection):
                return await arun(connection, _limited(what))
        except psycopg.errors.QueryCanceled as exc:
            raise StoreUnavailableError(
                f"Postgres has not answered within {_STATEMENT_SECONDS:.0f} s: ask for less, or try again later."
            ) from exc
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as exc:
            raise NotSetUpError("Tables are missing or old: run `checkpointer migrate`.") from exc
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError) as exc:
            raise StoreUnavailableError("Postgres cannot be reached: try again later.") from exc

    async def aclose(self) -> None:
        """Close the connections that were made here."""
        pool, self._made = self._made, None
        if pool is not None:
            await pool.close()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Close it at the end of an application that a router with it is part of."""
        try:
            yield
        finally:
            await self.aclose()

    async def _own_pool(self) -> AsyncConnectionPool[psycopg.AsyncConnection[Any]]:
        if self._made is None:
            self._made = AsyncConnectionPool(
                self._uri,
                kwargs=self._settings,
                min_size=0,
                max_size=_POOL_SIZE,
                timeout=_CONNECT_SECONDS,
                check=_check,
                open=False,
                name="checkpointer-api",
            )
            await self._made.open()
        return self._made


def _connection_settings(uri: str | None, schema: str | None) -> tuple[str, dict[str, Any]]:
    uri = uri or os.environ.get("POSTGRES_URI")
    schema = schema or os.environ.get("CHECKPOINTER_SCHEMA") or None
    if not uri:
        raise ConfigurationError("Say where Postgres is: set POSTGRES_URI, or give a connection string or a pool.")
    try:
        parts = conninfo_to_dict(uri)
    except psycopg.ProgrammingError:
        # Without the parser's words and as cause: they quote the URI, which can hold a password.
        raise ConfigurationError("The connection string of Postgres cannot be read.") from None
    # Unprepared: a pooler may stand between, and nothing here is hot.
    settings: dict[str, Any] = {
        "autocommit": True,
        "prepare_threshold": None,
        "connect_timeout": parts.get("connect_timeout") or int(_CONNECT_SECONDS),
    }
    if schema is not None:
        check_name(schema)
        options = parts.get("options")
        settings["options"] = with_search_path(None if options is None else str(options), schema)
    return uri, settings


def _limited(what: Statement[T] | Act[T]) -> Act[T]:
    """Have the server end what takes too long; for this transaction only, since a pooler may stand between."""
    milliseconds = str(int(_STATEMENT_SECONDS * 1_000))
    yield Statement("SELECT set_config('statement_timeout', %(limit)s, true)", {"limit": milliseconds})
    if isinstance(what, Statement):
        result: T = yield what
        return result
    return (yield from what)


@contextlib.asynccontextmanager
async def _deadline(connection: psycopg.AsyncConnection[Any]) -> AsyncIterator[None]:
    """Cut the connection if the block takes longer: psycopg waits without limit for a server that is stopped."""
    timer = asyncio.get_running_loop().call_later(_ANSWER_SECONDS, _shut_down, connection)
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(connection: psycopg.AsyncConnection[Any]) -> None:
    with contextlib.suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


async def _check(connection: psycopg.AsyncConnection[Any]) -> None:
    """Look whether a connection from the pool still works, so that a restarted server fails no request."""
    timer = asyncio.get_running_loop().call_later(_CONNECT_SECONDS, _shut_down, connection)
    try:
        await AsyncConnectionPool.check_connection(connection)
    finally:
        timer.cancel()
