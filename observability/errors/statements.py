"""What is asked of the error store: statements without I/O, and the two thin runners that carry them out.

A *statement* is SQL, its parameters and how its rows are read. An *act* is a generator that yields statements and
receives what each has read; all of them run in one transaction. A *page* is a part of a list and the *cursor* of the
next one: opaque text that says where the last page ended. Not here: what can be asked (`reading.py`) and done
(`acting.py`).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from psycopg.rows import dict_row

from checkpointer.errors import CheckpointerError

if TYPE_CHECKING:
    import psycopg

__all__ = ["Act", "Cursor", "InvalidCursorError", "Page", "Row", "Statement", "arun", "run"]

T = TypeVar("T")

Row = dict[str, Any]

_VERSION = 1
_LONGEST_CURSOR = 4_000
_LARGEST_ID = 2**63 - 1


class InvalidCursorError(CheckpointerError, ValueError):
    """A cursor is not one that this version has given out for this list; start again without one."""

    def __init__(self) -> None:
        super().__init__("The cursor is not one that this list has given out: start again without a cursor.")


def _as_they_are(rows: list[Row]) -> Any:
    return rows


@dataclass(frozen=True, slots=True)
class Statement(Generic[T]):
    """One statement.

    Attributes:
        sql: With placeholders of the form `%(name)s`; names no schema.
        params: The values of the placeholders.
        read: Makes the result out of the rows, each a dict by column.
    """

    sql: str
    params: dict[str, Any] = field(default_factory=dict)
    read: Callable[[list[Row]], T] = _as_they_are


Act = Generator[Statement[Any], Any, T]
"""Several statements, of which later ones depend on what earlier ones have read; returns the result."""


def run(conn: psycopg.Connection[Any], what: Statement[T] | Act[T]) -> T:
    """Carry out a statement or an act, in a transaction (a savepoint if the connection is in one already).

    Raises:
        psycopg.Error: As Postgres said; nothing was changed.
    """
    with conn.transaction(), conn.cursor(row_factory=dict_row) as cursor:
        if isinstance(what, Statement):
            return what.read(cursor.execute(what.sql.encode(), what.params).fetchall())
        reply = None
        while True:
            try:
                statement = what.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            cursor.execute(statement.sql.encode(), statement.params)
            reply = statement.read(cursor.fetchall() if cursor.description else [])


async def arun(conn: psycopg.AsyncConnection[Any], what: Statement[T] | Act[T]) -> T:
    """As `run`, for an async connection."""
    async with conn.transaction(), conn.cursor(row_factory=dict_row) as cursor:
        if isinstance(what, Statement):
            await cursor.execute(what.sql.encode(), what.params)
            return what.read(await cursor.fetchall())
        reply = None
        while True:
            try:
                statement = what.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            await cursor.execute(statement.sql.encode(), statement.params)
            reply = statement.read(await cursor.fetchall() if cursor.description else [])


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list.

    Attributes:
        rows: At most as many as were asked for.
        next_cursor: Leads to the next page; None if this is the last.
    """

    rows: list[Row]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page of a list ended.

    Attributes:
        kind: The list: a cursor of one list means nothing to another.
        at: The time of the last row; None if the row has none, or the list goes by the key alone.
        key: What tells rows of the same time apart: an id or a fingerprint.
    """

    kind: str
    at: datetime | None
    key: int | str

    def encode(self) -> str:
        """Return it as text fit for a URL."""
        values = [_VERSION, self.kind, self.at and self.at.isoformat(), self.key]
        return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()

    @classmethod
    def decode(cls, kind: str, text: str, key: type[int] | type[str]) -> Cursor:
        """Read a cursor of a list.

        Args:
            kind: The list.
            text: What `encode` has returned, or anything else.
            key: The type of the list's keys.

        Raises:
            InvalidCursorError: It is anything else.
        """
        try:
            if len(text) > _LONGEST_CURSOR:
                raise InvalidCursorError
            padded = text.encode("ascii") + b"=" * (-len(text) % 4)
            version, its_kind, at, value = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
            moment = None if at is None else datetime.fromisoformat(at)
            known = (version, its_kind) == (_VERSION, kind) and type(value) is key
            fits = "\0" not in value if isinstance(value, str) else abs(value) <= _LARGEST_ID
            if not known or not fits or (moment is not None and moment.tzinfo is None):
                raise InvalidCursorError
            if isinstance(value, str):
                value.encode()
        except (ValueError, TypeError, RecursionError, binascii.Error):
            raise InvalidCursorError from None
        return cls(kind, moment, value)


def page_of(kind: str, limit: int, at: str | None, key: str) -> Callable[[list[Row]], Page]:
    """Return what makes a page out of rows of which one more was asked for than the page holds.

    Args:
        kind: The list.
        limit: How many rows the page holds at most.
        at: The column of the time, if the list has one in its order.
        key: The column of the key.
    """

    def read(rows: list[Row]) -> Page:
        if len(rows) <= limit:
            return Page(rows, None)
        last = rows[limit - 1]
        return Page(rows[:limit], Cursor(kind, last[at] if at else None, last[key]).encode())

    return read


def where(conditions: Sequence[str]) -> str:
    """Return the conditions as a WHERE clause, or nothing if there are none."""
    return f"WHERE {' AND '.join(conditions)}" if conditions else ""
