"""The one way to Postgres: lock the partition, then read the buffer, write, commit, and only then forget.

Not here: when that happens and what a failure means (`flusher.py`). A *session* is one background thread's pair
of connections; it is used by one thread at a time.

The order is the guarantee. What is read before the lock may be older than what another worker has
committed meanwhile; what is forgotten before the commit may be lost.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from dataclasses import dataclass, field
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row

from checkpointer.buffer.clients import FAILURES, is_astray, pipelined, run_pipeline
from checkpointer.buffer.commands import DirtyBlob, DirtyCheckpoint, DirtyRecord, Drained, Undecodable, decode_record
from checkpointer.checks import as_error, partition_findings
from checkpointer.errors import BufferUnavailableError, CheckpointerError
from checkpointer.flush import poison, tombstones
from checkpointer.flush.backlog import measure
from checkpointer.flush.report import FlushTotals
from checkpointer.records import Address
from checkpointer.store import threads
from checkpointer.store.clients import not_set_up
from checkpointer.store.writes import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from psycopg import Connection

    from checkpointer.buffer.clients import RedisSide
    from checkpointer.buffer.commands import Commands, ScriptCall
    from checkpointer.buffer.places import SyncRedis
    from checkpointer.errors import TierUnavailableError
    from checkpointer.flush.backlog import Backlog
    from checkpointer.flush.ledger import Debt, Owed
    from checkpointer.flush.tombstones import Name
    from checkpointer.instruments import Instruments
    from checkpointer.options import BufferOptions
    from checkpointer.sanitize import Change
    from checkpointer.store.clients import PostgresSide
    from checkpointer.store.deadline import LimitedConnection
    from checkpointer.store.threads import Buried
    from checkpointer.tiers import Tier

_THREADS_AT_ONCE = 300
# So many threads are drained in one round trip: the first ones, and at most later, when it is known how much they have.
# Redis answers nobody else meanwhile, so the first ones are few.
_FIRST_DRAINED = 4
_DRAINED_AT_ONCE = 100
# What each of them may give at least, however many there are.
_LEAST_RECORDS = 500
_LEAST_BYTES = 256 * 1024
# A worker that stands still inside a transaction loses its locks after this. All that a transaction waits for beside
# Postgres is Redis, for at most one time-out for each round trip of the drain.
_IDLE_SECONDS = 10.0
_LOCK_LOST = "25P03"  # the server ended the connection because of the above
# One that stands still while it sends a statement is not idle for the server, which has a limit for that from
# PostgreSQL 17 on. It is meant to be out of the reach of any transaction that goes on.
_TRANSACTION_SECONDS = 300
_SMALLEST_SHARE = 1024

CLOSE_AFTER = 60.0
"""A thread without dirty records is closed after this many seconds; the next put opens it again."""

# READ COMMITTED is forced: each statement must see what was committed before it, the lock's last holder included.
_BEGIN = """
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL synchronous_commit = on;
SET LOCAL idle_in_transaction_session_timeout = '{idle_ms}ms';
SET LOCAL lock_timeout = '{lock_ms}ms';
SELECT set_config('transaction_timeout', '{transaction}s', true)
WHERE current_setting('server_version_num')::int >= 170000;
"""

_LOCK = """
SELECT partition, sequence FROM checkpoint_buffer_partitions
WHERE prefix = %s AND partition = ANY(%s::int[]) ORDER BY partition FOR UPDATE
"""

_EXISTING = """
SELECT checkpoint_ns, checkpoint_id FROM checkpoints WHERE thread_id = %s AND checkpoint_id = ANY(%s)
"""

_EXISTING_WRITES = """
SELECT DISTINCT checkpoint_ns, checkpoint_id, task_id FROM checkpoint_writes
WHERE thread_id = %s AND checkpoint_id = ANY(%s)
"""

_ADVANCE = """
UPDATE checkpoint_buffer_partitions AS p
SET sequence = greatest(p.sequence, n.sequence), flushed_at = now()
FROM unnest(%s::int[], %s::bigint[]) AS n (partition, sequence)
WHERE p.prefix = %s AND p.partition = n.partition
"""

_OPEN_DEAD_LETTERS = """
SELECT count(*) AS letters FROM checkpoint_dead_letters WHERE prefix = %s AND resolved_at IS NULL
"""

_REGISTER = """
WITH mine AS (
    INSERT INTO checkpoint_buffers (prefix, partitions) VALUES (%s, %s) ON CONFLICT (prefix) DO NOTHING
)
INSERT INTO checkpoint_buffer_partitions (prefix, partition)
SELECT %s, n FROM generate_series(0, %s - 1) AS n
ON CONFLICT (prefix, partition) DO NOTHING
"""


Planned = tuple[DirtyRecord | Undecodable | None, bool]
"""A drained record, or None if it belongs to a deleted life, and whether it may be older than what Postgres has."""


class Locked(NamedTuple):
    """A transaction that holds partitions.

    Attributes:
        cur: A cursor in it.
        partitions: The partitions, with the highest sequence number that was flushed.
        found: The rows of the statements that ran behind the lock.
        highest: What the partitions' sequence numbers are raised to with the commit.
    """

    cur: psycopg.Cursor[DictRow]
    partitions: dict[int, int]
    found: list[list[DictRow]]
    highest: dict[int, int]


class LockedElsewhereError(Exception):
    """Another worker holds a partition and did not let go in time, or won a race for rows."""


class LockLostError(LockedElsewhereError):
    """The server took the locks back, because this process stood still for too long."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What Redis knew of a thread when it was flushed.

    Attributes:
        upto: Postgres has the thread's records up to this sequence number.
        token: The token under which the thread was open.
        replay: Records up to this number come from before a rollback of Redis.
        is_all: The thread had nothing more.
    """

    upto: int
    token: int
    replay: int
    is_all: bool

    def covers(self, debt: Debt, upto: int) -> bool:
        """Tell whether what is owed up to a sequence number is flushed for certain, and nothing was forgotten."""
        return (
            self.upto >= upto
            and debt.tokens == {self.token}
            and all(owed.sequence > self.replay for owed in debt.owed if owed.sequence <= upto)
        )


@dataclass(slots=True)
class Progress:
    """What became of the threads of a flush.

    Attributes:
        done: Flushed up to the sequence number given.
        proofs: What shows that nothing of the threads that are done was lost on the way.
        locked: Left to the worker that holds their partition.
        lost_locks: How often the server took the locks back.
        pinned: Held up by a dead letter, old or new.
        replayed: Dead letters whose records are in Postgres now.
        dropped: Dead letters whose records were dropped.
        lost: Threads with fields that Redis named but no longer had.
        checkpoints: Checkpoints written.
        blobs: Channel versions written.
        writes: Pending writes written.
        behind: Threads that were passed by, and of which Redis has not forgotten what it had yet.
        late: Ids of checkpoints that were dropped because their thread had been deleted, by thread.
        changes: What the pass at the Postgres write sanitised.
    """

    done: dict[str, int] = field(default_factory=dict)
    proofs: dict[str, Proof] = field(default_factory=dict)
    behind: set[str] = field(default_factory=set)
    late: dict[str, list[str]] = field(default_factory=dict)
    locked: set[str] = field(default_factory=set)
    lost_locks: int = 0
    pinned: dict[str, poison.Letter] = field(default_factory=dict)
    replayed: list[poison.Letter] = field(default_factory=list)
    dropped: list[poison.Letter] = field(default_factory=list)
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
    """A background thread's connections to both tiers.

    Args:
        redis: Where the Redis client comes from.
        postgres: Where the connection comes from.
        commands: The buffer's calls.
        options: The saver's settings.
        redis_tier: Learns whether Redis answers.
        postgres_tier: Learns whether Postgres answers.
        instruments: Are told of batches.
        share: The partitions in which to look for dirty threads; all by default.
    """

    def __init__(
        self,
        redis: RedisSide,
        postgres: PostgresSide,
        commands: Commands,
        options: BufferOptions,
        redis_tier: Tier,
        postgres_tier: Tier,
        instruments: Instruments,
        share: Iterable[int] | None = None,
    ) -> None:
        self._redis_side = redis
        self._postgres_side = postgres
        self.commands = commands
        self.options = options
        self._redis_tier = redis_tier
        self._postgres_tier = postgres_tier
        self._instruments = instruments
        self._redis: SyncRedis | None = None
        self._unanswered: set[bytes | None] = set()
        self._conn: LimitedConnection[DictRow] | None = None
        self._share = range(options.partitions) if share is None else share
        self._idle_ms = int(max(_IDLE_SECONDS, options.redis_timeout * _THREADS_AT_ONCE / _DRAINED_AT_ONCE) * 1000)
        self._share_of_batch = 1
        self._interrupted = False
        self._may_copy = True
        self.totals = FlushTotals()

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
            if isinstance(exc, psycopg.Error) and exc.sqlstate == _LOCK_LOST:
                self._drop_connection()
                raise LockLostError from exc
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
        if self._conn is not None and _was_ended(self._conn):
            self._drop_connection()
        if self._conn is None or self._conn.closed:
            with self._postgres_errors():
                self._conn = self._postgres_side.dedicated(self._postgres_side.work_limit)
                # COPY takes text as it is; a statement's parameters are encoded as the connection wants them.
                self._may_copy = self._conn.info.encoding == "utf-8"
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
                self._conn.execute(threads.FORGET_TOMBSTONES, args[:1])
            if row is not None:
                check_partitions(options, row["stored"])
        return self._conn

    def redis(self) -> SyncRedis:
        """Return the Redis client."""
        if self._redis is None:
            self._redis = self._redis_side.dedicated()
        return self._redis

    def pipeline(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Run script calls in one round trip to each server.

        Raises:
            BufferUnavailableError: Redis cannot be reached or refuses.
        """
        keys = [call.keys[0] for call in calls]
        replies, error = self._ask(keys, lambda client: run_pipeline(client, calls), proof=True)
        if error is not None:
            raise error
        return replies

    def _ask(
        self, keys: Sequence[bytes], ask: Callable[[SyncRedis], list[Any]], *, proof: bool
    ) -> tuple[list[Any], TierUnavailableError | None]:
        """Ask Redis about keys, and note for each of its parts whether it answered.

        Args:
            keys: What each reply is about.
            ask: Asks.
            proof: The answer of a part proves that it works. One about a single key does not: it is given even while
                the slot is on its way to another server, when the scripts are refused.

        Returns:
            The replies, errors in their places, and an error if there is one.
        """
        begun = time.monotonic()
        self._unanswered = set()
        try:
            replies = ask(self.redis())
        except FAILURES as exc:
            self._drop_redis(exc)
            raise self._redis_tier.failed(exc) from exc
        error: TierUnavailableError | None = None
        parts: dict[bytes | None, BaseException | None] = {}
        for key, reply in zip(keys, replies, strict=True):
            part = self._redis_side.part_of(key)
            parts[part] = parts.get(part) or (reply if isinstance(reply, FAILURES) else None)
        for part, failure in parts.items():
            if failure is None:
                self._redis_tier.succeeded(begun, part if proof else None)
            else:
                self._drop_redis(failure)
                self._unanswered.add(part)
                error = self._redis_tier.failed(failure, part)
        return replies, error

    def _drop_redis(self, exc: BaseException) -> None:
        if is_astray(exc):
            self._close_redis()

    def _close_redis(self) -> None:
        client, self._redis = self._redis, None
        if client is not None:
            with contextlib.suppress(*FAILURES):
                client.close()

    def give_up(self) -> None:
        """From another thread: no longer wait for a Postgres that does not answer."""
        if (conn := self._conn) is not None:
            conn.give_up()

    def interrupt(self) -> None:
        """Have a flush end after the batch that it is at; from any thread, and for good."""
        self._interrupted = True

    def forget(self) -> None:
        """In a forked child: the connections are the parent's, and are left alone."""
        self._conn = self._redis = None
        self.totals = FlushTotals()

    def close(self) -> None:
        """Close both connections; the session can be used again."""
        self._drop_connection()
        self._close_redis()

    # -- reading the buffer --------------------------------------------------------------------------------------

    def scan(self) -> dict[int, tuple[int, float]]:
        """Return for each partition with dirty records their bytes, and for how many seconds the oldest waits.

        A partition of a cluster that is away is not among them, and does not hold up the others.
        """
        calls = [self.commands.scan(partition) for partition in range(self.commands.layout.partitions)]
        keys = [call.keys[0] for call in calls]
        replies, error = self._ask(keys, lambda client: run_pipeline(client, calls), proof=True)
        if error is not None and not any(isinstance(reply, list) for reply in replies):
            raise error
        found = {partition: reply for partition, reply in enumerate(replies) if isinstance(reply, list)}
        return {partition: (held, age / 1000) for partition, (age, held) in found.items() if age != -1}

    def dirty_threads(self, partitions: Iterable[int] | None = None, *, pinned: bool = True) -> list[str]:
        """Return the threads with dirty records, of these partitions or of all, as far as they are in the share.

        Those marked as pinned too, unless told otherwise.
        """
        layout = self.commands.layout
        wanted = None if partitions is None else set(partitions)
        keys = [layout.threads(p) for p in self._share if wanted is None or p in wanted]
        found = self._read(keys, "zrangebyscore", "-inf", "inf" if pinned else "(inf")
        return [thread.decode() for members in found for thread in members]

    def pinned_threads(self) -> list[str]:
        """Return the threads that are marked as pinned."""
        layout = self.commands.layout
        keys = [layout.threads(partition) for partition in range(layout.partitions)]
        found = self._read(keys, "zrangebyscore", "inf", "inf")
        return [thread.decode() for members in found for thread in members]

    def backlog(self) -> Backlog:
        """Return how much waits in the buffer.

        Raises:
            BufferUnavailableError: Redis cannot be reached or refuses.
        """
        return measure(self._read, self.scan(), self.commands.layout)

    def sequences(self, partitions: Iterable[int]) -> dict[int, int]:
        """Return the partitions' sequences."""
        wanted = list(partitions)
        found = self._read([self.commands.layout.state(partition) for partition in wanted], "hget", "sequence")
        return {partition: int(value or 0) for partition, value in zip(wanted, found, strict=True)}

    def _read(self, keys: Sequence[bytes], command: str, *args: Any) -> list[Any]:
        """Read keys in one round trip to each server."""
        steps = [(key, methodcaller(command, key, *args)) for key in keys]
        replies, error = self._ask(keys, lambda client: pipelined(client, steps), proof=False)
        if error is not None:
            raise error
        return replies

    # -- writing Postgres ----------------------------------------------------------------------------------------

    def open_dead_letters(self) -> int:
        """Return how many dead letters are neither replayed nor dropped.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        begun = time.monotonic()
        with self._postgres_errors():
            row = self.connection().execute(_OPEN_DEAD_LETTERS, (self.options.prefix,)).fetchone()
        self._postgres_tier.succeeded(begun)
        return row["letters"] if row else 0

    @contextlib.contextmanager
    def locked(
        self, thread_ids: Iterable[str], wait: float | None, *then: tuple[str, tuple[Any, ...]]
    ) -> Iterator[Locked]:
        """Open a transaction that holds the partitions of these threads, in ascending order.

        Args:
            thread_ids: The threads.
            wait: Seconds to wait for a lock, or None to do without the partitions that others hold.
            then: Statements, with their parameters, that run behind the lock in the same round trip.

        Yields:
            The transaction.

        Raises:
            LockedElsewhereError: A lock was not given in time.
            StoreUnavailableError: Postgres cannot be reached.
        """
        partitions = sorted({self.commands.layout.partition_of(thread) for thread in thread_ids})
        begun = time.monotonic()
        conn = self.connection()
        begin = _BEGIN.format(
            lock_ms=max(1, int((wait or 0) * 1000)), idle_ms=self._idle_ms, transaction=_TRANSACTION_SECONDS
        )
        lock = _LOCK + ("SKIP LOCKED" if wait is None else "")
        # Each statement of a script sees what was committed before it, as if it had been sent by itself.
        behind = "".join(f";{text}" for text, _ in then)
        params = (self.options.prefix, partitions, *(param for _, given in then for param in given))
        with self._postgres_errors(), _rolled_back(conn), conn.cursor(binary=True) as cur:
            _, locks, *found = _script(conn, begin + lock + behind, params)
            held = Locked(cur, {row["partition"]: row["sequence"] for row in locks}, found, {})
            yield held
            highest = held.highest
            if conn.info.transaction_status != TransactionStatus.INTRANS:
                raise psycopg.errors.InFailedSqlTransaction("a statement failed, and nobody minded")
            if highest:
                _script(conn, f"{_ADVANCE};COMMIT", (list(highest), list(highest.values()), self.options.prefix))
            else:
                conn.commit()
        self._postgres_tier.succeeded(begun)

    def flush(
        self,
        thread_ids: Iterable[str],
        wait: float | None,
        progress: Progress,
        replays: Mapping[int, str | None] | None = None,
    ) -> None:
        """Bring the dirty records of these threads to Postgres, in batches.

        A thread is done when everything that it had when its turn came is in Postgres. What became of the
        threads is added to `progress` as it happens, so that it stands even if this raises.

        Args:
            thread_ids: The threads.
            wait: Seconds to wait for a partition's lock, or None to do without those that others hold.
            progress: Is added to.
            replays: Dead letters to try again, and who wants that. Any other one holds its thread up.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
            BufferUnavailableError: Redis cannot be reached or refuses.
        """
        targets: dict[str, int | None] = dict.fromkeys(thread_ids)
        away: BufferUnavailableError | None = None
        again: set[str] = set()
        while targets and not self._interrupted:
            chunk = list(targets)[:_THREADS_AT_ONCE]
            try:
                finished = self._flush_chunk(chunk, targets, wait, progress, replays or {})
            except BufferUnavailableError as exc:
                finished = [t for t in targets if self._part_of(t) in self._unanswered - {None}]
                if not finished:
                    raise
                # In a cluster, a part that is away does not hold up the others.
                away = exc
            for thread in finished:
                del targets[thread]
            if not targets and progress.behind - again:
                # What Redis had of them is flushed now, and has to be forgotten.
                again |= progress.behind
                targets = dict.fromkeys(progress.behind)
        if away is not None:
            raise away

    def _part_of(self, thread: str) -> bytes | None:
        return self._redis_side.part_of(self.commands.layout.thread(thread).state)

    def _flush_chunk(
        self,
        chunk: list[str],
        targets: dict[str, int | None],
        wait: float | None,
        progress: Progress,
        replays: Mapping[int, str | None],
    ) -> list[str]:
        """Flush one batch; returns the threads that need no further one."""
        partition_of = self.commands.layout.partition_of
        drained: dict[str, Drained] = {}
        written: list[Batch] = []
        begun = time.monotonic()
        try:
            prefix = self.options.prefix
            standing = (
                (poison.UNRESOLVED, (prefix, chunk)),
                (threads.STATE_OF, (chunk, prefix, prefix)),
            )
            with self.locked(chunk, wait, *standing) as (cur, held, (letters, states), highest):
                mine = [thread for thread in chunk if partition_of(thread) in held]
                progress.locked.update(set(chunk) - set(mine))
                letter_of = poison.by_thread(letters)
                pinned = {thread: letter_of[thread] for thread in mine if thread in letter_of}
                tried = {
                    thread: pinned.pop(thread) for thread in mine if thread in pinned and pinned[thread].id in replays
                }
                self._drain([thread for thread in mine if thread not in pinned], drained)
                drained_at = time.monotonic()
                restored = {
                    thread
                    for thread in tried.keys() & drained.keys()
                    if self._restore(thread, drained[thread], tried[thread], cur)
                }
                plan, buried, found_late, behind = self._sort(drained, held, cur, restored, states)

                def build(parts: Sequence[poison.Part]) -> Batch:
                    batch = Batch()
                    for thread, first, end in parts:
                        for record, older in plan[thread][first:end]:
                            if record is not None:
                                add_record(batch, thread, record, older=older)
                    return batch

                sizes = {thread: len(found.records) for thread, found in drained.items()}
                written, refused = poison.write(cur, sizes, build, lambda batch: self._copied(batch, cur))
                new, replayed = poison.settle(cur, self.options.prefix, drained, refused, tried, replays)
                pinned |= new
                dead = len(new.keys() - tried.keys())
                # Not before the older records are gone: their acknowledgement puts them into the read cache.
                caught_up = [thread for thread in behind if not drained[thread].waiting]
                if caught_up:
                    self.pipeline([self.commands.drop(thread, 0) for thread in caught_up])
                    cur.execute(threads.REPLAYED, (self.options.prefix, caught_up) * 2)
                progress.behind = (progress.behind | set(behind)) - set(caught_up)
                for thread, found in drained.items():
                    if found.upto:
                        partition = partition_of(thread)
                        highest[partition] = max(highest.get(partition, 0), found.upto)
        except LockedElsewhereError as exc:
            progress.locked.update(chunk)
            if isinstance(exc, LockLostError):
                progress.lost_locks += 1
                # If it is the size that takes so long, the next one has to be smaller.
                self._share_of_batch = min(self._share_of_batch * 4, _SMALLEST_SHARE)
            return chunk
        self._share_of_batch = 1
        progress.pinned.update(pinned)
        progress.replayed += replayed
        progress.late |= found_late
        for batch in written:
            checkpoints, blobs, writes = batch.counts
            progress.checkpoints += checkpoints
            progress.blobs += blobs
            progress.writes += writes
            progress.changes += batch.changes
        self._acknowledge(drained, held, buried, progress)
        # Not before the records that go have gone: the acknowledgement takes the mark away.
        if pinned:
            self.pipeline([self.commands.pin(thread) for thread in pinned])
        self._count(written, drained, dead, begun, drained_at)
        finished = [thread for thread in chunk if thread not in drained]
        later = [thread for thread in mine if thread not in drained and thread not in pinned]
        for thread, found in drained.items():
            if thread in pinned:
                finished.append(thread)
                continue
            target = targets[thread]
            if target is None:
                target = targets[thread] = found.sequence
            if not found.is_all and found.upto < target:
                continue
            # If nothing was left, all that the thread got before this drain is in Postgres.
            progress.done[thread] = found.sequence if found.is_all else found.upto
            progress.proofs[thread] = Proof(max(found.upto, found.acked), found.token, found.replay, found.is_all)
            finished.append(thread)
        return [thread for thread in finished if thread not in later]

    def _count(
        self, written: Sequence[Batch], drained: Mapping[str, Drained], dead: int, begun: float, drained_at: float
    ) -> None:
        """Count what a transaction has brought, for those who measure."""
        now = time.monotonic()
        waited = [found.age / 1000 for found in drained.values() if found.upto and found.is_all and found.age >= 0]
        lags = [age + now - drained_at for age in waited]
        self.totals.dead_letters += dead
        if self.totals.add(written, now - begun, lags):
            self._instruments.batch(now - begun, lags)

    def _copied(self, batch: Batch, cur: psycopg.Cursor[DictRow]) -> bool:
        """Write a large batch by COPY; returns whether that was possible. If not, nothing of it is written."""
        if not (self._may_copy and batch.is_for_copy):
            return False
        try:
            with cur.connection.transaction():
                batch.copy(cur)
        except (psycopg.Error, ValueError) as exc:
            if isinstance(exc, psycopg.Error) and is_transient(exc):
                raise
            # A row that is there already, or poison: the next batch has others. Otherwise COPY is not for this user or
            # these tables (row-level security, a view), and is not tried again.
            self._may_copy = poison.is_poison(exc)
            return False
        return True

    def _drain(self, thread_ids: list[str], drained: dict[str, Drained]) -> None:
        """Read the threads' records until the batch is full."""
        records = max(1, self.options.batch_records // self._share_of_batch)
        size = max(1, self.options.batch_bytes // self._share_of_batch)
        waiting = deque(thread_ids)
        count = _FIRST_DRAINED
        while waiting and records > 0 and size > 0:
            some = [waiting.popleft() for _ in range(min(count, len(waiting)))]
            # All of them together fill the batch at most, or a small one each.
            most = min(records, max(records // len(some), _LEAST_RECORDS))
            largest = min(size, max(size // len(some), _LEAST_BYTES))
            replies = self.pipeline([self.commands.drain(thread, most, largest) for thread in some])
            for thread, reply in zip(some, replies, strict=True):
                found = drained[thread] = self.commands.read_drain(reply)
                records -= len(found.records)
                size -= sum([len(payload) for _, payload in found.raw])
            each = sum(len(found.records) for found in drained.values()) / len(drained)
            count = max(1, min(_DRAINED_AT_ONCE, int(records / max(each, 1.0))))

    def _sort(
        self,
        drained: dict[str, Drained],
        held: dict[int, int],
        cur: psycopg.Cursor[DictRow],
        restored: set[str],
        states: Sequence[DictRow],
    ) -> tuple[dict[str, list[Planned]], dict[str, Buried], dict[str, list[str]], list[str]]:
        """Tell what of the drained records is to be written.

        Returns:
            By thread, for each record: the record, or None if it belongs to a deleted life, and whether it may be older
            than what Postgres has. The tombstones, and the ids of late checkpoints, both by thread. The threads of
            which something went straight to Postgres.
        """
        buried: dict[str, Buried] = {}
        replayed: list[str] = []
        for row in states:
            if row["thread_id"] not in drained:
                continue
            if row["buried"] is not None:
                buried[row["thread_id"]] = threads.Buried(row["buried"], row["last_id"], frozenset(row["late"]))
            if row["replay"]:
                replayed.append(row["thread_id"])
        all_late: dict[str, list[str]] = {}
        plan: dict[str, list[Planned]] = {}
        for thread, found in drained.items():
            flushed = held[self.commands.layout.partition_of(thread)]
            # Up to here the records may be older than what Postgres has.
            older = max(found.replay, flushed if found.sequence < flushed else 0)
            if thread in replayed:
                older = max(older, found.upto)
            keep = [True] * len(found.records)
            if thread in buried:
                keep, late = self._without_dead(thread, found, buried[thread], cur)
                if late:
                    all_late[thread] = late
                    cur.execute(threads.NOTE_LATE, (late, self.options.prefix, thread))
            plan[thread] = [
                (record if kept else None, sequence <= older or (i == 0 and thread in restored))
                for i, (record, sequence, kept) in enumerate(zip(found.records, found.sequences, keep, strict=True))
            ]
        return plan, buried, all_late, replayed

    def _without_dead(
        self, thread: str, found: Drained, buried: Buried, cur: psycopg.Cursor[DictRow]
    ) -> tuple[list[bool], list[str]]:
        """Tell which records to keep, and the ids of late checkpoints; nothing is written behind a damaged one."""
        keep = [sequence > buried.sequence for sequence in found.sequences]
        after = [i for i, kept in enumerate(keep) if kept]
        damaged = next((n for n, i in enumerate(after) if isinstance(found.records[i], Undecodable)), None)
        after = after[:damaged]
        alone = [record for i in after if not isinstance(record := found.records[i], Undecodable)]
        names = tombstones.names_of(alone)
        existing = _existing(cur, thread, [checkpoint_id for _, checkpoint_id in names]) if names else set()
        kept, late = tombstones.sort_out(alone, buried, existing)
        for i, is_kept in zip(after, kept, strict=True):
            keep[i] = is_kept
        return keep, late

    def _restore(self, thread: str, found: Drained, letter: poison.Letter, cur: psycopg.Cursor[DictRow]) -> bool:
        """Put a dead letter's record before the drained ones, if Redis has lost it; returns whether it has."""
        [held] = self._read([self.commands.layout.thread(thread).dirty], "hexists", letter.field)
        payload = None if held else poison.payload_of(cur, letter)
        if payload is None:
            return False
        if letter.field in found.missing:
            found.missing.remove(letter.field)
        else:
            found.waiting += 1
        found.records.insert(0, decode_record(letter.field, payload))
        found.raw.insert(0, (letter.field, payload))
        found.sequences.insert(0, letter.sequence)
        return True

    def _acknowledge(
        self, drained: dict[str, Drained], held: dict[int, int], buried: dict[str, Buried], progress: Progress
    ) -> None:
        partition_of = self.commands.layout.partition_of
        flushed = {thread: found for thread, found in drained.items() if found.upto}
        # What belongs to a deleted life is not in Postgres and must not get into the read cache.
        calls = [self.commands.drop(thread, buried[thread].sequence) for thread in flushed if thread in buried]
        calls += [self.commands.ack(thread, found) for thread, found in flushed.items()]
        calls += [self.commands.drop(thread, 0) for thread in flushed if thread in progress.late]
        # A server that has gone back in time must not give numbers anew.
        floors = {partition_of(t): t for t, found in drained.items() if found.sequence < held[partition_of(t)]}
        calls += [self.commands.raise_sequence(thread, held[partition]) for partition, thread in floors.items()]
        self.pipeline(calls)
        for thread, found in flushed.items():
            if found.missing:
                progress.lost[thread] = found.missing

    def write_around(
        self, batch: Batch, thread_id: str, name: Name | None, origin: Name | None, owes: bool, wait: float
    ) -> bool:
        """Bring a thread's records straight to Postgres that Redis could not take.

        Args:
            batch: The records.
            thread_id: The thread.
            name: The checkpoint among them, if there is one.
            origin: The checkpoint that they continue or belong to.
            owes: The buffer has something of the thread.
            wait: Seconds to wait for the partition.

        Returns:
            Whether they came late for a deleted life of the thread, and nothing was written.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
            LockedElsewhereError: Another worker held the partition for too long.
        """
        prefix = self.options.prefix
        with self.locked([thread_id], wait) as (cur, *_):
            for row in cur.execute(threads.STATE_OF, ([thread_id], prefix, prefix)).fetchall():
                if row["buried"] is None:
                    continue
                buried = threads.Buried(row["buried"], row["last_id"], frozenset(row["late"]))
                existing = _existing(cur, thread_id, [one[1] for one in (origin, name) if one])
                if name not in existing and tombstones.is_late(origin, buried, existing, buried.late):
                    if name is not None:
                        cur.execute(threads.NOTE_LATE, ([name[1]], prefix, thread_id))
                    return True
            batch.run(cur)
            # What the buffer has of the thread is older than this now.
            cur.execute(threads.PASS_BY, (prefix, thread_id, owes))
        return False

    # -- open, lost and deleted threads --------------------------------------------------------------------------

    def close_threads(self, tokens: dict[str, int]) -> None:
        """Close threads, each under its token, unless something of them is dirty or they were opened anew."""
        replies = self.pipeline([self.commands.close(thread, token) for thread, token in tokens.items()])
        closed = [thread for thread, reply in zip(tokens, replies, strict=True) if reply == 1]
        if closed:
            with self._postgres_errors():
                numbers = [tokens[thread] for thread in closed]
                self.connection().execute(threads.CLOSE, (closed, numbers, self.options.prefix))

    def passed_by(self) -> list[str]:
        """Return threads of which something went straight to Postgres, and what Redis has may be older."""
        with self._postgres_errors():
            rows = self.connection().execute(threads.PASSED, (self.options.prefix,)).fetchall()
        return [row["thread_id"] for row in rows]

    def close_idle(self) -> None:
        """Close the threads that have been open for a while and have nothing dirty."""
        with self._postgres_errors():
            args = self.options.prefix, CLOSE_AFTER
            rows = self.connection().execute(threads.OPEN_FOR, args).fetchall()
        if rows:
            self.close_threads({row["thread_id"]: row["token"] for row in rows})

    def missing(self, thread_id: str, owed_then: Sequence[Owed]) -> list[Owed]:
        """Return what of a thread's debt is not in Postgres, and was not deleted.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        prefix = self.options.prefix
        ids = list({owed.checkpoint_id for owed in owed_then})
        with self._postgres_errors(), self.connection().cursor() as cur:
            rows = cur.execute(threads.STATE_OF, ([thread_id], prefix, prefix)).fetchall()
            have = _existing(cur, thread_id, ids)
            cur.execute(_EXISTING_WRITES, (thread_id, ids))
            writes = {(r["checkpoint_ns"], r["checkpoint_id"], r["task_id"]) for r in cur.fetchall()}
        buried = next((row for row in rows if row["buried"] is not None), None)
        lost = []
        for owed in owed_then:
            if buried is not None and (owed.sequence <= buried["buried"] or owed.checkpoint_id in buried["late"]):
                continue
            name = owed.checkpoint_ns, owed.checkpoint_id
            if name not in have if owed.task_id is None else (*name, owed.task_id) not in writes:
                lost.append(owed)
        return lost

    def bury(self, thread_ids: Sequence[str], sequences: Sequence[int], cur: psycopg.Cursor[DictRow]) -> dict[str, str]:
        """Note deleted threads: what was put before is never flushed, nor what continues it.

        Returns:
            The latest checkpoint id of each deleted life.
        """
        heads = self._latest_ids(thread_ids)
        # A new life must get higher numbers, even if Redis is emptied before it begins.
        highest: dict[int, int] = {}
        for thread, sequence in zip(thread_ids, sequences, strict=True):
            partition = self.commands.layout.partition_of(thread)
            highest[partition] = max(highest.get(partition, 0), sequence)
        cur.execute(_ADVANCE, (list(highest), list(highest.values()), self.options.prefix))
        cur.execute(threads.BURY, (self.options.prefix, list(thread_ids), list(sequences), heads))
        return {row["thread_id"]: row["last_id"] for row in cur.fetchall()}

    def _latest_ids(self, thread_ids: Sequence[str]) -> list[str]:
        """Return the latest checkpoint id of each thread that Redis knows, or an empty one."""
        facts = self._read([self.commands.layout.thread(thread).facts for thread in thread_ids], "hgetall")
        return [
            max((value.decode() for name, value in found.items() if name.startswith(b"h\0")), default="")
            for found in facts
        ]


def _script(conn: Connection[DictRow], text: str, params: Sequence[Any]) -> list[list[DictRow]]:
    """Run statements in one round trip; returns the rows of those that have any.

    Only the simple protocol takes several, so the parameters are put into the text, and nothing is prepared.
    """
    rows = []
    with psycopg.ClientCursor(conn, row_factory=dict_row) as cur:
        cur.execute(text.encode(), params)
        while True:
            if cur.description is not None:
                rows.append(cur.fetchall())
            if not cur.nextset():
                return rows


@contextlib.contextmanager
def _rolled_back(conn: Connection[Any]) -> Iterator[None]:
    """Leave no transaction open behind an error."""
    try:
        yield
    except BaseException:
        if conn.info.transaction_status == TransactionStatus.ACTIVE:
            conn.close()  # it was interrupted in the middle of a statement
        with contextlib.suppress(psycopg.Error):
            conn.rollback()
        raise


def _was_ended(conn: Connection[Any]) -> bool:
    """Tell whether the server has spoken on an idle connection: it does so, as good as always, to end it."""
    if conn.closed or conn.info.transaction_status != TransactionStatus.IDLE:
        return False
    waiting = select.poll()
    waiting.register(conn.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


def _existing(cur: psycopg.Cursor[DictRow], thread_id: str, ids: Sequence[str]) -> set[Name]:
    cur.execute(_EXISTING, (thread_id, list(ids)))
    return {(row["checkpoint_ns"], row["checkpoint_id"]) for row in cur.fetchall()}


def check_partitions(options: BufferOptions, stored: int) -> None:
    """Refuse to work with another number of partitions than the application's.

    Raises:
        ConfigurationError: The numbers differ.
    """
    for finding in partition_findings(options.prefix, options.partitions, stored):
        raise as_error(finding)


def add_record(batch: Batch, thread_id: str, record: DirtyRecord | Undecodable, *, older: bool = False) -> None:
    """Add a record to a batch; an older one replaces nothing.

    Raises:
        DamagedRecordError: The record cannot be read.
        UnserializableValueError: A checkpoint's JSON cannot be read.
    """
    if isinstance(record, Undecodable):
        raise poison.DamagedRecordError(
            f"The record in Redis cannot be read ({type(record.error).__name__}): it was damaged after it was "
            "written, or another version of this package wrote it."
        ) from record.error
    address = Address(thread_id, record.checkpoint_ns)
    if isinstance(record, DirtyCheckpoint):
        batch.add_checkpoint(address, record.row, older=older)
    elif isinstance(record, DirtyBlob):
        batch.add_blob(address, record.blob)
    else:
        batch.add_write(address, record.checkpoint_id, record.write, older=older)
