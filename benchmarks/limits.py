"""What no saver can beat: the same bytes with nothing around them.

Not here: savers (`contenders.py`). The bytes are serialised beforehand.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from psycopg import sql

from benchmarks.states import messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psycopg
    import redis

_SCRIPT = """
redis.call('HSET', KEYS[1], unpack(ARGV))
local sequence = redis.call('INCR', KEYS[2])
redis.call('ZADD', KEYS[3], sequence, KEYS[1])
return sequence
"""

TABLES = ("checkpoint_blobs", "checkpoint_writes", "checkpoints")


class BareRedis:
    """Calls of one script that stores the bytes of a `put` or a `put_writes` in a hash, and counts and indexes them.

    Args:
        client: A synchronous client.
        prefix: Of its keys.
        size: The size of the state.
    """

    def __init__(self, client: redis.Redis, prefix: str, size: int) -> None:
        self._client = client
        self._prefix = f"{{{prefix}.bare}}"
        self._sha = client.script_load(_SCRIPT)
        self._made: list[str] = []
        serde, state = JsonPlusSerializer(), messages(size)
        checkpoint = {**empty_checkpoint(), "channel_versions": {"messages": "1" * 50}}
        metadata = {"source": "loop", "step": 1, "parents": {}}
        self._fields: dict[str, list[Any]] = {
            "put": [
                "blob",
                serde.dumps_typed(state)[1],
                "checkpoint",
                json.dumps(checkpoint) + json.dumps(metadata),
            ],
            "put_writes": ["write", serde.dumps_typed(state[-1])[1]],
        }

    def _arguments(self, operation: str) -> tuple[Any, ...]:
        keys = (f"{self._prefix}{uuid4()}", f"{self._prefix}sequence", f"{self._prefix}dirty")
        self._made.append(keys[0])
        return self._sha, len(keys), *keys, *self._fields[operation]

    def call(self, operation: str) -> float:
        """Make one call; returns the seconds that it took."""
        arguments = self._arguments(operation)
        begin = time.perf_counter()
        self._client.evalsha(*arguments)
        return time.perf_counter() - begin

    def clear(self) -> None:
        """Remove what was stored."""
        self._client.unlink(*self._made)
        self._made.clear()

    def pipelined(self, count: int, at_once: int) -> float:
        """Make the calls of so many puts and put_writes, many in a pipeline; returns the puts per second."""
        calls = [self._arguments(operation) for _ in range(count) for operation in ("put", "put_writes")]
        begin = time.perf_counter()
        for start in range(0, len(calls), at_once):
            pipe = self._client.pipeline(transaction=False)
            for arguments in calls[start : start + at_once]:
                pipe.evalsha(*arguments)
            pipe.execute()
        return count / (time.perf_counter() - begin)


def copy_rows(conn: psycopg.Connection[Any], threads: Sequence[str]) -> float:
    """Copy rows of LangGraph's tables into empty tables like them, in one transaction; returns the seconds.

    Reading the rows is not part of it: they are in memory, encoded, when the time begins.
    """
    rows: dict[str, list[bytes]] = {}
    for table in TABLES:
        conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(_copy_of(table)))
        conn.execute(sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(_copy_of(table), sql.Identifier(table)))
        query = sql.SQL("COPY (SELECT * FROM {} WHERE thread_id = ANY({})) TO STDOUT (FORMAT binary)").format(
            sql.Identifier(table), sql.Literal(list(threads))
        )
        with conn.cursor() as cur, cur.copy(query) as copy:
            rows[table] = [bytes(data) for data in copy]
    begin = time.perf_counter()
    with conn.transaction(), conn.cursor() as cur:
        for table, data in rows.items():
            statement = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(_copy_of(table))
            with cur.copy(statement) as copy:
                for piece in data:
                    copy.write(piece)
    return time.perf_counter() - begin


def _copy_of(table: str) -> sql.Identifier:
    return sql.Identifier(f"bare_{table}")
