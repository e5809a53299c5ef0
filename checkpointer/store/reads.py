"""The queries that read LangGraph's tables, and their rows, without I/O.

Not here: who runs them (`clients.py`) and what is made of them (`merge.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from langgraph.checkpoint.serde.types import TASKS

from checkpointer.merge import Snapshot, Verdict, from_row
from checkpointer.records import Address, Blob, Write
from checkpointer.store import threads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMESPACES_LIMIT = 64
"""A thread with more namespaces than this is not said to be known as a whole."""


class Query(NamedTuple):
    """A statement with its parameters: one round trip.

    Attributes:
        sql: The statement.
        params: Its parameters.
        patient: It may be slow, if only the server answers others.
        short: It runs often and has only texts as parameters.
    """

    sql: str
    params: Sequence[Any] = ()
    patient: bool = False
    short: bool = False


# The rows of LangGraph's own SELECT. Text becomes bytes by convert_to: a cast would read backslashes as escapes.
SELECT = """
SELECT thread_id, checkpoint, checkpoint_ns, checkpoint_id, parent_checkpoint_id, metadata,
    (SELECT array_agg(ARRAY[convert_to(b.channel, 'UTF8'), convert_to(b.type, 'UTF8'), b.blob])
     FROM jsonb_each_text(checkpoint -> 'channel_versions') AS v
     JOIN checkpoint_blobs b
        ON b.thread_id = checkpoints.thread_id AND b.checkpoint_ns = checkpoints.checkpoint_ns
        AND b.channel = v.key AND b.version = v.value) AS channel_values,
    (SELECT array_agg(ARRAY[convert_to(w.task_id, 'UTF8'), convert_to(w.channel, 'UTF8'), convert_to(w.type, 'UTF8'),
                            w.blob, convert_to(w.task_path, 'UTF8'), convert_to(w.idx::text, 'UTF8')])
     FROM checkpoint_writes w
     WHERE w.thread_id = checkpoints.thread_id AND w.checkpoint_ns = checkpoints.checkpoint_ns
        AND w.checkpoint_id = checkpoints.checkpoint_id) AS pending_writes
FROM checkpoints """

_READY = """
SELECT current_setting('server_version_num')::int AS version,
    to_regclass('checkpoints') IS NOT NULL
    AND to_regclass('checkpoint_writes') IS NOT NULL
    AND to_regclass('checkpoint_buffer_threads') IS NOT NULL
    AND to_regclass('checkpoint_dead_letters') IS NOT NULL AS tables,
    current_schema()::text AS schema,
    ARRAY(SELECT DISTINCT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE c.oid IN (to_regclass('checkpoints'), to_regclass('checkpoint_buffer_threads'))) AS tables_in,
    pg_is_in_recovery() AS standby,
    current_setting('default_transaction_read_only') AS read_only,
    current_setting('fsync') AS fsync,
    current_setting('full_page_writes') AS full_page_writes,
    current_setting('synchronous_commit') AS synchronous_commit,
    extract(epoch FROM clock_timestamp())::float8 AS clock
"""

# Whether something of the thread went straight to Postgres that is newer than what Redis may have of it.
_REPLAY = """
EXISTS (SELECT FROM checkpoint_buffer_threads WHERE prefix = %s AND thread_id = %s AND replay) AS replay
"""
# The same, and null if Redis has nothing of the thread that Postgres lacks.
_STATE = """
(SELECT replay FROM checkpoint_buffer_threads WHERE prefix = %s AND thread_id = %s) AS replay
"""


def _with_and_without_opening(sql: str) -> dict[bool, str]:
    columns = f"{threads.OPENING_COLUMNS},"
    return {False: sql.format(opening=""), True: threads.with_opening(sql.format(opening=columns))}


# The two counts are cheap: both are ranges at the end of the primary key's index.
_VERIFY = _with_and_without_opening(f"""
SELECT {{opening}} {_REPLAY}, c.checkpoint_id, c.parent_checkpoint_id,
    (SELECT count(*) FROM checkpoint_writes w
     WHERE w.thread_id = %s AND w.checkpoint_ns = %s AND w.checkpoint_id = c.checkpoint_id) AS writes,
    (SELECT count(*) FROM checkpoint_writes w
     WHERE w.thread_id = %s AND w.checkpoint_ns = %s AND w.checkpoint_id > coalesce(c.checkpoint_id, '')) AS orphans
