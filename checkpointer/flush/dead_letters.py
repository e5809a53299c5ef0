"""What an operator does with dead letters: list, show, replay, drop.

Not here: how a record becomes one, and what that does to its thread (`poison.py`).

To *replay* is to try the record again, from Redis, with all that waits behind it; if Redis has lost it, from the
letter's copy. To *drop* is to give the record up, so that the rest of its thread goes on. Both hold the partition's
lock, so of two operators at once the second finds the letter resolved.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from checkpointer.buffer.commands import DirtyBlob, DirtyCheckpoint, DirtyWrite, decode_record
from checkpointer.errors import FlushIncompleteError, TierUnavailableError, UnknownDeadLetterError
from checkpointer.flush import poison
from checkpointer.flush.session import LockedElsewhereError, Progress
from checkpointer.records import thread_text
from checkpointer.sanitize import load_json
from checkpointer.steps import Job, Step
from checkpointer.store.reads import Query

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
    from datetime import datetime

    from langgraph.checkpoint.serde.base import SerializerProtocol

    from checkpointer.flush.flusher import Flusher
    from checkpointer.flush.session import Session

T = TypeVar("T")

_COLUMNS = """
SELECT id, thread_id, checkpoint_ns, checkpoint_id, kind, field, sequence, octet_length(payload) AS size, error_type,
    sqlstate, error_message, created_at, attempts, resolved_at, resolution, resolved_by, event_id
"""

_LIST = f"""{_COLUMNS} FROM checkpoint_dead_letters
WHERE prefix = %s AND (%s::text IS NULL OR thread_id = %s::text) AND (%s OR resolved_at IS NULL)
    AND (%s::bigint IS NULL OR id < %s::bigint)
