"""Nobody sees a page without a good token, a revoked one ends a session, and no other site can send a form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi.routing import APIRoute
from planting import plant
from visits import forms_of

from observability.api import BearerTokens, Store
from observability.console import Sessions, create_console_router
from observability.console.sessions import SECONDS
from observability.errors import reading
from observability.errors.statements import run
from observability.tokens import revoke

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from fastapi import FastAPI
    from visits import Visit

    Connection = psycopg.Connection[Any]

ADMIN = "an-administrators-token"


def audit(conn: Connection) -> list[tuple[str, str]]:
    return [(row["action"], row["actor"]) for row in run(conn, reading.audit()).rows]


async def test_every_page_asks_to_sign_in_and_leads_back(app: FastAPI, visit: Any, api_uri: str) -> None:
    router = create_console_router(tokens=BearerTokens(Store(api_uri)), store=Store(api_uri))
    pages = [route.path for route in router.routes if isinstance(route, APIRoute) and "GET" in route.methods]
    async with visit(app) as nobody:
        asked = 0
        for path in pages:
            if "/static/" in path or path in ("/console/sign-in", "/console/"):
                continue
            url = path.replace("{error_id}", "1").replace("{fingerprint:path}", "a")
            answer = await nobody.client.get(url, follow_redirects=False)
            assert answer.status_code in (303, 401), (url, answer.status_code)
            asked += 1
        assert asked >= 6
        answer = await nobody.get("/console/errors?text=a%26b")
        assert "Sign in" in answer.text
        answer = await nobody.client.post("/console/sign-in", data={"token": ADMIN, "next": "/errors?text=a%26b"})
        assert str(answer.url) == "http://test/console/errors?text=a%26b"


async def test_a_wrong_token_is_refused_audited_and_counted(
    app: FastAPI, visit: Any, conn: Connection, token: Callable[..., str]
) -> None:
    async with visit(app) as nobody:
        wrong = token("read")[:-1] + "!"
        for _ in range(10):
            answer = await nobody.sign_in(wrong)
            assert answer.status_code == 401
            assert "not valid" in answer.text
            assert wrong not in answer.text
        assert "set-cookie" not in answer.headers
        answer = await nobody.sign_in(ADMIN)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        # The bearer tokens of the HTTP interface are counted together with these.
        found = await nobody.get("/admin/system-errors", headers={"Authorization": f"Bearer {ADMIN}"})
        assert found.status_code == 429
    assert audit(conn)[:3] == [("refuse", "anonymous")] * 3


async def test_the_cookie_names_the_token_and_is_kept_from_scripts_and_other_sites(
    app: FastAPI, visit: Any, token: Callable[..., str], conn: Connection
) -> None:
    given = token("read")
    async with visit(app, scheme="https") as somebody:
        answer = await somebody.client.post("/console/sign-in", data={"token": given}, follow_redirects=False)
        said = answer.headers["set-cookie"]
        for word in ("HttpOnly", "SameSite=strict", "Secure", "Path=/console", f"Max-Age={SECONDS}"):
            assert word.lower() in said.lower()
        assert given not in said
        assert given.split("_")[2] not in said
    async with visit(app) as somebody:
        answer = await somebody.client.post("/console/sign-in", data={"token": given}, follow_redirects=False)
        assert "secure" not in answer.headers["set-cookie"].lower()
    assert ("sign-in", "ann") in audit(conn)


async def test_a_revoked_token_ends_its_session(
    app: FastAPI, visit: Any, token: Callable[..., str], conn: Connection
) -> None:
    given = token("read")
    async with visit(app, given) as somebody:
        assert "<h1>Errors</h1>" in (await somebody.get("/console/errors")).text
        run(conn, revoke(given.split("_")[1], actor="test"))
        assert "<h1>Sign in</h1>" in (await somebody.get("/console/errors")).text


async def test_signing_out_ends_the_session_even_for_a_copy_of_the_cookie(admin: Visit, conn: Connection) -> None:
    kept = dict(admin.client.cookies)
    answer = await admin.send("/console/errors", "/console/sign-out")
    assert "<h1>Sign in</h1>" in answer.text
    assert not dict(admin.client.cookies)
    answer = await admin.get(
        "/console/errors", headers={"Cookie": f"checkpointer_session={kept['checkpointer_session']}"}
    )
    assert "<h1>Sign in</h1>" in answer.text
    assert ("sign-out", "admin-token") in audit(conn)


async def test_a_form_of_another_site_or_session_changes_nothing(
    app: FastAPI, visit: Any, admin: Visit, token: Callable[..., str], conn: Connection
) -> None:
    error = plant(conn)
    page, action = f"/console/errors/{error}", f"/console/errors/{error}/resolve"
    async with visit(app, token("read", "resolve")) as other:
        stolen = forms_of((await other.get(page)).text)[1]["fields"]["form_token"]
    refused = [
        await admin.send(page, action, {"Sec-Fetch-Site": "cross-site"}),
        await admin.send(page, action, {"Sec-Fetch-Site": "same-site"}),
        await admin.send(page, action, {"Origin": "https://evil.example"}),
        await admin.send(page, action, {"Origin": "null"}),
        await admin.send(page, action, form_token=""),
        await admin.send(page, action, form_token="é" + "\ud800".encode("utf-8", "replace").decode()),
        await admin.send(page, action, form_token=stolen),
        await admin.client.post(action),
        await admin.client.post(action, json={"resolution_notes": "x"}),
    ]
    assert [answer.status_code for answer in refused] == [403] * len(refused)
    row = run(conn, reading.one(error))
    assert row is not None
    assert row["resolved_at"] is None
    answer = await admin.send(page, action, {"Sec-Fetch-Site": "same-origin", "Origin": "http://test"})
    assert answer.status_code == 200
    row = run(conn, reading.one(error))
    assert row is not None
    assert row["resolved_by"] == "admin-token"


async def test_signing_in_from_another_site_is_refused(app: FastAPI, visit: Any) -> None:
    async with visit(app) as nobody:
        answer = await nobody.sign_in(ADMIN, headers={"Sec-Fetch-Site": "cross-site"})
        assert answer.status_code == 403
        assert not dict(nobody.client.cookies)


@pytest.mark.parametrize(
    "wanted", ["//evil.example", "https://evil.example", "/\\evil.example", "/../admin", "evil", "/a\r\nb", "/a" * 2000]
)
async def test_signing_in_leads_nowhere_else(app: FastAPI, visit: Any, wanted: str) -> None:
    async with visit(app) as nobody:
        answer = await nobody.client.post(
            "/console/sign-in", data={"token": ADMIN, "next": wanted}, follow_redirects=False
        )
        assert answer.headers["location"] == "/console/"


@pytest.mark.parametrize("scopes", [("resolve",), ("delete",), ("read_sensitive",)])
async def test_pages_need_the_scope_read(
    app: FastAPI, visit: Any, token: Callable[..., str], scopes: tuple[str, ...]
) -> None:
    async with visit(app) as somebody:
        await somebody.sign_in(token(*scopes))
        answer = await somebody.get("/console/errors")
        assert answer.status_code == 403
        assert "scope" in answer.text


def test_a_session_is_read_only_as_it_was_made_and_for_its_time() -> None:
    now = 1_000.0
    sessions = Sessions(b"k" * 32, clock=lambda: now)
    cookie = sessions.begin("token 1", "")
    found = sessions.read(cookie)
    assert found is not None
    assert found.credential == "token 1"
    payload, signature = cookie.split(".")
    wrong = ["", ".", "é.é", payload, f"{payload}.", f"{payload[:-1]}.{signature}", f".{signature}", "a" * 3_000, None]
    assert [sessions.read(text) for text in wrong] == [None] * len(wrong)
    assert Sessions(b"x" * 32, clock=lambda: now).read(cookie) is None
    assert Sessions(b"k" * 32, clock=lambda: now + SECONDS - 1).read(cookie) is not None
    assert Sessions(b"k" * 32, clock=lambda: now + SECONDS).read(cookie) is None


async def test_a_changed_admin_token_ends_its_sessions_even_with_the_same_key(api_uri: str) -> None:
    store = Store(api_uri)
    old, new = BearerTokens(store, admin_token="old"), BearerTokens(store, admin_token="new")
    seal = old.seal("admin-token")
    found = await old.recall("admin-token", seal)
    assert found is not None
    assert await new.recall("admin-token", seal) is None
    assert await BearerTokens(store).recall("admin-token", seal) is None
