"""Poison: records that Postgres refuses for what they are. They are found by halving and noted as dead letters.

Not here: what an operator does with a dead letter (`dead_letters.py`), and errors that concern every thread, such as a
missing right: those are raised, reported and tried again.

Words: a *dead letter* is a row of `checkpoint_dead_letters`: the record, and why it was refused. An unresolved one
*pins* its thread: the record and all that came after it stay in Redis, so that nothing of the thread is flushed over
the gap. Every worker reads that under the partition's lock. The mark that a pinned thread has in Redis only keeps it
from counting as old, so it may be late, or stand for too long: whoever finds it looks into the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import psycopg

from checkpointer.buffer.commands import DirtyCheckpoint
from checkpointer.errors import CheckpointerError, UnserializableValueError
from checkpointer.events import CheckpointEvent, ErrorInfo, describe_error, uuid7
from checkpointer.sanitize import load_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from uuid import UUID

    from psycopg import Cursor
    from psycopg.rows import DictRow

    from checkpointer.buffer.commands import Drained
    from checkpointer.flush.ledger import Debt
    from checkpointer.store.writes import Batch

Kind = Literal["checkpoint", "blob", "write"]

_KINDS: dict[str, Kind] = {"c": "checkpoint", "b": "blob"}

# Cardinality, data, integrity constraint, WITH CHECK OPTION, program limit, RAISE in a trigger.
_POISONOUS = frozenset({"21", "22", "23", "44", "54", "P0"})

UNRESOLVED = """
SELECT id, thread_id, checkpoint_ns, checkpoint_id, kind, field, sequence, error_type, sqlstate, error_message,
    event_id, attempts
FROM checkpoint_dead_letters WHERE prefix = %s AND thread_id = ANY(%s::text[]) AND resolved_at IS NULL
"""
"""The dead letters that pin threads; parameters: prefix, threads."""

_ADD = """
INSERT INTO checkpoint_dead_letters (prefix, thread_id, checkpoint_ns, checkpoint_id, kind, field, sequence, payload,
    error_type, sqlstate, error_message, event_id)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING id
"""

_AGAIN = """
UPDATE checkpoint_dead_letters
SET attempts = attempts + 1, sequence = %s, payload = %s, error_type = %s, sqlstate = %s, error_message = %s
WHERE id = %s
"""

_RESOLVE = """
UPDATE checkpoint_dead_letters SET resolved_at = now(), resolution = %s, resolved_by = %s,
    payload = CASE WHEN %s THEN payload END
WHERE id = %s AND resolved_at IS NULL
"""

_DELETE = """
UPDATE checkpoint_dead_letters SET payload = NULL, resolved_at = coalesce(resolved_at, now()),
    resolution = coalesce(resolution, 'deleted')
WHERE prefix = %s AND thread_id = ANY(%s)
"""


class DamagedRecordError(CheckpointerError):
    """A record in Redis cannot be read."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The first record of a thread that Postgres refuses: its position among those drained, and the error."""

    index: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Letter:
    """An unresolved dead letter, as far as the flusher needs it.

    Attributes:
        id: Its number.
        thread_id: The pinned thread.
        checkpoint_ns: The record's namespace.
        checkpoint_id: The checkpoint that the record is, or belongs to; a blob belongs to none.
        kind: `checkpoint`, `blob` or `write`.
        field: The record's name in Redis.
        sequence: Its sequence number.
        error: Why it was refused.
        event_id: The event that tells of it; the same whoever tells.
        attempts: How often it was tried.
        step: The superstep, if it is known.
        run_id: The run, if it is known.
        fresh: It was added just now.
    """

    id: int
    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str | None
    kind: Kind
    field: bytes
    sequence: int
    error: ErrorInfo
    event_id: UUID
    attempts: int = 1
    step: int | None = None
    run_id: str | None = None
    fresh: bool = False

    def report_error(self) -> ErrorInfo:
        """Return the error of a flush that this letter keeps from being complete."""
        return replace(self.error, message=self.describe())

    def describe(self) -> str:
        """Say what holds the thread up, and what to do."""
        return (
            f"Dead letter {self.id} holds up thread {self.thread_id!r}: Postgres refused a {self.kind} "
            f"({self.error.message}). `checkpointer dead-letters show {self.id}` shows it; then replay or drop it"
        )


def is_poison(exc: Exception) -> bool:
    """Tell whether an error is about the data of a row, so that only this row's thread is concerned."""
    if isinstance(exc, psycopg.Error):
        if exc.sqlstate is not None:
            return exc.sqlstate[:2] in _POISONOUS
        return isinstance(exc, psycopg.DataError)
    # What is refused on this side: text that is no UTF-8, JSON or payloads that were damaged.
    return isinstance(exc, ValueError | UnserializableValueError | DamagedRecordError)


