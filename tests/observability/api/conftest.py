"""The application on real servers: called in process, or served by a real server where streams matter."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
from serving import listening, make_token

from checkpointer.store import schema
from observability.api import Streams, create_app

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    import uvicorn
    from fastapi import FastAPI

ADMIN = "an-administrators-token"


@dataclass
class Served:
    """An application under a real server.

    Attributes:
        url: Where it is.
        streams: Its open streams.
        server: Set `should_exit` to have it shut down.
        thread: It runs in this one.
    """

    url: str
    streams: Streams
    server: uvicorn.Server
    thread: threading.Thread
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {ADMIN}"})

    def lines(self, path: str, **headers: str) -> contextlib.AbstractContextManager[Iterator[str]]:
        """Open a stream and return its lines."""
        return _lines(f"{self.url}{path}", self.headers | headers)


@contextlib.contextmanager
def _lines(url: str, headers: dict[str, str]) -> Iterator[Iterator[str]]:
    with httpx.stream("GET", url, headers=headers, timeout=60) as response:
        assert response.status_code == 200, response.read()
        yield response.iter_lines()


@pytest.fixture
def api_uri(postgres_uri: str) -> str:
    """A database with all tables."""
    with psycopg.connect(postgres_uri, autocommit=True) as connection:
        schema.setup(connection)
    return postgres_uri


@pytest.fixture
def make_app(api_uri: str, redis_url: str, prefix: str, spool_dir: Path) -> Callable[..., FastAPI]:
    def make(**options: Any) -> FastAPI:
        defaults = {"postgres_uri": api_uri, "redis_url": redis_url, "prefix": prefix, "admin_token": ADMIN}
        return create_app(**{**defaults, **options})

    return make


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app()


@contextlib.asynccontextmanager
async def calling(app: FastAPI, address: str = "10.0.0.1", **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """Call an application in process."""
    # What is raised in the application is what a server would make a 500 of; no test may see one by accident.
    transport = httpx.ASGITransport(app, client=(address, 1234))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers, timeout=60) as client,
    ):
        yield client


@pytest.fixture
def call() -> Callable[..., Any]:
    return calling


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """An administrator with every scope."""
    async with calling(app, Authorization=f"Bearer {ADMIN}") as found:
        yield found


@pytest.fixture
def token(api_uri: str) -> Callable[..., str]:
    """Makes a token with some scopes."""
    return functools.partial(make_token, api_uri)


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI, Streams], Served]]:
    with contextlib.ExitStack() as stack:

        def start(app: FastAPI, streams: Streams) -> Served:
            url, server, thread = stack.enter_context(listening(app, streams))
            return Served(url, streams, server, thread)

        yield start


@pytest.fixture
def served(make_app: Callable[..., FastAPI], serve: Callable[[FastAPI, Streams], Served]) -> Served:
    streams = Streams()
    return serve(make_app(streams=streams), streams)
