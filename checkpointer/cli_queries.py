"""The commands `checkpointer queries ...`, and `checkpointer query` from before there were several.

Not here: the queries (`observability/queries/`).
"""

# No `from __future__ import annotations`: see `cli.py`.

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from checkpointer import cli_output
from checkpointer.cli_connections import Common, connect
from observability import queries

if TYPE_CHECKING:
    import typer


def _matching(incomplete: str) -> list[str]:
    return [name for name in queries.names() if name.startswith(incomplete)]


def add_commands(app: "typer.Typer", common: Common) -> None:
    """Add the group `queries` to the command line."""
    import typer

    group = typer.Typer(no_args_is_help=True, help="The queries that come with this package.")
    app.add_typer(group, name="queries")
    name_argument = typer.Argument(help="The name of a query.", show_default=False, autocompletion=_matching)
    param_option = typer.Option("--param", metavar="NAME=VALUE", help="A parameter; may be repeated.")

    @group.command("list")
    def list_queries(as_json: Annotated[bool, common.json] = False) -> None:
        """List the queries, with what each answers and its parameters."""
        rows = [(name, queries.question(name), queries.params(name)) for name in queries.names()]
        if as_json:
            found = [{"name": name, "question": question, "params": params} for name, question, params in rows]
            cli_output.print_json({"count": len(found), "queries": found})
            return
        cli_output.print_table(
            [
                {"name": name, "question": question, "params": " ".join(f"{key}={params[key]}" for key in params)}
                for name, question, params in rows
            ]
        )

    @group.command("run")
    def run_query(
        name: Annotated[str, name_argument],
        param: Annotated[list[str] | None, param_option] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Run a query."""
        _run(name, param or [], as_json, postgres_uri, in_schema)


def add_query(app: "typer.Typer", common: Common) -> None:
    """Add `query` to the command line."""
    import typer

    name_argument = typer.Argument(help="The name of a query.", show_default=False, autocompletion=_matching)
    list_option = typer.Option("--list", help="Print the names of all queries.")

    @app.command()
    def query(
        name: Annotated[str | None, name_argument] = None,
        list_names: Annotated[bool, list_option] = False,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Run one of the queries that come with this package: `queries run` in short."""
        if list_names:
            if as_json:
                cli_output.print_json(queries.names())
            else:
                for one in queries.names():
                    cli_output.print_line(one)
            return
        _run(name, [], as_json, postgres_uri, in_schema)


def _run(name: str | None, params: Sequence[str], as_json: bool, postgres_uri: str | None, schema: str | None) -> None:
    import typer

    if name is None or name not in queries.names():
        raise typer.BadParameter(f"choose one of: {', '.join(queries.names())}", param_hint="NAME")
    given: dict[str, str] = {}
    for param in params:
        key, equals, value = param.partition("=")
        known = queries.params(name)
        if not equals or key not in known:
            said = f"choose of: {', '.join(known)}" if known else f"{name} has none"
            raise typer.BadParameter(f"{param!r} is not NAME=VALUE of a parameter: {said}", param_hint="--param")
        given[key] = value
    with connect(postgres_uri, schema) as conn:
        rows = queries.run(conn, name, given) if given else queries.run(conn, name)
    if as_json:
        cli_output.print_json(rows)
    else:
        cli_output.print_table(rows)
