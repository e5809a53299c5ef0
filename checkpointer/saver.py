"""`BufferedPostgresSaver`: LangGraph's contract, each method a few lines over the rooms below.

Not here: what an operation does (`operations.py`), what a record is (`records.py`), how Redis and Postgres are asked
(`buffer/`, `store/`). Here are the two runners that carry an operation's steps out, one blocking, one awaiting.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg.rows import dict_row

from checkpointer.buffer.commands import ScriptCall
from checkpointer.core import Core
from checkpointer.errors import (
    ConfigurationError,
    NonFiniteValueError,
    StoreUnavailableError,
    UnserializableValueError,
)
from checkpointer.flush import barriers
from checkpointer.flush.dead_letters import DeadLetters
from checkpointer.instruments import Measured
from checkpointer.operations import thread_ids
from checkpointer.options import BufferOptions
from checkpointer.puts import refused_event
from checkpointer.records import Codec, thread_text
from checkpointer.steps import Both, Flushed, Pause, RareStep, ServerInfo, Step
from checkpointer.store import schema
from checkpointer.store.reads import SELECT, Query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
    from types import TracebackType

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import (
        ChannelVersions,
        Checkpoint,
        CheckpointMetadata,
        CheckpointTuple,
        DeltaChannelHistory,
    )
    from langgraph.checkpoint.serde.base import SerializerProtocol
    from psycopg import Cursor
    from psycopg.rows import DictRow
    from psycopg_pool import AsyncConnectionPool

    from checkpointer.buffer.places import AsyncRedis, SyncRedis
    from checkpointer.flush.report import FlushReport
    from checkpointer.hooks import Hooks
    from checkpointer.instruments import Instruments
    from checkpointer.store.clients import Given

T = TypeVar("T")


class BufferedPostgresSaver(PostgresSaver):
    """A `PostgresSaver` with a Redis buffer in front: a put costs one Redis round trip.

    One object serves `invoke` and `ainvoke`, from any number of threads and event loops. What it has acknowledged is in
    Redis or in Postgres; a background thread moves it to Postgres, into LangGraph's own tables, where the stock
    `PostgresSaver` reads it. Every failure becomes an event for `hooks`.

    Use it under `with` or `async with`, or call `close()` or `aclose()` in the end.

    Args:
        conn: A connection string, or your own `psycopg_pool.ConnectionPool` or `AsyncConnectionPool`. Of a single
            psycopg connection only the settings are used.
        redis: A URL, or your own client (with `decode_responses=False`): `redis.Redis`, `redis.RedisCluster`, what a
            sentinel's `master_for(...)` gives, or one of those of `redis.asyncio`.
        async_conn: An `AsyncConnectionPool` to use beside a `ConnectionPool`.
        async_redis: An asynchronous client to use beside a synchronous one.
        serde: The serializer, as for `PostgresSaver`.
        options: The settings; or give them as keywords.
        **settings: Fields of `BufferOptions`.

    Raises:
        ConfigurationError: An argument cannot work; nothing was started.

    Example:
        ```python
        with BufferedPostgresSaver.from_conn_string(POSTGRES_URI, redis_url=REDIS_URL) as saver:
            saver.setup()
            graph = builder.compile(checkpointer=saver)
            graph.invoke(inputs, {"configurable": {"thread_id": "1"}})
        ```
    """

    SELECT_SQL = SELECT

    def __init__(
        self,
        conn: str | Given,
        redis: str | SyncRedis | AsyncRedis,
        *,
        async_conn: AsyncConnectionPool[Any] | None = None,
        async_redis: AsyncRedis | None = None,
        serde: SerializerProtocol | None = None,
        options: BufferOptions | None = None,
        **settings: Any,
    ) -> None:
        if options is not None and settings:
            raise ConfigurationError("Give either options=BufferOptions(...) or single settings, not both.")
        options = options or BufferOptions.from_mapping(settings)
        self._core = Core(conn, redis, async_conn=async_conn, async_redis=async_redis, options=options)
        super().__init__(cast("Any", conn), serde=serde)

    @classmethod
    def from_conn_string(  # type: ignore[override]  # returns the saver itself, so that it works under `async with` too
        cls,
        conn_string: str,
        *,
        redis_url: str,
        serde: SerializerProtocol | None = None,
        **options: Any,
    ) -> BufferedPostgresSaver:
        """Make a saver from addresses, for `with` or `async with`.

        Args:
            conn_string: Postgres, as `postgresql://user:password@host:port/db` or `key=value` pairs.
            redis_url: Redis or Valkey, as `redis://`, `rediss://`, `unix://`, `redis+cluster://host:port,host:port` or
                `redis+sentinel://host:port,host:port/service`.
            serde: The serializer.
            **options: Fields of `BufferOptions`.

        Raises:
            ConfigurationError: An address or an option cannot work; nothing was started.
        """
        if not isinstance(redis_url, str):
            raise ConfigurationError("redis_url must be a URL: redis://host:6379. For a client use the constructor.")
        if not isinstance(conn_string, str):
            raise ConfigurationError("conn_string must be a string. For a pool use the constructor.")
        return cls(conn_string, redis_url, serde=serde, **options)

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def hooks(self) -> Hooks:
        """Where to subscribe to events: `saver.hooks.add(hook)`."""
        return self._core.hooks

    @property
    def options(self) -> BufferOptions:
        """The settings."""
        return self._core.options

    @property
    def instruments(self) -> Instruments:
        """What the saver can be measured by: `observability.prometheus.PrometheusMetrics(saver)`."""
        return self._core.instruments

    @property
    def dead_letters(self) -> DeadLetters:
        """The records that Postgres refused: list, show, replay or drop them."""
        options = self._core.options
        return DeadLetters(
            self._core.flusher, options.prefix, options.postgres_timeout, self.serde, self._run, self._arun
        )

    def __enter__(self) -> BufferedPostgresSaver:
        self._core.check_open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> BufferedPostgresSaver:
        self._core.check_open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def close(self) -> None:
        """Flush what this process has buffered, for at most `close_timeout`, and close what the saver opened.

        What could not be flushed stays in Redis; the next saver on this buffer finds it. May be called again.

        Raises:
            WrongLoopError: Called inside a running event loop that has used the saver; use `aclose()` there.
        """
        self._core.close()

    async def aclose(self) -> None:
        """See `close`."""
        await self._core.aclose()

    def setup(self) -> None:
        """Create the tables, and the schema if one is set, if they are not there, and check both servers.

        Safe to call at every start, and from many processes at once. What weakens a promise without breaking it (no
        append-only file, say) becomes an event `server.unsafe`.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
            BufferUnavailableError: Redis cannot be reached.
            UnsupportedServerError: A server is too old, or is set up in a way that cannot keep the guarantees.
            MigrationError: A migration failed.
            ConfigurationError: The application has another number of partitions, or the schema is not in effect.
        """
        self._core.check_open()
        try:
            with self._core.postgres.unchecked(self._core.postgres.setup_limit) as conn:
                schema.setup(conn, schema=self.options.schema)
        except (psycopg.OperationalError, OSError) as exc:
            raise self._core.postgres_tier.unavailable(exc) from exc
        self._run(self._core.operations.register())

    async def asetup(self) -> None:
        """See `setup`."""
        self._core.check_open()
        try:
            async with await self._core.postgres.aunchecked(self._core.postgres.setup_limit) as conn:
                await schema.asetup(conn, schema=self.options.schema)
        except (psycopg.OperationalError, OSError) as exc:
            raise self._core.postgres_tier.unavailable(exc) from exc
        await self._arun(self._core.operations.register())

    # -- the two runners -----------------------------------------------------------------------------------------

    def _run(self, steps: Generator[Step, Any, T]) -> T:
        self._core.check_open()
        try:
            step = next(steps)
            while True:
                try:
                    reply = self._core.redis.run(step) if isinstance(step, ScriptCall) else self._do(step)
                except Exception as exc:  # noqa: BLE001 - the operation decides what a failed step means
                    step = steps.throw(exc)
                else:
                    step = steps.send(reply)
        except StopIteration as stop:
            return cast("T", stop.value)

    def _do(self, step: RareStep) -> Any:
        if isinstance(step, Query):
            return self._core.postgres.fetch(step)
        if isinstance(step, Both):
            return self._do_both(step)
        if isinstance(step, Flushed):
            return self._core.flusher.flush_soon(step.thread_id, step.upto).result()
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, ServerInfo):
            return self._core.redis.info()
        return self._core.flusher.submit(step.work).result()

    def _do_both(self, step: Both) -> tuple[Any, list[DictRow] | StoreUnavailableError]:
        reply: Future[Any] = Future()

        def ask_redis() -> None:
            if reply.done():
                return
            try:
                reply.set_result(self._core.redis.run(step.call))
            except Exception as exc:  # noqa: BLE001 - the operation decides what it means
                reply.set_exception(exc)

        try:
            rows: list[DictRow] | StoreUnavailableError = self._core.postgres.fetch(step.query, meanwhile=ask_redis)
        except StoreUnavailableError as exc:
            rows = exc
        ask_redis()
        return reply.result(), rows

    async def _arun(self, steps: Generator[Step, Any, T]) -> T:
        self._core.check_open()
        try:
            step = next(steps)
            while True:
                try:
                    reply = await (self._core.redis.arun(step) if isinstance(step, ScriptCall) else self._ado(step))
                except Exception as exc:  # noqa: BLE001 - the operation decides what a failed step means
                    step = steps.throw(exc)
                else:
                    step = steps.send(reply)
        except StopIteration as stop:
            return cast("T", stop.value)

    async def _ado(self, step: RareStep) -> Any:
        if isinstance(step, Query):
            return await self._core.postgres.afetch(step)
        if isinstance(step, Both):
            return await self._ado_both(step)
        if isinstance(step, Flushed):
            return await _shielded(self._core.flusher.flush_soon(step.thread_id, step.upto))
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, ServerInfo):
            return await self._core.redis.ainfo()
        return await _shielded(self._core.flusher.submit(step.work))

    async def _ado_both(self, step: Both) -> tuple[Any, list[DictRow] | StoreUnavailableError]:
        reply = asyncio.ensure_future(self._core.redis.arun(step.call))
        try:
            rows: list[DictRow] | StoreUnavailableError = await self._core.postgres.afetch(step.query)
        except StoreUnavailableError as exc:
            rows = exc
        except BaseException:
            reply.cancel()
            reply.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else takes it
            raise
        return await reply, rows

    # -- LangGraph's contract ------------------------------------------------------------------------------------

    # An operation is measured only while somebody measures: else a put looks at one flag more, and calls nothing.

    def _putting(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Generator[Step, Any, RunnableConfig]:
        codec = Codec(self.serde, self._core.options.non_finite)
        try:
            put = codec.encode_put(config, checkpoint, metadata, new_versions)
        except (NonFiniteValueError, UnserializableValueError) as exc:
            self._core.hooks.emit(refused_event("put", config, metadata, exc))
            raise
        self._core.run_streams.note(config)
        return self._core.operations.put(put, codec)

    def _putting_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> Generator[Step, Any, None]:
        codec = Codec(self.serde, self._core.options.non_finite)
        try:
            put = codec.encode_writes(config, writes, task_id, task_path)
        except (NonFiniteValueError, UnserializableValueError) as exc:
            self._core.hooks.emit(refused_event("put_writes", config, {}, exc))
            raise
        return self._core.operations.put_writes(put)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Read a checkpoint: the one that the config names, or the thread's latest.

        Raises:
            TierUnavailableError: A server is away, and the other is not known to be complete.
            InvalidConfigError: The config has no usable thread.
        """
        self._core.run_streams.note(config)
        if self._core.instruments.is_on:
            with Measured(self._core.instruments, "get_tuple", config):
                return self._run(self._core.operations.get_tuple(config, self))
        return self._run(self._core.operations.get_tuple(config, self))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """See `get_tuple`."""
        self._core.run_streams.note(config)
        if self._core.instruments.is_on:
            with Measured(self._core.instruments, "get_tuple", config):
                return await self._arun(self._core.operations.get_tuple(config, self))
        return await self._arun(self._core.operations.get_tuple(config, self))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Read the checkpoints that match, newest first; what is buffered of them is flushed before.

        Raises:
            FlushIncompleteError: Something could not be flushed.
            TierUnavailableError: A server is away.
        """
        with Measured(self._core.instruments, "list", config):
            found = self._run(self._core.operations.list(config, filter, before, limit, self))
        yield from found

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """See `list`."""
        with Measured(self._core.instruments, "list", config):
            found = await self._arun(self._core.operations.list(config, filter, before, limit, self))
        for one in found:
            yield one

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint.

        When this returns, it is as safe as the acknowledgement level says (`BufferOptions.ack`, or
        `config["configurable"]["ack"]`): in Redis at least, or in Postgres if Redis cannot take it.

        Raises:
            CheckpointLostError: Neither server took it.
            AcknowledgementError: It is in the buffer, but not as safe as asked for.
            UnsupportedServerError: This Redis cannot acknowledge at the level asked for; it is in the buffer.
            InvalidConfigError: The config has no usable thread or namespace; nothing was written.
            UnserializableValueError: A value cannot be serialised; nothing was written.
            NonFiniteValueError: With `non_finite="raise"`; nothing was written.
        """
        if self._core.instruments.is_on:
            with Measured(self._core.instruments, "put", config):
                return self._run(self._putting(config, checkpoint, metadata, new_versions))
        return self._run(self._putting(config, checkpoint, metadata, new_versions))

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """See `put`. A put that is cancelled may have been stored."""
        if self._core.instruments.is_on:
            with Measured(self._core.instruments, "put", config):
                return await self._arun(self._putting(config, checkpoint, metadata, new_versions))
        return await self._arun(self._putting(config, checkpoint, metadata, new_versions))

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store pending writes of a task; see `put` for what that promises and raises."""
        if self._core.instruments.is_on:
            with Measured(self._core.instruments, "put_writes", config):
                return self._run(self._putting_writes(config, writes, task_id, task_path))
        return self._run(self._putting_writes(config, writes, task_id, task_path))

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """See `put_writes`."""
        if self._core.instruments.is_on:
            with Measured(self._core.instruments, "put_writes", config):
                return await self._arun(self._putting_writes(config, writes, task_id, task_path))
        return await self._arun(self._putting_writes(config, writes, task_id, task_path))

    def delete_thread(self, thread_id: str) -> None:
        """Delete all that was saved of a thread, buffered or not.

        Raises:
            TierUnavailableError: A server is away; deleting again is safe.
        """
        self._run(self._deletion([thread_text(thread_id)]))

    async def adelete_thread(self, thread_id: str) -> None:
        """See `delete_thread`."""
        await self._arun(self._deletion([thread_text(thread_id)]))

    def _deletion(self, threads: Sequence[str]) -> Generator[Step, Any, None]:
        return self._core.operations.barrier(barriers.delete_threads, threads, threads=threads)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata names one of these runs, with their pending writes.

        Raises:
            FlushIncompleteError: Something could not be flushed before.
            TierUnavailableError: A server is away.
        """
        if runs := _run_ids(run_ids):
            self._run(self._core.operations.barrier(barriers.delete_for_runs, runs))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """See `delete_for_runs`."""
        if runs := _run_ids(run_ids):
            await self._arun(self._core.operations.barrier(barriers.delete_for_runs, runs))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints, blobs and pending writes of a thread to another one.

        Raises:
            FlushIncompleteError: A thread could not be flushed before.
            TierUnavailableError: A server is away.
        """
        self._run(self._copy(source_thread_id, target_thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """See `copy_thread`."""
        await self._arun(self._copy(source_thread_id, target_thread_id))

    def _copy(self, source: str, target: str) -> Generator[Step, Any, None]:
        source, target = thread_text(source), thread_text(target)
        return self._core.operations.barrier(barriers.copy_thread, source, target, threads=[target])

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Prune threads.

        `"keep_latest"` keeps each namespace's latest checkpoint with its pending writes and blobs, and the ancestors
        that its delta channels are rebuilt from; `"delete"` and `"delete_all"` delete the threads.

        Raises:
            TypeError: `thread_ids` is a single string.
            ValueError: The strategy is unknown.
            FlushIncompleteError: A thread could not be flushed before.
            TierUnavailableError: A server is away.
        """
        if steps := self._pruning(thread_ids, strategy):
            self._run(steps)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """See `prune`."""
        if steps := self._pruning(thread_ids, strategy):
            await self._arun(steps)

    def _pruning(self, threads: Sequence[str], strategy: str) -> Generator[Step, Any, None] | None:
        names = thread_ids(threads)
        if strategy not in ("keep_latest", "delete", "delete_all"):
            raise ValueError(f"Unknown prune strategy: {strategy!r}. Use 'keep_latest', 'delete' or 'delete_all'.")
        if not names:
            return None
        if strategy != "keep_latest":
            return self._deletion(names)
        return self._core.operations.barrier(barriers.prune_to_latest, names, threads=names)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Read the writes and seeds from which delta channels are rebuilt; the thread is flushed before.

        Raises:
            FlushIncompleteError: The thread could not be flushed.
            TierUnavailableError: A server is away.
        """
        return self._run(self._core.operations.delta_history(config, channels, self))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """See `get_delta_channel_history`."""
        return await self._arun(self._core.operations.delta_history(config, channels, self))

    # -- flushing ------------------------------------------------------------------------------------------------

    def flush(self, thread_id: str | None = None) -> FlushReport:
        """Bring a thread, or everything that is buffered, to Postgres now.

        Args:
            thread_id: The thread; None for everything, whoever put it.

        Returns:
            A report that is true only if everything asked for is in Postgres. An outage makes it false, with the error;
            nothing is dropped, and the flusher goes on trying.
        """
        with Measured(self._core.instruments, "flush", _named(thread_id)):
            return self._core.flusher.flush(self._to_flush(thread_id)).result()

    async def aflush(self, thread_id: str | None = None) -> FlushReport:
        """See `flush`."""
        with Measured(self._core.instruments, "flush", _named(thread_id)):
            return await _shielded(self._core.flusher.flush(self._to_flush(thread_id)))

    def _to_flush(self, thread_id: str | None) -> Sequence[str] | None:
        self._core.check_open()
        return None if thread_id is None else [thread_text(thread_id)]

    @contextmanager
    def _cursor(self, *, pipeline: bool = False) -> Iterator[Cursor[DictRow]]:
        """Give the base class a cursor, without its lock: a pool needs none."""
        self._core.check_open()
        with (
            self._core.postgres.connection() as conn,
            conn.transaction(),
            conn.cursor(binary=True, row_factory=dict_row) as cur,
        ):
            self._core.postgres.verify(conn)
            yield cur


async def _shielded(future: Future[T]) -> T:
    """Await work of the flusher; who is cancelled stops waiting, and the work goes on."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _named(thread_id: str | None) -> dict[str, Any]:
    return {"configurable": {"thread_id": thread_id}}


def _run_ids(values: Any) -> list[str]:
    if isinstance(values, str):
        raise TypeError("run_ids must be a sequence of run IDs, not a str")
    return [str(value) for value in values]
