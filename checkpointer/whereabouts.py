"""Which threads there are, and where each lives: in Postgres, in the buffer, or in both. Changes nothing.

A page of threads goes by the thread's id, in the order of the database, and costs what the page holds, not what the
tables hold; only the names of threads with something unflushed are read all, in pieces. With Redis away the page is
what Postgres knows: the threads that it has, and those that are *open*, of which Redis may hold something.

Not here: what the threads' checkpoints hold (`saver.py`), and errors and logs of threads (`observability/`).
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from psycopg.rows import dict_row
from redis.exceptions import RedisClusterException, RedisError

from checkpointer.buffer.clients import pipelined, run_pipeline
from checkpointer.buffer.commands import Commands, DirtyCheckpoint, decode_record
from checkpointer.buffer.keys import KeyLayout
from checkpointer.buffer.keys import field as field_name
from checkpointer.flush.backlog import Backlog, measure
from checkpointer.hooks import redis_client

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from psycopg import Connection

    from checkpointer.buffer.places import SyncRedis
    from checkpointer.records import CheckpointRow

__all__ = ["Buffer", "Details", "Holdings", "Namespace", "Thread", "ThreadPage", "one", "page", "search", "show"]

Where = Literal["postgres", "redis", "both", "unknown", "none"]

LARGEST_LIMIT = 500
"""The most threads that a page holds."""

COUNTED = 10_000
"""Checkpoints beyond so many are not counted in a page."""

SEARCHED = 2_000
"""So many threads are looked through for one page of a search."""

_PIECE = 10_000
_SCANNED_AT_ONCE = 1_000
_TIMEOUT = 3.0
_NAMESPACES = 64
_RECORDS = 20_000
_CLEAN_TTL = 1.0  # of a command that keeps nothing

# One index probe for each thread, whatever the length of their histories.
_NAMES = """
WITH RECURSIVE stored AS (
    (SELECT thread_id, 1 AS n FROM checkpoints {after} ORDER BY thread_id LIMIT 1)
    UNION ALL
    SELECT next.thread_id, stored.n + 1
    FROM stored CROSS JOIN LATERAL (
        SELECT thread_id FROM checkpoints WHERE thread_id > stored.thread_id ORDER BY thread_id LIMIT 1
    ) AS next
    WHERE stored.n < %(limit)s
)
SELECT thread_id FROM stored
UNION
(SELECT thread_id FROM checkpoint_buffer_threads {after} {and_open} ORDER BY thread_id LIMIT %(limit)s)
UNION
SELECT thread_id FROM unnest(%(buffered)s::text[]) AS thread_id
ORDER BY thread_id LIMIT %(limit)s
"""

_FIRST_OF = "SELECT DISTINCT thread_id FROM unnest(%(names)s::text[]) AS thread_id {after} ORDER BY 1 LIMIT %(limit)s"

_FACTS = f"""
SELECT t.thread_id, counted.checkpoints, latest.checkpoint_id, latest.ts, o.opened_at, d.id AS dead_letter
FROM unnest(%(names)s::text[]) WITH ORDINALITY AS t (thread_id, n)
CROSS JOIN LATERAL (
    SELECT count(*) AS checkpoints FROM (
        SELECT FROM checkpoints c WHERE c.thread_id = t.thread_id LIMIT {COUNTED} + 1
    ) AS few
) AS counted
LEFT JOIN LATERAL (
    SELECT c.checkpoint_id, c.checkpoint ->> 'ts' AS ts FROM checkpoints c
    WHERE c.thread_id = t.thread_id AND c.checkpoint_ns = '' ORDER BY c.checkpoint_id DESC LIMIT 1
) AS latest ON true
LEFT JOIN checkpoint_buffer_threads o ON o.prefix = %(prefix)s AND o.thread_id = t.thread_id AND o.token > 0
LEFT JOIN checkpoint_dead_letters d ON d.prefix = %(prefix)s AND d.thread_id = t.thread_id AND d.resolved_at IS NULL
ORDER BY t.n
"""

_NAMESPACES_OF = f"""
WITH RECURSIVE heads AS (
    (SELECT checkpoint_ns, checkpoint_id, 1 AS n FROM checkpoints
     WHERE thread_id = %(thread)s ORDER BY checkpoint_ns, checkpoint_id DESC LIMIT 1)
    UNION ALL
    SELECT next.checkpoint_ns, next.checkpoint_id, heads.n + 1
    FROM heads CROSS JOIN LATERAL (
        SELECT checkpoint_ns, checkpoint_id FROM checkpoints
        WHERE thread_id = %(thread)s AND checkpoint_ns > heads.checkpoint_ns
        ORDER BY checkpoint_ns, checkpoint_id DESC LIMIT 1
    ) AS next
    WHERE heads.n < {_NAMESPACES}
)
SELECT h.checkpoint_ns, h.checkpoint_id AS last_checkpoint_id,
    (SELECT count(*) FROM checkpoints c
     WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = h.checkpoint_ns) AS checkpoints
