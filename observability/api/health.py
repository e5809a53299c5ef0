"""The routes for whatever watches the process: is it alive, can it work, and its metrics.

Not here: what is measured.
"""

# No `from __future__ import annotations`: FastAPI reads them.

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import redis
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from pydantic import BaseModel

from checkpointer.errors import CheckpointerError, ConfigurationError
from checkpointer.hooks import redis_client
from observability.api.principals import Principal
from observability.api.problems import Refusals, problem, remember_principal, responses, route_class
from observability.api.store import Store
from observability.errors import reading

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_REDIS_SECONDS = 2.0


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Both servers answer."""

    status: Literal["ok"] = "ok"
    postgres: Literal["ok"] = "ok"
    redis: Literal["ok", "not configured"]


def create_health_router(
    *,
    store: Store | None = None,
    redis_url: str | None = None,
    authorize_metrics: Callable[..., Any] | None = None,
    registry: "CollectorRegistry | None" = None,
) -> APIRouter:
    """Make `/healthz` (restart me), `/readyz` (both servers answer) and, if asked for, `/metrics` (Prometheus).

    Args:
        store: Is asked for readiness; by default one on POSTGRES_URI.
        redis_url: Is asked for readiness, if given.
        authorize_metrics: A FastAPI dependency as `create_admin_router` takes it; `/metrics` then needs the scope
            `read`. Without it there is no `/metrics`.
        registry: What `/metrics` shows; by default prometheus-client's own.

    Raises:
        ConfigurationError: `/metrics` is asked for, and prometheus-client is not installed.
    """
    store = store or Store()

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with store.lifespan(app):
            yield

    router = APIRouter(tags=["health"], route_class=route_class(Refusals(store)), lifespan=lifespan)

    @router.get("/healthz", operation_id="alive", openapi_extra={"x-credentials": "none"})
    async def healthz() -> Alive:
        """Say that the process answers."""
        return Alive()

    @router.get(
        "/readyz",
        operation_id="ready",
        response_model=Ready,
        responses={503: responses()[503]},
        openapi_extra={"x-credentials": "none"},
    )
    async def readyz() -> Any:
        """Say whether both servers answer and the tables are there."""
        found = {"postgres": await _postgres_trouble(store), "redis": "not configured"}
        if redis_url is not None:
            found["redis"] = await asyncio.to_thread(_redis_trouble, redis_url)
        if set(found.values()) <= {"ok", "not configured"}:
            return Ready(redis=found["redis"])  # type: ignore[arg-type]  # one of the two
        away = " and ".join(name for name, state in found.items() if state not in ("ok", "not configured"))
        headers = {"Retry-After": "5"}
        return problem(503, f"Not ready: {away}.", code="not_ready", headers=headers, checks=found)

    if authorize_metrics is None:
        return router
    render, content_type = _renderer(registry)

    async def check(request: Request, principal: Annotated[Principal, Depends(authorize_metrics)]) -> None:
        remember_principal(request, principal.name)
        if "read" not in principal.scopes:
            raise HTTPException(403, "This needs the scope 'read'.")

    @router.get(
        "/metrics",
        operation_id="metrics",
        response_class=Response,
        responses={**responses(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        openapi_extra={"x-required-scope": "read"},
        dependencies=[Depends(check)],
    )
    async def metrics() -> Response:
        """Show the metrics for Prometheus."""
        # In a thread: a collector may ask a server.
        return Response(await asyncio.to_thread(render), media_type=content_type)

    return router


async def _postgres_trouble(store: Store) -> str:
    try:
        await store.run(reading.newest_id())
    except CheckpointerError as exc:
        return str(exc)
    return "ok"


def _redis_trouble(url: str) -> str:
    try:
        with contextlib.closing(redis_client(url, _REDIS_SECONDS)) as client:
            client.ping()
    # Without their words: they can quote the URL, which can hold a password.
    except (redis.RedisError, redis.exceptions.RedisClusterException, CheckpointerError, OSError):
        return "Redis cannot be reached."
    return "ok"


def _renderer(registry: "CollectorRegistry | None") -> tuple[Callable[[], bytes], str]:
    try:
        from prometheus_client import REGISTRY
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            'Metrics over HTTP need: pip install "langgraph-checkpoint-buffered[prometheus]"'
        ) from exc
    shown = REGISTRY if registry is None else registry
    return lambda: generate_latest(shown), CONTENT_TYPE_PLAIN_0_0_4
