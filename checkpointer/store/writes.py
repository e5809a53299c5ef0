"""The bulk statements that bring records into LangGraph's tables.

Not here: the transaction around them (`flush/session.py`). They mean what LangGraph's own statements mean: blobs and
ordinary writes are left alone if they exist, checkpoints and overwriting writes are replaced, and a
replaced checkpoint keeps its parent. Rows go in primary-key order, so that two writers cannot deadlock.

Many rows go by COPY into the tables themselves, which costs the server much less than an upsert. COPY does not know
ON CONFLICT, so it is only for rows that are not expected to be there, and a hope: if Postgres refuses it, for whatever
reason, nothing has been written, and `run` with the upserts says what is true. It needs no prepared statement and no
temporary table, so it works behind a pooler too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from checkpointer.sanitize import Change, sanitize_json_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Cursor

    from checkpointer.records import Address, Blob, CheckpointRow, Write

_BLOBS = b"""
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bytea[])
ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING
"""

_CHECKPOINTS = b"""
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
SELECT r.thread_id, r.ns, r.id, r.parent,
    convert_from(r.checkpoint, 'UTF8')::jsonb, convert_from(r.metadata, 'UTF8')::jsonb
FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::bytea[], %b::bytea[])
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

_COPY_BLOBS = b"""
COPY checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob) FROM STDIN (FORMAT BINARY)
"""
_COPY_CHECKPOINTS = b"""
COPY checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
FROM STDIN (FORMAT BINARY)
"""
_COPY_WRITES = b"""
COPY checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob)
FROM STDIN (FORMAT BINARY)
"""

# Below so many rows of a table the second round trip that COPY takes costs more than the upsert.
_COPY_FROM = 100
# Postgres works on the first rows while the next ones are packed; no piece holds other threads up for long.
_PIECE_BYTES = 64 * 1024

# What COPY's binary format begins and ends with, and what stands for NULL and before the text of a JSONB value.
_COPY_HEAD = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"
_JSONB_VERSION = b"\1"
_length = struct.Struct(">i").pack
_count = struct.Struct(">h").pack
_integer = struct.Struct(">ii").pack


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
        checkpoint, found = sanitize_json_text(row.checkpoint)
        metadata, found_too = sanitize_json_text(row.metadata)
        if found or found_too:
            self.changes += [(address, change) for change in (*found, *found_too)]
        rows = self.older_checkpoints if older else self.checkpoints
        rows.append((address.thread_id, address.checkpoint_ns, row.checkpoint_id, row.parent_id, checkpoint, metadata))

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

    @property
    def is_for_copy(self) -> bool:
        """Whether there are enough rows for `copy` to be worth while."""
        return max(len(self.blobs), len(self.first_stays), len(self.checkpoints)) >= _COPY_FROM

    def run(self, cur: Cursor[Any]) -> None:
        """Bring the rows into the tables: what a checkpoint needs before the checkpoint."""
        self._write(cur, copies=False)

    def copy(self, cur: Cursor[Any]) -> None:
        """As `run`, the quick way for many rows.

        Raises:
            psycopg.Error: Also if a row is in its table already; the caller goes back to before, and calls `run`.
        """
        self._write(cur, copies=True)

    def _write(self, cur: Cursor[Any], *, copies: bool) -> None:
        for statement, copy, rows, key in (
            (_BLOBS, _COPY_BLOBS, self.blobs, 4),
            (_FIRST_STAYS, _COPY_WRITES, self.first_stays, 5),
            (_LAST_WINS, None, self.last_wins, 5),
            (_OLDER_CHECKPOINTS, None, self.older_checkpoints, 3),
            (_LATEST_CHECKPOINTS, _COPY_CHECKPOINTS, self.checkpoints, 3),
        ):
            rows.sort(key=itemgetter(slice(key)))
            if copies and copy is not None and len(rows) >= _COPY_FROM:
                with cur.copy(copy) as copying:
                    for piece in _packed(rows, is_json=copy is _COPY_CHECKPOINTS):
                        copying.write(piece)
            elif rows:
                cur.execute(statement, _columns(rows))


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _packed(rows: Sequence[tuple[Any, ...]], *, is_json: bool) -> Iterator[bytes]:
    """Yield rows in COPY's binary format, in pieces; bytes are JSON texts, or they are BYTEA."""
    head = _count(len(rows[0]))
    before, extra = (_JSONB_VERSION, 1) if is_json else (b"", 0)
    parts = [_COPY_HEAD]
    add = parts.append
    size = 0
    thread_id = ns = beginning = None
    for row in rows:
        # In primary-key order, most rows begin as the one before does.
        if row[0] != thread_id or row[1] != ns or beginning is None:
            thread_id, ns, *_ = row
            beginning = b"".join((head, *(_length(len(text)) + text for text in (thread_id.encode(), ns.encode()))))
        add(beginning)
        for value in row[2:]:
            if type(value) is str:
                text = value.encode()
                add(_length(len(text)))
                add(text)
            elif type(value) is bytes:
                add(_length(len(value) + extra))
                add(before)
                add(value)
                size += len(value)
            elif value is None:
                add(_NULL)
            else:
                add(_integer(4, value))
        if size >= _PIECE_BYTES:
            yield b"".join(parts)
            parts.clear()
            size = 0
    add(_COPY_END)
    yield b"".join(parts)