FROM heads AS h ORDER BY h.n
"""

_SIZE_OF = """
SELECT b.blobs, b.bytes + w.bytes AS bytes, w.writes FROM (
    SELECT count(*) AS blobs, coalesce(sum(octet_length(blob)), 0)::bigint AS bytes
    FROM checkpoint_blobs WHERE thread_id = %(thread)s
) AS b, (
    SELECT count(*) AS writes, coalesce(sum(octet_length(blob)), 0)::bigint AS bytes
    FROM checkpoint_writes WHERE thread_id = %(thread)s
) AS w
"""


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread.

    Attributes:
        thread_id: Its id.
        where: `postgres`; `redis`, if nothing of it is in Postgres yet; `both`, if Redis has something newer;
            `unknown`, if Redis may have something newer and is away; `none`, if no checkpoint of it is anywhere.
        checkpoints: How many Postgres has, of all namespaces.
        checkpoints_capped: There are more than these 10,000.
        last_checkpoint_id: The latest one of the root namespace, wherever it is.
        last_checkpoint_at: When it was made, if that can be told.
        unflushed: Records that only Redis has; None if Redis is away.
        unflushed_since: Since when the oldest of them waits; None if none does, or if a dead letter holds them up.
        opened_at: Since when Redis may hold something of it, as Postgres knows; None if it is not open.
        dead_letter: The number of the dead letter that holds it up, or None.
    """

    thread_id: str
    where: Where
    checkpoints: int
    checkpoints_capped: bool
    last_checkpoint_id: str | None
    last_checkpoint_at: datetime | None
    unflushed: int | None
    unflushed_since: datetime | None
    opened_at: datetime | None
    dead_letter: int | None


@dataclass(frozen=True, slots=True)
class ThreadPage:
    """Some threads.

    Attributes:
        threads: By id, in the order of the database.
        next_after: Leads to the next page; None if this is the last.
        redis_trouble: Why Redis could not be asked; None if it was.
    """

    threads: list[Thread]
    next_after: str | None
    redis_trouble: str | None


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of a thread in Postgres: the root's is empty, others are those of subgraphs."""

    checkpoint_ns: str
    last_checkpoint_id: str
    checkpoints: int


@dataclass(frozen=True, slots=True)
class Details:
    """One thread, looked at closely.

    Attributes:
        thread: As in a page.
        namespaces: The first 64 that Postgres has.
        blobs: Channel versions in Postgres.
        writes: Pending writes in Postgres.
        bytes: The size of both.
        redis_trouble: Why Redis could not be asked; None if it was.
    """

    thread: Thread
    namespaces: list[Namespace]
    blobs: int
    writes: int
    bytes: int
    redis_trouble: str | None


@dataclass(frozen=True, slots=True)
class _InBuffer:
    unflushed: int
    since: datetime | None
    head: str | None


@dataclass(frozen=True, slots=True)
class Holdings:
    """What Redis has of one namespace of a thread, by checkpoint id; of the latest 20,000 records.

    Attributes:
        waiting: Checkpoints that are not known to be in Postgres yet.
        cached: Checkpoints that are kept for fast reads.
        writes: How many pending writes of each checkpoint are not known to be in Postgres yet.
    """

    waiting: frozenset[str]
    cached: frozenset[str]
    writes: Mapping[str, int]


