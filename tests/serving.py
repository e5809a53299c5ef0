"""Serves an application for real, where streams or a browser matter, and makes tokens for it."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import uvicorn
from helpers import wait_until

from observability.errors.statements import run
from observability.tokens import create

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from observability.api import Streams


@contextlib.contextmanager
def listening(app: FastAPI, streams: Streams) -> Iterator[tuple[str, uvicorn.Server, threading.Thread]]:
    """Serve an application on a free port; yields its address, the server and the server's thread."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, proxy_headers=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server, thread
    finally:
        streams.end()
        server.should_exit = True
        thread.join(60)


def make_token(postgres_uri: str, *scopes: str, name: str = "ann", **options: Any) -> str:
    """Make a token with some scopes."""
    with psycopg.connect(postgres_uri, autocommit=True) as connection:
        return run(connection, create(name, scopes, actor="test", **options)).token
