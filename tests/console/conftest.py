"""The console on real servers: called in process, or served by a real server where a browser comes."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from serving import listening, make_token
from visits import ADMIN, Visit, visiting

from checkpointer.store import schema
from observability.api import Streams, create_app

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
    return functools.partial(make_token, api_uri)


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI, Streams], str]]:
    """Serves an application for real, and returns where."""
    with contextlib.ExitStack() as stack:
        yield lambda app, streams: stack.enter_context(listening(app, streams))[0]
