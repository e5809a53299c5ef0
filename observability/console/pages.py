"""What is common to all pages: how one is made of a template, its headers, who may see it, and what is shown instead.

All text in a page is escaped, and what does not print is spelled. Not here: what the pages show (`errors.py`).
"""

from __future__ import annotations

import hmac
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import anyio
import anyio.to_thread
import jinja2
from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from checkpointer.events import describe_error
from observability.api.limits import client_key
from observability.api.problems import Refusals, check_length, limited_body, remember_principal, response_to

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from checkpointer.inspection import Inspector
    from observability.api.authentication import BearerTokens
    from observability.api.principals import Principal
    from observability.api.store import Store
    from observability.console.sessions import Session, Sessions
    from observability.tokens import Scope

__all__ = ["COOKIE", "Form", "Pages", "SignInNeededError", "Visitor", "how", "page_class"]

logger = logging.getLogger("checkpointer.observability")

T = TypeVar("T")

COOKIE = "checkpointer_session"

# Questions that wait at the same time, each in a thread.
_AT_ONCE = 8

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: a browser would then say of its own forms that they come from nowhere.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

_TITLES = {
    400: "This address cannot be understood",
    401: "Sign in first",
    403: "Not allowed",
    404: "Not found",
    409: "Not now",
    413: "Too long",
    422: "This cannot be used",
    429: "Too many attempts",
    503: "Not available",
}


class SignInNeededError(Exception):
    """Nobody is signed in, or no longer."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who sees a page.

    Attributes:
        principal: As the HTTP interface knows them.
        session: Their session.
    """

    principal: Principal
    session: Session

    def may(self, scope: Scope) -> bool:
        """Return whether their token has a scope."""
        return scope in self.principal.scopes


Form = dict[str, str]
"""What a form holds; of a field that comes twice, the last."""


