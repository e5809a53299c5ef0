"""Makes poison: records that Postgres refuses for what they hold, wherever the word stands in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

if TYPE_CHECKING:
    import psycopg

WORD = "arsenic"

_TRIGGERS = f"""
CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'no poison here' USING ERRCODE = '{{sqlstate}}', DETAIL = 'it held {WORD}'; END $$;
CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON checkpoints FOR EACH ROW
    WHEN (NEW.metadata ->> 'source' = '{WORD}') EXECUTE FUNCTION refuse();
CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON checkpoint_blobs FOR EACH ROW
    WHEN (position('{WORD}'::bytea IN NEW.blob) > 0) EXECUTE FUNCTION refuse();
CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON checkpoint_writes FOR EACH ROW
    WHEN (position('{WORD}'::bytea IN NEW.blob) > 0) EXECUTE FUNCTION refuse();
"""


def forbid(conn: psycopg.Connection[Any], sqlstate: str = "P0001") -> None:
    """Have Postgres refuse every row with the word."""
    conn.execute(_TRIGGERS.format(sqlstate=sqlstate).encode())


def allow(conn: psycopg.Connection[Any]) -> None:
    """Have Postgres take the word again."""
    for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
        conn.execute(f"DROP TRIGGER refuse ON {table}".encode())


def config(thread: str, checkpoint_id: str | None = None) -> Any:
    found = {"thread_id": thread, "checkpoint_ns": ""}
    return {"configurable": found | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def put_step(saver: Any, thread: str, step: int, parent: str | None = None, poison: str = "") -> str:
    """Put a checkpoint with one new blob and one pending write; `poison` says which of the three is."""

    def value(kind: str) -> list[Any]:
        return [WORD if poison == kind else "water", step]

    checkpoint = empty_checkpoint()
    checkpoint["id"] = str(uuid6(clock_seq=step))
    checkpoint["channel_values"] = {"xs": value("blob")}
    checkpoint["channel_versions"] = {"xs": step + 1}
    metadata: Any = {"source": WORD if poison == "checkpoint" else "loop", "step": step, "run_id": "run-1"}
    saved = saver.put(config(thread, parent), checkpoint, metadata, {"xs": step + 1})
    saver.put_writes(saved, [("xs", value("write"))], "task")
    checkpoint_id: str = saved["configurable"]["checkpoint_id"]
    return checkpoint_id


def put_steps(saver: Any, thread: str, count: int, poison: dict[int, str] | None = None) -> list[str]:
    """Put a chain of checkpoints; `poison` says which steps are, and what of them."""
    ids: list[str] = []
    for step in range(count):
        ids.append(put_step(saver, thread, step, ids[-1] if ids else None, (poison or {}).get(step, "")))
    return ids


def saved(conn: psycopg.Connection[Any], thread: str) -> list[str]:
    """Return the ids of a thread's checkpoints in Postgres, in order."""
    rows = conn.execute("SELECT checkpoint_id FROM checkpoints WHERE thread_id = %s ORDER BY 1", (thread,)).fetchall()
    return [row[0] for row in rows]


def values(saver: Any, thread: str, ids: list[str]) -> list[Any]:
    """Read checkpoints by their ids: what is in the channel, and in the pending writes."""
    found = [saver.get_tuple(config(thread, each)) for each in ids]
    return [each and (each.checkpoint["channel_values"].get("xs"), each.pending_writes) for each in found]
