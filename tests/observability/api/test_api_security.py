"""Nobody gets in without credentials, nobody gets further than their scopes, and nothing secret gets out."""

from __future__ import annotations

import json
import logging
import re
import socket
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from planting import plant

from observability.api import BearerTokens, Principal, Store, Tickets, create_admin_router, create_app
from observability.api import limits as limits_module
from observability.api.limits import Window, client_key
from observability.api.principals import SCOPES
from observability.api.problems import BODY_BYTES
from observability.errors import reading
from observability.errors.statements import run
from observability.tokens import revoke

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg
    from conftest import Served
    from fastapi import FastAPI

    Connection = psycopg.Connection[Any]

ERRORS = "/admin/system-errors"
OPEN = {"/healthz", "/readyz"}
VALUES = {"error_id": "1", "fingerprint": "v1:a", "thread_id": "t"}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Return each route as OpenAPI has it: a new one cannot be forgotten."""
    for path, methods in create_app(postgres_uri="postgresql://x/y").openapi()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def names(found: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    return [f"{method} {path}" for method, path, _ in found]


ALL = list(operations())
CLOSED = [one for one in ALL if one[1] not in OPEN]
SCOPED = [one for one in CLOSED if "x-credentials" not in one[2]]


def request_for(client: httpx.AsyncClient, method: str, path: str, operation: dict[str, Any], **more: Any) -> Any:
    """Make a request that is right but for its credentials."""
    for name, value in VALUES.items():
        path = path.replace(f"{{{name}}}", value)
    params = {"resolved_before": "2020-01-01T00:00:00Z"} if operation["operationId"] == "delete_old_errors" else {}
    body = {} if "requestBody" in operation else None
    return client.request(method, path, params=params, json=body, **more)


def test_the_routes_without_credentials_are_those_that_may_be_so() -> None:
    marked = {path for _, path, operation in ALL if operation.get("x-credentials") == "none"}
    assert marked == OPEN
    with_ticket = {path for _, path, operation in ALL if operation.get("x-credentials") == "ticket"}
    assert with_ticket == {f"{ERRORS}/events/by-ticket", "/threads/{thread_id}/events/by-ticket"}
    assert len(CLOSED) > 20


@pytest.mark.parametrize(("method", "path", "operation"), CLOSED, ids=names(CLOSED))
async def test_no_route_answers_without_valid_credentials(
    app: FastAPI, call: Any, token: Callable[..., str], method: str, path: str, operation: dict[str, Any]
) -> None:
    good = token("read")
    wrong = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic YWRtaW46YWRtaW4="},
        {"Authorization": f"Bearer {good[:-1]}{'A' if good[-1] != 'A' else 'B'}"},
        {"Authorization": f"Bearer {good} extra"},
        {"Cookie": f"token={good}"},
    ]
    async with call(app) as client:
        for headers in wrong:
            params = {"ticket": "wrong"} if operation.get("x-credentials") == "ticket" else {}
            if params:
                answer = await client.request(method, path.replace("{thread_id}", "t"), params=params, headers=headers)
            else:
                answer = await request_for(client, method, path, operation, headers=headers)
            assert answer.status_code == 401, (headers, answer.text)
            assert answer.headers["www-authenticate"]
            assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(("method", "path", "operation"), SCOPED, ids=names(SCOPED))
async def test_every_route_needs_its_scope(
    app: FastAPI, call: Any, token: Callable[..., str], method: str, path: str, operation: dict[str, Any]
) -> None:
    needed = operation.get("x-required-scope", "read")
    assert needed in SCOPES
    others = token(*(scope for scope in SCOPES if scope != needed))
    async with call(app) as client:
        answer = await request_for(client, method, path, operation, headers={"Authorization": f"Bearer {others}"})
        assert answer.status_code == 403, answer.text
        assert needed in answer.json()["detail"]
        # With it alone the request gets further; a stream that opens would not end.
        if "/events" in path and method == "GET":
            return
        only = {"Authorization": f"Bearer {token(needed)}"}
        assert (await request_for(client, method, path, operation, headers=only)).status_code in (200, 404)


def test_every_route_describes_its_answers_and_its_problems() -> None:
    for method, path, operation in CLOSED:
        assert operation["summary"], path
        assert operation["description"], path
        assert {"200", "401", "403", "422", "500", "503"} <= set(operation["responses"]), (method, path)
        for status, response in operation["responses"].items():
            if status != "200":
                assert set(response["content"]) == {"application/problem+json"}, (path, status)
    ids = [operation["operationId"] for _, _, operation in ALL]
    assert len(ids) == len(set(ids))


async def test_stack_and_context_are_seen_with_their_scope_only(
    app: FastAPI, call: Any, token: Callable[..., str], conn: Connection
) -> None:
    error_id = plant(conn, stack_trace="needle-in-stack", error_context=json.dumps({"key": "needle-in-context"}))
    async with call(app) as client:
        plain = {"Authorization": f"Bearer {token('read')}"}
        for path in (ERRORS, f"{ERRORS}/{error_id}", f"{ERRORS}/groups", f"{ERRORS}/audit", f"{ERRORS}/stats"):
            answer = await client.get(path, headers=plain)
            assert answer.status_code == 200
            assert "needle" not in answer.text
        # Nor can it be found out by searching for it.
        for text in ("needle-in-stack", "needle-in-context"):
            assert (await client.get(ERRORS, params={"text": text}, headers=plain)).json()["count"] == 0
        hidden = (await client.get(f"{ERRORS}/{error_id}", headers=plain)).json()["error"]
        assert hidden["withheld"] == ["stack_trace", "error_context"]
        both = {"Authorization": f"Bearer {token('read', 'read_sensitive')}"}
        shown = (await client.get(f"{ERRORS}/{error_id}", headers=both)).json()["error"]
        assert (shown["stack_trace"], shown["error_context"]) == ("needle-in-stack", {"key": "needle-in-context"})


HOSTILE = ["'; DROP TABLE system_errors; --", "%", "_", "\\", "%s", "\0", "../..", "<script>", "1 OR 1=1", "\r\nX: y"]


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_hostile_values_find_nothing_and_break_nothing(
    client: httpx.AsyncClient, conn: Connection, caplog: pytest.LogCaptureFixture, hostile: str
) -> None:
    error_id = plant(conn)
    caplog.set_level(logging.DEBUG, "checkpointer")
    for name in ("error_type", "thread_id", "component", "fingerprint", "text"):
        answer = await client.get(ERRORS, params={name: hostile})
        assert (answer.status_code, answer.json()["count"]) == (200, 0), name
    for name in ("severity", "state", "limit", "cursor", "since"):
        assert (await client.get(ERRORS, params={name: hostile})).status_code in (400, 422), name
    for name in ("action", "actor", "fingerprint"):
        assert (await client.get(f"{ERRORS}/audit", params={name: hostile})).json()["count"] == 0
    await client.get(f"{ERRORS}/groups/{quote(hostile, safe='')}")
    await client.get(f"/threads/{quote(hostile, safe='')}/logs")
    noted = await client.post(f"{ERRORS}/{error_id}/resolve", json={"resolution_notes": hostile})
    assert noted.status_code == 200
    assert (await client.get(f"{ERRORS}/{error_id}")).json()["error"]["resolution_notes"] == hostile.replace(
        "\0", "\ufffd"
    )
    assert not [record for record in caplog.records if "\n" in record.getMessage()]


async def test_a_refusal_cannot_forge_a_line_of_the_log(app: FastAPI, call: Any, conn: Connection, caplog: Any) -> None:
    conn.execute("DROP TABLE system_error_audit")
    caplog.set_level(logging.DEBUG, "checkpointer")
    async with call(app) as client:
        await client.get("/threads/x%0DERROR%20forged/logs")
    lines = [record.getMessage() for record in caplog.records if "refusal" in record.getMessage()]
    assert len(lines) == 1
    assert "forged" not in lines[0]


async def test_a_body_is_limited_whether_or_not_it_says_its_length(client: httpx.AsyncClient) -> None:
    big = json.dumps({"resolution_notes": "x" * BODY_BYTES}).encode()
    path = f"{ERRORS}/1/resolve"
    headers = {"Content-Type": "application/json"}
    said = await client.post(path, content=big, headers=headers)

    async def parts() -> Any:
        for start in range(0, len(big), 1_000):
            yield big[start : start + 1_000]

    unsaid = await client.post(path, content=parts(), headers=headers)
    lying = await client.post(path, content=parts(), headers=headers | {"Content-Length": "10"})
    for answer in (said, unsaid, lying):
        assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
    deep = await client.post(path, content=b"[" * 60_000, headers=headers)
    assert deep.status_code in (400, 422)
    digits = await client.post(path, content=b'{"resolution_notes": ' + b"9" * 6_000 + b"}", headers=headers)
    assert digits.status_code in (400, 422)


async def test_headers_that_proxies_and_servers_read_differently_change_nothing(
    app: FastAPI, call: Any, token: Callable[..., str], conn: Connection
) -> None:
    good, admin = token("read"), "an-administrators-token"
    async with call(app) as client:
        both = await client.get(
            ERRORS, headers=[("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {good}")]
        )
        assert both.status_code == 401
        for name in ("X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"):
            error_id = plant(conn)
            headers = {"Authorization": f"Bearer {good}", name: "DELETE"}
            assert (await client.get(f"{ERRORS}/{error_id}", headers=headers)).status_code == 200
            assert run(conn, reading.one(error_id)) is not None
        for headers in (
            {"X-Original-URL": "/healthz"},
            {"X-Rewrite-URL": "/healthz"},
            {"X-Forwarded-User": "admin"},
            {"X-Remote-User": "admin"},
            {"Proxy-Authorization": f"Bearer {admin}"},
            {"X-Authorization": f"Bearer {admin}"},
        ):
            assert (await client.get(ERRORS, headers=headers)).status_code == 401
        for params in ({"access_token": admin}, {"token": admin}, {"authorization": f"Bearer {admin}"}):
            assert (await client.get(ERRORS, params=params)).status_code == 401


GOOD = "Authorization: Bearer an-administrators-token"
SMUGGLED = f"DELETE {ERRORS}/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("request_text", "statuses"),
    [
        # What follows on the same connection has credentials of its own, or none.
        (f"GET {ERRORS}/1 HTTP/1.1\r\nHost: x\r\n{GOOD}\r\n\r\n{SMUGGLED}", [200, 401]),
        # A proxy goes by one of the lengths, the server by the other.
        (
            f"POST {ERRORS}/1/reopen HTTP/1.1\r\nHost: x\r\n{GOOD}\r\nContent-Length: {5 + len(SMUGGLED)}\r\n"
            f"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
            [200, 401],
        ),
        (
            f"POST {ERRORS}/1/reopen HTTP/1.1\r\nHost: x\r\n{GOOD}\r\nContent-Length: 0\r\nContent-Length: "
            f"{len(SMUGGLED)}\r\n\r\n{SMUGGLED}",
            [400],
        ),
        (f"GET {ERRORS} HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer an-administrators-token\r\n\r\n", [400]),
        (f"GET {ERRORS} HTTP/1.1\r\nHost: x\r\nX: a\r\n {GOOD}\r\nConnection: close\r\n\r\n", [401]),
        (f"GET {ERRORS} HTTP/1.1\r\nHost: x\r\nX: a\0{GOOD}\r\n\r\n", [400]),
    ],
)
def test_no_request_gets_the_credentials_of_another_one(
    served: Served, conn: Connection, request_text: str, statuses: list[int]
) -> None:
    assert plant(conn) == 1
    address = urlsplit(served.url)
    answered = b""
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(request_text.encode())
        while part := connection.recv(65_536):
            answered += part
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answered)]
    assert found == statuses
    assert run(conn, reading.one(1)) is not None


async def test_another_site_cannot_use_the_cookies_of_somebody_signed_in(
    api_uri: str, call: Any, conn: Connection
) -> None:
    from fastapi import FastAPI

    app = FastAPI()
    anybody = Principal("cookie", frozenset(SCOPES))
    app.include_router(create_admin_router(authorize=lambda: anybody, store=Store(api_uri)))
    error_id = plant(conn)
    async with call(app, Cookie="session=1") as client:
        for site in ("cross-site", "same-site"):
            forged = await client.post(f"{ERRORS}/{error_id}/reopen", headers={"Sec-Fetch-Site": site})
            assert forged.status_code == 403
        own = await client.post(f"{ERRORS}/{error_id}/reopen", headers={"Sec-Fetch-Site": "same-origin"})
        assert own.status_code == 200


async def test_a_hostile_stack_trace_stays_text(client: httpx.AsyncClient, conn: Connection) -> None:
    hostile = "<script>alert(1)</script>\x1b[2J\u202e</pre>\r\n\r\ndata: forged"
    error_id = plant(conn, stack_trace=hostile, error_message=hostile, thread_id=hostile[:20])
    answer = await client.get(f"{ERRORS}/{error_id}")
    assert answer.json()["error"]["stack_trace"] == hostile
    for one in (
        answer,
        await client.get(ERRORS),
        await client.get("/threads/t/logs"),
        await client.get(f"{ERRORS}/none"),
    ):
        assert one.headers["content-type"] in ("application/json", "application/problem+json")
        assert one.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in one.headers["content-security-policy"]
        assert one.headers["cache-control"] == "no-store"


async def test_every_refusal_is_in_the_audit_without_what_was_tried(
    app: FastAPI, call: Any, token: Callable[..., str], conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("psycopg").setLevel(logging.DEBUG)
    reader = token("read", name="rita")
    wrong = f"cpt_{'0' * 16}_{'s' * 43}"
    async with call(app, address="192.0.2.7") as client:
        await client.get(ERRORS, headers={"Authorization": f"Bearer {wrong}"})
        await client.delete(f"{ERRORS}/7", headers={"Authorization": f"Bearer {reader}"})
        await client.get("/threads/t/logs", headers={"Authorization": "Bearer guessed-token"})
        await client.get("/threads/t/events/by-ticket", params={"ticket": "guessed-ticket"})
    lines = run(conn, reading.audit(action="refuse")).rows[::-1]
    assert [(line["actor"], line["details"]["status"]) for line in lines] == [
        ("anonymous", 401),
        ("rita", 403),
        ("anonymous", 401),
        ("anonymous", 401),
    ]
    assert lines[1]["details"]["path"] == f"{ERRORS}/7"
    assert {line["details"]["client"] for line in lines} == {"192.0.2.7"}
    # But for what the client of this test says of its own requests.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert logged
    written = str(conn.execute("SELECT * FROM system_error_audit").fetchall()) + "\n".join(logged)
    for secret in (wrong, "s" * 43, reader, reader[-43:], "guessed-token", "guessed-ticket"):
        assert secret not in written


async def test_a_flood_of_refusals_fills_neither_the_audit_nor_the_memory(
    app: FastAPI, call: Any, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with call(app) as client:
        answers = [await client.get(ERRORS) for _ in range(40)]
        assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 30
        assert int(answers[-1].headers["retry-after"]) > 0
    assert len(run(conn, reading.audit(action="refuse")).rows) == 20
    monkeypatch.setattr(limits_module, "_KEYS", 100)
    window = Window(1, 60.0)
    for number in range(1_000):
        window.add(str(number))
    assert len(window._counts) == 100
    assert window.full_for("999")
    assert not window.full_for("1")


async def test_failed_sign_ins_are_limited_by_address_and_by_token(
    api_uri: str, make_app: Callable[..., FastAPI], call: Any, token: Callable[..., str]
) -> None:
    good, other = token("read"), token("read")
    wrong = good[:-4] + ("AAAA" if not good.endswith("AAAA") else "BBBB")
    app = make_app()
    seen: list[int] = []

    async def attempt(address: str, value: str) -> int:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            # No client can choose the address that it is counted by.
            forwarded = {"X-Forwarded-For": f"203.0.113.{len(seen)}", "Forwarded": f"for=203.0.113.{len(seen)}"}
            answer = await client.get(ERRORS, headers={"Authorization": f"Bearer {value}"} | forwarded)
            seen.append(answer.status_code)
            return answer.status_code

    async with app.router.lifespan_context(app):
        assert [await attempt("192.0.2.1", "wrong") for _ in range(12)] == [401] * 10 + [429] * 2
        # The right token does not help from there, and elsewhere it works.
        assert await attempt("192.0.2.1", good) == 429
        assert await attempt("192.0.2.2", good) == 200
        # One token's secret tried from many addresses.
        assert [await attempt(f"198.51.100.{n}", wrong) for n in range(21)] == [401] * 20 + [429]
        assert await attempt("192.0.2.3", good) == 429
        assert await attempt("192.0.2.3", other) == 200


def test_a_window_forgets_after_its_time() -> None:
    now = 100.0
    window = Window(2, 60.0, clock=lambda: now)
    for _ in range(2):
        assert window.full_for("a") == 0.0
        window.add("a")
    assert window.full_for("a") == 60.0
    now = 159.0
    assert window.full_for("a") == 1.0
    now = 161.0
    assert window.full_for("a") == 0.0
    window.add("a")
    assert window.full_for("a") == 0.0


def test_a_household_is_one_client() -> None:
    assert client_key("2001:db8:1:2:3::4") == client_key("2001:db8:1:2:ffff::1")
    assert client_key("2001:db8:1:2::1") != client_key("2001:db8:1:3::1")
    assert client_key("::ffff:192.0.2.1") == client_key("192.0.2.1")
    assert client_key(None) == client_key("testclient") == "unknown"


async def test_a_token_ends_when_it_expires_or_is_revoked_and_notes_its_use(
    app: FastAPI, call: Any, token: Callable[..., str], conn: Connection
) -> None:
    soon = token("read", expires_at=datetime.now(UTC) + timedelta(days=1))
    lasting = token("read")
    async with call(app) as client:
        for one in (soon, lasting):
            assert (await client.get(ERRORS, headers={"Authorization": f"Bearer {one}"})).status_code == 200
        conn.execute("UPDATE checkpointer_api_tokens SET expires_at = now() WHERE expires_at IS NOT NULL")
        row = run(conn, revoke(lasting.split("_")[1], actor="ann"))
        assert row is not None
        assert row["last_used_at"] is not None
        for one in (soon, lasting):
            assert (await client.get(ERRORS, headers={"Authorization": f"Bearer {one}"})).status_code == 401
    stored = str(conn.execute("SELECT * FROM checkpointer_api_tokens").fetchall())
    assert lasting[-43:] not in stored
    assert [line["action"] for line in run(conn, reading.audit()).rows if line["action"] != "refuse"] == [
        "token_revoke",
        "token_create",
        "token_create",
    ]


async def test_a_ticket_opens_its_own_stream_only_and_not_for_long(make_app: Callable[..., FastAPI], call: Any) -> None:
    now = 1_000.0
    tickets = Tickets(b"k" * 32, clock=lambda: now)
    for purpose in ("thread:a", "system-errors"):
        ticket = tickets.issue(purpose)
        assert tickets.is_good(ticket, purpose)
        assert not tickets.is_good(ticket, "thread:b")
        assert not Tickets(b"l" * 32, clock=lambda: now).is_good(ticket, purpose)
        for wrong in (ticket[:-1], ticket + "A", ticket.split(".")[0], "." + ticket, "", "é", ticket * 100):
            assert not tickets.is_good(wrong, purpose)
    ticket = tickets.issue("thread:a")
    now += 61
    assert not tickets.is_good(ticket, "thread:a")
    now -= 61
    app = make_app(tickets=tickets)
    async with call(app) as client:
        for path in ("/threads/b/events/by-ticket", f"{ERRORS}/events/by-ticket"):
            assert (await client.get(path, params={"ticket": ticket})).status_code == 401
        # It is no bearer token.
        assert (await client.get(ERRORS, headers={"Authorization": f"Bearer {ticket}"})).status_code == 401


def test_bearer_tokens_without_an_admin_token_take_none_by_that_name(api_uri: str) -> None:
    assert BearerTokens(Store(api_uri), admin_token="")._admin is None
