"""A statement that runs often and takes texts, with no more than libpq needs for it.

Not here: the statements (`reads.py`) and the connections (`clients.py`). psycopg's cursors adapt parameters of any
kind, which for a handful of texts takes longer than Postgres does; the rows are psycopg's, in binary.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from psycopg import errors, generators
from psycopg.adapt import Transformer
from psycopg.pq import ExecStatus, Format

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from psycopg import AsyncConnection, Connection
    from psycopg.pq.abc import PGresult

    AnyConnection = Connection[Any] | AsyncConnection[Any]

# Somebody has said DEALLOCATE ALL, or a table was altered.
_OUTDATED = (errors.InvalidSqlStatementName, errors.FeatureNotSupported)


class ShortStatements:
    """Knows under which name a connection's session has which statement."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[AnyConnection, dict[str, bytes]] = weakref.WeakKeyDictionary()
        self._count = 0

    def suits(self, conn: AnyConnection) -> bool:
        """Tell whether a connection can keep statements, needs no transaction around one, and speaks UTF-8."""
        if conn in self._known:
            return True
        return conn.autocommit and conn.prepare_threshold is not None and conn.info.encoding == "utf-8"

    def ask(self, conn: AnyConnection, sql: str, params: Sequence[str]) -> Generator[Any, Any, list[dict[str, Any]]]:
        """Return what the connection's `wait` has to carry out; its result is the rows.

        Args:
            conn: An idle connection that `suits`.
            sql: The statement, with `%s` for each parameter and no other percent sign.
            params: The parameters.
        """
        known = self._known.setdefault(conn, {})
        values = [value.encode() for value in params]
        if (name := known.get(sql)) is not None:
            try:
                return (yield from _run(conn, name, values))
            except _OUTDATED:
                del known[sql]
        self._count += 1
        name = b"checkpointer_%d" % self._count
        conn.pgconn.send_prepare(name, _numbered(sql))
        _check((yield from generators.execute(conn.pgconn)))
        known[sql] = name
        return (yield from _run(conn, name, values))


def _numbered(sql: str) -> bytes:
    first, *rest = sql.split("%s")
    return (first + "".join(f"${n}{part}" for n, part in enumerate(rest, 1))).encode()


def _run(conn: AnyConnection, name: bytes, values: Sequence[bytes]) -> Generator[Any, Any, list[dict[str, Any]]]:
    conn.pgconn.send_query_prepared(name, values, result_format=Format.BINARY)
    result = _check((yield from generators.execute(conn.pgconn)))
    columns = [str(result.fname(n), "utf-8") for n in range(result.nfields)]  # type: ignore[arg-type]  # there are so many
    loader = Transformer.from_context(conn)
    loader.set_pgresult(result)
    return loader.load_rows(0, result.ntuples, lambda values: dict(zip(columns, values, strict=True)))


def _check(results: Sequence[PGresult]) -> PGresult:
    result = results[0]
    if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        raise errors.error_from_result(result)
    return result
