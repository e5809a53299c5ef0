"""What is common to all routes: problems as RFC 9457 has them, a limit of bodies, safe headers, refusals written down.

It is a class of routes, and no handler of the application's: what the application answers elsewhere stays as it is.
Not here: what the routes do.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request

from checkpointer.errors import (
    CheckpointerError,
    ConfigurationError,
    FlushIncompleteError,
    InvalidConfigError,
    NotSetUpError,
    StoreUnavailableError,
    TierUnavailableError,
    UnknownDeadLetterError,
)
from checkpointer.events import describe_error
from observability.api.limits import Window, client_key
from observability.errors.acting import note
from observability.errors.statements import InvalidCursorError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.responses import Response
    from starlette.types import Message, Receive

    from observability.api.store import Store

logger = logging.getLogger("checkpointer.observability")

BODY_BYTES = 64_000
"""The longest body of a request."""

MEDIA_TYPE = "application/problem+json"

_RETRY_SECONDS = 5
_REFUSALS_OF_CLIENT, _REFUSALS_OF_ALL = 20, 300
_PRINCIPAL = "checkpointer.principal"

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class FieldProblem(BaseModel):
    """What is wrong with one part of a request."""

    location: str = Field(description="Where it is, such as `query.limit`.")
    message: str


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    type: str = Field("about:blank", description="Always `about:blank`; `code` tells problems apart.")
    title: str = Field(description="The words of the status.")
    status: int
    detail: str = Field(description="What happened and what to do.")
    code: str = Field(description="For programs, such as `invalid_cursor`.")
    errors: list[FieldProblem] | None = Field(None, description="With the code `invalid_request`.")


_TEXTS = {
    400: "The request cannot be understood.",
    401: "Credentials are missing or not valid.",
    403: "The credentials do not allow this.",
    404: "There is no such thing.",
    413: "The body is too long.",
    422: "The request has values that cannot be used.",
    429: "Too many failed attempts.",
    500: "Something went wrong here.",
    503: "Postgres or another server is away, or too much is asked at once.",
}


def responses(*more: int) -> dict[int | str, dict[str, Any]]:
    """Return the problems of a route for its description: those of every route, and `more`."""
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    schema["properties"]["errors"]["anyOf"][0]["items"] = definitions["FieldProblem"]
    found: dict[int | str, dict[str, Any]] = {}
    for status in sorted({400, 401, 403, 413, 422, 429, 500, 503, *more}):
        example = _content(status, _TEXTS[status])
        content = {MEDIA_TYPE: {"schema": schema, "example": example}}
        found[status] = {"description": _TEXTS[status], "content": content}
    return found


def problem(
    status: int, detail: str, *, code: str | None = None, headers: dict[str, str] | None = None, **more: Any
) -> JSONResponse:
    """Return a problem as a response."""
    return JSONResponse(_content(status, detail, code) | more, status, headers=headers, media_type=MEDIA_TYPE)


def _content(status: int, detail: str, code: str | None = None) -> dict[str, Any]:
    title = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
    code = code or title.lower().replace(" ", "_").replace("-", "_")
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}


def response_to(exc: Exception) -> JSONResponse | None:
    """Return the problem that says what an exception means; None for one that was not expected."""
    if isinstance(exc, RequestValidationError):
        # Without the values: a body can hold what does not belong into an answer.
        errors = [
            {"location": ".".join(str(part) for part in error["loc"])[:200], "message": str(error["msg"])[:500]}
            for error in exc.errors()[:20]
        ]
        detail = "The request has values that cannot be used: see `errors`."
        return problem(422, detail, code="invalid_request", errors=errors)
    if isinstance(exc, HTTPException):
        detail = exc.detail if isinstance(exc.detail, str) else _TEXTS.get(exc.status_code, "It was refused.")
        return problem(exc.status_code, detail, headers=dict(exc.headers or {}))
    if isinstance(exc, InvalidCursorError):
        return problem(400, str(exc), code="invalid_cursor")
    if isinstance(exc, ConfigurationError | InvalidConfigError):
        return problem(422, str(exc), code="invalid_request")
    if isinstance(exc, NotSetUpError):
        return problem(503, str(exc), code="not_set_up", headers={"Retry-After": str(_RETRY_SECONDS)})
    if isinstance(exc, StoreUnavailableError):
        return problem(503, str(exc), code="store_unavailable", headers={"Retry-After": str(_RETRY_SECONDS)})
    if isinstance(exc, TierUnavailableError):
        return problem(503, str(exc), code="buffer_unavailable", headers={"Retry-After": str(_RETRY_SECONDS)})
    if isinstance(exc, FlushIncompleteError):
        return problem(409, str(exc), code="flush_incomplete")
    if isinstance(exc, UnknownDeadLetterError):
        return problem(404, str(exc), code="unknown_dead_letter")
    return None


class Refusals:
    """Writes down who was refused what, without the credentials.

    Of one client at most 20 a minute get a line of their own, of all clients 300; further ones are counted, and the
    next line says how many there were.

    Args:
        store: Has the audit.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._of_client = Window(_REFUSALS_OF_CLIENT, 60.0)
        self._of_all = Window(_REFUSALS_OF_ALL, 60.0)
        self._left_out = 0

    async def add(self, request: Request, status: int, detail: str) -> None:
        """Write a refusal down; if Postgres is away, only into the program's log."""
        client = client_key(request.client.host if request.client else None)
        if self._of_client.full_for(client) or self._of_all.full_for(""):
            self._left_out += 1
            return
        self._of_client.add(client)
        self._of_all.add("")
        left_out, self._left_out = self._left_out, 0
        route = request.scope.get("route")
        details = {
            "status": status,
            "reason": detail,
            "method": request.method,
            "route": getattr(route, "path", ""),
            "path": request.url.path[:500],
            "client": client,
        } | ({"left_out_before": left_out} if left_out else {})
        try:
            await self._store.run(note("refuse", actor_of(request), details=details))
        except CheckpointerError as exc:
            # The log has the template of the route, which nobody outside can write.
            logger.warning("a refusal (%d, %s) could not be audited: %s", status, details["route"], exc)


