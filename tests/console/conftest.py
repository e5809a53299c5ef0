"""The console on real servers: called in process, or served by a real server where a browser comes."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import uvicorn
from helpers import wait_until
from visits import ADMIN, Visit, visiting

from checkpointer.store import schema
from observability.api import Streams, create_app
from observability.errors.statements import run
from observability.tokens import create

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from fastapi import FastAPI


@pytest.fixture
def api_uri(postgres_uri: str) -> str:
    """A database with all tables."""
    with psycopg.connect(postgres_uri, autocommit=True) as connection:
        schema.setup(connection)
    return postgres_uri


@pytest.fixture
def spool_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spool"
    monkeypatch.setenv("CHECKPOINTER_SPOOL_DIR", str(folder))
    return folder


@pytest.fixture
def make_app(api_uri: str, redis_url: str, prefix: str, spool_dir: Path) -> Callable[..., FastAPI]:
    def make(**options: Any) -> FastAPI:
        defaults = {"postgres_uri": api_uri, "redis_url": redis_url, "prefix": prefix, "admin_token": ADMIN}
        return create_app(**{**defaults, **options})

    return make


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app()


@pytest.fixture
def visit() -> Callable[..., Any]:
    return visiting


@pytest.fixture
async def admin(app: FastAPI) -> AsyncIterator[Visit]:
    """Somebody with every scope."""
    async with visiting(app, ADMIN) as found:
        yield found


@pytest.fixture
def token(api_uri: str) -> Callable[..., str]:
    """Makes a token with some scopes."""

    def make(*scopes: str, name: str = "ann", **options: Any) -> str:
        with psycopg.connect(api_uri, autocommit=True) as connection:
            return run(connection, create(name, scopes, actor="test", **options)).token

    return make


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI, Streams], str]]:
    """Serves an application for real, and returns where."""
    with contextlib.ExitStack() as stack:

        def start(app: FastAPI, streams: Streams) -> str:
            config = uvicorn.Config(app, port=0, log_config=None, access_log=False, proxy_headers=False)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run)
            thread.start()

            def end() -> None:
                streams.end()
                server.should_exit = True
                thread.join(60)

            stack.callback(end)
            wait_until(lambda: server.started)
            return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

        yield start
