"""What an operator asks of an application's checkpoints from outside of it: how it stands, threads, dead letters.

`Inspector` puts together what the command line has commands for (`whereabouts.py`, `timelines.py`,
`flush/dead_letters.py`), for a process that is asked again and again, such as the console. Not here: how it is shown,
and errors and logs (`observability/`). All methods block; they may be called from several threads.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from psycopg.rows import dict_row
from redis.exceptions import RedisClusterException, RedisError

from checkpointer import timelines, whereabouts
from checkpointer.buffer.places import place_of_url
from checkpointer.errors import BufferUnavailableError, ConfigurationError, NotSetUpError, StoreUnavailableError
from checkpointer.events import describe_error
from checkpointer.flush import dead_letters
from checkpointer.hooks import STANDARD_HOOKS, redis_client
from checkpointer.options import BufferOptions
from checkpointer.records import thread_text
from checkpointer.saver import BufferedPostgresSaver
from checkpointer.store.clients import PostgresSide
from checkpointer.store.deadline import Limit, limited
from checkpointer.store.reads import Query, partitions
from checkpointer.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    import redis
    from langgraph.checkpoint.serde.base import SerializerProtocol
    from psycopg import Connection

    from checkpointer.events import CheckpointEvent
    from checkpointer.flush.backlog import Backlog
    from checkpointer.flush.dead_letters import DeadLetter

T = TypeVar("T")

__all__ = ["Change", "Inspector", "RedisStanding", "StoreStanding"]

_POOL_SIZE = 4
_CONNECT_SECONDS = 3.0
_STATEMENT_SECONDS = 5.0
_REDIS_SECONDS = 2.0
# A look at the backlog costs one Redis command for each waiting thread: all who ask share one, and the pause between
# two makes that a twentieth of the time at most.
_LOOK_SECONDS = 1.0
_LOOK_SHARE = 20
_LONGEST_VALUE = 200_000

# Whoever asks sees the outcome, so nothing is printed.
_HOOKS = tuple(name for name in STANDARD_HOOKS if name != "console")

_STANDING = """
SELECT (SELECT max(flushed_at) FROM checkpoint_buffer_partitions WHERE prefix = %(prefix)s) AS flushed_at,
    (SELECT count(*) FROM checkpoint_dead_letters WHERE prefix = %(prefix)s AND resolved_at IS NULL) AS dead_letters,
    (SELECT count(*) FROM (
        SELECT FROM checkpoint_buffer_threads WHERE prefix = %(prefix)s AND token > 0 LIMIT 10000
    ) AS few) AS open_threads
"""


@dataclass(frozen=True, slots=True)
class RedisStanding:
    """How it stands in Redis.

    Attributes:
        trouble: Why it cannot be told; None if it can.
        backlog: What waits to be flushed; None if Redis does not answer, or if nothing of this application is known.
    """

    trouble: str | None
    backlog: Backlog | None


@dataclass(frozen=True, slots=True)
class StoreStanding:
    """How it stands in Postgres.

    Attributes:
        trouble: Why it cannot be told; None if it can.
        is_known: An application with this prefix has been set up.
        flushed_at: When something was flushed last, or None.
        dead_letters: How many wait for a decision.
        open_threads: Of how many threads Redis may hold something that Postgres lacks; at most 10,000 are counted.
    """

    trouble: str | None
    is_known: bool = False
    flushed_at: datetime | None = None
    dead_letters: int = 0
    open_threads: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one channel between two checkpoints.

    Attributes:
        channel: Its name.
        kind: `added`, `removed`, `changed` or `same`.
        before: Its value in the first one, as text; None if it has none, or if no content was asked for.
        after: Its value in the second one.
    """

    channel: str
    kind: str
    before: str | None
    after: str | None


