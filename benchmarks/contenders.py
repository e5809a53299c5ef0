"""The savers under test, each set up as its makers say, with the settings that are best for the load.

Not here: what they have to do (`loads/`). A *mode* is how a saver is called: `sync` or `async`; most makers have a
class for each. Every contender gets its tables made (`setup`), its own prefix where it has prefixes, and, where calls
come concurrently, a pool that is large enough for them and lets callers wait instead of failing.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from benchmarks.servers import installed
from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from benchmarks.servers import Place

Mode = Literal["sync", "async"]

POOL_SETTINGS = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
"""What `PostgresSaver.from_conn_string` sets on its connection."""

POOL_SIZE = 20
"""Connections of each pool, of the same size for all contenders that have one; more do not help two processors."""

CONNECTIONS = {"sync": (2, 10), "async": (POOL_SIZE, POOL_SIZE)}
"""Least and most connections of the pools of stock savers."""


@dataclass(frozen=True)
class Contender:
    """One saver in one configuration.

    Attributes:
        key: Names it in results.
        name: Names it for readers.
        kind: `ours`, `stock`, `peer` or `ceiling`.
        open: Opens it in a place for a mode.
        package: What has to be installed for it.
        is_slow: Each of its calls waits for a disk, so that it gets fewer of them.
    """

    key: str
    name: str
    kind: Literal["ours", "stock", "peer", "ceiling"]
    open: Callable[[Place, Mode], AbstractAsyncContextManager[Any]]
    package: str | None = None
    is_slow: bool = False

    def why_not(self, place: Place) -> str | None:
        """Say why it cannot be measured here, if it cannot."""
        if self.package and not installed(self.package):
            return f"{self.name} is left out: {self.package} is not installed"
        if self.key == "redisjson" and place.search_url is None:
            return f"{self.name} is left out: it needs a server with JSON and Search (--search-url)"
        return None


def ours(suffix: str, **options: Any) -> Callable[[Place, Mode], AbstractAsyncContextManager[Any]]:
    """Make an opener of our saver with some options; all else is as users get it."""

    @asynccontextmanager
    async def open_it(place: Place, mode: Mode) -> AsyncIterator[Any]:
        settings = {"prefix": f"{place.prefix}.{suffix}", **options}
        async with BufferedPostgresSaver.from_conn_string(
            place.postgres_uri, redis_url=place.redis_url, **settings
        ) as saver:
            if mode == "sync":
                saver.setup()
            else:
                await saver.asetup()
            yield saver

    return open_it


@asynccontextmanager
async def _stock_on_connection(place: Place, mode: Mode) -> AsyncIterator[Any]:
    if mode == "sync":
        with PostgresSaver.from_conn_string(place.postgres_uri) as saver:
            saver.setup()
            yield saver
    else:
        async with AsyncPostgresSaver.from_conn_string(place.postgres_uri) as asaver:
            await asaver.setup()
            yield asaver


class LockFreePostgresSaver(PostgresSaver):
    """The stock saver on a pool without the lock around each call: what it could be."""

    @contextmanager
    def _cursor(self, *, pipeline: bool = False) -> Iterator[Any]:
        assert isinstance(self.conn, ConnectionPool)
        with self.conn.connection() as conn:
            if pipeline:
                with conn.pipeline(), conn.cursor(binary=True, row_factory=dict_row) as cur:
                    yield cur
            else:
                with conn.cursor(binary=True, row_factory=dict_row) as cur:
                    yield cur


class AsyncLockFreePostgresSaver(AsyncPostgresSaver):
    """See `LockFreePostgresSaver`."""

    @asynccontextmanager
    async def _cursor(self, *, pipeline: bool = False) -> AsyncIterator[Any]:
        assert isinstance(self.conn, AsyncConnectionPool)
        async with self.conn.connection() as conn:
            if pipeline:
                async with conn.pipeline(), conn.cursor(binary=True, row_factory=dict_row) as cur:
                    yield cur
            else:
                async with conn.cursor(binary=True, row_factory=dict_row) as cur:
                    yield cur


def _stock_on_pool(
    sync: type[PostgresSaver], asynchronous: type[AsyncPostgresSaver]
) -> Callable[[Place, Mode], AbstractAsyncContextManager[Any]]:
    @asynccontextmanager
    async def open_it(place: Place, mode: Mode) -> AsyncIterator[Any]:
        least, most = CONNECTIONS[mode]
        pooled: Any = {"kwargs": POOL_SETTINGS, "min_size": least, "max_size": most, "timeout": 120.0}
        if mode == "sync":
            with ConnectionPool(place.postgres_uri, **pooled) as pool:
                saver = sync(pool)
                saver.setup()
                yield saver
        else:
            async with AsyncConnectionPool(place.postgres_uri, **pooled) as apool:
                await apool.wait()
                asaver = asynchronous(apool)
                await asaver.setup()
                yield asaver

    return open_it


@asynccontextmanager
async def _memory(place: Place, mode: Mode) -> AsyncIterator[Any]:
    yield InMemorySaver()


@asynccontextmanager
async def _sqlite(place: Place, mode: Mode) -> AsyncIterator[Any]:
    path = str(place.folder / f"{mode}.sqlite")
    if mode == "sync":
        with import_module("langgraph.checkpoint.sqlite").SqliteSaver.from_conn_string(path) as saver:
            saver.setup()
            yield saver
    else:
        async with import_module("langgraph.checkpoint.sqlite.aio").AsyncSqliteSaver.from_conn_string(path) as asaver:
            await asaver.setup()
            yield asaver


@asynccontextmanager
async def _plain_redis(place: Place, mode: Mode) -> AsyncIterator[Any]:
    package, prefix = import_module("langgraph_checkpoint_plainredis"), f"{place.prefix}.plain"
    if mode == "sync":
        saver = package.RedisSaver(url=place.redis_url, prefix=prefix)
        try:
            yield saver
        finally:
            saver.close()
    else:
        # As the saver makes its own client, but with a pool whose callers wait for a connection.
        redis = import_module("redis.asyncio")
        pool = redis.BlockingConnectionPool.from_url(
            place.redis_url, protocol=2, max_connections=POOL_SIZE, timeout=120.0
        )
        async with redis.Redis(connection_pool=pool) as client:
            yield package.AsyncRedisSaver(client=client, prefix=prefix)
        await pool.aclose()


@asynccontextmanager
async def _valkey(place: Place, mode: Mode) -> AsyncIterator[Any]:
    package = import_module("langgraph_checkpoint_aws.checkpoint.valkey")
    url = place.redis_url.replace("redis://", "valkey://", 1)
    if mode == "sync":
        with package.ValkeySaver.from_conn_string(url) as saver:
            yield saver
    else:
        pools = import_module("valkey.asyncio")
        pool = pools.BlockingConnectionPool.from_url(url, max_connections=POOL_SIZE, timeout=120.0)
        async with package.AsyncValkeySaver.from_pool(pool) as asaver:
            yield asaver
        await pool.aclose()


@asynccontextmanager
async def _redis_json(place: Place, mode: Mode) -> AsyncIterator[Any]:
    prefixes = {
        "checkpoint_prefix": f"{place.prefix}.json",
        "checkpoint_write_prefix": f"{place.prefix}.writes",
    }
    if mode == "sync":
        package = import_module("langgraph.checkpoint.redis")
        with package.RedisSaver.from_conn_string(place.search_url, **prefixes) as saver:
            saver.setup()
            yield saver
    else:
        package = import_module("langgraph.checkpoint.redis.aio")
        async with AsyncExitStack() as stack:
            asaver = await stack.enter_async_context(
                package.AsyncRedisSaver.from_conn_string(place.search_url, **prefixes)
            )
            await asaver.asetup()
            yield asaver


OURS, UNVERIFIED, IDLE = "ours", "ours, unverified", "ours, no flusher"
STOCK, POOLED, LOCK_FREE = "stock", "stock, pool", "stock, lock-free"
MEMORY, PLAIN = "memory", "plainredis"

CONTENDERS: dict[str, Contender] = {
    contender.key: contender
    for contender in (
        Contender(OURS, "BufferedPostgresSaver", "ours", ours("buffered")),
        Contender(
            UNVERIFIED, "BufferedPostgresSaver, verify_reads=False", "ours", ours("unverified", verify_reads=False)
        ),
        Contender(
            IDLE, "BufferedPostgresSaver, triggers=frozenset()", "ours", ours("no-flusher", triggers=frozenset())
        ),
        Contender(
            "ours, fsynced",
            'BufferedPostgresSaver, ack="fsynced"',
            "ours",
            ours("fsynced", ack="fsynced"),
            is_slow=True,
        ),
        Contender(
            "ours, replicated",
            'BufferedPostgresSaver, ack="replicated"',
            "ours",
            ours("replicated", ack="replicated"),
            is_slow=True,
        ),
        Contender(
            "ours, flushed",
            'BufferedPostgresSaver, ack="flushed"',
            "ours",
            ours("flushed", ack="flushed"),
            is_slow=True,
        ),
        Contender(STOCK, "PostgresSaver, one connection", "stock", _stock_on_connection),
        Contender(POOLED, "PostgresSaver, pool", "stock", _stock_on_pool(PostgresSaver, AsyncPostgresSaver)),
        Contender(
            LOCK_FREE,
            "PostgresSaver, pool, its lock removed",
            "stock",
            _stock_on_pool(LockFreePostgresSaver, AsyncLockFreePostgresSaver),
        ),
        Contender("sqlite", "SqliteSaver", "peer", _sqlite, "langgraph-checkpoint-sqlite"),
        Contender(PLAIN, "plainredis RedisSaver", "peer", _plain_redis, "langgraph-checkpoint-plainredis"),
        Contender("valkey", "aws ValkeySaver", "peer", _valkey, "langgraph-checkpoint-aws"),
        Contender("redisjson", "RedisSaver (JSON, Search)", "peer", _redis_json, "langgraph-checkpoint-redis"),
        Contender(MEMORY, "InMemorySaver", "ceiling", _memory),
    )
}

LUA, LUA_PIPELINED, COPY, PING = "Lua", "Lua, pipelined", "COPY", "ping"

LIMITS = {
    LUA: "one Lua call to Redis, same bytes",
    LUA_PIPELINED: "Lua calls to Redis, same bytes, 50 in a pipeline",
    COPY: "COPY into the three tables, same rows",
    PING: "PING",
}
"""What is no saver: the least that a server needs for the same bytes."""

EMPTY = "ours, Redis empty"
"""Ours, for threads that only Postgres has."""


def name_of(key: str) -> str:
    """Return the name for readers of a contender or a limit."""
    if key == EMPTY:
        return f"{CONTENDERS[OURS].name}, Redis empty"
    return CONTENDERS[key].name if key in CONTENDERS else LIMITS[key]
