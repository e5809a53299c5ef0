"""How a command finds and reaches the servers: the options that all have, and the connections made of them.

Not here: what a command does with a connection. No message here holds a password.
"""

# No `from __future__ import annotations`: see `cli.py`.

import contextlib
import getpass
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from checkpointer import search_path
from checkpointer.errors import ConfigurationError, NotSetUpError, StoreUnavailableError
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import STANDARD_HOOKS, HookContext, Hooks, load_hook
from checkpointer.store.reads import partitions

if TYPE_CHECKING:
    from checkpointer.saver import BufferedPostgresSaver

__all__ = [
    "Common",
    "Connect",
    "check_postgres_uri",
    "check_redis_url",
    "connect",
    "context",
    "open_saver",
    "reporting",
    "stored_partitions",
    "who",
]

CONNECT_SECONDS = 10

Connect = Callable[..., contextlib.AbstractContextManager[psycopg.Connection[Any]]]

# Whoever runs a command sees the outcome on the terminal.
_HOOKS = tuple(name for name in STANDARD_HOOKS if name != "console")


class Common:
    """The options that many commands have, to be used inside `Annotated`."""

    def __init__(self) -> None:
        import typer

        self.postgres = typer.Option(envvar="POSTGRES_URI", help="Where Postgres is.", show_default=False)
        self.redis = typer.Option(envvar="REDIS_URL", help="Where Redis is.", show_default=False)
        self.schema = typer.Option("--schema", envvar="CHECKPOINTER_SCHEMA", help="The saver's schema in Postgres.")
        self.prefix = typer.Option(envvar="CHECKPOINTER_PREFIX", help="The saver's prefix.")
        self.json = typer.Option("--json", help="Print JSON instead of a table.")
        self.by = typer.Option("--by", help="Who does it; default: user@host.", show_default=False)
        self.cursor = typer.Option("--cursor", help="Where the page before has ended.", show_default=False)


def who() -> str:
    """Return who runs a command, for what keeps who did what."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def check_postgres_uri(uri: str | None) -> str:
    """Return a connection string that can be read.

    Raises:
        ConfigurationError: There is none, or it cannot be read.
    """
    if not uri:
        raise ConfigurationError("Say where Postgres is: set POSTGRES_URI or pass --postgres-uri.")
    try:
        conninfo_to_dict(uri)
    except psycopg.ProgrammingError:
        # Without the parser's words and as cause: they quote the URI, which can hold a password.
        raise ConfigurationError("POSTGRES_URI or --postgres-uri is not a valid connection string.") from None
    return uri


def check_redis_url(url: str | None) -> str:
    """Return the URL.

    Raises:
        ConfigurationError: There is none.
    """
    if not url:
        raise ConfigurationError("Say where Redis is: set REDIS_URL or pass --redis-url.")
    return url


@contextlib.contextmanager
def connect(uri: str | None, schema: str | None = None) -> Iterator[psycopg.Connection[Any]]:
    """Open an autocommit connection.

    Raises:
        ConfigurationError: There is no usable URI, or the schema cannot be one.
        NotSetUpError: What is done with the connection met a missing table or column.
        StoreUnavailableError: The server did not answer, let nobody in, or went away.
    """
    uri = check_postgres_uri(uri)
    settings = _settings(uri, schema)
    try:
        conn = psycopg.connect(uri, autocommit=True, **settings)
    except psycopg.OperationalError as exc:
        raise StoreUnavailableError(f"Postgres cannot be reached: {exc}") from exc
    with conn:
        try:
            yield conn
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as exc:
            said = exc.diag.message_primary
            raise NotSetUpError(f"Tables are missing or old ({said}): run `checkpointer migrate`.") from exc


def context(postgres_uri: str, prefix: str, schema: str | None) -> HookContext:
    """Return what hooks and links get, of a command that works without Redis."""

    def connect_postgres() -> psycopg.Connection[Any]:
        return psycopg.connect(postgres_uri, autocommit=True, row_factory=dict_row, **_settings(postgres_uri, schema))

    def no_redis() -> NoReturn:
        raise ConnectionError("this command works without Redis")

    keys = search_path.key_prefix(prefix, schema or None)
    return HookContext(connect_postgres=connect_postgres, connect_redis=no_redis, prefix=keys, identity="command-line")


@contextlib.contextmanager
def reporting(postgres_uri: str, prefix: str, schema: str | None) -> Iterator[Callable[[CheckpointEvent], None]]:
    """Report events to the thread's log, to those who watch it, and to the table of errors."""
    hooks = Hooks()
    for name in ("thread_log", "run_events", "system_errors"):
        hooks.add(load_hook(name, context(postgres_uri, prefix, schema)), name=name)
    try:
        yield hooks.emit
        hooks.flush(CONNECT_SECONDS)
    finally:
        hooks.close()


def stored_partitions(conn: psycopg.Connection[Any], prefix: str) -> int:
    """Return into how many partitions an application's threads are divided.

    Raises:
        ConfigurationError: No application with this prefix has ever used the database.
    """
    query = partitions(prefix)
    with conn.cursor(row_factory=dict_row) as cur:
        row = cur.execute(query.sql.encode(), query.params).fetchone()
    if row is None:
        raise ConfigurationError(f"No application with the prefix {prefix!r} uses this database: see --prefix.")
    return int(row["partitions"])


def open_saver(uri: str | None, redis_url: str | None, prefix: str, schema: str | None) -> "BufferedPostgresSaver":
    """Open a saver that does nothing by itself, for an application that is there already.

    Raises:
        ConfigurationError: An address is missing, or there is no such application.
        StoreUnavailableError: Postgres cannot be reached.
    """
    from checkpointer.saver import BufferedPostgresSaver

    redis_url = check_redis_url(redis_url)
    with connect(uri, schema) as conn:
        number = stored_partitions(conn, prefix)
    return BufferedPostgresSaver.from_conn_string(
        check_postgres_uri(uri),
        redis_url=redis_url,
        prefix=prefix,
        partitions=number,
        schema=schema or None,
        triggers=frozenset(),
        hooks=_HOOKS,
    )


def _settings(uri: str, schema: str | None) -> dict[str, Any]:
    """Return what is added to a connection string: a limit for connecting, the schema, and what poolers need."""
    given = conninfo_to_dict(uri)
    settings: dict[str, Any] = {
        "connect_timeout": given.get("connect_timeout") or CONNECT_SECONDS,
        "prepare_threshold": None,
    }
    if schema:
        search_path.check_name(schema)
        options = given.get("options")
        settings["options"] = search_path.with_search_path(None if options is None else str(options), schema)
    return settings