FROM (SELECT 1) AS one
LEFT JOIN LATERAL (
    SELECT checkpoint_id, parent_checkpoint_id FROM checkpoints
    WHERE thread_id = %s AND checkpoint_ns = %s
    ORDER BY checkpoint_id DESC LIMIT 1
) AS c ON true
""")

_FOUND = f"""
FROM (SELECT 1) AS one
LEFT JOIN LATERAL (
    {SELECT} WHERE thread_id = %s AND checkpoint_ns = %s ORDER BY checkpoint_id DESC LIMIT 1
) AS found ON true
"""

_LATEST = f"""
SELECT {_STATE},
    (SELECT checkpoint_ns FROM checkpoints WHERE thread_id = %s ORDER BY checkpoint_ns DESC LIMIT 1) AS last_ns, found.*
{_FOUND}
"""

# A skip scan: one index probe for each namespace, whatever the length of their histories.
_LATEST_OPENING = threads.with_opening(f"""
WITH RECURSIVE heads AS (
    (SELECT checkpoint_ns, checkpoint_id, 1 AS n FROM checkpoints
     WHERE thread_id = %s ORDER BY checkpoint_ns DESC, checkpoint_id DESC LIMIT 1)
    UNION ALL
    SELECT next.checkpoint_ns, next.checkpoint_id, heads.n + 1
    FROM heads CROSS JOIN LATERAL (
        SELECT checkpoint_ns, checkpoint_id FROM checkpoints
        WHERE thread_id = %s AND checkpoint_ns < heads.checkpoint_ns
        ORDER BY checkpoint_ns DESC, checkpoint_id DESC LIMIT 1
    ) AS next
    WHERE heads.n <= {NAMESPACES_LIMIT}
)
SELECT {threads.OPENING_COLUMNS}, {_STATE},
    (SELECT array_agg(ARRAY[heads.checkpoint_ns, heads.checkpoint_id]) FROM heads) AS heads, found.*
{_FOUND}
""")

_ONE = f"{SELECT} WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s"

_PARTS = """
SELECT
    (SELECT array_agg(ARRAY[convert_to(b.channel, 'UTF8'), convert_to(b.version, 'UTF8'),
                            convert_to(b.type, 'UTF8'), b.blob])
     FROM unnest(%s::text[], %s::text[]) AS wanted (channel, version)
     JOIN checkpoint_blobs b
        ON b.thread_id = %s AND b.checkpoint_ns = %s
        AND b.channel = wanted.channel AND b.version = wanted.version) AS blobs,
    (SELECT array_agg(ARRAY[convert_to(w.task_id, 'UTF8'), convert_to(w.channel, 'UTF8'), convert_to(w.type, 'UTF8'),
                            w.blob, convert_to(w.task_path, 'UTF8'), convert_to(w.idx::text, 'UTF8')])
     FROM checkpoint_writes w
     WHERE w.thread_id = %s AND w.checkpoint_ns = %s AND w.checkpoint_id = %s) AS writes
"""

_SENDS = f"""
SELECT checkpoint_id, task_id, idx, task_path, type, blob FROM checkpoint_writes
WHERE thread_id = %s AND checkpoint_id = ANY(%s) AND channel = '{TASKS}'
"""


def ready() -> Query:
    """Ask whether the tables are there, and for what `checks.postgres_findings` judges."""
    return Query(_READY)


def partitions(prefix: str) -> Query:
    """Ask into how many partitions an application's threads are divided."""
    return Query("SELECT partitions FROM checkpoint_buffers WHERE prefix = %s", (prefix,))


def verify(prefix: str, address: Address, *, opening_in: int | None = None) -> Query:
    """Ask for a namespace's latest checkpoint id, in the shortest way.

    With `opening_in`, its partition, open the thread too, if it is closed.
    """
    owner = (prefix, address.thread_id)
    where = (address.thread_id, address.checkpoint_ns)
    if opening_in is None:
        return Query(_VERIFY[False], (*owner, *where * 3), short=True)
    return Query(_VERIFY[True], (*owner, prefix, str(opening_in), *owner, *where * 3), short=True)