@dataclass(slots=True)
class Buffer:
    """The buffer of one application, as far as it can be asked.

    Attributes:
        url: Where Redis is; None is as good as away.
        key_prefix: Begins its keys.
        partitions: Into how many parts its threads are divided.
        trouble: Why it could not be asked; None as long as it could.
    """

    url: str | None
    key_prefix: str
    partitions: int
    trouble: str | None = None
    _client: SyncRedis | None = field(default=None, repr=False)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; again does nothing."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, RedisClusterException, OSError) as exc:
            self.trouble = f"{type(exc).__name__}: {exc}"
            self.close()

    def _connected(self) -> SyncRedis:
        if self.url is None:
            raise ConnectionError("no address of Redis is given")
        if self._client is None:
            self._client = redis_client(self.url, _TIMEOUT)
        return self._client

    def waiting_threads(self) -> int | None:
        """Return how many threads have something unflushed; None if Redis cannot be asked."""
        layout = self._layout()
        with self._asking():
            counts: list[int] = self._read([(layout.threads(p), "zcard", ()) for p in range(self.partitions)])
            return sum(counts)
        return None

    def names(self) -> Iterator[list[str]]:
        """Yield the ids of threads with something unflushed, in pieces and in no order; one may come twice."""
        if self.trouble is not None:
            return
        layout = self._layout()
        piece: list[str] = []
        with self._asking():
            client: Any = self._connected()
            for partition in range(self.partitions):
                cursor = 0
                while True:
                    cursor, members = client.zscan(layout.threads(partition), cursor, count=_SCANNED_AT_ONCE)
                    piece += [name.decode() for name, _ in members]
                    if len(piece) >= _PIECE:
                        yield piece
                        piece = []
                    if not cursor:
                        break
        if piece and self.trouble is None:
            yield piece

    def facts(self, thread_ids: Sequence[str]) -> list[_InBuffer] | None:
        """Return what Redis has of each of these threads; None if it cannot be asked."""
        if self.trouble is not None:
            return None
        layout = self._layout()
        questions: list[tuple[bytes, str, tuple[Any, ...]]] = []
        for thread in thread_ids:
            keys = layout.thread(thread)
            questions += [
                (keys.order, "zcard", ()),
                (keys.threads, "zscore", (thread.encode(),)),
                (keys.facts, "hget", (field_name("h", ""),)),
            ]
        with self._asking():
            replies = self._read(questions)
            triples = zip(replies[::3], replies[1::3], replies[2::3], strict=True)
            return [_InBuffer(count, _moment(score), head and head.decode()) for count, score, head in triples]
        return None

    def backlog(self) -> Backlog | None:
        """Return how much waits, of all threads; None if Redis cannot be asked."""
        layout = self._layout()
        commands = Commands(layout, _CLEAN_TTL)

        def read(keys: Sequence[bytes], command: str, *args: Any) -> list[Any]:
            return self._read([(key, command, args) for key in keys])

        with self._asking():
            replies = run_pipeline(self._connected(), [commands.scan(p) for p in range(self.partitions)])
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            scanned = {p: (held, age / 1_000) for p, (age, held) in enumerate(replies) if age != -1}
            return measure(read, scanned, layout)
        return None

    def holdings(self, thread_id: str, checkpoint_ns: str) -> Holdings | None:
        """Return what Redis has of a thread's namespace; None if it cannot be asked."""
        if self.trouble is not None:
            return None
        keys = self._layout().thread(thread_id)
        with self._asking():
            dirty, clean = self._read(
                [(keys.order, "zrange", (0, _RECORDS - 1, True)), (keys.clean, "hkeys", ())]  # the latest first
            )
            writes: dict[str, int] = {}
            for kind, checkpoint_id in _ids(dirty, checkpoint_ns):
                if kind == "w":
                    writes[checkpoint_id] = writes.get(checkpoint_id, 0) + 1
            waiting = {checkpoint_id for kind, checkpoint_id in _ids(dirty, checkpoint_ns) if kind == "c"}
            cached = {checkpoint_id for kind, checkpoint_id in _ids(clean, checkpoint_ns) if kind == "c"}
            return Holdings(frozenset(waiting), frozenset(cached), writes)
        return None

    def checkpoints(
        self, thread_id: str, checkpoint_ns: str, checkpoint_ids: Sequence[str]
    ) -> dict[str, tuple[CheckpointRow, int]]:
        """Return what waits of some checkpoints: each row and its size in bytes; what cannot be read is left out."""
        keys = self._layout().thread(thread_id)
        found: dict[str, tuple[CheckpointRow, int]] = {}
        if not checkpoint_ids:
            return found
        with self._asking():
            names = [field_name("c", checkpoint_ns, checkpoint_id) for checkpoint_id in checkpoint_ids]
            [payloads] = self._read([(keys.dirty, "hmget", (names,))])
            for name, payload in zip(names, payloads, strict=True):
                record = None if payload is None else decode_record(name, payload)
                if isinstance(record, DirtyCheckpoint):
                    found[record.row.checkpoint_id] = record.row, len(payload)
        return found

    def sizes(self, thread_id: str, checkpoint_ns: str, refs: Sequence[str]) -> dict[str, int]:
        """Return the sizes in bytes of those channel versions that wait."""
        keys = self._layout().thread(thread_id)
        with self._asking():
            lengths = self._read([(keys.dirty, "hstrlen", (field_name("b", checkpoint_ns, ref),)) for ref in refs])
            return {ref: length for ref, length in zip(refs, lengths, strict=True) if length}
        return {}

    def _read(self, questions: Sequence[tuple[bytes, str, tuple[Any, ...]]]) -> list[Any]:
        def adds(key: bytes, command: str, args: tuple[Any, ...]) -> Any:
            return lambda pipeline: getattr(pipeline, command)(key, *args)

        replies = pipelined(self._connected(), [(question[0], adds(*question)) for question in questions])
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _layout(self) -> KeyLayout:
        return KeyLayout(self.key_prefix, self.partitions)


