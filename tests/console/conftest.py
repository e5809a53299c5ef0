"""The console on real servers: called in process, or served by a real server where a browser comes."""

from __future__ import annotations

import contextlib
import re
import threading
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
import uvicorn
from helpers import wait_until

from checkpointer.store import schema
from observability.api import Streams, create_app
from observability.errors.statements import run
from observability.tokens import create

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from fastapi import FastAPI

ADMIN = "an-administrators-token"


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


class Visit:
    """A browser without JavaScript: keeps cookies, follows redirects, sends the forms of pages."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def get(self, path: str, **more: Any) -> httpx.Response:
        return await self.client.get(path, **more)

    async def sign_in(self, token: str, **more: Any) -> httpx.Response:
        return await self.client.post("/console/sign-in", data={"token": token}, **more)

    async def send(
        self, page: str, action: str, headers: dict[str, str] | None = None, **fields: str
    ) -> httpx.Response:
        """Send the form of a page that has this action, filled in."""
        found = await self.client.get(page)
        assert found.status_code == 200, found.text
        forms = [form for form in forms_of(found.text) if form["action"] == action]
        assert len(forms) == 1, (action, [form["action"] for form in forms_of(found.text)])
        return await self.client.post(action, data=forms[0]["fields"] | fields, headers=headers)


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self.found.append({"action": given.get("action"), "fields": {}})
        elif tag == "input" and self.found and given.get("name"):
            self.found[-1]["fields"][given["name"]] = given.get("value") or ""


def forms_of(html: str) -> list[dict[str, Any]]:
    parser = _Forms()
    parser.feed(html)
    return parser.found


def text_of(html: str) -> str:
    """Return what a reader sees, in one line."""
    parser = HTMLParser()
    seen: list[str] = []
    parser.handle_data = seen.append  # type: ignore[method-assign]
    parser.feed(html)
    return re.sub(r"\s+", " ", "".join(seen))


@contextlib.asynccontextmanager
async def visiting(app: FastAPI, token: str | None = None, scheme: str = "http") -> AsyncIterator[Visit]:
    """Visit an application in process; with a token, signed in."""
    transport = httpx.ASGITransport(app, client=("10.0.0.1", 1234))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url=f"{scheme}://test", timeout=60, follow_redirects=True
        ) as client,
    ):
        visit = Visit(client)
        if token is not None:
            answer = await visit.sign_in(token)
            assert answer.status_code == 200, answer.text
        yield visit


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
