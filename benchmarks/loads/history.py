"""Threads of different length: `put`, hot `get_tuple`, and `list(limit=10)`.

The long histories are made by one statement for each table, which continues a thread of one checkpoint: so it takes
seconds, and the rows look as the savers write them. Only savers on Postgres can be given a history in this way. Each
checkpoint of it has a row, a small blob and a write. At each length there is a thread for each turn and contender,
except for the longest, of which each contender has one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

from benchmarks.contenders import OURS, POOLED, STOCK
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from benchmarks.lab import Lab, Lane

LATEST = 10
_LONG = 1_000

# Ids as LangGraph's `uuid6` makes them sort as their text does; these are all older than any that is made now.
_ID = "'1e000000-0000-6000-8000-' || lpad(i::text, 12, '0')"
_VERSION = "lpad(i::text, 32, '0') || '.0'"

_ROWS = f"""
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata)
SELECT thread_id, checkpoint_ns, {_ID}, CASE WHEN i > 1 THEN {_ID.replace("i::", "(i - 1)::")} END, type,
    checkpoint || jsonb_build_object(
        'id', {_ID},
        'channel_versions', jsonb_build_object('messages', {_VERSION}),
        'versions_seen', jsonb_build_object('model', jsonb_build_object('messages', {_VERSION}))
    ),
    metadata || jsonb_build_object('step', i)
FROM checkpoints, generate_series(1, %(length)s) AS i WHERE thread_id = %(thread)s
"""
_BLOBS = f"""
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT thread_id, checkpoint_ns, channel, {_VERSION}, type, blob
FROM checkpoint_blobs, generate_series(1, %(length)s) AS i WHERE thread_id = %(thread)s
"""
_WRITES = f"""
INSERT INTO checkpoint_writes
    (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob, task_path)
SELECT thread_id, checkpoint_ns, {_ID}, task_id, idx, channel, type, blob, task_path
FROM checkpoint_writes, generate_series(1, %(length)s) AS i WHERE thread_id = %(thread)s
"""
# The first one was only the pattern.
_PATTERN = (
    "DELETE FROM checkpoints WHERE thread_id = %(thread)s AND checkpoint_id = %(id)s",
    "DELETE FROM checkpoint_writes WHERE thread_id = %(thread)s AND checkpoint_id = %(id)s",
)


async def run(lab: Lab) -> None:
    """Measure all lengths in turns."""
    lab.say(f"histories of {', '.join(f'{length:,}' for length in lab.scale.histories)} checkpoints")
    with lab.servers.place() as place:
        async with lab.lanes("history", place, [OURS, STOCK, POOLED], "sync") as lanes:
            with psycopg.connect(place.postgres_uri, autocommit=True) as conn, lab.stock(place) as stock:
                threads: dict[tuple[str, int], list[str]] = {}
                for lane in lanes:
                    for length in lab.scale.histories:
                        count = 1 if length > _LONG else lab.scale.history_rounds + 1
                        names = [place.thread() for _ in range(count)]
                        for name in names:
                            await _make(conn, Run(stock, name, messages(250)), length)
                        threads[lane.key, length] = names
                conn.execute("VACUUM (ANALYZE) checkpoints, checkpoint_blobs, checkpoint_writes")
            turn = partial(_turn, lab, threads)
            await lab.warm_up("history", lanes, turn)
            await lab.take_turns("history", lanes, lab.scale.history_rounds, turn)


async def _make(conn: psycopg.Connection[Any], pattern: Run, length: int) -> None:
    await pattern.put_next()
    await pattern.put_writes()
    given = {
        "thread": pattern.thread_id,
        "length": length,
        "id": pattern.config["configurable"]["checkpoint_id"],
    }
    for statement in (_ROWS, _BLOBS, _WRITES, *_PATTERN):
        conn.execute(statement.encode(), given)


async def _turn(lab: Lab, threads: dict[tuple[str, int], list[str]], lane: Lane) -> None:
    for length in lab.scale.histories:
        names = threads[lane.key, length]
        name = names.pop() if len(names) > 1 else names[0]
        one = Run(lane.face, name, messages())
        found = await one.face.get_tuple(one.here)
        one.config, one.step = found.config, found.metadata["step"]
        one.version = found.checkpoint["channel_versions"]["messages"]
        for number in range(lab.scale.steps):
            checkpoint = one.next_checkpoint()
            call = partial(one.put, *checkpoint)
            if number == 0:  # the first one after a cold read brings more; it is not a hot thread yet
                await call()
                continue
            await lab.timed("history, put", lane.key, call, length)
            await lab.timed("history, get_tuple", lane.key, one.get_tuple, length)
        await lane.face.settle()
        await lab.timed("history, list", lane.key, partial(one.face.latest, one.here, LATEST), length)