def page(
    conn: Connection[Any], buffer: Buffer, prefix: str, *, after: str | None = None, limit: int = 100
) -> ThreadPage:
    """Return some threads of an application and of its database, by id.

    Args:
        conn: A connection to Postgres.
        buffer: The application's.
        prefix: The application.
        after: The `next_after` of the page before.
        limit: How many at most, from 1 to 500.
    """
    names = _names(conn, buffer, prefix, after, limit + 1)
    threads = _threads(conn, buffer, prefix, names[:limit])
    return ThreadPage(threads, names[limit - 1] if len(names) > limit else None, buffer.trouble)


def search(
    conn: Connection[Any], buffer: Buffer, prefix: str, text: str, *, after: str | None = None, limit: int = 100
) -> ThreadPage:
    """Return threads whose id has a text in it, in whatever case.

    It looks through 2,000 threads: a page may hold few or none, and another one follow.

    Args:
        conn: A connection to Postgres.
        buffer: The application's.
        prefix: The application.
        text: The text.
        after: The `next_after` of the page before.
        limit: How many at most, from 1 to 500.
    """
    names = _names(conn, buffer, prefix, after, SEARCHED + 1)
    found = [name for name in names[:SEARCHED] if text.casefold() in name.casefold()]
    next_after = found[limit - 1] if len(found) > limit else names[SEARCHED - 1] if len(names) > SEARCHED else None
    return ThreadPage(_threads(conn, buffer, prefix, found[:limit]), next_after, buffer.trouble)


def one(conn: Connection[Any], buffer: Buffer, prefix: str, thread_id: str) -> Thread:
    """Return one thread, as a page has it; what there is none of is `none`."""
    return _threads(conn, buffer, prefix, [thread_id])[0]


