"""The command line, `checkpointer <command>`: for people and for deployment scripts.

Not here: what the commands do (the modules that they call) and anything that the Python interface lacks.
Every command reads `POSTGRES_URI` and `REDIS_URL`, or `--postgres-uri` and `--redis-url`, even one that needs
only the first, so that one set of arguments fits all of them.

`--schema` or `CHECKPOINTER_SCHEMA` names the Postgres schema of a saver that has one.

Exit codes: 0 done; 1 it failed, with one line on standard error, or a check found something; 2 wrong usage.
"""

# No `from __future__ import annotations`: typer is optional and imported inside a function, and it could not
# look up there what the annotations of the commands refer to.

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from checkpointer import cli_dead_letters, cli_serve, search_path
from checkpointer import doctor as examination
from checkpointer.checks import Finding
from checkpointer.errors import CheckpointerError, ConfigurationError, NotSetUpError, StoreUnavailableError
from checkpointer.events import CheckpointEvent
from checkpointer.flush import abandon
from checkpointer.hooks import HookContext, Hooks, load_hook
from checkpointer.options import BufferOptions
from checkpointer.store import schema
from checkpointer.worker import Worker
from observability import backlog, queries

if TYPE_CHECKING:
    import redis
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
    defaults = BufferOptions()
    postgres_option = typer.Option(envvar="POSTGRES_URI", help="Where Postgres is.", show_default=False)
    redis_option = typer.Option(envvar="REDIS_URL", help="Where Redis is.", show_default=False)
    schema_option = typer.Option("--schema", envvar="CHECKPOINTER_SCHEMA", help="The saver's schema in Postgres.")
    check_option = typer.Option("--check", help="Change nothing; exit with 1 if anything is pending.")
    name_argument = typer.Argument(help="The name of a query.", show_default=False)
    list_option = typer.Option("--list", help="Print the names of all queries.")
    json_option = typer.Option("--json", help="Print JSON instead of a table.")
    prefix_option = typer.Option(envvar="CHECKPOINTER_PREFIX", help="The saver's prefix.")
    partitions_option = typer.Option(help="The saver's number of partitions.")
    strict_option = typer.Option("--strict", help="Exit with 1 also if there are only warnings.")
    timeout_option = typer.Option(help="Seconds to wait for each server.", min=0.1)
    noted_partitions_option = typer.Option(
        help="The application's number of partitions.", show_default="what Postgres has noted for the prefix, or 32"
    )
    concurrency_option = typer.Option(help="How many threads flush, each with a connection to Postgres of its own.")
    age_option = typer.Option(help="Flush what has waited for so many seconds.")
    drain_option = typer.Option(help="For how many seconds to drain at the end.")
    hook_option = typer.Option("--hook", help="A hook beside the standard ones, by name; can be given again.")
    http_option = typer.Option(
        metavar="HOST:PORT", help="Where to answer /healthz, /readyz and /metrics.", show_default="nowhere"
    )

    @app.callback()
    def about() -> None:
        """LangGraph checkpoints: a Redis buffer in front of Postgres."""

    @app.command()
    def migrate(
        check: Annotated[bool, check_option] = False,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Create or update the tables in Postgres; safe to run again and from many machines at once."""
        with _connect(postgres_uri, in_schema) as conn:
            names = schema.pending(conn) if check else schema.setup(conn, schema=in_schema or None)
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
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Run one of the queries that come with this package."""
        if list_names:
            typer.echo("\n".join(queries.names()))
            return
        if name is None or name not in queries.names():
            raise typer.BadParameter(f"choose one of: {', '.join(queries.names())}", param_hint="NAME")
        with _connect(postgres_uri, in_schema) as conn:
            rows = queries.run(conn, name)
        if as_json:
            typer.echo(orjson.dumps(rows, default=str, option=orjson.OPT_INDENT_2))
        else:
            _print_table(rows)

    buffer = typer.Typer(no_args_is_help=True, help="What the buffer holds.")
    app.add_typer(buffer, name="buffer")
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
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Give up a Redis that is gone for good: threads go on from their latest checkpoint in Postgres."""
        with _connect(postgres_uri, in_schema) as conn:
            if not yes:
                threads = abandon.open_threads(conn, prefix)
                for thread in threads:
                    typer.echo(_cell(thread))
                typer.echo(f"{len(threads)} threads are open. What only Redis has of them is lost with --yes.")
                return
            with _reporting(postgres_uri or "", prefix, in_schema) as emit:
                threads = abandon.abandon(conn, prefix, emit)
        for thread in threads:
            typer.echo(_cell(thread))
        typer.echo(f"{len(threads)} threads were given up.")

    @app.command()
    def doctor(
        as_json: Annotated[bool, json_option] = False,
        strict: Annotated[bool, strict_option] = False,
        prefix: Annotated[str, prefix_option] = "checkpointer",
        partitions: Annotated[int, partitions_option] = 32,
        timeout: Annotated[float, timeout_option] = 10.0,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Check both servers and what lies between them, and say what to do; exit with 1 if there is an error."""
        try:
            options = BufferOptions(prefix=prefix, partitions=partitions, schema=in_schema or None)
        except ConfigurationError as exc:
            raise typer.BadParameter(str(exc)) from exc
        report = examination.diagnose(
            postgres_uri,
            redis_url,
            options=options,
            timeout=timeout,
            also=lambda client: _streamed(client, options.key_prefix),
        )
        report += _spooled()
        if as_json:
            typer.echo(orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2))
        else:
            _print_report(report)
        if not report or (strict and report.level != "ok"):
            raise typer.Exit(1)

    @app.command()
    def worker(
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
        prefix: Annotated[str, prefix_option] = defaults.prefix,
        partitions: Annotated[int | None, noted_partitions_option] = None,
        concurrency: Annotated[int, concurrency_option] = 4,
        flush_age: Annotated[float, age_option] = defaults.flush_age,
        drain_timeout: Annotated[float, drain_option] = 30.0,
        http: Annotated[str | None, http_option] = None,
        hook: Annotated[list[str] | None, hook_option] = None,
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Flush what all applications with this prefix have buffered, until SIGTERM or SIGINT.

        Then it drains: 0 is the exit code if all that was buffered is in Postgres, 1 if something had to stay in Redis.
        Run as many as you like; a second signal ends one at once, and nothing is lost by that.
        """
        _check_uri(postgres_uri)
        if not redis_url:
            raise ConfigurationError("Say where Redis is: set REDIS_URL or pass --redis-url.")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        report = Worker(
            postgres_uri or "",
            redis_url,
            partitions=partitions,
            concurrency=concurrency,
            drain_timeout=drain_timeout,
            http=http,
            prefix=prefix,
            flush_age=flush_age,
            schema=in_schema or None,
            hooks=(*defaults.hooks, *(hook or ())),
        ).run()
        if not report:
            _fail(str(report), 1)
        typer.echo(str(report))

    app.add_typer(cli_dead_letters.make_app(_connect, _print_table), name="dead-letters")
    cli_serve.add_commands(app, _connect, _print_table)
    return app


def _streamed(client: "redis.Redis | redis.RedisCluster", prefix: str) -> list[Finding]:
    if not (count := backlog.streamed(client, prefix)):
        return [Finding("ok", "reports.redis", "No error report or log line waits in Redis.")]
    return [
        Finding(
            "warning",
            "reports.redis",
            f"{count} error reports and log lines wait in Redis for Postgres.",
            "They are moved by the next saver or worker with this prefix that finds Postgres well.",
        )
    ]


def _spooled() -> list[Finding]:
    found = []
    for path, count in backlog.spooled().items():
        if count is None:
            said = f"{path} cannot be read: it is damaged, or belongs to somebody else."
            found.append(Finding("warning", "reports.spool", said, "Look at the file."))
        elif count:
            said = f"{count} error reports and log lines wait in {path}."
            advice = "They are moved by the next process of this user that opens a saver with the same addresses."
            found.append(Finding("warning", "reports.spool", said, advice))
    return found or [Finding("ok", "reports.spool", "No error report or log line waits in a file of this user.")]


def _print_report(report: examination.Report) -> None:
    """Print a finding a line, with what to do about it below, and a summary."""
    for finding in report.findings:
        sys.stdout.write(f"{finding.level:<7}  {_cell(' '.join(finding.message.split()))}\n")
        if finding.advice:
            sys.stdout.write(f"{'':<7}  -> {finding.advice}\n")
    counts = {level: sum(f.level == level for f in report.findings) for level in ("error", "warning")}
    sys.stdout.write(f"{counts['error']} errors, {counts['warning']} warnings.\n")


def _check_uri(uri: str | None) -> dict[str, Any]:
    """Return the parts of a connection string.

    Raises:
        ConfigurationError: There is none, or it cannot be read.
    """
    if not uri:
        raise ConfigurationError("Say where Postgres is: set POSTGRES_URI or pass --postgres-uri.")
    try:
        return conninfo_to_dict(uri)
    except psycopg.ProgrammingError:
        # Without the parser's words and as cause: they quote the URI, which can hold a password.
        raise ConfigurationError("POSTGRES_URI or --postgres-uri is not a valid connection string.") from None


@contextlib.contextmanager
def _reporting(postgres_uri: str, prefix: str, schema: str | None) -> Iterator[Callable[[CheckpointEvent], None]]:
    """Report events to the thread's log and the table of errors."""

    def connect() -> psycopg.Connection[Any]:
        return psycopg.connect(postgres_uri, autocommit=True, row_factory=dict_row, **_settings(postgres_uri, schema))

    def no_redis() -> NoReturn:
        raise ConnectionError("this command works without Redis")

    keys = search_path.key_prefix(prefix, schema or None)
    context = HookContext(connect_postgres=connect, connect_redis=no_redis, prefix=keys, identity="command-line")
    hooks = Hooks()
    for name in ("thread_log", "system_errors"):
        hooks.add(load_hook(name, context), name=name)
    try:
        yield hooks.emit
        hooks.flush(_CONNECT_SECONDS)
    finally:
        hooks.close()


@contextlib.contextmanager
def _connect(uri: str | None, schema: str | None = None) -> Iterator[psycopg.Connection[Any]]:
    """Open an autocommit connection.

    Raises:
        ConfigurationError: There is no usable URI.
        NotSetUpError: What is done with the connection met a missing table.
        StoreUnavailableError: The server did not answer or let nobody in.
    """
    _check_uri(uri)
    try:
        settings = _settings(uri or "", schema)
        conn = psycopg.connect(uri or "", autocommit=True, **settings)
    except psycopg.OperationalError as exc:
        raise StoreUnavailableError(f"Postgres cannot be reached: {exc}") from exc
    with conn:
        try:
            yield conn
        except psycopg.errors.UndefinedTable as exc:
            raise NotSetUpError(
                f"Tables are missing ({exc.diag.message_primary}): run `checkpointer migrate`."
            ) from exc


def _settings(uri: str, schema: str | None) -> dict[str, Any]:
    """Return what is added to a connection string: a limit for connecting, and the schema."""
    given = conninfo_to_dict(uri)
    settings: dict[str, Any] = {"connect_timeout": given.get("connect_timeout") or _CONNECT_SECONDS}
    if schema:
        search_path.check_name(schema)
        options = given.get("options")
        settings["options"] = search_path.with_search_path(None if options is None else str(options), schema)
    return settings


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
