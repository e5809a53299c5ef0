"""The Postgres connections: the user's pools, or pools made from a connection string, and thin runners of a query.

Not here: the statements (`reads.py`, `writes.py`). There is one synchronous pool, one asynchronous pool for each
event loop that uses the saver, and dedicated connections for background threads. No lock stands before a
pool: it hands out connections to as many callers as it has.

A *pooler* (pgbouncer and its like) may give each transaction another server session, which lacks the statements that
an earlier one had prepared. A URI cannot say that there is one, so each new connection is asked (`behind_pooler`).
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg
from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row, tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from checkpointer import search_path
from checkpointer.checks import check_schema
from checkpointer.errors import CheckpointerError, ConfigurationError, NotSetUpError
from checkpointer.store.deadline import Limit, LimitedAsyncConnection, LimitedConnection, NoAnswerError, limited
from checkpointer.store.short import ShortStatements

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from checkpointer.store.reads import Query
    from checkpointer.tiers import Tier

T = TypeVar("T")

SyncPool = ConnectionPool[Any]
AsyncPool = AsyncConnectionPool[Any]
Given = Connection[Any] | ConnectionPool[Any] | AsyncConnectionPool[Any] | AsyncConnection[Any]

# A server that takes no writes (a fail-over, a full disk at some providers) is as good as none for those who write.
_DOWN = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction, OSError)
# A transaction under an isolation level that the database has as its default may lose a race, and is then repeated.
_LOST_RACE = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
_RACES = 10
_NO_POINT_IN_RETRYING = (PoolTimeout, PoolClosed, TooManyRequests, NoAnswerError)

# A connection that is silent for so long while the server answers others was cut off by something between.
_LONGEST_SILENCE = 600.0
# So many reads may share a connection before the pool sees it again.
_TIMES_IN_HAND = 100
# For each thread of a pool: one that is just connecting is left to itself.
_CLOSE_SECONDS = 0.2


def check_conninfo(conninfo: str) -> None:
    """Refuse what cannot be a connection string of Postgres.

    Raises:
        ConfigurationError: It is not.
    """
    try:
        if not isinstance(conninfo, str) or not conninfo_to_dict(conninfo):
            raise ConfigurationError("The Postgres connection string is empty: use postgresql://user@host/db.")
    except psycopg.ProgrammingError as exc:
        raise ConfigurationError(
            f"The Postgres connection string cannot be read ({exc}): use postgresql://user:password@host:port/db "
            "or key=value pairs."
        ) from exc


class _UntilCancelled:
    """A pool worker's queue that gives nothing more to a worker that was cancelled."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    async def get(self) -> Any:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        return await self._queue.get()


class _Pool(ConnectionPool[LimitedConnection[DictRow]]):
    """A pool of which one connection stays in hand between two reads.

    Having the pool give one out and take it back costs as much as a tenth of a read. Who takes one that is in hand
    spares the pool's; now and then it goes back all the same, since the pool replaces what has become old.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hand = _Hand()

    def take(self) -> LimitedConnection[DictRow]:
        """Return a connection; who takes it brings it back."""
        return self._hand.take() or self.getconn()

    def bring_back(self, conn: LimitedConnection[DictRow], *, works: bool) -> None:
        """Give a connection back; one that may not work goes to the pool, which looks after it."""
        if not works or self.closed or not self._hand.keeps(conn):
            self.putconn(conn)

    def drain(self) -> None:
        """As psycopg_pool's."""
        self._let_go()
        super().drain()

    def close(self, timeout: float = 5.0) -> None:
        """As psycopg_pool's."""
        self._let_go()
        super().close(timeout)

    def _let_go(self) -> None:
        while (conn := self._hand.take()) is not None:
            self.putconn(conn)