ORDER BY id DESC LIMIT %s
"""

_SHOW = f"""{_COLUMNS}, payload FROM checkpoint_dead_letters WHERE prefix = %s AND id = %s"""

_BY_ID = f"{_COLUMNS} FROM checkpoint_dead_letters WHERE prefix = %s AND id = ANY(%s) ORDER BY id"

_TO_REPLAY = """
SELECT id, thread_id FROM checkpoint_dead_letters
WHERE prefix = %s AND (%s::bigint IS NULL OR id = %s::bigint) AND (%s::text IS NULL OR thread_id = %s::text)
    AND (resolved_at IS NULL OR %s) ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that Postgres refused.

    Attributes:
        id: Its number.
        thread_id: The thread, which waits behind it until it is resolved.
        checkpoint_ns: The namespace.
        checkpoint_id: The checkpoint that it is, or that a write belongs to; None for a blob.
        kind: `checkpoint`, `blob` (one version of a channel) or `write` (a pending write of a task).
        name: The rest of its name: channel and version of a blob, task and index of a write.
        size: The size of the kept copy in bytes; 0 if none is kept any more.
        error_type: The class of the latest error.
        sqlstate: Its SQLSTATE, if Postgres refused it.
        error_message: Its primary message.
        created_at: When it was first refused.
        attempts: How often it was tried.
        resolved_at: When it was resolved, or None.
        resolution: `replayed`, `dropped` or `deleted` (with its thread).
        resolved_by: Who resolved it, if they said so.
        content: What the record holds, by `show` only.
    """

    id: int
    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str | None
    kind: str
    name: str
    size: int
    error_type: str
    sqlstate: str | None
    error_message: str
    created_at: datetime
    attempts: int
    resolved_at: datetime | None
    resolution: str | None
    resolved_by: str | None
    content: dict[str, Any] | None = None


def listing(prefix: str, thread_id: str | None, limit: int, include_resolved: bool, before: int | None = None) -> Query:
    """Ask for dead letters, the newest first; with `before` only those with a lower number."""
    return Query(_LIST, (prefix, thread_id, thread_id, include_resolved, before, before, limit))


def showing(prefix: str, letter_id: int) -> Query:
    """Ask for one dead letter."""
    return Query(_SHOW, (prefix, letter_id))


def read(row: Mapping[str, Any], serde: SerializerProtocol | None = None) -> DeadLetter:
    """Read a row; with a serializer, its content too."""
    _, _, parts = poison.parse_field(bytes(row["field"]))
    if row["kind"] != "blob":
        parts = parts[1:]  # the checkpoint's id
    return DeadLetter(
        id=row["id"],
        thread_id=row["thread_id"],
        checkpoint_ns=row["checkpoint_ns"],
        checkpoint_id=row["checkpoint_id"],
        kind=row["kind"],
        name=" ".join(parts),
        size=row["size"] or 0,
        error_type=row["error_type"],
        sqlstate=row["sqlstate"],
        error_message=row["error_message"],
        created_at=row["created_at"],
        attempts=row["attempts"],
        resolved_at=row["resolved_at"],
        resolution=row["resolution"],
        resolved_by=row["resolved_by"],
        content=None if serde is None else _content(bytes(row["field"]), row["payload"], serde),
    )


def _content(name: bytes, payload: Any, serde: SerializerProtocol) -> dict[str, Any] | None:
    """Decode as much of a record as can be decoded."""
    if payload is None:
        return None
    record = decode_record(name, bytes(payload))
    if isinstance(record, DirtyCheckpoint):
        row = record.row
        return {
            "parent_checkpoint_id": row.parent_id,
            "checkpoint": _json(row.checkpoint),
            "metadata": _json(row.metadata),
        }
    if isinstance(record, DirtyBlob):
        blob = record.blob
        value = None if blob.data is None else _value(serde, blob.type, blob.data)
        return {"channel": blob.channel, "version": blob.version, "type": blob.type, "value": value}
    if isinstance(record, DirtyWrite):
        write = record.write
        value = _value(serde, write.type, write.data)
        return {"channel": write.channel, "task_path": write.task_path, "type": write.type, "value": value}
    return {"undecodable": type(record.error).__name__, "bytes": repr(bytes(payload[:1000]))}


def _json(text: bytes) -> Any:
    try:
        return load_json(text)
    except ValueError:
        return repr(text)


def _value(serde: SerializerProtocol, kind: str, data: bytes) -> Any:
    try:
        return serde.loads_typed((kind, data))
    except Exception as exc:  # noqa: BLE001 - a serializer may raise anything, and showing goes on
        return f"<{len(data)} bytes that the serializer cannot read: {type(exc).__name__}>"


class DeadLetters:
    """The dead letters of a saver's application: `saver.dead_letters`.

    Args:
        flusher: Flushes what waits behind a letter.
        prefix: The application.
        wait: Seconds to wait for a partition's lock.
        serde: Decodes what a record holds.
        run: Carries an operation's steps out, blocking.
        arun: The same, for asynchronous callers.
    """

    def __init__(
        self,
        flusher: Flusher,
        prefix: str,
        wait: float,
        serde: SerializerProtocol,
        run: Callable[[Generator[Step, Any, Any]], Any],
        arun: Callable[[Generator[Step, Any, Any]], Awaitable[Any]],
    ) -> None:
        self._flusher = flusher
        self._prefix = prefix
        self._wait = wait
        self._serde = serde
        self._run = run
        self._arun = arun

    def list(
        self, thread_id: str | None = None, *, limit: int = 100, include_resolved: bool = False
    ) -> Sequence[DeadLetter]:
        """Return the unresolved dead letters, or all, the newest first.

        Raises:
            StoreUnavailableError: Postgres cannot be reached.
        """
        found: Sequence[DeadLetter] = self._run(self._list(thread_id, limit, include_resolved))
        return found

    async def alist(
        self, thread_id: str | None = None, *, limit: int = 100, include_resolved: bool = False
    ) -> Sequence[DeadLetter]:
        """See `list`."""
        found: Sequence[DeadLetter] = await self._arun(self._list(thread_id, limit, include_resolved))
        return found

    def _list(
        self, thread_id: str | None, limit: int, include_resolved: bool
    ) -> Generator[Step, Any, Sequence[DeadLetter]]:
        thread = None if thread_id is None else thread_text(thread_id)
        rows = yield listing(self._prefix, thread, limit, include_resolved)
        return [read(row) for row in rows]

    def show(self, letter_id: int) -> DeadLetter:
        """Return one dead letter with what its record holds, as far as the serializer can read it.

        Raises:
            UnknownDeadLetterError: There is none with this number.
            StoreUnavailableError: Postgres cannot be reached.
        """
        found: DeadLetter = self._run(self._show(letter_id))
        return found

    async def ashow(self, letter_id: int) -> DeadLetter:
        """See `show`."""
        found: DeadLetter = await self._arun(self._show(letter_id))
        return found

    def _show(self, letter_id: int) -> Generator[Step, Any, DeadLetter]:
        rows = yield showing(self._prefix, letter_id)
        return read(one_of(rows, letter_id), self._serde)

    def replay(
        self, letter_id: int | None = None, *, thread_id: str | None = None, resolved_by: str | None = None
    ) -> Sequence[DeadLetter]:
        """Try dead letters again: one, a thread's, or all unresolved ones.

        What waits behind a letter is flushed with it. A letter that is refused again stays, with the new error.

        Args:
            letter_id: The letter.
            thread_id: The thread.
            resolved_by: Who does it; kept with the letter.

        Returns:
            The letters as they are now: `resolution` tells which are saved.

        Raises:
            UnknownDeadLetterError: There is none with this number.
            FlushIncompleteError: Another worker kept the partition; try again.
            TierUnavailableError: A server cannot be reached; try again.
        """
        found: Sequence[DeadLetter] = self._run(self._replay(letter_id, thread_id, resolved_by))
        return found

    async def areplay(
        self, letter_id: int | None = None, *, thread_id: str | None = None, resolved_by: str | None = None
    ) -> Sequence[DeadLetter]:
        """See `replay`."""
        found: Sequence[DeadLetter] = await self._arun(self._replay(letter_id, thread_id, resolved_by))
        return found

    def _replay(
        self, letter_id: int | None, thread_id: str | None, by: str | None
    ) -> Generator[Step, Any, Sequence[DeadLetter]]:
        thread = None if thread_id is None else thread_text(thread_id)
        rows = yield Query(_TO_REPLAY, (self._prefix, letter_id, letter_id, thread, thread, letter_id is not None))
        if letter_id is not None:
            one_of(rows, letter_id)
        for row in rows:
            yield Job(
                partial(
                    replay, flusher=self._flusher, letter_id=row["id"], thread=row["thread_id"], wait=self._wait, by=by
                )
            )
        rows = yield Query(_BY_ID, (self._prefix, [row["id"] for row in rows]))
        return [read(row) for row in rows]

    def drop(self, letter_id: int, *, resolved_by: str | None = None) -> DeadLetter:
        """Give a record up, so that the rest of its thread is flushed; the letter keeps a copy.

        To drop a checkpoint leaves a hole in its thread's history.

        Returns:
            The letter as it is now; if it was resolved before, nothing was done.

        Raises:
            UnknownDeadLetterError: There is none with this number.
            FlushIncompleteError: Another worker kept the partition; try again.
            TierUnavailableError: A server cannot be reached; try again.
        """
        found: DeadLetter = self._run(self._drop(letter_id, resolved_by))
        return found

    async def adrop(self, letter_id: int, *, resolved_by: str | None = None) -> DeadLetter:
        """See `drop`."""
        found: DeadLetter = await self._arun(self._drop(letter_id, resolved_by))
        return found

    def _drop(self, letter_id: int, by: str | None) -> Generator[Step, Any, DeadLetter]:
        rows = yield Query(_BY_ID, (self._prefix, [letter_id]))
        thread = one_of(rows, letter_id)["thread_id"]
        yield Job(partial(drop, flusher=self._flusher, letter_id=letter_id, thread=thread, wait=self._wait, by=by))
        rows = yield Query(_BY_ID, (self._prefix, [letter_id]))
        return read(one_of(rows, letter_id))


def one_of(rows: Sequence[Mapping[str, Any]], letter_id: int) -> Mapping[str, Any]:
    """Return the only row.

    Raises:
        UnknownDeadLetterError: There is none.
    """
    if not rows:
        raise UnknownDeadLetterError(
            f"There is no dead letter {letter_id}: `checkpointer dead-letters list` shows all."
        )
    return rows[0]


def replay(session: Session, flusher: Flusher, letter_id: int, thread: str, wait: float, by: str | None) -> None:
    """Flush a pinned thread, its dead letter included; in the flusher's thread.

    Raises:
        FlushIncompleteError: Another worker kept the partition.
        TierUnavailableError: A server cannot be reached.
    """
    progress = Progress()
    flusher.flush_threads(session, [thread], wait, progress, replays={letter_id: by})
    if thread in progress.locked:
        raise _held(thread)


def drop(session: Session, flusher: Flusher, letter_id: int, thread: str, wait: float, by: str | None) -> None:
    """Take a dead letter's record out of Redis, and flush what waited behind it; in the flusher's thread.

    Raises:
        FlushIncompleteError: Another worker kept the partition.
        TierUnavailableError: A server cannot be reached.
    """
    commands = session.commands
    try:
        with session.locked([thread], wait) as (cur, *_):
            letter = poison.unresolved(cur, session.options.prefix, [thread]).get(thread)
            if letter is None or letter.id != letter_id:
                return
            poison.resolve(cur, letter.id, "dropped", by)
            # Before the commit: if that fails, the letter still has the record, and the thread is still pinned.
            session.pipeline([commands.discard(thread, letter.field, letter.sequence), commands.drop(thread, 0)])
    except LockedElsewhereError as exc:
        raise _held(thread) from exc
    # The drop stands; what waited is flushed later if not now.
    with contextlib.suppress(TierUnavailableError):
        flusher.flush_threads(session, [thread], wait, Progress(dropped=[letter]))


def _held(thread: str) -> FlushIncompleteError:
    return FlushIncompleteError(
        f"Another worker holds the partition of thread {thread!r}; nothing was changed here. Try again."
    )
