"""The commands `checkpointer dead-letters ...`.

Not here: what they do (`flush/dead_letters.py`), and how a command connects and prints (`cli.py`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import getpass
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import psycopg
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from psycopg.rows import dict_row

from checkpointer.errors import ConfigurationError
from checkpointer.flush.dead_letters import DeadLetter, listing, one_of, read, showing
from checkpointer.hooks import STANDARD_HOOKS
from checkpointer.options import BufferOptions
from checkpointer.saver import BufferedPostgresSaver
from checkpointer.store.reads import Query, partitions

if TYPE_CHECKING:
    import typer

Connect = Callable[..., AbstractContextManager[psycopg.Connection[Any]]]

# Whoever replays or drops sees the outcome on the terminal.
_HOOKS = tuple(name for name in STANDARD_HOOKS if name != "console")


def make_app(connect: Connect, print_table: Callable[[Sequence[Mapping[str, Any]]], None]) -> "typer.Typer":
    """Return the commands."""
    import typer

    app = typer.Typer(no_args_is_help=True, help="Records that Postgres refused, and that wait for a decision.")
    postgres_option = typer.Option(envvar="POSTGRES_URI", help="Where Postgres is.", show_default=False)
    redis_option = typer.Option(envvar="REDIS_URL", help="Where Redis is.", show_default=False)
    prefix_option = typer.Option(envvar="CHECKPOINTER_PREFIX", help="The application's key prefix.")
    json_option = typer.Option("--json", help="Print JSON instead of a table.")
    thread_option = typer.Option("--thread", help="Only those of this thread.")
    resolved_option = typer.Option("--resolved", help="Resolved ones too.")
    limit_option = typer.Option(min=1, help="At most so many.")
    by_option = typer.Option("--by", help="Who decides; default: user@host.", show_default=False)
    id_argument = typer.Argument(help="The number of a dead letter.", show_default=False)
    all_option = typer.Option("--all", help="All unresolved ones.")
    default_prefix = BufferOptions().prefix

    def echo(letters: Sequence[DeadLetter], as_json: bool) -> None:
        if as_json:
            typer.echo(_dump([_fields(letter) for letter in letters]))
        else:
            print_table([_line(letter) for letter in letters])

    @app.command("list")
    def list_letters(
        thread_id: Annotated[str | None, thread_option] = None,
        resolved: Annotated[bool, resolved_option] = False,
        limit: Annotated[int, limit_option] = 100,
        as_json: Annotated[bool, json_option] = False,
        prefix: Annotated[str, prefix_option] = default_prefix,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
    ) -> None:
        """List dead letters, the newest first."""
        with connect(postgres_uri) as conn:
            echo([read(row) for row in _rows(conn, listing(prefix, thread_id, limit, resolved))], as_json)

    @app.command()
    def show(
        letter_id: Annotated[int, id_argument],
        as_json: Annotated[bool, json_option] = False,
        prefix: Annotated[str, prefix_option] = default_prefix,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
    ) -> None:
        """Show one dead letter with what its record holds: a part of the thread's state."""
        with connect(postgres_uri) as conn:
            letter = read(one_of(_rows(conn, showing(prefix, letter_id)), letter_id), JsonPlusSerializer())
        if as_json:
            typer.echo(_dump(_fields(letter) | {"content": _shown(letter.content)}))
        else:
            print_table([{"field": key, "value": value} for key, value in _fields(letter).items()])
            typer.echo(_dump(_shown(letter.content)))

    @app.command()
    def replay(
        letter_id: Annotated[int | None, id_argument] = None,
        all_letters: Annotated[bool, all_option] = False,
        by: Annotated[str | None, by_option] = None,
        as_json: Annotated[bool, json_option] = False,
        prefix: Annotated[str, prefix_option] = default_prefix,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
    ) -> None:
        """Try a record again, with all that waits behind it; exit with 1 if one is refused again."""
        if (letter_id is None) is not all_letters:
            raise typer.BadParameter("give either the number of a dead letter or --all", param_hint="ID")
        with _saver(connect, postgres_uri, redis_url, prefix) as saver:
            letters = saver.dead_letters.replay(letter_id, resolved_by=by or who())
        echo(letters, as_json)
        if any(letter.resolution is None for letter in letters):
            raise typer.Exit(1)

    @app.command()
    def drop(
        letter_id: Annotated[int, id_argument],
        by: Annotated[str | None, by_option] = None,
        as_json: Annotated[bool, json_option] = False,
        prefix: Annotated[str, prefix_option] = default_prefix,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
    ) -> None:
        """Give a record up, so that the rest of its thread is saved; exit with 1 if it was resolved otherwise."""
        with _saver(connect, postgres_uri, redis_url, prefix) as saver:
            letter = saver.dead_letters.drop(letter_id, resolved_by=by or who())
        echo([letter], as_json)
        if letter.resolution != "dropped":
            raise typer.Exit(1)

    return app


def _rows(conn: psycopg.Connection[Any], query: Query) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cur:
        return cur.execute(query.sql.encode(), query.params).fetchall()


def _saver(connect: Connect, uri: str | None, redis_url: str | None, prefix: str) -> BufferedPostgresSaver:
    if not redis_url:
        raise ConfigurationError("Say where Redis is: set REDIS_URL or pass --redis-url.")
    with connect(uri) as conn:
        stored = _rows(conn, partitions(prefix))
    if uri is None or not stored:
        raise ConfigurationError(f"No application with the prefix {prefix!r} uses this database: see --prefix.")
    return BufferedPostgresSaver.from_conn_string(
        uri,
        redis_url=redis_url,
        prefix=prefix,
        partitions=stored[0]["partitions"],
        triggers=frozenset(),
        hooks=_HOOKS,
    )


def who() -> str:
    """Return who runs a command, for what keeps who did what."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _fields(letter: DeadLetter) -> dict[str, Any]:
    fields = asdict(letter)
    del fields["content"]
    return fields


def _line(letter: DeadLetter) -> dict[str, Any]:
    fields = _fields(letter) | {"created_at": letter.created_at.isoformat(" ", "seconds")}
    names = ("id", "thread_id", "kind", "checkpoint_id", "error_message", "attempts", "created_at", "resolution")
    return {name: fields[name] for name in names}


def _dump(value: Any) -> str:
    # ASCII only: what an application stored must not reach the terminal as control characters.
    return json.dumps(value, indent=2, default=str).replace("\x7f", "\\u007f")


def _shown(content: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value if _fits_json(value) else repr(value) for name, value in (content or {}).items()}


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
