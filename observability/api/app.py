"""An application of its own: all routes, with bearer tokens, for `checkpointer serve` or any ASGI server.

Not here: the server (`checkpointer/cli_serve.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

import contextlib
import os
from collections.abc import AsyncIterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from observability.api.admin import create_admin_router
from observability.api.authentication import BearerTokens
from observability.api.health import create_health_router
from observability.api.principals import Principal
from observability.api.problems import problem, remember_principal, response_to
from observability.api.store import Store
from observability.api.streams import Streams
from observability.api.threads import create_thread_router
from observability.api.tickets import Tickets
from observability.target import open_target

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def create_app(
    *,
    postgres_uri: str | None = None,
    redis_url: str | None = None,
    admin_token: str | None = None,
    prefix: str = "checkpointer",
    schema: str | None = None,
    streams: Streams | None = None,
    tickets: Tickets | None = None,
    registry: "CollectorRegistry | None" = None,
) -> FastAPI:
    """Make an application with the routes for administrators, threads and health.

    Every route but `/healthz`, `/readyz` and `/openapi.json` needs a bearer token; those of threads and `/metrics`
    the scope `read`.

    Args:
        postgres_uri: Where Postgres is; by default POSTGRES_URI.
        redis_url: Where Redis is, for live events; without it they come by Postgres alone.
        admin_token: A ready token with every scope.
        prefix: The saver's.
        schema: The saver's.
        streams: To end the open streams from outside.
        tickets: For streams in a browser, with a key if several processes serve the same clients.
        registry: What `/metrics` shows; by default prometheus-client's own.

    With the extra `console` installed, the console is at `/console`.

    Raises:
        ConfigurationError: There is no connection string, or one that cannot be read.
    """
    streams = streams or Streams()
    tickets = tickets or Tickets()
    postgres_uri = postgres_uri or os.environ.get("POSTGRES_URI") or None
    schema = schema or os.environ.get("CHECKPOINTER_SCHEMA") or None
    store = Store(postgres_uri, schema=schema)
    authorize = BearerTokens(store, admin_token=admin_token)
    target = open_target(postgres_uri, redis_url, prefix=prefix, schema=schema)

    async def authorize_thread(request: Request, principal: Annotated[Principal, Depends(authorize)]) -> None:
        remember_principal(request, principal.name)
        if "read" not in principal.scopes:
            raise HTTPException(403, "This needs the scope 'read'.")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            target.close()

    async def answer(request: Request, exc: Exception) -> Response:
        return response_to(exc) or problem(500, "Something went wrong here; the program's log says what.")

    app = FastAPI(
        title="langgraph-checkpoint-buffered",
        summary="Errors of checkpoints, the logs of threads, and both live.",
        version=version("langgraph-checkpoint-buffered"),
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        # For what no route takes: here the whole application is ours.
        exception_handlers={StarletteHTTPException: answer},
    )
    app.include_router(create_admin_router(authorize=authorize, store=store, streams=streams, tickets=tickets))
    app.include_router(
        create_thread_router(
            authorize_thread=authorize_thread,
            store=store,
            observability=lambda: target,
            streams=streams,
            tickets=tickets,
        )
    )
    app.include_router(
        create_health_router(store=store, redis_url=redis_url, authorize_metrics=authorize, registry=registry)
    )
    if find_spec("jinja2") is not None:
        from checkpointer.inspection import Inspector
        from observability.console import create_console_router

        assert postgres_uri is not None  # the store would have refused
        inspector = Inspector(postgres_uri, redis_url, prefix=prefix, schema=schema)
        app.include_router(create_console_router(tokens=authorize, store=store, streams=streams, inspector=inspector))
    return app