def remember_principal(request: Request, name: str) -> None:
    """Note who a request is from, for the audit of a refusal."""
    request.scope[_PRINCIPAL] = name


def actor_of(request: Request) -> str:
    """Return who a request is from, as far as is known."""
    return str(request.scope.get(_PRINCIPAL, "anonymous"))


def route_class(refusals: Refusals) -> type[APIRoute]:
    """Return the class of the routes of a router."""

    class ProblemRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            template = self.path

            async def guarded(request: Request) -> Response:
                try:
                    _check_site(request)
                    check_length(request)
                    response = await handle(Request(request.scope, limited_body(request.receive)))
                # Whatever it is, no detail of it may get out.
                except Exception as exc:  # noqa: BLE001 - logged and answered with a problem
                    answer = response_to(exc)
                    if answer is None:
                        error = describe_error(exc)
                        logger.error("%s %s failed: %s\n%s", request.method, template, error.type, error.stack)
                        answer = problem(500, "Something went wrong here; the program's log says what.")
                    elif answer.status_code in (401, 403, 429):
                        detail = str(getattr(exc, "detail", ""))[:200]
                        await refusals.add(request, answer.status_code, detail)
                    response = answer
                for name, value in _HEADERS.items():
                    response.headers[name] = value
                response.headers.setdefault("Cache-Control", "no-store")
                return response

            return guarded

    return ProblemRoute


def _check_site(request: Request) -> None:
    """Refuse what another site has a browser do with the user's cookies."""
    if (
        request.method not in ("GET", "HEAD", "OPTIONS")
        and request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        and "cookie" in request.headers
        and "authorization" not in request.headers
    ):
        raise HTTPException(403, "Another site may not do this with your cookies.")


def check_length(request: Request) -> None:
    """Refuse a body that says that it is too long.

    Raises:
        HTTPException: 413.
    """
    length = request.headers.get("content-length")
    if length is not None and length.isdecimal() and int(length[:20]) > BODY_BYTES:
        raise _too_long()


def limited_body(receive: Receive) -> Receive:
    """Return what receives a body and refuses the rest of one that is too long."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > BODY_BYTES:
            raise _too_long()
        return message

    return limited


def _too_long() -> HTTPException:
    return HTTPException(413, f"The body is longer than {BODY_BYTES} bytes.")
