"""The command line, `checkpointer <command>`: for people and for deployment scripts.

Not here: what the commands do (the modules that they call) and anything that the Python interface lacks.
Every command reads `POSTGRES_URI` and `REDIS_URL`, or `--postgres-uri` and `--redis-url`, even one that needs
only the first, so that one set of arguments fits all of them.

Exit codes: 0 done; 1 it failed, or a check found something, with one line on standard error; 2 wrong usage.
"""

# No `from __future__ import annotations`: typer is optional and imported inside a function, and it could not
# look up there what the annotations of the commands refer to.

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from checkpointer import cli_dead_letters
from checkpointer.errors import CheckpointerError, ConfigurationError, NotSetUpError, StoreUnavailableError
from checkpointer.events import CheckpointEvent
from checkpointer.flush import abandon
from checkpointer.hooks import HookContext, Hooks, load_hook
from checkpointer.store import schema
from observability import queries

if TYPE_CHECKING:
    import typer

__all__ = ["main"]

_CONNECT_SECONDS = 10


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    try:
        app = _app()
    except ModuleNotFoundError as exc:
        if exc.name not in ("typer", "rich"):
            raise
        _fail('The command line needs: pip install "langgraph-checkpoint-buffered[cli]"', 2)
    try:
        app()
    except CheckpointerError as exc:
        _fail(str(exc), 1)
    except psycopg.Error as exc:
        _fail(f"Postgres: {exc.diag.message_primary or exc}", 1)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(" ".join(message.split()) + "\n")
    sys.exit(code)


def _app() -> "typer.Typer":
    import rich  # noqa: F401 - looked for here, so that a command does not fail half-way
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    postgres_option = typer.Option(envvar="POSTGRES_URI", help="Where Postgres is.", show_default=False)
    redis_option = typer.Option(envvar="REDIS_URL", help="Where Redis is.", show_default=False)
    check_option = typer.Option("--check", help="Change nothing; exit with 1 if anything is pending.")
    name_argument = typer.Argument(help="The name of a query.", show_default=False)
    list_option = typer.Option("--list", help="Print the names of all queries.")
    json_option = typer.Option("--json", help="Print JSON instead of a table.")

    @app.callback()
    def about() -> None:
        """LangGraph checkpoints: a Redis buffer in front of Postgres."""

    @app.command()
    def migrate(
        check: Annotated[bool, check_option] = False,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
    ) -> None:
        """Create or update the tables in Postgres; safe to run again and from many machines at once."""
        with _connect(postgres_uri) as conn:
            names = schema.pending(conn) if check else schema.setup(conn)
        for name in names:
            typer.echo(f"{'pending' if check else 'applied'}: {name}")
        if check and names:
            raise typer.Exit(1)
        if not names:
            typer.echo("Nothing is pending.")

    @app.command()
    def query(
        name: Annotated[str | None, name_argument] = None,
        list_names: Annotated[bool, list_option] = False,
        as_json: Annotated[bool, json_option] = False,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
    ) -> None:
        """Run one of the queries that come with this package."""
        if list_names:
            typer.echo("\n".join(queries.names()))
            return
        if name is None or name not in queries.names():
            raise typer.BadParameter(f"choose one of: {', '.join(queries.names())}", param_hint="NAME")
        with _connect(postgres_uri) as conn:
            rows = queries.run(conn, name)
        if as_json:
            typer.echo(orjson.dumps(rows, default=str, option=orjson.OPT_INDENT_2))
        else:
            _print_table(rows)

    buffer = typer.Typer(no_args_is_help=True, help="What the buffer holds.")
    app.add_typer(buffer, name="buffer")
    prefix_option = typer.Option(envvar="CHECKPOINTER_PREFIX", help="The application's key prefix.")
    yes_option = typer.Option("--yes", help="Do it; without this the threads are only listed.")

    @buffer.callback()
    def about_buffer() -> None:
        """What the buffer holds."""

    @buffer.command("abandon")
    def abandon_buffer(
        prefix: Annotated[str, prefix_option] = "checkpointer",
        yes: Annotated[bool, yes_option] = False,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
    ) -> None:
        """Give up a Redis that is gone for good: threads go on from their latest checkpoint in Postgres."""
        with _connect(postgres_uri) as conn:
            if not yes:
                threads = abandon.open_threads(conn, prefix)
                for thread in threads:
                    typer.echo(_cell(thread))
                typer.echo(f"{len(threads)} threads are open. What only Redis has of them is lost with --yes.")
                return
            with _reporting(postgres_uri or "", prefix) as emit:
                threads = abandon.abandon(conn, prefix, emit)
        for thread in threads:
            typer.echo(_cell(thread))
        typer.echo(f"{len(threads)} threads were given up.")

    app.add_typer(cli_dead_letters.make_app(_connect, _print_table), name="dead-letters")
    return app


@contextlib.contextmanager
def _reporting(postgres_uri: str, prefix: str) -> Iterator[Callable[[CheckpointEvent], None]]:
    """Report events to the thread's log and the table of errors."""

    def connect() -> psycopg.Connection[Any]:
        return psycopg.connect(postgres_uri, autocommit=True, row_factory=dict_row)

    def no_redis() -> NoReturn:
        raise ConnectionError("this command works without Redis")

    context = HookContext(connect_postgres=connect, connect_redis=no_redis, prefix=prefix, identity="command-line")
    hooks = Hooks()
    for name in ("thread_log", "system_errors"):
        hooks.add(load_hook(name, context), name=name)
    try:
        yield hooks.emit
        hooks.flush(_CONNECT_SECONDS)
    finally:
        hooks.close()


@contextlib.contextmanager
def _connect(uri: str | None) -> Iterator[psycopg.Connection[Any]]:
    """Open an autocommit connection.

    Raises:
        ConfigurationError: There is no usable URI.
        NotSetUpError: What is done with the connection met a missing table.
        StoreUnavailableError: The server did not answer or let nobody in.
    """
    if not uri:
        raise ConfigurationError("Say where Postgres is: set POSTGRES_URI or pass --postgres-uri.")
    try:
        seconds = conninfo_to_dict(uri).get("connect_timeout") or _CONNECT_SECONDS
    except psycopg.ProgrammingError:
        # Without the parser's words and as cause: they quote the URI, which can hold a password.
        raise ConfigurationError("POSTGRES_URI or --postgres-uri is not a valid connection string.") from None
    try:
        conn = psycopg.connect(uri, autocommit=True, connect_timeout=seconds)
    except psycopg.OperationalError as exc:
        raise StoreUnavailableError(f"Postgres cannot be reached: {exc}") from exc
    with conn:
        try:
            yield conn
        except psycopg.errors.UndefinedTable as exc:
            raise NotSetUpError(
                f"Tables are missing ({exc.diag.message_primary}): run `checkpointer migrate`."
            ) from exc


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not rows:
        console.print("No rows.")
        return
    table = Table()
    for column in rows[0]:
        # Folded, never cut: the end of an id or a message can be what matters.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    console.print(table)


def _cell(value: object) -> str:
    """Return a value for a terminal; what an application logged must not reach it as control characters."""
    if value is None:
        return ""
    text = orjson.dumps(value).decode() if isinstance(value, dict | list) else str(value)
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
