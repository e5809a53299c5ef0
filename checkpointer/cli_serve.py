"""The commands `checkpointer serve` and `checkpointer tokens ...`.

Not here: what is served (`observability/api/`), and how a command connects (`cli_connections.py`) and prints
(`cli_output.py`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

from checkpointer import cli_output, search_path
from checkpointer.cli_connections import Connect, check_postgres_uri, who
from checkpointer.errors import ConfigurationError
from observability import tokens
from observability.errors.acting import by_way_of
from observability.errors.statements import run

if TYPE_CHECKING:
    import typer

# Open responses that are not streams get this long at the end.
_GRACE_SECONDS = 5
_HOW = {"way": "command line"}


def add_commands(
    app: "typer.Typer", connect: Connect, print_table: Callable[[Sequence[Mapping[str, Any]]], None]
) -> None:
    """Add the commands to the command line."""
    import typer

    postgres_option = typer.Option(envvar="POSTGRES_URI", help="Where Postgres is.", show_default=False)
    redis_option = typer.Option(envvar="REDIS_URL", help="Where Redis is.", show_default=False)
    schema_option = typer.Option("--schema", envvar="CHECKPOINTER_SCHEMA", help="The saver's schema in Postgres.")
    prefix_option = typer.Option(envvar="CHECKPOINTER_PREFIX", help="The saver's prefix.")
    host_option = typer.Option(help="The address to listen on.")
    port_option = typer.Option(help="The port to listen on; 0 for any.", min=0, max=65_535)
    proxies_option = typer.Option(
        "--proxies",
        help="Addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, separated by commas.",
        show_default="none",
    )
    address_option = typer.Option("--json", help="Print as JSON where it listens, once it does.")
    json_option = typer.Option("--json", help="Print JSON instead of a table.")
    name_argument = typer.Argument(help="Whose it is; stands in the audit.", show_default=False)
    scope_option = typer.Option(
        "--scope", help=f"What it allows; may be repeated: {', '.join(tokens.SCOPES)}.", show_default="read"
    )
    days_option = typer.Option("--days", help="For how many days it is good.", min=1, max=36_500)
    never_option = typer.Option("--never-expires", help="It is good until it is revoked.")
    id_argument = typer.Argument(help="The id of a token.", show_default=False)

    @app.command()
    def serve(
        host: Annotated[str, host_option] = "127.0.0.1",
        port: Annotated[int, port_option] = 8_080,
        proxies: Annotated[str | None, proxies_option] = None,
        as_json: Annotated[bool, address_option] = False,
        prefix: Annotated[str, prefix_option] = "checkpointer",
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Serve the console, errors, thread logs and live events over HTTP, until SIGTERM or SIGINT.

        CHECKPOINTER_ADMIN_TOKEN is a bearer token with every scope; `checkpointer tokens` makes others.
        """
        _serve(host, port, proxies, prefix, postgres_uri, redis_url, in_schema or None, _print_url if as_json else None)

    group = typer.Typer(no_args_is_help=True, help="Bearer tokens of the HTTP interface.")
    app.add_typer(group, name="tokens")

    def echo(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
        if as_json:
            cli_output.print_json(rows)
        else:
            print_table([{name: _cell(value) for name, value in row.items()} for row in rows])

    @group.command("create")
    def create_token(
        name: Annotated[str, name_argument],
        scope: Annotated[list[str] | None, scope_option] = None,
        days: Annotated[int, days_option] = 90,
        never_expires: Annotated[bool, never_option] = False,
        as_json: Annotated[bool, json_option] = False,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Make a token and print it; it cannot be shown again."""
        expires_at = None if never_expires else datetime.now(UTC) + timedelta(days=days)
        with connect(postgres_uri, in_schema) as conn:
            act = tokens.create(name, scope or ["read"], actor=who(), expires_at=expires_at)
            made = run(conn, by_way_of(_HOW, act))
        if as_json:
            cli_output.print_json({"id": made.id, "token": made.token})
        else:
            typer.echo(made.token)

    @group.command("list")
    def list_tokens(
        as_json: Annotated[bool, json_option] = False,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """List tokens, without what makes them worth something."""
        with connect(postgres_uri, in_schema) as conn:
            rows = run(conn, tokens.listing())
        echo(rows, as_json)

    @group.command("revoke")
    def revoke_token(
        token_id: Annotated[str, id_argument],
        as_json: Annotated[bool, json_option] = False,
        postgres_uri: Annotated[str | None, postgres_option] = None,
        redis_url: Annotated[str | None, redis_option] = None,
        in_schema: Annotated[str | None, schema_option] = None,
    ) -> None:
        """Make a token worthless from now on."""
        with connect(postgres_uri, in_schema) as conn:
            row = run(conn, by_way_of(_HOW, tokens.revoke(token_id, actor=who())))
        if row is None:
            raise ConfigurationError(f"There is no token with the id {token_id!r}: see `checkpointer tokens list`.")
        echo([row], as_json)


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(" ", "seconds")
    return ", ".join(value) if isinstance(value, list) else value


def _url(address: Sequence[Any]) -> str:
    host, port = address[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _print_url(address: Sequence[Any]) -> None:
    cli_output.print_json_line({"url": _url(address)})


def _tell_console(address: Sequence[Any]) -> None:
    """Say where the console is, of a server that listens there."""
    log = logging.getLogger("checkpointer")
    if find_spec("jinja2") is None:
        log.info('there is no console: pip install "langgraph-checkpoint-buffered[console]"')
        return
    log.info("the console is at %s/console/", _url(address))


def _serve(
    host: str,
    port: int,
    proxies: str | None,
    prefix: str,
    uri: str | None,
    redis_url: str | None,
    schema: str | None,
    tell: Callable[[Sequence[Any]], None] | None,
) -> None:
    from observability.api import Streams, create_app

    try:
        import uvicorn
    except ModuleNotFoundError as exc:
        raise ConfigurationError('`serve` needs: pip install "langgraph-checkpoint-buffered[api]"') from exc

    uri = check_postgres_uri(uri)
    if schema is not None:
        search_path.check_name(schema)
    streams = Streams()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            try:
                await super().startup(sockets)
            except SystemExit as exc:
                raise ConfigurationError(
                    f"The address {host}:{port} cannot be listened on: see the log above, --host and --port."
                ) from exc
            addresses = [running.sockets[0].getsockname() for running in self.servers]
            if tell is not None:
                tell(addresses[0])
            for address in addresses:
                _tell_console(address)

        def handle_exit(self, sig: int, frame: Any) -> None:
            # Before it waits for the open responses, of which streams would not end.
            streams.end()
            super().handle_exit(sig, frame)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    token = os.environ.get("CHECKPOINTER_ADMIN_TOKEN") or None
    if token is None:
        logging.getLogger("checkpointer").warning(
            "CHECKPOINTER_ADMIN_TOKEN is not set: only tokens made by `checkpointer tokens create` are taken"
        )
    app = create_app(
        postgres_uri=uri, redis_url=redis_url, admin_token=token, prefix=prefix, schema=schema, streams=streams
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        # A line for each request would hold the tickets of streams.
        access_log=False,
        server_header=False,
        proxy_headers=proxies is not None,
        forwarded_allow_ips=proxies,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        log_config=None,
    )
    # The server ends by raising the signal once more, which is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    Server(config).run()
