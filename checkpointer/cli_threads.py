"""The commands `checkpointer threads ...`: which threads there are, where they live, and what is wrong with them.

Not here: how that is found out (`whereabouts.py`, `observability/errors/`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import psycopg

from checkpointer import cli_output, search_path, whereabouts
from checkpointer.cli_connections import Common, connect, stored_partitions
from checkpointer.errors import ConfigurationError
from checkpointer.options import BufferOptions
from observability.errors import by_thread, reading
from observability.errors.statements import run

if TYPE_CHECKING:
    import typer

_SHOWN_ERRORS = 10
_SHOWN_LINES = 10


def add_commands(app: "typer.Typer", common: Common) -> None:
    """Add the commands to the command line."""
    import typer

    group = typer.Typer(no_args_is_help=True, help="Threads: where they live, and what is wrong with them.")
    app.add_typer(group, name="threads")
    limit_option = typer.Option(min=1, max=whereabouts.LARGEST_LIMIT, help="At most so many.")
    thread_argument = typer.Argument(help="The id of a thread.", show_default=False)
    default_prefix = BufferOptions().prefix

    @group.command("list")
    def list_threads(
        limit: Annotated[int, limit_option] = 100,
        cursor: Annotated[str | None, common.cursor] = None,
        as_json: Annotated[bool, common.json] = False,
        prefix: Annotated[str, common.prefix] = default_prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """List threads by id, with where they live, what waits to be flushed, and how many errors they have."""
        with connect(postgres_uri, in_schema) as conn, _buffer(conn, redis_url, prefix, in_schema) as buffer:
            page = whereabouts.page(conn, buffer, prefix, after=cursor, limit=limit)
            errors = run(conn, by_thread.unresolved([thread.thread_id for thread in page.threads]))
        _tell(page.redis_trouble)
        rows = [_fields(thread, errors) for thread in page.threads]
        if as_json:
            away = page.redis_trouble is not None
            cli_output.print_json(
                {"count": len(rows), "threads": rows, "next_cursor": page.next_after, "redis": "away" if away else "ok"}
            )
            return
        held_up = any(row["dead_letter"] for row in rows)
        lines = [_line(row) | ({"dead_letter": row["dead_letter"]} if held_up else {}) for row in rows]
        cli_output.print_table(lines)
        if page.next_after is not None:
            cli_output.note(f"There are more: --cursor {shlex.quote(page.next_after)}")

    @group.command()
    def show(
        thread_id: Annotated[str, thread_argument],
        as_json: Annotated[bool, common.json] = False,
        prefix: Annotated[str, common.prefix] = default_prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Show one thread: where it lives, its namespaces, its unresolved errors and the end of its log."""
        with connect(postgres_uri, in_schema) as conn, _buffer(conn, redis_url, prefix, in_schema) as buffer:
            found = whereabouts.show(conn, buffer, prefix, thread_id)
            counted = run(conn, by_thread.unresolved([thread_id]))
            errors = run(conn, reading.find(reading.Filters(thread_id=thread_id), limit=_SHOWN_ERRORS)).rows
            lines = run(conn, reading.log(thread_id, limit=_SHOWN_LINES)).rows
        _tell(found.redis_trouble)
        row = _fields(found.thread, counted)
        if found.thread.where == "none" and not (errors or lines or found.thread.opened_at or found.thread.dead_letter):
            raise ConfigurationError(
                f"There is no thread {thread_id!r}: see `checkpointer threads list`, and --prefix and --schema."
            )
        size = {"blobs": found.blobs, "writes": found.writes, "bytes": found.bytes}
        namespaces = [asdict(namespace) for namespace in found.namespaces]
        if as_json:
            away = found.redis_trouble is not None
            more = {"namespaces": namespaces, "latest_errors": errors, "latest_log_lines": lines}
            cli_output.print_json(row | size | more | {"redis": "away" if away else "ok"})
            return
        cli_output.print_fields(row | size)
        for title, rows in (
            ("Namespaces in Postgres", namespaces),
            ("Unresolved errors", [_only(error, "id", "created_at", "severity", "error_message") for error in errors]),
            ("Log", [_only(line, "created_at", "level", "message") for line in lines]),
        ):
            if rows:
                cli_output.print_line()
                cli_output.print_line(title)
                cli_output.print_table(rows)


def _buffer(
    conn: psycopg.Connection[Any], redis_url: str | None, prefix: str, schema: str | None
) -> whereabouts.Buffer:
    number = stored_partitions(conn, prefix)
    return whereabouts.Buffer(redis_url or None, search_path.key_prefix(prefix, schema or None), number)


def _tell(trouble: str | None) -> None:
    if trouble is not None:
        cli_output.note(
            f"Redis cannot be asked ({trouble}): only what Postgres knows is shown, and what waits in Redis is not."
        )


def _fields(thread: whereabouts.Thread, errors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return asdict(thread) | errors.get(thread.thread_id, {"errors": 0, "worst_severity": None})


def _line(row: dict[str, Any]) -> dict[str, Any]:
    count = f"more than {row['checkpoints']}" if row["checkpoints_capped"] else row["checkpoints"]
    unflushed = "?" if row["unflushed"] is None else row["unflushed"]
    worst = f" ({row['worst_severity']})" if row["worst_severity"] else ""
    return {
        "thread_id": row["thread_id"],
        "where": row["where"],
        "checkpoints": count,
        "last_checkpoint_at": row["last_checkpoint_at"],
        "unflushed": unflushed,
        "errors": f"{row['errors']}{worst}",
    }


def _only(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}
