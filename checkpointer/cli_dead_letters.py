"""The commands `checkpointer dead-letters ...`.

Not here: what they do (`flush/dead_letters.py`), and how a command connects (`cli_connections.py`) and prints
(`cli_output.py`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import psycopg
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from psycopg.rows import dict_row

from checkpointer import cli_output
from checkpointer.cli_connections import Common, connect, open_saver, who
from checkpointer.flush.dead_letters import DeadLetter, listing, one_of, read, showing
from checkpointer.options import BufferOptions
from checkpointer.store.reads import Query

if TYPE_CHECKING:
    import typer


def make_app(common: Common) -> "typer.Typer":
    """Return the commands."""
    import typer

    app = typer.Typer(no_args_is_help=True, help="Records that Postgres refused, and that wait for a decision.")
    thread_option = typer.Option("--thread", help="Only those of this thread.")
    resolved_option = typer.Option("--resolved", help="Resolved ones too.")
    limit_option = typer.Option(min=1, help="At most so many.")
    id_argument = typer.Argument(help="The number of a dead letter.", show_default=False)
    all_option = typer.Option("--all", help="All unresolved ones.")
    default_prefix = BufferOptions().prefix

    def echo(letters: Sequence[DeadLetter], as_json: bool) -> None:
        if as_json:
            cli_output.print_json([_fields(letter) for letter in letters])
        else:
            cli_output.print_table([_line(letter) for letter in letters])

    @app.command("list")
    def list_letters(
        thread_id: Annotated[str | None, thread_option] = None,
        resolved: Annotated[bool, resolved_option] = False,
        limit: Annotated[int, limit_option] = 100,
        as_json: Annotated[bool, common.json] = False,
        prefix: Annotated[str, common.prefix] = default_prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """List dead letters, the newest first."""
        with connect(postgres_uri, in_schema) as conn:
            echo([read(row) for row in _rows(conn, listing(prefix, thread_id, limit, resolved))], as_json)

    @app.command()
    def show(
        letter_id: Annotated[int, id_argument],
        as_json: Annotated[bool, common.json] = False,
        prefix: Annotated[str, common.prefix] = default_prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Show one dead letter with what its record holds: a part of the thread's state."""
        with connect(postgres_uri, in_schema) as conn:
            letter = read(one_of(_rows(conn, showing(prefix, letter_id)), letter_id), JsonPlusSerializer())
        if as_json:
            cli_output.print_json(_fields(letter) | {"content": _shown(letter.content)})
        else:
            cli_output.print_table([{"field": key, "value": value} for key, value in _fields(letter).items()])
            cli_output.print_json(_shown(letter.content))

    @app.command()
    def replay(
        letter_id: Annotated[int | None, id_argument] = None,
        all_letters: Annotated[bool, all_option] = False,
        by: Annotated[str | None, common.by] = None,
        as_json: Annotated[bool, common.json] = False,
        prefix: Annotated[str, common.prefix] = default_prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Try a record again, with all that waits behind it; exit with 1 if one is refused again."""
        if (letter_id is None) is not all_letters:
            raise typer.BadParameter("give either the number of a dead letter or --all", param_hint="ID")
        with open_saver(postgres_uri, redis_url, prefix, in_schema) as saver:
            letters = saver.dead_letters.replay(letter_id, resolved_by=by or who())
        echo(letters, as_json)
        if any(letter.resolution is None for letter in letters):
            raise typer.Exit(1)

    @app.command()
    def drop(
        letter_id: Annotated[int, id_argument],
        by: Annotated[str | None, common.by] = None,
        as_json: Annotated[bool, common.json] = False,
        prefix: Annotated[str, common.prefix] = default_prefix,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Give a record up, so that the rest of its thread is saved; exit with 1 if it was resolved otherwise."""
        with open_saver(postgres_uri, redis_url, prefix, in_schema) as saver:
            letter = saver.dead_letters.drop(letter_id, resolved_by=by or who())
        echo([letter], as_json)
        if letter.resolution != "dropped":
            raise typer.Exit(1)

    return app


def _rows(conn: psycopg.Connection[Any], query: Query) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cur:
        return cur.execute(query.sql.encode(), query.params).fetchall()


def _fields(letter: DeadLetter) -> dict[str, Any]:
    fields = asdict(letter)
    del fields["content"]
    return fields


def _line(letter: DeadLetter) -> dict[str, Any]:
    fields = _fields(letter) | {"created_at": letter.created_at.isoformat(" ", "seconds")}
    names = ("id", "thread_id", "kind", "checkpoint_id", "error_message", "attempts", "created_at", "resolution")
    return {name: fields[name] for name in names}


def _shown(content: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value if _fits_json(value) else repr(value) for name, value in (content or {}).items()}


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