Part = tuple[str, int, int]
"""A thread, and a range of its drained records."""


def write(
    cur: Cursor[DictRow],
    sizes: Mapping[str, int],
    build: Callable[[Sequence[Part]], Batch],
    quick: Callable[[Batch], bool],
) -> tuple[list[Batch], dict[str, Refusal]]:
    """Write the drained records, of each thread those before the first one that Postgres refuses.

    Everything goes at once. If that is refused, halves are tried, of the threads and then of a refused thread's
    records: for each poison record that costs a number of statements that grows with the logarithm.

    Args:
        cur: A cursor in the locked transaction.
        sizes: How many records of each thread were drained.
        build: Makes a batch of ranges.
        quick: Takes the quick way for a large batch, if there is one; says whether it worked. It is tried once: what
            holds it up is poison, as good as always, or would hold up the halves too.

    Returns:
        The batches that were written, and the refusals by thread.

    Raises:
        psycopg.Error: An error that is not about a row's data.
    """
    written: list[Batch] = []
    refused: dict[str, Refusal] = {}
    is_first = True

    def attempt(parts: Sequence[Part]) -> Exception | None:
        nonlocal is_first
        try:
            batch = build(parts)
            if not (is_first and quick(batch)):
                with cur.connection.transaction():
                    batch.run(cur)
        except (psycopg.Error, ValueError, CheckpointerError) as exc:
            if not is_poison(exc):
                raise
            return exc
        finally:
            is_first = False
        written.append(batch)
        return None

    waiting = [list(sizes)] if sizes else []
    while waiting:
        threads = waiting.pop()
        error = attempt([(thread, 0, sizes[thread]) for thread in threads])
        if error is None:
            continue
        if len(threads) > 1:
            half = len(threads) // 2
            waiting += (threads[half:], threads[:half])
            continue
        (thread,) = threads
        low, high = 0, sizes[thread]
        while high - low > 1:
            # Below `low` all is written; the first refused record is below `high`.
            middle = (low + high) // 2
            found = attempt([(thread, low, middle)])
            if found is None:
                low = middle
            else:
                high, error = middle, found
        refused[thread] = Refusal(low, error)
    return written, refused


def unresolved(cur: Cursor[DictRow], prefix: str, threads: Sequence[str]) -> dict[str, Letter]:
    """Return the dead letters that pin these threads."""
    if not threads:
        return {}
    cur.execute(UNRESOLVED, (prefix, list(threads)))
    return by_thread(cur.fetchall())


def by_thread(rows: Iterable[Mapping[str, Any]]) -> dict[str, Letter]:
    """Read the rows of `UNRESOLVED`."""
    return {row["thread_id"]: letter_of(row) for row in rows}


def letter_of(row: Mapping[str, Any]) -> Letter:
    """Read a row of the table."""
    return Letter(
        row["id"],
        row["thread_id"],
        row["checkpoint_ns"],
        row["checkpoint_id"],
        row["kind"],
        bytes(row["field"]),
        row["sequence"],
        ErrorInfo(row["error_type"], row["error_message"], row["sqlstate"]),
        row["event_id"],
        row["attempts"],
    )


def settle(
    cur: Cursor[DictRow],
    prefix: str,
    drained: Mapping[str, Drained],
    refused: Mapping[str, Refusal],
    tried: Mapping[str, Letter],
    replays: Mapping[int, str | None],
) -> tuple[dict[str, Letter], list[Letter]]:
    """Note what was refused, resolve what was replayed, and cut off what must not be acknowledged.

    Args:
        cur: A cursor in the locked transaction.
        prefix: The application.
        drained: What was drained, by thread.
        refused: What Postgres refused of it, by thread.
        tried: The letters that were tried again, by thread.
        replays: Who wanted that, by the letter's number.

    Returns:
        The letters that pin threads from now on, by thread, and the letters that were replayed.
    """
    replayed = []
    pinned = {}
    for thread, letter in tried.items():
        refusal = refused.get(thread)
        if thread not in drained or (refusal and drained[thread].raw[refusal.index][0] == letter.field):
            continue
        resolve(cur, letter.id, "replayed", replays[letter.id])
        replayed.append(letter)
    for thread, refusal in refused.items():
        pinned[thread] = _note(cur, prefix, thread, drained[thread], refusal, tried.get(thread))
        drained[thread].cut(refusal.index)
    return pinned, replayed


