"""A browser without JavaScript, for the console called in process."""

from __future__ import annotations

import contextlib
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

ADMIN = "an-administrators-token"


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
        elif tag == "input" and given.get("type") in ("checkbox", "radio") and "checked" not in given:
            return
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
