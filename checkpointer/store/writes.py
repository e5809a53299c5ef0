"""The bulk statements that bring records into LangGraph's tables.

Not here: the transaction around them (`flush/session.py`). They mean what LangGraph's own statements mean: blobs and
ordinary writes are left alone if they exist, checkpoints and overwriting writes are replaced, and a
replaced checkpoint keeps its parent. Rows go in primary-key order, so that two writers cannot deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from checkpointer.sanitize import Change, sanitize_json_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Cursor

    from checkpointer.records import Address, Blob, CheckpointRow, Write

_BLOBS = b"""
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bytea[])
ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING
"""

_CHECKPOINTS = b"""
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
SELECT r.thread_id, r.ns, r.id, r.parent, r.checkpoint::jsonb, r.metadata::jsonb
FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[])
    AS r (thread_id, ns, id, parent, checkpoint, metadata)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id)
"""
_LATEST_CHECKPOINTS = _CHECKPOINTS + b"DO UPDATE SET checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata"
_OLDER_CHECKPOINTS = _CHECKPOINTS + b"DO NOTHING"

_WRITES = b"""
INSERT INTO checkpoint_writes
    (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::int[],
                     %b::text[], %b::text[], %b::text[], %b::bytea[])
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx)
"""
_FIRST_STAYS = _WRITES + b"DO NOTHING"
_LAST_WINS = _WRITES + b"DO UPDATE SET channel = EXCLUDED.channel, type = EXCLUDED.type, blob = EXCLUDED.blob"


@dataclass(slots=True)
class Batch:
    """Rows for one transaction; a primary key may occur once.

    An *older* row may be older than what the table has, and replaces nothing.
    """

    blobs: list[tuple[Any, ...]] = field(default_factory=list)
    checkpoints: list[tuple[Any, ...]] = field(default_factory=list)
    older_checkpoints: list[tuple[Any, ...]] = field(default_factory=list)
    first_stays: list[tuple[Any, ...]] = field(default_factory=list)
    last_wins: list[tuple[Any, ...]] = field(default_factory=list)
    changes: list[tuple[Address, Change]] = field(default_factory=list)

    def add_blob(self, address: Address, blob: Blob) -> None:
        """Add one version of a channel."""
        self.blobs.append((address.thread_id, address.checkpoint_ns, blob.channel, blob.version, blob.type, blob.data))

    def add_checkpoint(self, address: Address, row: CheckpointRow, *, older: bool = False) -> None:
        """Add a checkpoint; what JSONB would refuse is taken out once more, and noted."""
        texts = []
        for text in (row.checkpoint, row.metadata):
            clean, found = sanitize_json_text(text)
            texts.append(clean.decode())
            self.changes += [(address, change) for change in found]
        rows = self.older_checkpoints if older else self.checkpoints
        rows.append((address.thread_id, address.checkpoint_ns, row.checkpoint_id, row.parent_id, *texts))

    def add_write(self, address: Address, checkpoint_id: str, write: Write, *, older: bool = False) -> None:
        """Add a pending write."""
        (self.last_wins if write.overwrite and not older else self.first_stays).append(
            (
                address.thread_id,
                address.checkpoint_ns,
                checkpoint_id,
                write.task_id,
                write.idx,
                write.task_path,
                write.channel,
                write.type,
                write.data,
            )
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many checkpoints, blobs and writes there are."""
        checkpoints = len(self.checkpoints) + len(self.older_checkpoints)
        return checkpoints, len(self.blobs), len(self.first_stays) + len(self.last_wins)

    def run(self, cur: Cursor[Any]) -> None:
        """Bring the rows into the tables: what a checkpoint needs before the checkpoint."""
        for statement, rows, key in (
            (_BLOBS, self.blobs, 4),
            (_FIRST_STAYS, self.first_stays, 5),
            (_LAST_WINS, self.last_wins, 5),
            (_OLDER_CHECKPOINTS, self.older_checkpoints, 3),
            (_LATEST_CHECKPOINTS, self.checkpoints, 3),
        ):
            if rows:
                cur.execute(statement, _columns(sorted(rows, key=itemgetter(slice(key)))))


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]
