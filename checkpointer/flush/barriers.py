"""Operations that change threads as a whole: delete, copy, prune, delete the checkpoints of runs.

Not here: who runs them (the flusher's thread, `operations.py`). Each is a *barrier*: it flushes what it needs, holds
the partitions' locks while it changes Postgres, so that nothing of these threads is flushed meanwhile, and makes Redis
forget what it knew afterwards. Locks are taken in ascending order.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.postgres.base import (
    PRUNE_BLOBS_SQL,
    PRUNE_CHECKPOINTS_SQL,
    PRUNE_DELETE_THREADS_SQL,
    PRUNE_HEADS_SQL,
    PRUNE_PARENTS_SQL,
    PRUNE_REFERENCED_BLOBS_SQL,
    PRUNE_SUBGRAPH_CALLS_SQL,
    PRUNE_UNKEPT_SQL,
    PRUNE_WRITES_SQL,
)

from checkpointer.errors import FlushIncompleteError
from checkpointer.flush import poison
from checkpointer.flush.session import LockedElsewhereError, Progress
from checkpointer.records import Address
from checkpointer.store import delta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from psycopg import Cursor
    from psycopg.rows import DictRow

    from checkpointer.flush.flusher import Flusher
    from checkpointer.flush.session import Session

_COPY = (
    """
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT %s, checkpoint_ns, channel, version, type, blob FROM checkpoint_blobs WHERE thread_id = %s
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO checkpoint_writes
        (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob)
    SELECT %s, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob
    FROM checkpoint_writes WHERE thread_id = %s
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO checkpoints
        (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata)
    SELECT %s, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata
    FROM checkpoints WHERE thread_id = %s
    ON CONFLICT DO NOTHING
    """,
)

_OF_RUNS = """
SELECT thread_id, checkpoint_ns, array_agg(checkpoint_id) AS ids FROM checkpoints
WHERE metadata ->> 'run_id' = ANY(%s) GROUP BY thread_id, checkpoint_ns ORDER BY thread_id, checkpoint_ns
"""

_DELETE_CHECKPOINTS = """
WITH deleted AS (
    DELETE FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s)
    RETURNING checkpoint -> 'channel_versions' AS versions
)
SELECT DISTINCT v.key AS channel, v.value AS version
FROM deleted CROSS JOIN LATERAL jsonb_each_text(deleted.versions) AS v
"""

# Counters stand in the metadata of every checkpoint whose delta channels have writes since their snapshot.
_DELTA_CHANNELS = """
SELECT metadata -> 'counters_since_delta_snapshot' AS counters, metadata ? 'delta_writes_versioned' AS foreign_writes,
    checkpoint -> 'channel_versions' AS versions
FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s
"""


def delete_threads(session: Session, flusher: Flusher, threads: Sequence[str], wait: float) -> None:
    """Delete threads; whatever is in flight of them, up to now, stays deleted.

    Raises:
        TierUnavailableError: A server cannot be reached. Deleting again is safe.
    """
    partition_of = session.commands.layout.partition_of
    with _holding(session, threads, wait) as cur:
        # Under the locks: nothing of these threads can be flushed between this and the commit.
        now = session.sequences({partition_of(thread) for thread in threads})
        sequences = [now[partition_of(thread)] for thread in threads]
        latest = session.bury(threads, sequences, cur)
        for sql in PRUNE_DELETE_THREADS_SQL:
            cur.execute(sql.encode(), (list(threads),))
        poison.delete(cur, session.options.prefix, threads)
    drops = [session.commands.drop(t, upto, latest[t]) for t, upto in zip(threads, sequences, strict=True)]
    session.pipeline(drops)
    for thread, upto in zip(threads, sequences, strict=True):
        flusher.ledger.unpin(thread)
        flusher.ledger.paid(thread, upto)


def copy_thread(session: Session, flusher: Flusher, source: str, target: str, wait: float) -> None:
    """Copy all that was saved of a thread so far to another one.

    Raises:
        FlushIncompleteError: The source could not be flushed.
        TierUnavailableError: A server cannot be reached.
    """
    flush_first(session, flusher, [source, target], wait)
    with _holding(session, [source, target], wait) as cur:
        for sql in _COPY:
            cur.execute(sql.encode(), (target, source))
    forget_clean(session, [target])


def prune_to_latest(session: Session, flusher: Flusher, threads: Sequence[str], wait: float) -> None:
    """Keep the latest checkpoint of each namespace, and what its delta channels need; delete the rest.

    Raises:
        FlushIncompleteError: A thread could not be flushed.
        TierUnavailableError: A server cannot be reached.
    """
    flush_first(session, flusher, threads, wait)
    for thread in threads:
        with _holding(session, [thread], wait) as cur:
            _keep_latest(cur, thread)
        forget_clean(session, [thread])


def _keep_latest(cur: Cursor[DictRow], thread: str) -> None:
    heads = _rows(cur, PRUNE_HEADS_SQL, (thread,) * 4)
    kept = {h["checkpoint_ns"]: [i for i in (h["head"], h["sends_parent"]) if i] for h in heads}
    # A subgraph call's namespace ends in its task's id after a ":"; it goes with the root checkpoint that it
    # was started from, once that one is saved.
    calls = {
        h["checkpoint_ns"]
        for h in heads
        if ":" in h["checkpoint_ns"] and h["root_saved"] and h["root"] not in kept.get("", ())
    }
    if calls:
        for sql in PRUNE_SUBGRAPH_CALLS_SQL:
            cur.execute(sql.encode(), (thread, list(calls)), prepare=False)
    for ns, head_ids in kept.items():
        if ns in calls:
            continue
        ids = head_ids + _delta_ancestors(cur, Address(thread, ns), head_ids[0])
        unkept = [r["checkpoint_id"] for r in _rows(cur, PRUNE_UNKEPT_SQL, (thread, ns, ids))]
        if unkept:
            cur.execute(PRUNE_WRITES_SQL.encode(), (thread, ns, unkept), prepare=False)
        freed = _rows(cur, PRUNE_CHECKPOINTS_SQL, (thread, ns, ids))
        cur.execute(PRUNE_PARENTS_SQL.encode(), (thread, ns, ids, ids), prepare=False)
        _delete_garbage(cur, thread, ns, freed)


def _delta_ancestors(cur: Cursor[DictRow], address: Address, head: str) -> list[str]:
    """Return the ancestors that a head's delta channels are rebuilt from."""
    row = _rows(cur, _DELTA_CHANNELS, (address.thread_id, address.checkpoint_ns, head))[0]
    # LangGraph.js marks its threads instead of counting; every channel may be a delta channel there.
    channels = list(row["versions"] if row["foreign_writes"] else row["counters"] or ())
    if not channels:
        return []
    walk = delta.walk(address, head, channels)
    try:
        query = next(walk)
        while True:
            query = walk.send(_rows(cur, query.sql, query.params))
    except StopIteration as stop:
        found: delta.Walk = stop.value
    return list(dict.fromkeys(i for chain in found.chain.values() for i in chain))


