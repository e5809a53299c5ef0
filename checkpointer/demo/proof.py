"""Whether all that was acknowledged is in Postgres, and is what it should be: asked of Postgres, not of the saver.

States and histories are read with LangGraph's own `PostgresSaver`, and states compared with what the fake model's rule
says. Not here: what was acknowledged (`acknowledged.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer.demo.agents import config_of
from checkpointer.options import BufferOptions
from checkpointer.whereabouts import Buffer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from checkpointer.demo.acknowledged import Acknowledged, Checkpoint, Write

__all__ = ["Proof", "prove"]

_WRITES = """
SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, idx FROM checkpoint_writes WHERE thread_id = ANY(%s)
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found; true if nothing is missing, nothing is wrong, and nothing waits.

    Attributes:
        threads: Of which anything was acknowledged.
        checkpoints: How many were acknowledged.
        writes: How many pending writes were acknowledged.
        missing_checkpoints: Those of them that Postgres does not have.
        missing_writes: Those of them that Postgres does not have.
        wrong_states: Threads whose last state is not what it should be.
        waiting_threads: Of how many threads the buffer holds something; None if that could not be asked.
    """

    threads: int
    checkpoints: int
    writes: int
    missing_checkpoints: frozenset[Checkpoint]
    missing_writes: frozenset[Write]
    wrong_states: tuple[str, ...]
    waiting_threads: int | None

    def __bool__(self) -> bool:
        """Whether all is well."""
        missing = self.missing_checkpoints or self.missing_writes or self.wrong_states
        return not missing and self.waiting_threads == 0


def prove(
    postgres_uri: str,
    redis_url: str,
    acknowledged: Acknowledged,
    expected: Mapping[str, Mapping[str, Any]],
    *,
    options: BufferOptions = BufferOptions(),  # noqa: B008 - frozen
) -> Proof:
    """Look everything up.

    Args:
        postgres_uri: Where Postgres is.
        redis_url: Where Redis is.
        acknowledged: What savers have acknowledged.
        expected: For each thread what its last state has to be, as far as it is known beforehand; messages as
            pairs of kind and content.
        options: The savers'.
    """
    told = acknowledged.copy()
    threads = told.thread_ids()
    checkpoints: set[Checkpoint] = set()
    wrong = []
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        for thread in threads:
            for found in stock.list(config_of(thread)):
                place = found.config["configurable"]
                checkpoints.add((thread, place["checkpoint_ns"], place["checkpoint_id"]))
        for thread, values in expected.items():
            latest = stock.get_tuple(config_of(thread))
            stored = latest.checkpoint["channel_values"] if latest else {}
            if {name: comparable(stored.get(name)) for name in values} != values:
                wrong.append(thread)
    with psycopg.connect(postgres_uri) as conn:
        writes: set[Write] = {(*row,) for row in conn.execute(_WRITES, (threads,)).fetchall()}
    with Buffer(redis_url, options.key_prefix, options.partitions) as buffer:
        waiting = buffer.waiting_threads()
    return Proof(
        threads=len(threads),
        checkpoints=len(told.checkpoints),
        writes=len(told.writes),
        missing_checkpoints=frozenset(told.checkpoints - checkpoints),
        missing_writes=frozenset(told.writes - writes),
        wrong_states=tuple(wrong),
        waiting_threads=waiting,
    )


def comparable(value: Any) -> Any:
    """Return messages as pairs of kind and content, and anything else as it is."""
    if isinstance(value, list) and value and all(hasattr(item, "content") for item in value):
        return [(message.type, message.content) for message in value]
    return value