class Inspector:
    """Asks both servers about one application; connects when it is first asked.

    Args:
        postgres_uri: Where Postgres is.
        redis_url: Where Redis is; without it only what Postgres knows is told, and nothing can be replayed.
        prefix: The saver's.
        schema: The saver's.
        serde: The saver's, if it has one of its own.

    Raises:
        ConfigurationError: An argument cannot work.
    """

    def __init__(
        self,
        postgres_uri: str,
        redis_url: str | None = None,
        *,
        prefix: str = BufferOptions().prefix,
        schema: str | None = None,
        serde: SerializerProtocol | None = None,
    ) -> None:
        self._options = BufferOptions(prefix=prefix, schema=schema)
        self._uri = postgres_uri
        self._redis_url = redis_url or None
        self._serde = serde or JsonPlusSerializer()
        if self._redis_url is not None:
            place_of_url(self._redis_url, _REDIS_SECONDS)
        self._postgres = PostgresSide(
            postgres_uri,
            apool=None,
            timeout=_CONNECT_SECONDS,
            query_timeout=_STATEMENT_SECONDS,
            pool_size=_POOL_SIZE,
            tier=Tier("postgres", _ignore),
            schema=schema,
        )
        self._partitions: int | None = None
        self._looking = threading.Lock()
        self._looked: RedisStanding | None = None
        self._look_at = 0.0

    @property
    def key_prefix(self) -> str:
        """What the application's Redis keys begin with."""
        return self._options.key_prefix

    def close(self) -> None:
        """Close the connections; again does nothing, and it can be used again."""
        self._postgres.close()

    def connect_redis(self) -> redis.Redis | redis.RedisCluster:
        """Return a client, which the caller closes.

        Raises:
            BufferUnavailableError: There is no address of Redis.
        """
        if self._redis_url is None:
            raise BufferUnavailableError("No address of Redis is given: set REDIS_URL.")
        return redis_client(self._redis_url, _REDIS_SECONDS)

    # -- how it stands -------------------------------------------------------------------------------------------

    def in_postgres(self) -> StoreStanding:
        """Return how it stands in Postgres; what is wrong is a part of the answer."""
        try:
            with self._connection() as conn:
                row = _one(conn, _STANDING, {"prefix": self._options.prefix})
                return StoreStanding(None, self._find_partitions(conn) is not None, **row)
        except (StoreUnavailableError, NotSetUpError, ConfigurationError) as exc:
            return StoreStanding(str(exc))

    def in_redis(self) -> RedisStanding:
        """Return how it stands in Redis, as of a moment ago; what is wrong is a part of the answer."""
        with self._looking:
            if self._looked is None or time.monotonic() >= self._look_at:
                begun = time.monotonic()
                self._looked = self._look()
                done = time.monotonic()
                pause = 0.0 if self._looked.trouble else (done - begun) * _LOOK_SHARE
                self._look_at = done + max(_LOOK_SECONDS, pause)
            return self._looked

    def _look(self) -> RedisStanding:
        if self._redis_url is None:
            return RedisStanding("No address of Redis is given: set REDIS_URL.", None)
        try:
            if self._partitions is None:
                # Nothing is found while Postgres is away for whom it was never there.
                with contextlib.suppress(StoreUnavailableError, NotSetUpError), self._connection() as conn:
                    self._find_partitions(conn)
            if self._partitions is None:
                with contextlib.closing(redis_client(self._redis_url, _REDIS_SECONDS)) as client:
                    client.ping()
                return RedisStanding(None, None)
            with self._buffer() as buffer:
                backlog = buffer.backlog()
                return RedisStanding(_NO_REDIS if buffer.trouble is not None else None, backlog)
        # Without their words: they can quote the URL, which can hold a password.
        except (RedisError, RedisClusterException, OSError):
            return RedisStanding(_NO_REDIS, None)

    # -- threads -------------------------------------------------------------------------------------------------

    def threads(self, *, text: str | None = None, after: str | None = None, limit: int = 50) -> whereabouts.ThreadPage:
        """Return some threads, by id; with a text, those whose id has it in it (see `whereabouts.search`).

        Raises:
            InvalidConfigError: `after` cannot be an id.
            StoreUnavailableError: Postgres cannot be reached.
        """
        after = None if after is None else thread_text(after)
        with self._connection() as conn, self._buffer(conn) as buffer:
            if text is None:
                return whereabouts.page(conn, buffer, self._options.prefix, after=after, limit=limit)
            return whereabouts.search(conn, buffer, self._options.prefix, text, after=after, limit=limit)

    def thread(self, thread_id: str) -> whereabouts.Thread:
        """Return one thread; of what there is none of, `where` is `none`.

        Raises:
            InvalidConfigError: It cannot be an id.
            StoreUnavailableError: Postgres cannot be reached.
        """
        thread_id = thread_text(thread_id)
        with self._connection() as conn, self._buffer(conn) as buffer:
            return whereabouts.one(conn, buffer, self._options.prefix, thread_id)

    def namespaces(self, thread_id: str) -> list[str]:
        """Return the first 64 namespaces that Postgres has of a thread.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        with self._connection() as conn:
            return timelines.namespaces(conn, thread_text(thread_id))

    def timeline(
        self, thread_id: str, checkpoint_ns: str = "", *, before: str | None = None, limit: int = 50
    ) -> timelines.Timeline:
        """Return some checkpoints of a thread, the latest first.

        Raises:
            InvalidConfigError: Something cannot be an id.
            StoreUnavailableError: Postgres cannot be reached.
        """
        thread_id, checkpoint_ns = thread_text(thread_id), checkpoint_ns and thread_text(checkpoint_ns)
        before = None if before is None else thread_text(before)
        with self._connection() as conn, self._buffer(conn) as buffer:
            return timelines.timeline(conn, buffer, thread_id, checkpoint_ns, before=before, limit=limit)

    def compare(
        self, thread_id: str, checkpoint_ns: str, before: str, after: str, *, content: bool
    ) -> list[Change] | None:
        """Return what became of each channel between two checkpoints, by name; None if one of them is nowhere.

        Args:
            thread_id: The thread.
            checkpoint_ns: The namespace of both.
            before: The id of the first one.
            after: The id of the second one.
            content: Return values too; otherwise only which channels have changed.

        Raises:
            InvalidConfigError: Something cannot be an id.
            TierUnavailableError: A server that is needed cannot be reached.
            ConfigurationError: There is no address of Redis, or no such application.
        """
        with self._saver(hooks=()) as saver:
            sides: list[dict[str, tuple[Any, str]]] = []
            for checkpoint_id in (before, after):
                names = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
                found = saver.get_tuple({"configurable": names})
                if found is None:
                    return None
                versions = found.checkpoint["channel_versions"]
                values = found.checkpoint["channel_values"]
                sides.append({name: (versions.get(name), _readable(values[name])) for name in values})
        return [_change(name, *sides, content=content) for name in sorted({*sides[0], *sides[1]})]

    # -- dead letters --------------------------------------------------------------------------------------------

    def dead_letters(self, *, resolved: bool = False, before: int | None = None, limit: int = 50) -> list[DeadLetter]:
        """Return dead letters, the newest first.

        Args:
            resolved: Resolved ones too.
            before: Only those with a lower number.
            limit: How many at most.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        query = dead_letters.listing(self._options.prefix, None, limit, resolved, before)
        with self._connection() as conn:
            return [dead_letters.read(row) for row in _all(conn, query)]

    def dead_letter(self, letter_id: int, *, content: bool) -> DeadLetter:
        """Return one dead letter; with what its record holds, if that is asked for, each value as text.

        Raises:
            UnknownDeadLetterError: There is none with this number.
            StoreUnavailableError: Postgres cannot be reached.
        """
        with self._connection() as conn:
            rows = _all(conn, dead_letters.showing(self._options.prefix, letter_id))
        found = dead_letters.read(dead_letters.one_of(rows, letter_id), self._serde if content else None)
        return replace(found, content={name: _readable(value) for name, value in (found.content or {}).items()})

    def replay(self, letter_id: int, *, by: str) -> DeadLetter:
        """Try a dead letter again; see `DeadLetters.replay`.

        Raises:
            UnknownDeadLetterError: There is none with this number.
            FlushIncompleteError: Another worker kept the partition; try again.
            TierUnavailableError: A server cannot be reached; try again.
            ConfigurationError: There is no address of Redis.
        """
        with self._saver(hooks=_HOOKS) as saver:
            return saver.dead_letters.replay(letter_id, resolved_by=by)[0]

    def drop(self, letter_id: int, *, by: str) -> DeadLetter:
        """Give a dead letter's record up; see `DeadLetters.drop`.

        Raises:
            UnknownDeadLetterError: There is none with this number.
            FlushIncompleteError: Another worker kept the partition; try again.
            TierUnavailableError: A server cannot be reached; try again.
            ConfigurationError: There is no address of Redis.
        """
        with self._saver(hooks=_HOOKS) as saver:
            return saver.dead_letters.drop(letter_id, resolved_by=by)

    # -- connections ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection[Any]]:
        """Lend a connection in a transaction that changes nothing and in which no statement takes long."""
        try:
            with self._postgres.connection() as conn, limited(conn, Limit(_STATEMENT_SECONDS + 2)):
                self._postgres.verify(conn)
                with conn.transaction():
                    conn.execute("SET TRANSACTION READ ONLY")
                    conn.execute(f"SET LOCAL statement_timeout = {int(_STATEMENT_SECONDS * 1_000)}".encode())
                    yield conn
        except psycopg.errors.QueryCanceled as exc:
            raise StoreUnavailableError(
                f"Postgres has not answered within {_STATEMENT_SECONDS:.0f} s: ask for less, or try again later."
            ) from exc
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as exc:
            raise NotSetUpError("Tables are missing or old: run `checkpointer migrate`.") from exc
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError) as exc:
            raise StoreUnavailableError("Postgres cannot be reached: try again later.") from exc

    def _find_partitions(self, conn: Connection[Any]) -> int | None:
        if self._partitions is None:
            rows = _all(conn, partitions(self._options.prefix))
            self._partitions = int(rows[0]["partitions"]) if rows else None
        return self._partitions

    def _buffer(self, conn: Connection[Any] | None = None) -> whereabouts.Buffer:
        number = self._partitions if conn is None else self._find_partitions(conn)
        # Where nothing has been set up nothing is buffered, in however many partitions.
        return whereabouts.Buffer(self._redis_url, self._options.key_prefix, number or 1)

    @contextlib.contextmanager
    def _saver(self, hooks: Sequence[str]) -> Iterator[BufferedPostgresSaver]:
        """Open a saver that does nothing by itself."""
        if self._redis_url is None:
            raise ConfigurationError("This needs Redis: set REDIS_URL.")
        with self._connection() as conn:
            number = self._find_partitions(conn)
        if number is None:
            raise ConfigurationError(f"No application with the prefix {self._options.prefix!r} uses this database.")
        with BufferedPostgresSaver(
            self._uri,
            self._redis_url,
            serde=self._serde,
            prefix=self._options.prefix,
            schema=self._options.schema,
            partitions=number,
            triggers=frozenset(),
            hooks=tuple(hooks),
        ) as saver:
            yield saver