def delete_for_runs(session: Session, flusher: Flusher, run_ids: Sequence[str], wait: float) -> None:
    """Delete the checkpoints of runs, with their pending writes and the blobs that no other checkpoint needs.

    Raises:
        FlushIncompleteError: Something could not be flushed.
        TierUnavailableError: A server cannot be reached.
    """
    flush_first(session, flusher, None, wait)
    with _holding(session, [], wait) as cur:
        found = _rows(cur, _OF_RUNS, (list(run_ids),))
    by_thread: dict[str, list[DictRow]] = {}
    for row in found:
        by_thread.setdefault(row["thread_id"], []).append(row)
    for thread, rows in by_thread.items():
        with _holding(session, [thread], wait) as cur:
            for row in rows:
                where = (thread, row["checkpoint_ns"], row["ids"])
                cur.execute(PRUNE_WRITES_SQL.encode(), where, prepare=False)
                freed = _rows(cur, _DELETE_CHECKPOINTS, where)
                _delete_garbage(cur, thread, row["checkpoint_ns"], freed)
        forget_clean(session, [thread])


def _delete_garbage(cur: Cursor[DictRow], thread: str, ns: str, freed: Sequence[Mapping[str, Any]]) -> None:
    if not freed:
        return
    needed = {(r["channel"], r["version"]) for r in _rows(cur, PRUNE_REFERENCED_BLOBS_SQL, (thread, ns))}
    garbage: dict[str, list[str]] = {}
    for r in freed:
        if (r["channel"], r["version"]) not in needed:
            garbage.setdefault(r["channel"], []).append(r["version"])
    for channel, versions in garbage.items():
        cur.execute(PRUNE_BLOBS_SQL.encode(), (thread, ns, channel, versions), prepare=False)


def _rows(cur: Cursor[DictRow], sql: str, params: Sequence[Any]) -> list[DictRow]:
    # Unprepared, so that each statement is planned knowing the size of its arrays.
    return cur.execute(sql.encode(), params, prepare=False).fetchall()


def flush_first(session: Session, flusher: Flusher, threads: Sequence[str] | None, wait: float) -> None:
    """Flush threads, or everything, for an operation that reads Postgres.

    Raises:
        FlushIncompleteError: Something is left in the buffer.
        TierUnavailableError: A server cannot be reached.
    """
    wanted = session.dirty_threads() if threads is None else threads
    progress = Progress()
    flusher.flush_threads(session, wanted, wait, progress)
    left = [thread for thread in dict.fromkeys(wanted) if thread not in progress.done]
    if left:
        letter = next(iter(progress.pinned.values()), None)
        if letter is not None:
            raise FlushIncompleteError(f"{letter.describe()}. Everything is still buffered.")
        raise FlushIncompleteError(
            f"{len(left)} thread(s), {left[0]!r} among them, could not be flushed in time: another worker is at it. "
            "Everything is still buffered; try again."
        )


def forget_clean(session: Session, threads: Iterable[str]) -> None:
    """Make Redis forget what it has of these threads beside what is not flushed."""
    session.pipeline([session.commands.drop(thread, 0) for thread in threads])


@contextlib.contextmanager
def _holding(session: Session, threads: Sequence[str], wait: float) -> Iterator[Cursor[DictRow]]:
    """Hold the threads' partitions in one transaction."""
    try:
        with session.locked(threads, wait) as (cur, *_):
            yield cur
    except LockedElsewhereError as exc:
        raise FlushIncompleteError(
            "Another worker holds the thread's partition, or changed it at the same time; nothing was changed here. "
            "Try again."
        ) from exc