class _LoopPool(AsyncConnectionPool[LimitedAsyncConnection[DictRow]]):
    """As `_Pool`, for an event loop; its workers end with their loop.

    psycopg_pool's take a cancellation while they connect for a failed attempt, and go on; `asyncio.run`, which cancels
    what is left of a loop and waits for it, would wait for ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hand = _Hand()

    @classmethod
    async def worker(cls, q: Any) -> None:
        """As psycopg_pool's."""
        await super().worker(cast("Any", _UntilCancelled(q)))

    async def take(self) -> LimitedAsyncConnection[DictRow]:
        """See `_Pool.take`."""
        return self._hand.take() or await self.getconn()

    async def bring_back(self, conn: LimitedAsyncConnection[DictRow], *, works: bool) -> None:
        """See `_Pool.bring_back`."""
        if not works or self.closed or not self._hand.keeps(conn):
            await self.putconn(conn)

    async def drain(self) -> None:
        """As psycopg_pool's."""
        await self._let_go()
        await super().drain()

    async def close(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - psycopg_pool's signature
        """As psycopg_pool's."""
        await self._let_go()
        await super().close(timeout)

    async def _let_go(self) -> None:
        while (conn := self._hand.take()) is not None:
            await self.putconn(conn)


class _Hand:
    """Holds a connection between two who use it; no lock, since each step is one of a list's own."""

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._times = 0

    def take(self) -> Any:
        try:
            return self._held.pop()
        except IndexError:
            return None

    def keeps(self, conn: Any) -> bool:
        self._times += 1
        if self._held or self._times % _TIMES_IN_HAND == 0:
            return False
        self._held.append(conn)
        return True


class PostgresSide:
    """Hands out Postgres connections.

    Args:
        given: A connection string, or the user's pool or connection. Of a single connection only the settings are
            used: it could not be shared, and once broken would stay so.
        apool: The user's asynchronous pool beside a synchronous one.
        timeout: Seconds to wait for a connection.
        query_timeout: Seconds that a statement may go without an answer.
        pool_size: The most connections of a pool made here.
        tier: Learns from every call whether the server is there.
        schema: Made the search path of every connection that is opened here, and required of the user's pools.
    """

    def __init__(
        self,
        given: str | Given,
        *,
        apool: AsyncConnectionPool[Any] | None,
        timeout: float,
        query_timeout: float,
        pool_size: int,
        tier: Tier,
        schema: str | None = None,
    ) -> None:
        self._tier = tier
        self._limit = Limit(query_timeout)
        # Work may be slow, so a silent server is asked before it is given up; an index is built for hours.
        self.work_limit = Limit(query_timeout, self._answers, _LONGEST_SILENCE)
        self.setup_limit = Limit(query_timeout, self._answers)
        self._schema = schema
        # Pools of which a connection was seen to work in the schema.
        self._short = ShortStatements()
        self._turns: weakref.WeakKeyDictionary[SyncPool | AsyncPool, Any] = weakref.WeakKeyDictionary()
        self._verified: weakref.WeakSet[SyncPool | AsyncPool] = weakref.WeakSet()
        self._timeout = timeout
        self._size = pool_size
        self._lock = threading.Lock()
        self._kwargs: dict[str, Any] = {"autocommit": True, "prepare_threshold": 0}
        self._given_pool: SyncPool | None = None
        self._given_apool: AsyncPool | None = apool
        if isinstance(given, ConnectionPool | AsyncConnectionPool):
            if isinstance(given, ConnectionPool):
                self._given_pool = given
            else:
                self._given_apool = given
            if not isinstance(given.conninfo, str) or callable(given.kwargs):
                raise ConfigurationError(
                    "The pool's conninfo or kwargs is a callable; give a pool with fixed settings, the flusher "
                    "needs connections of its own."
                )
            self._conninfo = given.conninfo
            self._kwargs |= {k: v for k, v in (given.kwargs or {}).items() if k != "row_factory"}
        elif isinstance(given, Connection | AsyncConnection):
            self._conninfo = make_conninfo(
                **given.info.get_parameters(),
                **({"password": given.info.password} if given.info.password else {}),
            )
            self._kwargs["prepare_threshold"] = given.prepare_threshold
        elif isinstance(given, str):
            check_conninfo(given)
            self._conninfo = given
        else:
            raise ConfigurationError(
                "conn must be a connection string, a psycopg connection or a psycopg_pool pool, "
                f"not {type(given).__name__}."
            )
        self._kwargs["autocommit"] = True
        self._kwargs.setdefault("connect_timeout", max(2, round(timeout)))
        if schema is not None:
            given_options = self._kwargs.get("options", conninfo_to_dict(self._conninfo).get("options"))
            self._kwargs["options"] = search_path.with_search_path(given_options, schema)
        self._pool = self._given_pool
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncPool] = weakref.WeakKeyDictionary()

    @property
    def conninfo(self) -> str:
        """The connection string."""
        return self._conninfo

    def unchecked(self, limit: Limit | None = None) -> LimitedConnection[DictRow]:
        """Open a connection of its own (autocommit, rows as dicts), whose schema need not exist yet.

        Raises:
            ConfigurationError: A pooler does not let the schema be chosen.
        """
        try:
            conn = LimitedConnection[DictRow].connect(self._conninfo, row_factory=dict_row, **self._kwargs)
        except psycopg.OperationalError as exc:
            self._check_refusal(exc)
            raise
        conn.limit = limit
        try:
            _suit_pooler(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    async def aunchecked(self, limit: Limit | None = None) -> LimitedAsyncConnection[DictRow]:
        """See `unchecked`."""
        try:
            conn = await LimitedAsyncConnection[DictRow].connect(self._conninfo, row_factory=dict_row, **self._kwargs)
        except psycopg.OperationalError as exc:
            self._check_refusal(exc)
            raise
        conn.limit = limit
        try:
            await _asuit_pooler(conn)
        except BaseException:
            await conn.close()
            raise
        return conn

    def _check_refusal(self, exc: psycopg.OperationalError) -> None:
        if self._schema is not None and "unsupported startup parameter" in str(exc):
            raise ConfigurationError(
                f"A pooler refuses the connection option that schema={self._schema!r} needs. Let it ignore the option "
                "(pgbouncer: ignore_startup_parameters = options) and run ALTER ROLE ... IN DATABASE ... SET "
                "search_path = ..., or give the server's own address."
            ) from exc

    def dedicated(self, limit: Limit | None = None) -> LimitedConnection[DictRow]:
        """Open a connection of its own (autocommit, rows as dicts); the caller closes it.

        Raises:
            ConfigurationError: It does not work in the schema.
        """
        conn = self.unchecked(limit)
        try:
            self.verify(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def verify(self, conn: Connection[Any]) -> None:
        """Check that a connection works in the schema.

        Raises:
            ConfigurationError: It does not.
        """
        if self._schema is not None:
            row = conn.cursor(row_factory=tuple_row).execute("SELECT current_schema()").fetchone()
            check_schema(self._schema, row[0] if row else None)

    async def averify(self, conn: AsyncConnection[Any]) -> None:
        """See `verify`."""
        if self._schema is not None:
            cur = await conn.cursor(row_factory=tuple_row).execute("SELECT current_schema()")
            row = await cur.fetchone()
            check_schema(self._schema, row[0] if row else None)

    def _answers(self) -> bool:
        """Ask the server something on a new connection."""
        with self.unchecked(self._limit) as conn:
            return conn.execute("SELECT 1").fetchone() is not None

    def for_hook(self) -> Connection[DictRow]:
        """Open a connection for a hook.

        Raises:
            psycopg.OperationalError: There is none to be had, whatever the reason.
        """
        try:
            return self.dedicated()
        except CheckpointerError as exc:
            raise psycopg.OperationalError(str(exc)) from exc

    def _pool_settings(self) -> dict[str, Any]:
        return {
            "kwargs": {**self._kwargs, "row_factory": dict_row},
            "min_size": min(1, self._size),
            "max_size": self._size,
            "timeout": self._timeout,
            # The pool's own backoff grows to minutes; a short limit lets every later request try anew.
            "reconnect_timeout": self._timeout,
            "open": False,
        }

    def pool(self) -> SyncPool:
        """Return the shared synchronous pool."""
        if self._pool is None:
            with self._lock:
                if self._pool is None:
                    pool = _Pool(
                        self._conninfo,
                        connection_class=LimitedConnection[DictRow],
                        configure=_suit_pooler,
                        **self._pool_settings(),
                    )
                    pool.open(wait=False)
                    self._pool = pool
        return self._pool

    async def apool(self) -> AsyncPool:
        """Return the asynchronous pool of the running loop."""
        if self._given_apool is not None:
            return self._given_apool
        loop = asyncio.get_running_loop()
        pool = self._by_loop.get(loop)
        if pool is None:
            pool = self._by_loop[loop] = _LoopPool(
                self._conninfo,
                connection_class=LimitedAsyncConnection[DictRow],
                configure=_asuit_pooler,
                **self._pool_settings(),
            )
            await pool.open(wait=False)
        return pool

    @contextmanager
    def connection(self) -> Iterator[Connection[DictRow]]:
        """Lend a connection of the synchronous pool.

        Raises:
            psycopg_pool.PoolTimeout: None was to be had in time.
        """
        pool = self.pool()
        conn = pool.take() if isinstance(pool, _Pool) else pool.getconn(self._timeout)
        works = False
        try:
            yield conn
            works = True
        finally:
            if isinstance(pool, _Pool):
                pool.bring_back(conn, works=works)
            else:
                pool.putconn(conn)

    @asynccontextmanager
    async def _aconnection(self, pool: AsyncPool) -> AsyncIterator[AsyncConnection[DictRow]]:
        conn = await (pool.take() if isinstance(pool, _LoopPool) else pool.getconn(self._timeout))
        works = False
        try:
            yield conn
            works = True
        finally:
            if isinstance(pool, _LoopPool):
                await pool.bring_back(conn, works=works)
            else:
                await pool.putconn(conn)

    def _turns_of(self, pool: SyncPool | AsyncPool, make: Callable[[int], T]) -> T:
        """Return what lets as many callers at a pool as it has connections.

        Others queue for as long as it takes: that many want something at a time is no outage, which a pool that has no
        connection to give in time is taken for.
        """
        turns: T | None = self._turns.get(pool)
        if turns is None:
            with self._lock:
                turns = self._turns.setdefault(pool, make(pool.max_size))
        return turns

    def fetch(self, query: Query, *, meanwhile: Callable[[], None] | None = None) -> list[DictRow]:
        """Run a read; a connection that broke while it lay in the pool is replaced.

        Args:
            query: The statement.
            meanwhile: Is called while the server works, if it comes to that; must not raise, and may be called again.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
            NotSetUpError: The tables are missing.
            ConfigurationError: The pool's connections do not work in the schema.
        """
        self._tier.check(probes=False)
        pool = self.pool()
        with self._turns_of(pool, threading.BoundedSemaphore):
            return self._fetch(pool, query, meanwhile)

    def _fetch(self, pool: SyncPool, query: Query, meanwhile: Callable[[], None] | None) -> list[DictRow]:
        limit = self.work_limit if query.patient else self._limit
        begun = self._tier.check()  # those who were before may have found it gone
        for left in range(max(pool.max_size, _RACES), -1, -1):
            conn: Connection[DictRow] | None = None
            try:
                with self.connection() as conn, limited(conn, limit, meanwhile):
                    if self._schema is not None and pool not in self._verified:
                        self.verify(conn)
                        self._verified.add(pool)
                    if query.short and self._short.suits(conn):
                        rows = conn.wait(self._short.ask(conn, query.sql, query.params))
                    else:
                        cur = conn.cursor(binary=True, row_factory=dict_row)
                        rows = cur.execute(query.sql.encode(), query.params).fetchall()
                        if not conn.autocommit:
                            conn.commit()
            except psycopg.errors.UndefinedTable as exc:
                raise not_set_up(exc) from exc
            except _DOWN as exc:
                if isinstance(exc, NoAnswerError) and pool is not self._given_pool:
                    pool.drain()  # the others may be as dead, and each would cost a time-out
                is_passing = isinstance(exc, _LOST_RACE) or (conn and conn.broken)
                if not left or isinstance(exc, _NO_POINT_IN_RETRYING) or not is_passing:
                    raise self._tier.failed(exc) from exc
            else:
                self._tier.succeeded(begun)
                return rows
        raise AssertionError("the last attempt returns or raises")

    async def afetch(self, query: Query) -> list[DictRow]:
        """Run a read on the running loop's pool; see `fetch`."""
        self._tier.check(probes=False)
        pool = await self.apool()
        async with self._turns_of(pool, asyncio.BoundedSemaphore):
            return await self._afetch(pool, query)

    async def _afetch(self, pool: AsyncPool, query: Query) -> list[DictRow]:
        limit = self.work_limit if query.patient else self._limit
        begun = self._tier.check()  # those who were before may have found it gone
        for left in range(max(pool.max_size, _RACES), -1, -1):
            conn: AsyncConnection[DictRow] | None = None
            try:
                async with self._aconnection(pool) as conn:
                    with limited(conn, limit):
                        if self._schema is not None and pool not in self._verified:
                            await self.averify(conn)
                            self._verified.add(pool)
                        if query.short and self._short.suits(conn):
                            rows = await conn.wait(self._short.ask(conn, query.sql, query.params))
                        else:
                            cur = conn.cursor(binary=True, row_factory=dict_row)
                            rows = await (await cur.execute(query.sql.encode(), query.params)).fetchall()
                            if not conn.autocommit:
                                await conn.commit()
            except psycopg.errors.UndefinedTable as exc:
                raise not_set_up(exc) from exc
            except _DOWN as exc:
                if isinstance(exc, NoAnswerError) and pool is not self._given_apool:
                    await pool.drain()
                is_passing = isinstance(exc, _LOST_RACE) or (conn and conn.broken)
                if not left or isinstance(exc, _NO_POINT_IN_RETRYING) or not is_passing:
                    raise self._tier.failed(exc) from exc
            else:
                self._tier.succeeded(begun)
                return rows
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close the synchronous pool, if it was made here."""
        if self._pool is not None and self._pool is not self._given_pool:
            self._pool.close(_CLOSE_SECONDS)
        self._pool = self._given_pool

    async def aclose(self) -> None:
        """Close the running loop's pool, if it was made here."""
        pool = self._by_loop.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.close(_CLOSE_SECONDS)

    @property
    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """The event loops that have a pool made here."""
        return list(self._by_loop)

    def forget(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        self._lock = threading.Lock()
        self._pool = self._given_pool
        self._by_loop = weakref.WeakKeyDictionary()
        self._turns = weakref.WeakKeyDictionary()


PID = "SELECT pg_backend_pid()"
"""Asks for the process id of the session that answers."""


def behind_pooler(conn: Connection[Any] | AsyncConnection[Any], pid: int) -> bool:
    """Tell whether something between us and the server hands out its sessions, from what `pg_backend_pid()` says.

    A pooler answers the start of a connection itself, with a process id of its own.
    """
    return pid != conn.info.backend_pid


def _suit_pooler(conn: Connection[Any]) -> None:
    row = Cursor(conn, row_factory=tuple_row).execute(PID, prepare=False).fetchone()
    if row is not None and behind_pooler(conn, row[0]):
        conn.prepare_threshold = None


async def _asuit_pooler(conn: AsyncConnection[Any]) -> None:
    row = await (await AsyncCursor(conn, row_factory=tuple_row).execute(PID, prepare=False)).fetchone()
    if row is not None and behind_pooler(conn, row[0]):
        conn.prepare_threshold = None


def not_set_up(cause: BaseException) -> NotSetUpError:
    """Return the error that says that tables are missing."""
    return NotSetUpError(
        f"A table is missing ({cause.args[0] if cause.args else cause}). Call saver.setup() or run "
        "`checkpointer migrate` once."
    )