_NO_REDIS = "Redis cannot be reached."


def _ignore(_: CheckpointEvent) -> None:
    """Take an event of a tier: whoever asks is told."""


def _all(conn: Connection[Any], query: Query) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.sql.encode(), query.params).fetchall()


def _one(conn: Connection[Any], query: str, params: Mapping[str, Any]) -> dict[str, Any]:
    with conn.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(query.encode(), params).fetchone()
    assert row is not None  # aggregates only
    return row


def _change(
    name: str, first: Mapping[str, tuple[Any, str]], second: Mapping[str, tuple[Any, str]], *, content: bool
) -> Change:
    before, after = first.get(name), second.get(name)
    if before is None or after is None:
        kind = "added" if before is None else "removed"
    else:
        # A channel can be written anew with the value that it had; of a value that was cut that is not known.
        whole = len(before[1]) <= _LONGEST_VALUE
        kind = "same" if before[1] == after[1] and (whole or before[0] == after[0]) else "changed"
    return Change(name, kind, before[1] if before and content else None, after[1] if after and content else None)


def _readable(value: Any) -> str:
    """Return a value as text over several lines, to be read and compared; a very long one is cut."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=_parts, sort_keys=True)
    # A state may hold anything, and showing goes on.
    except Exception as exc:  # noqa: BLE001 - as above
        text = f"{value!r:.{_LONGEST_VALUE}} ({describe_error(exc).type})"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ... ({len(text):,} characters)"


def _parts(value: Any) -> Any:
    """Return what a value is made of, for one that JSON has no form for."""
    if callable(dump := getattr(value, "model_dump", None)):
        return {"(class)": type(value).__name__} | dump()
    if is_dataclass(value) and not isinstance(value, type):
        return {"(class)": type(value).__name__} | asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return repr(value)