def _names(conn: Connection[Any], buffer: Buffer, prefix: str, after: str | None, limit: int) -> list[str]:
    params: dict[str, Any] = {"prefix": prefix, "after": after, "limit": limit}
    condition = "WHERE thread_id > %(after)s" if after is not None else ""
    first: list[str] = []
    for piece in buffer.names():
        rows = _rows(conn, _FIRST_OF.format(after=condition), params | {"names": first + piece})
        first = [row["thread_id"] for row in rows]
    is_open = f"{'AND' if condition else 'WHERE'} prefix = %(prefix)s AND token > 0"
    found = _rows(conn, _NAMES.format(after=condition, and_open=is_open), params | {"buffered": first})
    return [row["thread_id"] for row in found]


def show(conn: Connection[Any], buffer: Buffer, prefix: str, thread_id: str) -> Details:
    """Look at one thread; what there is none of is `none`."""
    thread = one(conn, buffer, prefix, thread_id)
    params = {"thread": thread_id}
    namespaces = [Namespace(**row) for row in _rows(conn, _NAMESPACES_OF, params)]
    [size] = _rows(conn, _SIZE_OF, params)
    return Details(thread, namespaces, size["blobs"], size["writes"], size["bytes"], buffer.trouble)


def _threads(conn: Connection[Any], buffer: Buffer, prefix: str, names: list[str]) -> list[Thread]:
    # The buffer first: what is flushed in between is then seen in both, and not in neither.
    known = buffer.facts(names)
    buffered: Sequence[_InBuffer | None] = [None] * len(names) if known is None else known
    stored = _rows(conn, _FACTS, {"names": names, "prefix": prefix})
    return [_thread(row, inside) for row, inside in zip(stored, buffered, strict=True)]


def _thread(row: Mapping[str, Any], inside: _InBuffer | None) -> Thread:
    last_id, last_at = row["checkpoint_id"], written(row["ts"])
    # Redis also keeps the head of what is flushed; the later one of the two is the latest.
    if inside is not None and inside.head is not None and inside.head > (last_id or ""):
        last_id, last_at = inside.head, made(inside.head)
    in_postgres = row["checkpoints"] > 0
    where: Where
    if inside is None:
        where = "unknown" if row["opened_at"] is not None else ("postgres" if in_postgres else "none")
    elif inside.unflushed:
        where = "both" if in_postgres else "redis"
    else:
        where = "postgres" if in_postgres else "none"
    return Thread(
        thread_id=row["thread_id"],
        where=where,
        checkpoints=min(row["checkpoints"], COUNTED),
        checkpoints_capped=row["checkpoints"] > COUNTED,
        last_checkpoint_id=last_id,
        last_checkpoint_at=last_at,
        unflushed=None if inside is None else inside.unflushed,
        unflushed_since=None if inside is None else inside.since,
        opened_at=row["opened_at"],
        dead_letter=row["dead_letter"],
    )


def _rows(conn: Connection[Any], query: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), params).fetchall()


def _ids(names: Sequence[bytes], checkpoint_ns: str) -> Iterator[tuple[str, str]]:
    """Yield kind and checkpoint id of the records of a namespace that belong to a checkpoint."""
    for name in names:
        kind, ns, *parts = name.decode("utf-8", "replace").split("\0")
        if kind in ("c", "w") and ns == checkpoint_ns and parts:
            yield kind, parts[0]


def _moment(score: float | None) -> datetime | None:
    """Return when a thread became dirty, by its score; that of a pinned one is infinite."""
    return None if score is None or math.isinf(score) else datetime.fromtimestamp(score / 1_000, UTC)


def written(text: str | None) -> datetime | None:
    """Return the time that a checkpoint says, whoever wrote it."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def made(checkpoint_id: str) -> datetime | None:
    """Return the time inside a checkpoint's id, as LangGraph makes them (UUID version 6)."""
    try:
        made = UUID(checkpoint_id)
    except ValueError:
        return None
    if made.version != 6:
        return None
    # 100 nanoseconds since the Gregorian calendar began; the version stands between the parts.
    ticks = (made.int >> 80) << 12 | (made.int >> 64) & 0xFFF
    return datetime(1582, 10, 15, tzinfo=UTC) + timedelta(microseconds=ticks // 10)
