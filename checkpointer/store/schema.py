"""Brings a database up to date: LangGraph's own migrations first, then the numbered files of this project.

Not here: what the tables mean (the files say that) and any change of LangGraph's checkpoint tables. What has
to be done is decided by generators that do no I/O; two runners, one of them asynchronous, carry it out.

On tables that somebody has made as partitioned ones, LangGraph's indexes are created, but not concurrently, which
Postgres refuses there. Behind a pooler that hands out its sessions, the lock is held by a connection with a
transaction that stays open: the pooler leaves that one its session.

Words: a *file* is `NNNN_name.sql`, plain SQL that may run twice. *Stock* migrations are the list in
`langgraph-checkpoint-postgres`; they and their record are as if `PostgresSaver.setup()` had run them.
A *plan* is a generator that yields steps, receives the rows of each, and returns a result.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from langgraph.checkpoint.postgres.base import MIGRATIONS
from psycopg import sql
from psycopg.rows import tuple_row

from checkpointer.checks import check_schema
from checkpointer.errors import ConfigurationError, MigrationError, UnsupportedServerError
from checkpointer.store.clients import PID, behind_pooler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

__all__ = ["setup", "asetup", "pending", "apending", "is_set_up", "ais_set_up"]

_MINIMUM_SERVER = 150_000
_LOCK_SECONDS = 120.0
_POLL_SECONDS = 0.1

_FILE_NAME = re.compile(r"(\d{4})_\w+\.sql")

# Advisory locks are per database already; two schemas of one database can be set up at the same time.
_LOCK_KEY = "hashtextextended('checkpointer_migrations ' || coalesce(current_schema(), ''), 0)"
_TRY_LOCK = f"SELECT pg_try_advisory_lock({_LOCK_KEY})"
_UNLOCK = f"SELECT pg_advisory_unlock({_LOCK_KEY})"

_SCHEMA_EXISTS = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %s)"
_SERVER_VERSION = "SELECT current_setting('server_version_num')::int, current_setting('server_version')"
_TABLES = "SELECT to_regclass('checkpoint_migrations'), to_regclass('checkpointer_migrations')"
_STOCK_VERSION = "SELECT max(v) FROM checkpoint_migrations"
_PARTITIONED = """
SELECT count(*) FROM pg_class WHERE relkind = 'p' AND oid IN
    (to_regclass('checkpoints'), to_regclass('checkpoint_blobs'), to_regclass('checkpoint_writes'))
"""
_RECORD_STOCK = "INSERT INTO checkpoint_migrations (v) VALUES (%s) ON CONFLICT DO NOTHING"
_CREATE_RECORDS = """
CREATE TABLE IF NOT EXISTS checkpointer_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
_RECORDS = "SELECT version, checksum FROM checkpointer_migrations"
# Sent together with the file, so that the file and its record are one transaction.
_RECORD_FILE = "\n;\nINSERT INTO checkpointer_migrations (version, name, checksum) VALUES ({}, {}, {})"

Row: TypeAlias = tuple[Any, ...]
OnApplied: TypeAlias = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Query:
    text: str | sql.Composed
    parameters: Sequence[Any] | None = None
    by_keeper: bool = False


@dataclass(frozen=True, slots=True)
class _Pause:
    seconds: float


Plan: TypeAlias = Generator[_Query | _Pause, list[Row], T]


