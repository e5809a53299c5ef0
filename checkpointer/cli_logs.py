"""The command `checkpointer logs THREAD`: the log of a thread, once or as it grows.

Not here: how lines are stored and found (`observability/`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import contextlib
import shlex
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from checkpointer import cli_output
from checkpointer.cli_connections import Common, check_postgres_uri, connect
from checkpointer.cli_follow import follow
from checkpointer.errors import StoreUnavailableError
from checkpointer.options import BufferOptions
from observability.errors import reading
from observability.errors.statements import run
from observability.following import log_source
from observability.logs import as_line
from observability.target import open_target

if TYPE_CHECKING:
    import typer


def add_commands(app: "typer.Typer", common: Common) -> None:
    """Add the command to the command line."""
    import typer

    thread_argument = typer.Argument(help="The id of a thread.", show_default=False)
    lines_option = typer.Option("--lines", "-n", min=0, max=reading.LARGEST_LIMIT, help="How many of the last lines.")
    follow_option = typer.Option("--follow", "-f", help="Go on with each new line, until Ctrl-C.")
    json_option = typer.Option("--json", help="Print JSON; with --follow an object on each line.")

    @app.command()
    def logs(
        thread_id: Annotated[str, thread_argument],
        lines: Annotated[int, lines_option] = 100,
        follow_on: Annotated[bool, follow_option] = False,
        cursor: Annotated[str | None, common.cursor] = None,
        as_json: Annotated[bool, json_option] = False,
        prefix: Annotated[str, common.prefix] = BufferOptions().prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Show the log of a thread, the oldest line first.

        With Postgres away it shows what Redis still has of the last ten minutes, and says so.
        """
        if follow_on:
            if cursor is not None:
                raise typer.BadParameter("a page cannot be followed", param_hint="--cursor")
            show = cli_output.print_json_line if as_json else _print_at_once
            follow(
                log_source(thread_id),
                lines,
                postgres_uri=postgres_uri,
                schema=in_schema,
                clean=as_line,
                show=show,
            )
            return
        if lines == 0:
            raise typer.BadParameter("without --follow there is nothing to show then", param_hint="--lines")
        next_cursor = None
        try:
            with connect(postgres_uri, in_schema) as conn:
                page = run(conn, reading.log(thread_id, limit=lines, cursor=cursor))
            found, next_cursor = [as_line(row) for row in page.rows], page.next_cursor
            complete = True
        except StoreUnavailableError as exc:
            if not redis_url or cursor is not None:
                raise
            try:
                found, complete = _kept(thread_id, lines, postgres_uri, redis_url, prefix, in_schema), False
            except StoreUnavailableError as gone:
                raise StoreUnavailableError(f"{exc} Nor can Redis, which has the last ten minutes.") from gone
            cli_output.note(f"{exc} Only what Redis has of the last ten minutes is shown.")
        if as_json:
            cli_output.print_json(
                {"count": len(found), "lines": found, "next_cursor": next_cursor, "complete": complete}
            )
            return
        for line in found:
            _print(line)
        if next_cursor is not None:
            cli_output.note(f"There are earlier ones: --cursor {shlex.quote(next_cursor)}")


def _kept(
    thread_id: str, lines: int, postgres_uri: str | None, redis_url: str, prefix: str, schema: str | None
) -> list[dict[str, Any]]:
    target = open_target(check_postgres_uri(postgres_uri), redis_url, prefix=prefix, schema=schema or None)
    with contextlib.closing(target):
        return target.log.tail(thread_id, lines)


def _print(line: dict[str, Any]) -> None:
    time = line["created_at"] and datetime.fromisoformat(line["created_at"])
    # A line of the log stays one, whatever was written to it.
    cli_output.print_line(f"{cli_output.plain(time)}  {line['level']:<8}  {line['message']}")


def _print_at_once(line: dict[str, Any]) -> None:
    _print(line)
    sys.stdout.flush()
