"""What a saver and its clones share: connections, flusher, hooks, counters; opened at first use, closed once.

Not here: LangGraph's contract (`saver.py`). LangGraph clones savers (`with_allowlist`), so nothing that must exist
once may live in the saver itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from checkpointer import readings
from checkpointer.buffer.clients import RedisSide
from checkpointer.buffer.commands import Commands
from checkpointer.buffer.keys import KeyLayout
from checkpointer.errors import ClosedError, WrongLoopError
from checkpointer.flush.flusher import Flusher
from checkpointer.flush.ledger import Ledger
from checkpointer.flush.report import FlushTotals
from checkpointer.flush.session import Session
from checkpointer.hooks import HookContext, Hooks, load_hook, renew_in_child, target_identity
from checkpointer.instruments import Instruments
from checkpointer.operations import Operations
from checkpointer.puts import Puts
from checkpointer.run_streams import RunStreams
from checkpointer.store.clients import PostgresSide
from checkpointer.tiers import Tier
from checkpointer.watch import Watcher
from checkpointer.watermarks import WaterMarks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from psycopg_pool import AsyncConnectionPool

    from checkpointer.buffer.places import AsyncRedis, SyncRedis
    from checkpointer.instruments import Reading
    from checkpointer.options import BufferOptions
    from checkpointer.store.clients import Given


# Seconds between two looks at the servers, while somebody reads the metrics.
_LOOK_PAUSE = 5.0


class Core:
    """See the module. The arguments are those of `BufferedPostgresSaver`, and how often to look at the servers."""

    def __init__(
        self,
        conn: str | Given,
        redis: str | SyncRedis | AsyncRedis,
        *,
        async_conn: AsyncConnectionPool[Any] | None,
        async_redis: AsyncRedis | None,
        options: BufferOptions,
        look_pause: float = _LOOK_PAUSE,
    ) -> None:
        self.options = options
        self.instruments = Instruments(options.key_prefix)
        self.hooks = Hooks(notice=self.instruments.notice)
        emit = self.hooks.emit
        self.redis_tier = Tier("redis", emit)
        self.postgres_tier = Tier("postgres", emit)
        self.postgres = PostgresSide(
            conn,
            apool=async_conn,
            timeout=options.postgres_timeout,
            query_timeout=options.query_timeout,
            pool_size=options.pool_size,
            tier=self.postgres_tier,
            schema=options.schema,
        )
        given: dict[str, Any] = {"aclient": async_redis}
        if isinstance(redis, str):
            given["url"] = redis
        elif type(redis).__module__.startswith("redis.asyncio"):
            given["aclient"] = redis
        else:
            given["client"] = redis
        self.redis = RedisSide(tier=self.redis_tier, timeout=options.redis_timeout, **given)
        self.commands = Commands(KeyLayout(options.key_prefix, options.partitions), options.clean_ttl)
        self.ledger = Ledger()
        self.marks = WaterMarks(options, emit)
        self.watcher = Watcher(self.make_session, look_pause)
        self._flushers: list[Flusher] = []
        self.flusher = self.make_flusher()
        self.puts = Puts(
            self.commands,
            self.ledger,
            options,
            emit,
            self.redis_tier,
            self.postgres_tier,
            self.flusher,
            self.marks,
        )
        self.operations = Operations(self.commands, self.ledger, options, self.flusher, self.puts, emit)
        self.run_streams = RunStreams()
        self._closed = False
        self.instruments.add_source(self._readings)
        context = HookContext(
            connect_postgres=self.postgres.for_hook,
            connect_redis=self.redis.dedicated,  # type: ignore[arg-type]  # a cluster client does as well
            prefix=options.key_prefix,
            identity=target_identity(
                self.postgres.conninfo, redis if isinstance(redis, str) else "", options.key_prefix
            ),
            run_streams=self.run_streams,
            emit=emit,
            instruments=self.instruments,
        )
        for name in options.hooks:
            self.hooks.add(load_hook(name, context), name=name)
        renew_in_child(self.forget)

    def make_session(self, share: Iterable[int] | None = None) -> Session:
        """Make connections for one more background thread, which closes them."""
        return Session(
            self.redis,
            self.postgres,
            self.commands,
            self.options,
            self.redis_tier,
            self.postgres_tier,
            self.instruments,
            share,
        )

    def make_flusher(self, share: Iterable[int] | None = None) -> Flusher:
        """Make a flusher, for some of the partitions or for all; whoever makes a further one closes it."""
        flusher = Flusher(
            self.make_session(share), self.ledger, self.options, self.hooks.emit, self.marks, self.instruments
        )
        self._flushers.append(flusher)
        return flusher

    def totals(self) -> FlushTotals:
        """Return what the flushers of this process have done so far."""
        return FlushTotals.of_all([flusher.totals for flusher in self._flushers])

    def _readings(self) -> Iterator[Reading]:
        # Whoever reads once, reads again: by then there was a look.
        self.watcher.start()
        yield from readings.of_buffer(self.marks.pressure, self.puts.around)
        yield from readings.of_flushers(self.totals())
        yield from readings.of_hooks(self.hooks.stats())
        down = {"redis": self.redis_tier.is_down, "postgres": self.postgres_tier.is_down}
        yield from readings.of_servers(self.watcher, down)

    def check_open(self) -> None:
        """Refuse to work after closing.

        Raises:
            ClosedError: The saver is closed.
        """
        if self._closed:
            raise ClosedError("The saver is closed: open a new one with BufferedPostgresSaver.from_conn_string(...).")

    def close(self) -> None:
        """Flush what this process owes, as far as the time allows, and close what was opened here.

        Raises:
            WrongLoopError: The running event loop has connections of this saver; use `aclose()`.
        """
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not None and running in self.postgres.loops:
            raise WrongLoopError(
                "close() would block the event loop that has to close the saver's asynchronous connections: "
                "use `await saver.aclose()`, or `async with`."
            )
        self._close_blocking()
        for loop in self.postgres.loops:
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(self._aclose_loop(), loop).result(self.options.close_timeout)

    async def aclose(self) -> None:
        """See `close`; for asynchronous callers."""
        await asyncio.to_thread(self._close_blocking)
        await self._aclose_loop()

    async def _aclose_loop(self) -> None:
        await self.redis.aclose()
        await self.postgres.aclose()

    def _close_blocking(self) -> None:
        self._closed = True
        self.flusher.close(self.options.close_timeout)
        self.watcher.close()
        self.hooks.close()
        self.instruments.close()
        self.run_streams.close()
        self.redis.close()
        self.postgres.close()

    def forget(self) -> None:
        """In a forked child: start anew; the parent's connections and debts stay the parent's."""
        for owner in (self.redis_tier, self.postgres_tier, self.marks, self.puts, self.run_streams):
            owner.renew_lock()
        self.redis.forget()
        self.postgres.forget()
        self.ledger.clear()
        for flusher in self._flushers:
            flusher.forget()
        self.watcher.forget()
        self.instruments.renew()
