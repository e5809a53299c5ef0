"""The routes of the console, put together: signing in and out, what is served as a file, and the pages.

Not here: the pages themselves (`overview.py`, `errors.py`, `threads.py`, `dead_letters.py`, `audit.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from observability.api.authentication import BearerTokens
from observability.api.feed import ErrorFeed
from observability.api.limits import client_key
from observability.api.problems import Refusals
from observability.api.store import Store
from observability.api.streams import Streams
from observability.console import audit, dead_letters, errors, overview, threads
from observability.console.pages import COOKIE, Pages, check_origin, how, page_class, read_form
from observability.console.sessions import SECONDS, Sessions
from observability.errors.acting import note

if TYPE_CHECKING:
    from checkpointer.inspection import Inspector

_FILES = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "htmx.min.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def create_console_router(
    *,
    tokens: BearerTokens,
    store: Store | None = None,
    streams: Streams | None = None,
    sessions: Sessions | None = None,
    inspector: "Inspector | None" = None,
    prefix: str = "/console",
) -> APIRouter:
    """Make the pages.

    Args:
        tokens: Says what the token is worth that somebody signs in with; the one of the admin router, so that failed
            attempts are counted together.
        store: Has the errors; by default one on POSTGRES_URI. It is closed when the application ends.
        streams: The application's open streams, to be ended before it shuts down.
        sessions: Who has signed in; give one with a key if several processes serve the same clients.
        inspector: Knows of the buffer, threads and dead letters (`checkpointer.inspection.Inspector`); without it the
            console is about errors alone. It is closed when the application ends.
        prefix: Where the pages are.
    """
    store = store or Store()
    streams = streams or Streams()
    pages = Pages(prefix, store, tokens, sessions or Sessions(), inspector)
    feed = ErrorFeed(store)

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with store.lifespan(app), streams.lifespan(app):
            try:
                yield
            finally:
                await feed.aclose()
                if inspector is not None:
                    await asyncio.to_thread(inspector.close)

    router = APIRouter(
        prefix=prefix,
        route_class=page_class(pages, Refusals(store)),
        lifespan=lifespan,
        include_in_schema=False,
    )
    folder = files("observability.console") / "static"

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404, "There is no such file.")
        headers = {"Cache-Control": "no-cache"}
        return Response((folder / name).read_bytes(), media_type=_FILES[name], headers=headers)

    @router.get("/sign-in")
    async def ask(request: Request) -> Response:
        # A link from elsewhere comes without the cookie, which is no reason to sign in again.
        from_elsewhere = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        wanted = _inside(request.query_params.get("next", ""))
        return pages.render(request, "sign_in", wanted=wanted, trouble=None, from_elsewhere=from_elsewhere)

    @router.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        check_origin(request)
        fields = await read_form(request)
        wanted = _inside(fields.get("next", ""))
        client = client_key(request.client.host if request.client else None)
        try:
            principal = await tokens.check(fields.get("token", "").strip() or None, client)
        except HTTPException as exc:
            if exc.status_code != 401:
                raise
            await Refusals(store).add(request, 401, "The token is not valid.")
            said = "This token is not valid: it may be mistyped, expired or revoked."
            return pages.render(request, "sign_in", status=401, wanted=wanted, trouble=said, from_elsewhere=False)
        details = {"how": {"way": "console", "client": client, "with": principal.credential}}
        await store.run(note("sign-in", principal.name, details=details))
        response = pages.go(request, wanted)
        response.set_cookie(
            COOKIE,
            pages.sessions.begin(principal.credential, tokens.seal(principal.credential)),
            max_age=SECONDS,
            path=pages.base_of(request),
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        visitor, _ = await pages.form(request, "read")
        pages.sessions.end(visitor.session)
        await store.run(note("sign-out", visitor.principal.name, details={"how": how(visitor, request)}))
        response = pages.go(request, "/sign-in")
        response.delete_cookie(COOKIE, path=pages.base_of(request), httponly=True, samesite="strict")
        return response

    overview.add_pages(router, pages)
    errors.add_pages(router, pages, feed, streams)
    if inspector is not None:
        threads.add_pages(router, pages, inspector)
        dead_letters.add_pages(router, pages, inspector)
    audit.add_pages(router, pages)
    return router


def _inside(path: str) -> str:
    """Return a path within the console, whatever was asked for."""
    safe = path.startswith("/") and not path.startswith("//") and path.isprintable() and "\\" not in path
    return path if safe and len(path) <= 2_000 and ".." not in path.split("?")[0] else "/"