class Pages:
    """Makes pages, and finds out who asks for them.

    Args:
        base: The path that all pages begin with, without a slash at the end.
        store: Has the errors.
        tokens: Says what a token is worth.
        sessions: Who has signed in.
        inspector: Knows of threads and dead letters; None if nobody does.
    """

    def __init__(
        self,
        base: str,
        store: Store,
        tokens: BearerTokens,
        sessions: Sessions,
        inspector: Inspector | None,
    ) -> None:
        self.base = base
        self.store = store
        self.tokens = tokens
        self.sessions = sessions
        self.inspector = inspector
        self._room = anyio.CapacityLimiter(_AT_ONCE)
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("observability.console"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "plain": plain,
            "moment": moment,
            "ago": ago,
            "part": part,
            "pretty": pretty,
            "size": size,
            "duration": duration,
        }
        self._templates.globals |= {"query": query, "has_buffer": inspector is not None}

    async def ask(self, question: Callable[[], T]) -> T:
        """Carry out what blocks; if the caller is cancelled it is not waited for."""
        return await anyio.to_thread.run_sync(question, abandon_on_cancel=True, limiter=self._room)

    def base_of(self, request: Request) -> str:
        """Return the path of the console as the browser sees it."""
        return str(request.scope.get("root_path", "")).rstrip("/") + self.base

    def render(self, request: Request, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """Make a page.

        Args:
            request: What is answered.
            name: The template, without its ending.
            status: Of the response.
            values: What the template shows; `visitor`, if anybody is signed in.
        """
        shown = {"base": self.base_of(request), "visitor": None, "here": name, "now": datetime.now(UTC)} | values
        return HTMLResponse(self._templates.get_template(f"{name}.html").render(shown), status)

    def go(self, request: Request, path: str) -> Response:
        """Answer a form: look at another page now."""
        return RedirectResponse(f"{self.base_of(request)}{path}", 303)

    async def visitor(self, request: Request, scope: Scope = "read") -> Visitor:
        """Return who asks.

        Raises:
            SignInNeededError: Nobody is signed in.
            HTTPException: 403, they may not.
            StoreUnavailableError: It cannot be found out.
        """
        session = self.sessions.read(request.cookies.get(COOKIE))
        principal = None if session is None else await self.tokens.recall(session.credential, session.seal)
        if session is None or principal is None:
            raise SignInNeededError
        remember_principal(request, principal.name)
        if scope not in principal.scopes:
            raise HTTPException(403, f"This needs a token with the scope {scope!r}.")
        return Visitor(principal, session)

    async def form(self, request: Request, scope: Scope = "resolve") -> tuple[Visitor, Form]:
        """Return who has sent a form, and what it holds.

        Raises:
            SignInNeededError: Nobody is signed in.
            HTTPException: 403, they may not, or the form is not of a page of theirs.
            StoreUnavailableError: It cannot be found out.
        """
        check_origin(request)
        visitor = await self.visitor(request, scope)
        fields = await read_form(request)
        given = fields.pop("form_token", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, visitor.session.form_token.encode()):
            raise HTTPException(403, "The form is not from a page of this session: load the page again.")
        return visitor, fields


def check_origin(request: Request) -> None:
    """Refuse a form that a page of another site has sent.

    Raises:
        HTTPException: 403.
    """
    origin = request.headers.get("origin")
    other = request.headers.get("sec-fetch-site") not in (None, "same-origin", "none")
    # A proxy may have ended TLS: the scheme that is seen here need not be the browser's.
    if other or (origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")):
        raise HTTPException(403, "Another site may not send this form.")


async def read_form(request: Request) -> Form:
    """Read a form.

    Raises:
        HTTPException: 422 for something else.
    """
    try:
        fields = parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise HTTPException(422, "The form cannot be read.") from None
    return dict(fields)


def how(visitor: Visitor, request: Request) -> dict[str, str]:
    """Return how something was done, for the audit."""
    client = client_key(request.client.host if request.client else None)
    return {"way": "console", "client": client, "with": visitor.principal.credential}


def page_class(pages: Pages, refusals: Refusals) -> type[APIRoute]:
    """Return the class of the routes: what goes wrong is a page too, and every response has the headers."""

    class PageRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            template = self.path

            async def guarded(request: Request) -> Response:
                try:
                    check_length(request)
                    response = await handle(Request(request.scope, limited_body(request.receive)))
                except SignInNeededError:
                    response = await _to_sign_in(pages, refusals, request)
                # Whatever it is, no detail of it may get out.
                except Exception as exc:  # noqa: BLE001 - logged and answered with a page
                    response = await _trouble(pages, refusals, request, template, exc)
                for name, value in _HEADERS.items():
                    response.headers[name] = value
                response.headers.setdefault("Cache-Control", "no-store")
                return response

            return guarded

    return PageRoute


async def _to_sign_in(pages: Pages, refusals: Refusals, request: Request) -> Response:
    if COOKIE in request.cookies or request.method != "GET":
        await refusals.add(request, 401, "Nobody is signed in, or no longer.")
    where = f"{pages.base_of(request)}/sign-in"
    if "hx-request" in request.headers:
        return Response(status_code=401, headers={"HX-Redirect": where})
    if request.method != "GET" or request.url.path.endswith("/live"):
        return pages.render(request, "trouble", status=401, title=_TITLES[401], detail="You are not signed in.")
    wanted = request.url.path.removeprefix(pages.base_of(request))
    if request.url.query:
        wanted += f"?{request.url.query}"
    return RedirectResponse(f"{where}?next={quote(wanted)}" if wanted not in ("", "/") else where, 303)


async def _trouble(pages: Pages, refusals: Refusals, request: Request, template: str, exc: Exception) -> Response:
    problem = response_to(exc)
    if problem is None:
        error = describe_error(exc)
        logger.error("%s %s failed: %s\n%s", request.method, template, error.type, error.stack)
        status, detail, headers = 500, "The program's log says what.", {}
    else:
        status, headers = problem.status_code, dict(getattr(exc, "headers", None) or {})
        detail = str(json.loads(bytes(problem.body))["detail"])
        if status in (401, 403, 429):
            await refusals.add(request, status, detail[:200])
    title = _TITLES.get(status, "Something went wrong here")
    response = pages.render(request, "trouble", status=status, title=title, detail=detail)
    if "Retry-After" in headers or status == 503:
        response.headers["Retry-After"] = headers.get("Retry-After", "5")
    return response


# Filters and functions of the templates.


def plain(value: object) -> str:
    """Return text in which what does not print, or turns the direction of what follows, is spelled."""
    return "".join(char if char.isprintable() or char in "\n\t" else _spelled(char) for char in str(value))


def _spelled(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def moment(value: datetime | None) -> str:
    """Return a time to the second, in UTC."""
    return "" if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def ago(value: datetime | None, now: datetime) -> str:
    """Return how long ago a time is, to be read at a glance."""
    if value is None:
        return "never"
    seconds = max(0, int((now - value).total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def duration(seconds: float) -> str:
    """Return how long something takes, to be read at a glance."""
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def size(count: int) -> str:
    """Return a number of bytes, to be read at a glance."""
    number = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1_000 or unit == "GB":
            break
        number /= 1_000
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"


def part(value: object) -> str:
    """Return text as one part of a path, slashes and all."""
    return quote(str(value).encode("utf-8", "replace"), safe="")


def pretty(value: object) -> str:
    """Return JSON-like values over several lines."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def query(values: Mapping[str, Any], **changes: Any) -> str:
    """Return the part of a URL after the path; what is None or empty is left out."""
    given = {name: value for name, value in {**values, **changes}.items() if value not in (None, "", [], ())}
    return f"?{urlencode(given, doseq=True, errors='replace')}" if given else ""