def _note(
    cur: Cursor[DictRow], prefix: str, thread: str, drained: Drained, refusal: Refusal, tried: Letter | None
) -> Letter:
    name, payload = drained.raw[refusal.index]
    sequence, found = drained.sequences[refusal.index], drained.records[refusal.index]
    error = describe_error(refusal.error)
    told = (error.type, error.sqlstate, error.message)
    if tried is not None and tried.field == name:
        cur.execute(_AGAIN, (sequence, payload, *told, tried.id))
        return replace(tried, sequence=sequence, error=error, attempts=tried.attempts + 1)
    kind, ns, rest = parse_field(name)
    checkpoint_id = rest[0] if rest and kind != "blob" else None
    event_id = uuid7()
    cur.execute(_ADD, (prefix, thread, ns, checkpoint_id, kind, name, sequence, payload, *told, event_id))
    row = cur.fetchone()
    if row is None:
        raise AssertionError("INSERT ... RETURNING returns a row")
    metadata = _metadata(found.row.metadata) if isinstance(found, DirtyCheckpoint) else {}
    step, run_id = metadata.get("step"), metadata.get("run_id")
    return Letter(
        row["id"],
        thread,
        ns,
        checkpoint_id,
        kind,
        name,
        sequence,
        error,
        event_id,
        step=step if isinstance(step, int) else None,
        run_id=run_id if isinstance(run_id, str) else None,
        fresh=True,
    )


def parse_field(name: bytes) -> tuple[Kind, str, list[str]]:
    """Split a record's name into its kind, its namespace and the rest; whatever it is, the parts can be stored."""
    kind, _, rest = name.decode("utf-8", "replace").partition("\0")
    ns, *parts = rest.split("\0")
    return _KINDS.get(kind, "write"), ns, parts


def _metadata(text: bytes) -> Mapping[str, Any]:
    try:
        found = load_json(text)
    except ValueError:  # it may be what Postgres refused
        return {}
    return found if isinstance(found, dict) else {}


def payload_of(cur: Cursor[DictRow], letter: Letter) -> bytes | None:
    """Return the stored payload of an unresolved letter."""
    row = cur.execute("SELECT payload FROM checkpoint_dead_letters WHERE id = %s", (letter.id,)).fetchone()
    return None if row is None or row["payload"] is None else bytes(row["payload"])


def resolve(cur: Cursor[DictRow], letter_id: int, resolution: Literal["replayed", "dropped"], by: str | None) -> bool:
    """Resolve a letter; returns whether it was unresolved. What was replayed is in the tables and is not kept here."""
    cur.execute(_RESOLVE, (resolution, by, resolution == "dropped", letter_id))
    return cur.rowcount == 1


def delete(cur: Cursor[DictRow], prefix: str, threads: Iterable[str]) -> None:
    """Resolve the letters of deleted threads, and forget all that was kept of their records."""
    cur.execute(_DELETE, (prefix, list(threads)))


def added(letter: Letter, debt: Debt | None) -> CheckpointEvent:
    """Return the event that tells of a new dead letter, or of an old one that this process meets for the first time."""
    own = int(letter.kind == "checkpoint")
    waiting = sum(owed.sequence >= letter.sequence for owed in debt.checkpoints) if debt else own
    return CheckpointEvent(
        name="dead_letter.added",
        error_type="checkpoint_dead_letter",
        severity="critical",
        message=letter.describe() + ". Its thread's later records wait in the buffer; other threads go on.",
        event_id=letter.event_id,
        thread_id=letter.thread_id,
        run_id=letter.run_id or (debt.run_id if debt else None),
        checkpoint_ns=letter.checkpoint_ns,
        checkpoint_id=letter.checkpoint_id,
        step=letter.step,
        component="flusher",
        operation="flush",
        attempt=letter.attempts,
        outcome="buffered",
        checkpoint_count=waiting,
        error=letter.error,
        context={"dead_letter": letter.id, "kind": letter.kind},
        # Users are told once, by whoever noted it.
        user_notice=letter.fresh,
    )


def replayed(letter: Letter) -> CheckpointEvent:
    """Return the event that tells of a replayed letter."""
    return _resolved(letter, "dead_letter.replayed", f"Dead letter {letter.id} is saved now ({letter.kind}).")


def dropped(letter: Letter) -> CheckpointEvent:
    """Return the event that tells of a dropped letter."""
    hole = " The thread's history has a hole there, by this decision." if letter.kind == "checkpoint" else ""
    message = f"Dead letter {letter.id} was dropped: its {letter.kind} will not be saved.{hole}"
    return _resolved(letter, "dead_letter.dropped", message)


def _resolved(letter: Letter, name: str, message: str) -> CheckpointEvent:
    return CheckpointEvent(
        name=name,
        severity="info",
        message=message,
        thread_id=letter.thread_id,
        checkpoint_ns=letter.checkpoint_ns,
        checkpoint_id=letter.checkpoint_id,
        component="flusher",
        operation="replay" if name == "dead_letter.replayed" else "drop",
        attempt=letter.attempts,
        outcome="recovered" if name == "dead_letter.replayed" else "lost",
        checkpoint_count=int(letter.kind == "checkpoint"),
        context={"dead_letter": letter.id, "kind": letter.kind},
        user_notice=True,
    )