def read_verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Read the answer to `verify`."""
    row = rows[0]
    return Verdict(row["checkpoint_id"], row["parent_checkpoint_id"], row["writes"], row["orphans"], row["replay"])


def latest(prefix: str, address: Address, *, opening_in: int | None = None) -> Query:
    """Read a namespace's latest checkpoint and, if that is cheap, the heads of all namespaces.

    With `opening_in`, open the thread, as `verify` does: a run begins, for which the heads are worth their price.
    The answer is one state of Postgres, from before the opening.
    """
    owner = (prefix, address.thread_id)
    thread = address.thread_id
    where = (thread, address.checkpoint_ns)
    if opening_in is None:
        return Query(_LATEST, (*owner, thread, *where), short=True)
    params = (*owner, thread, thread, prefix, str(opening_in), *owner, *where)
    return Query(_LATEST_OPENING, params, short=True)


def is_whole(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the answer to `latest` is all there is: the thread was not open (`threads.py`) at that moment."""
    return rows[0]["replay"] is None


def read_latest(rows: Sequence[Mapping[str, Any]]) -> tuple[Snapshot | None, list[tuple[str, str]] | None]:
    """Read the answer to `latest`: the checkpoint, and the heads unless there are too many to be known."""
    row = rows[0]
    found = from_row(row) if row["checkpoint_id"] is not None else None
    if "heads" in row:
        heads = [(ns, checkpoint_id) for ns, checkpoint_id in row["heads"] or ()]
        return found, heads if len(heads) <= NAMESPACES_LIMIT else None
    if row["last_ns"] is None:
        return found, []
    # No other namespace sorts before the root's, the empty one: if it is the last, it is the only one.
    is_root_alone = row["last_ns"] == ""
    return found, [("", found.checkpoint_id)] if found is not None and is_root_alone else None


def one(address: Address, checkpoint_id: str) -> Query:
    """Read a checkpoint by its id."""
    return Query(_ONE, (address.thread_id, address.checkpoint_ns, checkpoint_id))


def read_one(rows: Sequence[Mapping[str, Any]]) -> Snapshot | None:
    """Read the answer to `one`."""
    return from_row(rows[0]) if rows else None


def exists(address: Address, checkpoint_id: str) -> Query:
    """Ask whether there is a checkpoint of this id."""
    sql = """
    SELECT EXISTS (SELECT FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s) AS found
    """
    return Query(sql, (address.thread_id, address.checkpoint_ns, checkpoint_id))


def parts(address: Address, checkpoint_id: str, refs: Sequence[str]) -> Query:
    """Read blobs by ref and all pending writes of a checkpoint whose row need not be there yet."""
    pairs = [ref.split("\0") for ref in refs]
    where = (address.thread_id, address.checkpoint_ns)
    return Query(_PARTS, ([p[0] for p in pairs], [p[1] for p in pairs], *where, *where, checkpoint_id))


def read_parts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Blob], list[Write]]:
    """Read the answer to `parts`."""
    row = rows[0]
    blobs = [Blob(c.decode(), v.decode(), t.decode(), data) for c, v, t, data in row["blobs"] or ()]
    writes = [
        Write(task.decode(), int(idx), channel.decode(), kind.decode(), path.decode(), data, overwrite=False)
        for task, channel, kind, data, path, idx in row["writes"] or ()
    ]
    return blobs, writes


def sends(thread_id: str, checkpoint_ids: Sequence[str]) -> Query:
    """Read the pending sends of checkpoints from before version 4."""
    return Query(_SENDS, (thread_id, list(checkpoint_ids)))


def read_sends(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Write]]:
    """Read the answer to `sends`: writes by checkpoint id."""
    found: dict[str, list[Write]] = {}
    for r in rows:
        write = Write(r["task_id"], r["idx"], TASKS, r["type"], r["task_path"], r["blob"], overwrite=False)
        found.setdefault(r["checkpoint_id"], []).append(write)
    return found