@dataclass(frozen=True, slots=True)
class _File:
    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is still to be done: numbers of stock migrations and files, in the order to apply them."""

    stock: range
    files: tuple[_File, ...]

    @property
    def names(self) -> list[str]:
        return [*(f"langgraph {version}" for version in self.stock), *(file.name for file in self.files)]


def _folder() -> Path:
    """Return the folder of the files: inside the installed package, or at the root of a source tree."""
    installed = Path(__file__).with_name("migrations")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "migrations"


def _files() -> tuple[_File, ...]:
    """Read the files, in order.

    Raises:
        MigrationError: There is none, or two have the same number.
    """
    folder = _folder()
    found: dict[int, _File] = {}
    for path in sorted(folder.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise MigrationError(f"{path.name} is not named NNNN_name.sql.")
        version = int(match[1])
        if version in found:
            raise MigrationError(f"{found[version].name} and {path.name} have the same number.")
        found[version] = _File(version, path.name, path.read_text(encoding="utf-8"))
    if not found:
        raise MigrationError(f"There are no migrations in {folder}: the installation is incomplete.")
    return tuple(found.values())


def _plan_pending(files: tuple[_File, ...]) -> Plan[_Pending]:
    [(has_stock, has_own)] = yield _Query(_TABLES)
    done = -1
    if has_stock:
        [(version,)] = yield _Query(_STOCK_VERSION)
        done = -1 if version is None else version
    applied: dict[int, str] = dict((yield _Query(_RECORDS))) if has_own else {}
    for file in files:
        if applied.get(file.version, file.checksum) != file.checksum:
            raise MigrationError(
                f"{file.name} was changed after it had been applied to this database. "
                "Restore the file and put the change into a new one."
            )
    left = tuple(file for file in files if file.version not in applied)
    return _Pending(range(done + 1, len(MIGRATIONS)), left)


def _plan_setup(
    files: tuple[_File, ...], lock_seconds: float, schema: str | None, on_applied: OnApplied | None = None
) -> Plan[list[str]]:
    [(number, version)] = yield _Query(_SERVER_VERSION)
    if number < _MINIMUM_SERVER:
        raise UnsupportedServerError(f"PostgreSQL {_MINIMUM_SERVER // 10_000} or later is needed; this is {version}.")
    if schema is not None:
        yield from _plan_schema(schema)
    # An up-to-date database needs neither the lock nor the right to create tables.
    todo = yield from _plan_pending(files)
    if not todo.names:
        return []
    # A cancelled attempt may have got the lock without our being told, so the attempts are inside as well:
    # unlocking what is not locked is only a warning.
    try:
        yield from _plan_lock(lock_seconds)
        todo = yield from _plan_pending(files)
        yield from _plan_apply(todo, on_applied or _ignore)
    finally:
        # On a connection that is lost the lock is gone, and what is being raised says more than this would.
        with contextlib.suppress(psycopg.Error):
            yield _Query(_UNLOCK, by_keeper=True)
    return todo.names


def _plan_schema(schema: str) -> Plan[None]:
    """Create the schema if it is missing, and see that it is the one that tables are made in."""
    [(exists,)] = yield _Query(_SCHEMA_EXISTS, (schema,))
    if not exists:
        create = sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema))
        try:
            yield _Query(create)
        except (psycopg.errors.DuplicateSchema, psycopg.errors.UniqueViolation):
            pass  # another process was faster
        except psycopg.errors.InsufficientPrivilege as exc:
            raise MigrationError(
                f"The schema {schema!r} is missing and this user may not create it: have an administrator run "
                f"{create.as_string()} AUTHORIZATION <this user>."
            ) from exc
    [(current,)] = yield _Query("SELECT current_schema()::text")
    check_schema(schema, current)


def _plan_lock(lock_seconds: float) -> Plan[None]:
    # Polled: a session that waits inside pg_advisory_lock holds a snapshot, for which CREATE INDEX
    # CONCURRENTLY in the session that has the lock would wait in turn.
    deadline = time.monotonic() + lock_seconds
    while True:
        [(locked,)] = yield _Query(_TRY_LOCK, by_keeper=True)
        if locked:
            return
        if time.monotonic() > deadline:
            raise MigrationError(
                f"Another process has been migrating this database for {lock_seconds:.0f} s. Try again later."
            )
        yield _Pause(_POLL_SECONDS)


def _ignore(name: str) -> None:
    """Take the name of what was applied."""


def _plan_apply(todo: _Pending, on_applied: OnApplied) -> Plan[None]:
    for version in todo.stock:
        [(partitioned,)] = yield _Query(_PARTITIONED)
        text = MIGRATIONS[version].replace(" CONCURRENTLY", "") if partitioned else MIGRATIONS[version]
        yield from _plan_one(f"LangGraph's migration {version}", _Query(text))
        yield _Query(_RECORD_STOCK, (version,))
        on_applied(f"langgraph {version}")
    if todo.files:
        yield _Query(_CREATE_RECORDS)
    for file in todo.files:
        record = sql.SQL(_RECORD_FILE).format(file.version, file.name, file.checksum)
        yield from _plan_one(file.name, _Query(sql.SQL(file.text) + record))
        on_applied(file.name)


def _plan_one(name: str, query: _Query) -> Plan[None]:
    try:
        yield query
    except psycopg.Error as exc:
        if exc.sqlstate is None and isinstance(exc, psycopg.OperationalError):
            raise  # the connection is lost: what became of the file is not known
        reason = exc.diag.message_primary or str(exc)
        raise MigrationError(f"{name} failed and was rolled back: {reason}") from exc


def _run(conn: psycopg.Connection[Any], plan: Plan[T], keeper: psycopg.Connection[Any] | None = None) -> T:
    try:
        step = next(plan)
        while True:
            try:
                rows = _step(keeper if keeper and _is_for_keeper(step) else conn, step)
            except BaseException as exc:  # noqa: BLE001 - the plan decides, and releases its lock
                step = plan.throw(exc)
            else:
                step = plan.send(rows)
    except StopIteration as end:
        result: T = end.value
        return result


def _step(conn: psycopg.Connection[Any], step: _Query | _Pause) -> list[Row]:
    if isinstance(step, _Pause):
        time.sleep(step.seconds)
        return []
    with conn.cursor(row_factory=tuple_row) as cur:
        cur.execute(step.text, step.parameters, prepare=False)
        return cur.fetchall() if cur.description else []


async def _arun(
    conn: psycopg.AsyncConnection[Any], plan: Plan[T], keeper: psycopg.AsyncConnection[Any] | None = None
) -> T:
    try:
        step = next(plan)
        while True:
            try:
                rows = await _astep(keeper if keeper and _is_for_keeper(step) else conn, step)
            except BaseException as exc:  # noqa: BLE001 - the plan decides, and releases its lock
                step = plan.throw(exc)
            else:
                step = plan.send(rows)
    except StopIteration as end:
        result: T = end.value
        return result


async def _astep(conn: psycopg.AsyncConnection[Any], step: _Query | _Pause) -> list[Row]:
    if isinstance(step, _Pause):
        await asyncio.sleep(step.seconds)
        return []
    async with conn.cursor(row_factory=tuple_row) as cur:
        await cur.execute(step.text, step.parameters, prepare=False)
        return await cur.fetchall() if cur.description else []


def _is_for_keeper(step: _Query | _Pause) -> bool:
    return isinstance(step, _Query) and step.by_keeper


def _twin(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> dict[str, Any]:
    """Return the settings of a connection, for another one to the same place."""
    password = {"password": conn.info.password} if conn.info.password else {}
    return {**conn.info.get_parameters(), **password, "prepare_threshold": None}


def _require_autocommit(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    if not conn.autocommit:
        raise ConfigurationError(
            "Migrations need a connection with autocommit=True: LangGraph's own create indexes concurrently."
        )


def setup(
    conn: psycopg.Connection[Any],
    *,
    schema: str | None = None,
    lock_seconds: float = _LOCK_SECONDS,
    on_applied: OnApplied | None = None,
) -> list[str]:
    """Apply what is pending; safe to call from many processes at once, and again at any time.

    The tables are made in the first schema of the connection's search path.

    Args:
        conn: An autocommit connection; through a pooler, a second one is opened beside it.
        schema: Created if it is missing; the search path of the connection has to lead there.
        lock_seconds: How long to wait for another process that is migrating.
        on_applied: Is told the name of each migration once it is applied.

    Returns:
        The names of what was applied; empty if nothing was pending.

    Raises:
        ConfigurationError: The connection is not in autocommit mode, or does not work in the schema.
        MigrationError: A migration failed, an applied file was changed, another process kept the lock, or the schema
            is missing and may not be created.
        UnsupportedServerError: The server is older than PostgreSQL 15.
    """
    _require_autocommit(conn)
    plan = _plan_setup(_files(), lock_seconds, schema, on_applied)
    [(pid,)] = _step(conn, _Query(PID))
    if not behind_pooler(conn, pid):
        return _run(conn, plan)
    with psycopg.connect(**_twin(conn)) as keeper:
        return _run(conn, plan, keeper)


async def asetup(
    conn: psycopg.AsyncConnection[Any], *, schema: str | None = None, lock_seconds: float = _LOCK_SECONDS
) -> list[str]:
    """As `setup`, on an asynchronous connection."""
    _require_autocommit(conn)
    plan = _plan_setup(_files(), lock_seconds, schema)
    [(pid,)] = await _astep(conn, _Query(PID))
    if not behind_pooler(conn, pid):
        return await _arun(conn, plan)
    async with await psycopg.AsyncConnection.connect(**_twin(conn)) as keeper:
        return await _arun(conn, plan, keeper)


def pending(conn: psycopg.Connection[Any]) -> list[str]:
    """Return the names of what `setup` would apply; changes nothing.

    Raises:
        MigrationError: An applied file was changed.
    """
    return _run(conn, _plan_pending(_files())).names


async def apending(conn: psycopg.AsyncConnection[Any]) -> list[str]:
    """As `pending`, on an asynchronous connection."""
    return (await _arun(conn, _plan_pending(_files()))).names


def is_set_up(conn: psycopg.Connection[Any]) -> bool:
    """Tell whether nothing is pending; if not, `NotSetUpError` is what a caller raises."""
    return not pending(conn)


async def ais_set_up(conn: psycopg.AsyncConnection[Any]) -> bool:
    """As `is_set_up`, on an asynchronous connection."""
    return not await apending(conn)
