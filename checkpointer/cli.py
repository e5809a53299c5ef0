"""The command line, `checkpointer <command>`: for people and for deployment scripts.

Not here: the groups of commands (`cli_*.py`), what the commands do (the modules that they call) and anything that the
Python interface lacks.
Every command but `demo` reads `POSTGRES_URI` and `REDIS_URL`, or `--postgres-uri` and `--redis-url`, even one that
needs only the first, so that one set of arguments fits all of them.

`--schema` or `CHECKPOINTER_SCHEMA` names the Postgres schema of a saver that has one.

Exit codes: 0 done; 1 it failed, with one line on standard error, or a check found something; 2 wrong usage; 130 ended
by Ctrl-C.
"""

# No `from __future__ import annotations`: typer is optional and imported inside a function, and it could not
# look up there what the annotations of the commands refer to.

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import psycopg
from redis.exceptions import RedisClusterException, RedisError

from checkpointer import (
    cli_dead_letters,
    cli_demo,
    cli_errors,
    cli_flush,
    cli_logs,
    cli_output,
    cli_queries,
    cli_serve,
    cli_threads,
)
from checkpointer import doctor as examination
from checkpointer.checks import Finding
from checkpointer.cli_connections import Common, check_postgres_uri, check_redis_url, connect, reporting
from checkpointer.errors import CheckpointerError, ConfigurationError
from checkpointer.flush import abandon
from checkpointer.options import BufferOptions
from checkpointer.store import schema
from checkpointer.worker import Worker
from observability import backlog

if TYPE_CHECKING:
    import redis
    import typer

__all__ = ["main"]


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    cli_output.tolerate_any_text()
    # What a command has to say it says itself; `worker` and `serve` log.
    logging.getLogger("checkpointer").addHandler(logging.NullHandler())
    try:
        app = _app()
    except ModuleNotFoundError as exc:
        if exc.name not in ("typer", "rich"):
            raise
        cli_output.fail('The command line needs: pip install "langgraph-checkpoint-buffered[cli]"', 2)
    try:
        with cli_output.written():
            app(prog_name="checkpointer")
    except CheckpointerError as exc:
        cli_output.fail(str(exc))
    except psycopg.Error as exc:
        cli_output.fail(f"Postgres: {exc.diag.message_primary or exc}")
    except (RedisError, RedisClusterException) as exc:
        cli_output.fail(f"Redis: {exc}")
    except UnicodeEncodeError:
        cli_output.fail("An argument is not text in UTF-8, as all ids and names are.", 2)


def _app() -> "typer.Typer":
    import rich  # noqa: F401 - looked for here, so that a command does not fail half-way
    import typer

    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    defaults = BufferOptions()
    common = Common()
    check_option = typer.Option("--check", help="Change nothing; exit with 1 if anything is pending.")
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
    drained_option = typer.Option("--json", help="Print at the end as JSON what is left in the buffer.")
    http_option = typer.Option(
        metavar="HOST:PORT", help="Where to answer /healthz, /readyz and /metrics.", show_default="nowhere"
    )

    @app.callback()
    def about() -> None:
        """LangGraph checkpoints: a Redis buffer in front of Postgres."""

    @app.command()
    def migrate(
        check: Annotated[bool, check_option] = False,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Create or update the tables in Postgres; safe to run again and from many machines at once."""
        with connect(postgres_uri, in_schema) as conn:
            names = schema.pending(conn)
            if not check:
                with cli_output.progress("Migrating", len(names), quiet=as_json) as advance:
                    names = schema.setup(conn, schema=in_schema or None, on_applied=_counting(advance))
        if as_json:
            cli_output.print_json({"pending": names if check else [], "applied": [] if check else names})
        else:
            for name in names:
                cli_output.print_line(f"{'pending' if check else 'applied'}: {name}")
            if not names:
                cli_output.print_line("Nothing is pending.")
        if check and names:
            raise typer.Exit(1)

    cli_queries.add_query(app, common)

    buffer = typer.Typer(no_args_is_help=True, help="What the buffer holds.")
    app.add_typer(buffer, name="buffer")
    yes_option = typer.Option("--yes", help="Do it; without this the threads are only listed.")

    @buffer.callback()
    def about_buffer() -> None:
        """What the buffer holds."""

    @buffer.command("abandon")
    def abandon_buffer(
        prefix: Annotated[str, common.prefix] = "checkpointer",
        yes: Annotated[bool, yes_option] = False,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Give up a Redis that is gone for good: threads go on from their latest checkpoint in Postgres."""
        with connect(postgres_uri, in_schema) as conn:
            if yes:
                with reporting(postgres_uri or "", prefix, in_schema) as emit:
                    threads = abandon.abandon(conn, prefix, emit)
            else:
                threads = abandon.open_threads(conn, prefix)
        if as_json:
            cli_output.print_json({"threads": threads, "abandoned": yes})
            return
        for thread in threads:
            cli_output.print_line(thread)
        done = "were given up." if yes else "are open. What only Redis has of them is lost with --yes."
        cli_output.print_line(f"{len(threads)} threads {done}")

    @app.command()
    def doctor(
        as_json: Annotated[bool, common.json] = False,
        strict: Annotated[bool, strict_option] = False,
        prefix: Annotated[str, common.prefix] = "checkpointer",
        partitions: Annotated[int, partitions_option] = 32,
        timeout: Annotated[float, timeout_option] = 10.0,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
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
            cli_output.print_json(report.to_dict())
        else:
            _print_report(report)
        if not report or (strict and report.level != "ok"):
            raise typer.Exit(1)

    @app.command()
    def worker(
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        prefix: Annotated[str, common.prefix] = defaults.prefix,
        partitions: Annotated[int | None, noted_partitions_option] = None,
        concurrency: Annotated[int, concurrency_option] = 4,
        flush_age: Annotated[float, age_option] = defaults.flush_age,
        drain_timeout: Annotated[float, drain_option] = 30.0,
        http: Annotated[str | None, http_option] = None,
        hook: Annotated[list[str] | None, hook_option] = None,
        as_json: Annotated[bool, drained_option] = False,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Flush what all applications with this prefix have buffered, until SIGTERM or SIGINT.

        Then it drains: 0 is the exit code if all that was buffered is in Postgres, 1 if something had to stay in Redis.
        Run as many as you like; a second signal ends one at once, and nothing is lost by that.
        """
        check_postgres_uri(postgres_uri)
        redis_url = check_redis_url(redis_url)
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
        if as_json:
            cli_output.print_json(asdict(report))
            raise typer.Exit(0 if report else 1)
        if not report:
            cli_output.fail(str(report))
        cli_output.print_line(str(report))

    cli_flush.add_commands(app, common)
    cli_errors.add_commands(app, common)
    cli_logs.add_commands(app, common)
    cli_threads.add_commands(app, common)
    cli_queries.add_commands(app, common)
    app.add_typer(cli_dead_letters.make_app(common), name="dead-letters")
    cli_serve.add_commands(app, connect, cli_output.print_table)
    cli_demo.add_commands(app)
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
        cli_output.print_line(f"{finding.level:<7}  {' '.join(finding.message.split())}")
        if finding.advice:
            cli_output.print_line(f"{'':<7}  -> {finding.advice}")
    counts = {level: sum(f.level == level for f in report.findings) for level in ("error", "warning")}
    cli_output.print_line(f"{counts['error']} errors, {counts['warning']} warnings.")


def _counting(advance: cli_output.Advance) -> Callable[[str], None]:
    done: Iterator[int] = itertools.count(1)
    return lambda name: advance(next(done))
