"""The one way to Postgres: lock the partition, then read the buffer, write, commit, and only then forget.

Not here: when that happens and what a failure means (`flusher.py`). A *session* is one background thread's pair
of connections; it is used by one thread at a time.

The order is the guarantee. What is read before the lock may be older than what another worker has
committed meanwhile; what is forgotten before the commit may be lost.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from redis.exceptions import RedisError

from checkpointer.buffer.clients import run_pipeline
from checkpointer.buffer.commands import DirtyBlob, DirtyCheckpoint, Drained
from checkpointer.errors import CheckpointerError, ConfigurationError
from checkpointer.records import Address
from checkpointer.store.clients import not_set_up
from checkpointer.store.writes import Batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from psycopg import Connection
    from psycopg.rows import DictRow

    from checkpointer.buffer.clients import RedisSide, SyncRedis
    from checkpointer.buffer.commands import Commands
    from checkpointer.options import BufferOptions
    from checkpointer.sanitize import Change
    from checkpointer.store.clients import PostgresSide
    from checkpointer.tiers import Tier

_THREADS_AT_ONCE = 100

# READ COMMITTED is forced: each statement must see what was committed before it, the lock's last holder included.
_BEGIN = """
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
SET LOCAL synchronous_commit = on;
SET LOCAL idle_in_transaction_session_timeout = '60s';
SET LOCAL lock_timeout = '{lock_ms}ms'
"""

_LOCK = """
SELECT partition FROM checkpoint_buffer_partitions
WHERE prefix = %s AND partition = ANY(%s) ORDER BY partition FOR UPDATE
"""

_TOMBSTONES = """
SELECT thread_id, sequence FROM checkpoint_buffer_tombstones WHERE prefix = %s AND thread_id = ANY(%s)
"""

_ADVANCE = """
UPDATE checkpoint_buffer_partitions AS p
SET sequence = greatest(p.sequence, n.sequence), flushed_at = now()
FROM unnest(%s::int[], %s::bigint[]) AS n (partition, sequence)
WHERE p.prefix = %s AND p.partition = n.partition
"""

_REGISTER = """
WITH mine AS (
    INSERT INTO checkpoint_buffers (prefix, partitions) VALUES (%s, %s) ON CONFLICT (prefix) DO NOTHING
)
INSERT INTO checkpoint_buffer_partitions (prefix, partition)
SELECT %s, n FROM generate_series(0, %s - 1) AS n
ON CONFLICT (prefix, partition) DO NOTHING
"""

_BURY = """
INSERT INTO checkpoint_buffer_tombstones (prefix, thread_id, sequence)
SELECT %s, t.thread_id, t.sequence FROM unnest(%s::text[], %s::bigint[]) AS t (thread_id, sequence)
ON CONFLICT (prefix, thread_id)
DO UPDATE SET sequence = greatest(checkpoint_buffer_tombstones.sequence, EXCLUDED.sequence), deleted_at = now()
"""

_FORGET_TOMBSTONES = """
DELETE FROM checkpoint_buffer_tombstones WHERE prefix = %s AND deleted_at < now() - interval '7 days'
"""


class LockedElsewhereError(Exception):
    """Another worker holds a partition and did not let go in time, or won a race for rows."""


@dataclass(slots=True)
class Progress:
    """What became of the threads of a flush.

    Attributes:
        done: Flushed up to the sequence number given.
        locked: Left to the worker that holds their partition.
        refused: Refused by Postgres, with the error.
        lost: Threads with fields that Redis named but no longer had.
        checkpoints: Checkpoints written.
        blobs: Channel versions written.
        writes: Pending writes written.
        changes: What the pass at the Postgres write sanitised.
    """

    done: dict[str, int] = field(default_factory=dict)
    locked: set[str] = field(default_factory=set)
    refused: dict[str, psycopg.Error] = field(default_factory=dict)
    lost: dict[str, list[bytes]] = field(default_factory=dict)
    checkpoints: int = 0
    blobs: int = 0
    writes: int = 0
    changes: list[tuple[Address, Change]] = field(default_factory=list)


def is_transient(exc: psycopg.Error) -> bool:
    """Tell whether the same statement may succeed later: an outage, a lost race, a full disk; no bad data."""
    if exc.sqlstate is None:
        return isinstance(exc, psycopg.OperationalError | psycopg.InterfaceError)
    return exc.sqlstate[:2] in {"08", "25", "40", "53", "55", "57", "58"}


class Session:
    """A background thread's connections to both tiers."""

    def __init__(
        self,
        redis: RedisSide,
        postgres: PostgresSide,
        commands: Commands,
        options: BufferOptions,
        redis_tier: Tier,
        postgres_tier: Tier,
    ) -> None:
        self._redis_side = redis
        self._postgres_side = postgres
        self.commands = commands
        self.options = options
        self._redis_tier = redis_tier
        self._postgres_tier = postgres_tier
        self._redis: SyncRedis | None = None
        self._conn: Connection[DictRow] | None = None

    # -- connections ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _postgres_errors(self) -> Iterator[None]:
        """Sort Postgres' errors: missing tables, lost lock, outage; anything else passes."""
        try:
            yield
        except CheckpointerError:
            raise  # what happened inside the transaction is named already, and may be an OSError too
        except psycopg.errors.UndefinedTable as exc:
            raise not_set_up(exc) from exc
        except (psycopg.Error, OSError) as exc:
            if isinstance(exc, psycopg.Error) and (exc.sqlstate or "")[:2] in {"40", "55"}:
                raise LockedElsewhereError from exc
            if isinstance(exc, psycopg.Error) and not is_transient(exc):
                raise
            self._drop_connection()
            raise self._postgres_tier.failed(exc) from exc

    def _drop_connection(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(psycopg.Error):
                conn.close()

    def connection(self) -> Connection[DictRow]:
        """Return the connection, opened and registered if need be.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
            ConfigurationError: The application has another number of partitions.
        """
        if self._conn is None or self._conn.closed:
            with self._postgres_errors():
                self._conn = self._postgres_side.dedicated()
                options = self.options
                args = (options.prefix, options.partitions)
                row = self._conn.execute(
                    "SELECT (SELECT partitions FROM checkpoint_buffers WHERE prefix = %s) AS stored", args[:1]
                ).fetchone()
                if row is None or row["stored"] is None:
                    self._conn.execute(_REGISTER, args * 2)
                    row = self._conn.execute(
                        "SELECT partitions AS stored FROM checkpoint_buffers WHERE prefix = %s", args[:1]
                    ).fetchone()
                self._conn.execute(_FORGET_TOMBSTONES, args[:1])
            if row is not None:
                check_partitions(options, row["stored"])
        return self._conn

    @contextlib.contextmanager
    def _redis_errors(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        except (RedisError, OSError) as exc:
            raise self._redis_tier.failed(exc) from exc
        self._redis_tier.succeeded(begun)

    def redis(self) -> SyncRedis:
        """Return the Redis client."""
        if self._redis is None:
            self._redis = self._redis_side.dedicated()
        return self._redis

    def pipeline(self, calls: Sequence[Any]) -> list[Any]:
        """Run script calls in one round trip.

        Raises:
            BufferUnavailableError: Redis cannot be reached or refuses.
        """
        with self._redis_errors():
            return run_pipeline(self.redis(), list(calls))

    def close(self) -> None:
        """Close both connections; the session can be used again."""
        self._drop_connection()
        client, self._redis = self._redis, None
        if client is not None:
            with contextlib.suppress(RedisError, OSError):
                client.close()

    # -- reading the buffer --------------------------------------------------------------------------------------

    def dirty_threads(self, min_age: float = 0.0) -> list[str]:
        """Return the threads with dirty records, of all partitions; with `min_age`, of those with an old enough one."""
        layout = self.commands.layout
        with self._redis_errors():
            client = self.redis()
            keys = [layout.threads(p) for p in range(layout.partitions)]
            if min_age:
                pipe = client.pipeline(transaction=False)
                for key in keys:
                    pipe.zrange(key, 0, 0, withscores=True)
                pipe.time()
                *firsts, now = pipe.execute()
                limit = now[0] * 1000 + now[1] / 1000 - min_age * 1000
                keys = [key for key, first in zip(keys, firsts, strict=True) if first and first[0][1] <= limit]
            if not keys:
                return []
            pipe = client.pipeline(transaction=False)
            for key in keys:
                pipe.zrange(key, 0, -1)
            return [thread.decode() for threads in pipe.execute() for thread in threads]

    def sequences(self, partitions: Iterable[int]) -> dict[int, int]:
        """Return the partitions' sequences."""
        wanted = list(partitions)
        with self._redis_errors():
            pipe = self.redis().pipeline(transaction=False)
            for partition in wanted:
                pipe.get(self.commands.layout.sequence(partition))
            return {p: int(value or 0) for p, value in zip(wanted, pipe.execute(), strict=True)}

    # -- writing Postgres ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, threads: Iterable[str], wait: float | None) -> Iterator[tuple[psycopg.Cursor[DictRow], set[int]]]:
        """Open a transaction that holds the partitions of these threads, in ascending order.

        Args:
            threads: The threads.
            wait: Seconds to wait for a lock, or None to do without the partitions that others hold.

        Yields:
            A cursor in the transaction, and the partitions held.

        Raises:
            LockedElsewhereError: A lock was not given in time.
            StoreUnavailableError: Postgres cannot be reached.
        """
        partitions = sorted({self.commands.layout.partition_of(thread) for thread in threads})
        begun = time.monotonic()
        conn = self.connection()
        with self._postgres_errors(), conn.transaction(), conn.cursor(binary=True) as cur:
            # Several statements in one round trip: only the text protocol, unprepared, takes them.
            conn.execute(_BEGIN.format(lock_ms=max(1, int((wait or 0) * 1000))).encode(), prepare=False)
            cur.execute((_LOCK + ("SKIP LOCKED" if wait is None else "")).encode(), (self.options.prefix, partitions))
            yield cur, {row["partition"] for row in cur.fetchall()}
        self._postgres_tier.succeeded(begun)

    def flush(self, threads: Iterable[str], wait: float | None, progress: Progress) -> None:
        """Bring the dirty records of these threads to Postgres, in batches.

        A thread is done when everything that it had when its turn came is in Postgres. What became of the
        threads is added to `progress` as it happens, so that it stands even if this raises.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
            BufferUnavailableError: Redis cannot be reached or refuses.
        """
        targets: dict[str, int | None] = dict.fromkeys(threads)
        while targets:
            chunk = list(targets)[:_THREADS_AT_ONCE]
            finished = self._flush_chunk(chunk, targets, wait, progress)
            for thread in finished:
                del targets[thread]

    def _flush_chunk(
        self, chunk: list[str], targets: dict[str, int | None], wait: float | None, progress: Progress
    ) -> list[str]:
        """Flush one batch; returns the threads that need no further one."""
        partition_of = self.commands.layout.partition_of
        drained: dict[str, Drained] = {}
        refused: dict[str, psycopg.Error] = {}
        batch = Batch()
        try:
            with self.locked(chunk, wait) as (cur, held):
                mine = [thread for thread in chunk if partition_of(thread) in held]
                progress.locked.update(set(chunk) - set(mine))
                buried = self._drain(mine, drained, cur)
                highest: dict[int, int] = {}
                for thread, found in drained.items():
                    add_records(batch, thread, found, buried.get(thread, 0))
                    partition = partition_of(thread)
                    highest[partition] = max(highest.get(partition, 0), found.upto)
                try:
                    with cur.connection.transaction():
                        batch.run(cur)
                except psycopg.Error as exc:
                    if is_transient(exc):
                        raise
                    refused = dict.fromkeys(drained, exc)
                else:
                    if any(highest.values()):
                        cur.execute(_ADVANCE, (list(highest), list(highest.values()), self.options.prefix))
        except LockedElsewhereError:
            progress.locked.update(chunk)
            return chunk
        if refused:
            return self._after_refusal(refused, chunk, targets, wait, progress)
        self._acknowledge(drained, buried, progress)
        progress.checkpoints += len(batch.checkpoints)
        progress.blobs += len(batch.blobs)
        progress.writes += len(batch.first_stays) + len(batch.last_wins)
        progress.changes += batch.changes
        finished = [thread for thread in chunk if thread not in drained]
        later = [thread for thread in mine if thread not in drained]
        for thread, found in drained.items():
            target = targets[thread]
            if target is None:
                target = targets[thread] = found.sequence
            if found.waiting <= len(found.records) + len(found.missing):
                # Nothing was left: all that the thread got before this drain is in Postgres.
                progress.done[thread] = found.sequence
                finished.append(thread)
            elif found.upto >= target:
                progress.done[thread] = found.upto
                finished.append(thread)
        return [thread for thread in finished if thread not in later]

    def _drain(self, threads: list[str], drained: dict[str, Drained], cur: psycopg.Cursor[DictRow]) -> dict[str, int]:
        """Read the threads' records until the batch is full; returns the tombstones."""
        records, size = self.options.batch_records, self.options.batch_bytes
        at_once = 20
        for start in range(0, len(threads), at_once):
            some = threads[start : start + at_once]
            calls = [self.commands.drain(thread, records, size) for thread in some]
            for thread, reply in zip(some, self.pipeline(calls), strict=True):
                found = drained[thread] = self.commands.read_drain(reply)
                records -= len(found.records)
                size -= sum(_size(record) for record in found.records)
            if records <= 0 or size <= 0:
                break
        if not drained:
            return {}
        cur.execute(_TOMBSTONES, (self.options.prefix, list(drained)))
        return {row["thread_id"]: row["sequence"] for row in cur.fetchall()}

    def _after_refusal(
        self,
        refused: dict[str, psycopg.Error],
        chunk: list[str],
        targets: dict[str, int | None],
        wait: float | None,
        progress: Progress,
    ) -> list[str]:
        """Postgres refused a row: let every thread go alone, so that the others of the batch are not held up."""
        if len(refused) == 1:
            progress.refused.update(refused)
            return list(refused)
        finished = []
        for thread in refused:
            finished += self._flush_chunk([thread], targets, wait, progress)
        return finished + [thread for thread in chunk if thread in progress.locked and thread not in refused]

    def _acknowledge(self, drained: dict[str, Drained], buried: dict[str, int], progress: Progress) -> None:
        flushed = {thread: found for thread, found in drained.items() if found.upto}
        # Records of a deleted life of the thread are not in Postgres and must not get into the read cache.
        calls = [self.commands.drop(thread, buried[thread]) for thread in flushed if thread in buried]
        calls += [self.commands.ack(thread, found.upto) for thread, found in flushed.items()]
        self.pipeline(calls)
        for thread, found in flushed.items():
            if found.missing:
                progress.lost[thread] = found.missing

    def write_around(self, batch: Batch, threads: Sequence[str], wait: float) -> None:
        """Bring records straight to Postgres that Redis could not take.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
            LockedElsewhereError: Another worker held the partition for too long.
        """
        with self.locked(threads, wait) as (cur, _):
            batch.run(cur)

    def bury(self, threads: Sequence[str], sequences: Sequence[int], cur: psycopg.Cursor[DictRow]) -> None:
        """Note deleted threads: their records up to these sequence numbers are never flushed."""
        cur.execute(_BURY, (self.options.prefix, list(threads), list(sequences)))


def check_partitions(options: BufferOptions, stored: int) -> None:
    """Refuse to work with another number of partitions than the application's.

    Raises:
        ConfigurationError: The numbers differ.
    """
    if stored != options.partitions:
        raise ConfigurationError(
            f"partitions={options.partitions}, but the threads of prefix {options.prefix!r} are divided into {stored}: "
            f"use partitions={stored}, or another prefix."
        )


def add_records(batch: Batch, thread_id: str, drained: Drained, buried: int) -> None:
    """Add a thread's records to a batch, unless the thread was deleted after them."""
    if drained.upto <= buried:
        return
    for sequence, record in zip(drained.sequences, drained.records, strict=True):
        if sequence <= buried:
            continue
        address = Address(thread_id, record.checkpoint_ns)
        if isinstance(record, DirtyCheckpoint):
            batch.add_checkpoint(address, record.row)
        elif isinstance(record, DirtyBlob):
            batch.add_blob(address, record.blob)
        else:
            batch.add_write(address, record.checkpoint_id, record.write)


def _size(record: Any) -> int:
    if isinstance(record, DirtyCheckpoint):
        return len(record.row.checkpoint) + len(record.row.metadata)
    return len((record.blob.data or b"") if isinstance(record, DirtyBlob) else record.write.data)
