"""The routes for administrators answer and act as promised."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fastapi import FastAPI, Header, HTTPException
from helpers import await_until
from planting import NOON, plant
from psycopg_pool import AsyncConnectionPool

from checkpointer.errors import ConfigurationError
from observability.api import Principal, Store, create_admin_router, create_app, create_health_router
from observability.api import store as store_module
from observability.errors import reading
from observability.errors.statements import run

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    import psycopg

    from checkpointer.embedded import Servers

    Connection = psycopg.Connection[Any]

ERRORS = "/admin/system-errors"


async def test_the_list_is_as_the_contract_has_it(client: httpx.AsyncClient, conn: Connection) -> None:
    planted = [plant(conn, thread_id="t", created_at=NOON + timedelta(seconds=n)) for n in range(3)]
    plant(conn, resolved_at=NOON)
    plant(conn, severity="critical")
    query = {"severity": "error", "error_type": "checkpoint_flush_error", "thread_id": "t", "limit": 2}
    first = (await client.get(ERRORS, params=query)).json()
    assert set(first) == {"status", "count", "errors", "next_cursor"}
    assert (first["status"], first["count"]) == ("success", 2)
    second = (await client.get(ERRORS, params=query | {"cursor": first["next_cursor"]})).json()
    assert [error["id"] for error in first["errors"] + second["errors"]] == planted[::-1]
    assert second["next_cursor"] is None
    assert first["errors"][0]["created_at"] == "2026-03-14T12:00:02Z"
    both = await client.get(ERRORS, params={"severity": ["critical", "error"], "state": "all"})
    assert both.json()["count"] == 5


async def test_an_error_is_resolved_in_the_principals_name_and_once(
    client: httpx.AsyncClient, conn: Connection
) -> None:
    error_id = plant(conn)
    answers = [
        (await client.post(f"{ERRORS}/{error_id}/resolve", json={"resolution_notes": notes})).json()
        for notes in ("fixed", "again")
    ]
    assert [answer["changed"] for answer in answers] == [True, False]
    assert {answer["resolved_by"] for answer in answers} == {"admin-token"}
    assert {answer["resolution_notes"] for answer in answers} == {"fixed"}
    reopened = (await client.post(f"{ERRORS}/{error_id}/reopen")).json()
    assert (reopened["changed"], reopened["resolved_at"]) == (True, None)
    # Nobody can act in somebody else's name.
    forged = await client.post(f"{ERRORS}/{error_id}/resolve", json={"resolved_by": "bob"})
    assert forged.status_code == 422
    assert (await client.post(f"{ERRORS}/{error_id}/resolve")).json()["changed"] is True


async def test_the_audit_says_who_did_what_when_and_how(
    app: FastAPI, call: Any, token: Callable[..., str], conn: Connection
) -> None:
    error_id, other = plant(conn), plant(conn, fingerprint="v1:b", resolved_at=NOON)
    secret = token("resolve", "delete", name="ann")
    credential = f"token {secret.split('_')[1]}"
    group = f"{ERRORS}/groups/v1:a"
    before = datetime.now(UTC) - timedelta(seconds=1)
    requests = [
        ("resolve", "POST", f"{ERRORS}/{error_id}/resolve"),
        ("reopen", "POST", f"{ERRORS}/{error_id}/reopen"),
        ("mute", "POST", f"{group}/mute"),
        ("unmute", "POST", f"{group}/unmute"),
        ("resolve_group", "POST", f"{group}/resolve"),
        ("reopen_group", "POST", f"{group}/reopen"),
        ("bulk_resolve", "POST", f"{ERRORS}/resolve"),
        ("bulk_delete", "DELETE", f"{ERRORS}?resolved_before=2026-03-15T00:00:00Z"),
        ("delete", "DELETE", f"{ERRORS}/{error_id}"),
    ]
    headers = {"Authorization": f"Bearer {secret}"}
    async with call(app, address="192.0.2.7") as client:
        for _, method, path in requests:
            body = {} if path == f"{ERRORS}/resolve" else None
            answer = await client.request(method, path, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
    lines = run(conn, reading.audit(actor="ann")).rows[::-1]
    assert [line["action"] for line in lines] == [action for action, _, _ in requests]
    assert lines[-2]["details"]["ids"] == [other]
    for line in lines:
        assert line["details"]["how"] == {"way": "http", "client": "192.0.2.7", "with": credential}
        assert before <= line["at"] <= datetime.now(UTC) + timedelta(seconds=1)


async def test_an_error_is_read_and_deleted(client: httpx.AsyncClient, conn: Connection) -> None:
    error_id = plant(conn, stack_trace="Traceback", error_context=json.dumps({"checkpoint_count": 3}))
    error = (await client.get(f"{ERRORS}/{error_id}")).json()["error"]
    assert (error["stack_trace"], error["error_context"], error["withheld"]) == (
        "Traceback",
        {"checkpoint_count": 3},
        [],
    )
    assert (await client.delete(f"{ERRORS}/{error_id}")).json() == {"status": "success", "count": 1}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/resolve"), ("POST", "/reopen")):
        answer = await client.request(method, f"{ERRORS}/{error_id}{path}")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


async def test_stats_and_trends_count(client: httpx.AsyncClient, conn: Connection) -> None:
    plant(conn, occurrences=7, created_at=datetime.now(UTC))
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    conn.execute("INSERT INTO system_error_hourly VALUES (%s, 'x', 'error', 'v1:a', 7)", [hour])
    stats = (await client.get(f"{ERRORS}/stats")).json()
    assert (stats["status"], stats["unresolved"], stats["groups"]["unresolved"]) == ("success", 7, 1)
    assert stats["by_severity"][0]["severity"] == "critical"
    trends = (await client.get(f"{ERRORS}/trends", params={"by": "error_type"})).json()
    assert [(one["key"], one["total"]) for one in trends["series"]] == [("x", 7)]
    assert len(trends["starts"]) == len(trends["series"][0]["counts"])
    days = (await client.get(f"{ERRORS}/trends", params={"bucket": "day"})).json()
    assert days["series"][0]["total"] == 7
    wrong = await client.get(f"{ERRORS}/trends", params={"since": "2026-01-01T00:00:00Z"})
    assert wrong.status_code == 422
    early = await client.get(f"{ERRORS}/trends", params={"until": "0001-01-01T00:00:00Z"})
    assert early.status_code == 422


async def test_groups_are_listed_resolved_reopened_and_muted(client: httpx.AsyncClient, conn: Connection) -> None:
    plant(conn)
    plant(conn, fingerprint="v1:b", created_at=NOON - timedelta(hours=1))
    first = (await client.get(f"{ERRORS}/groups", params={"limit": 1})).json()
    second = (await client.get(f"{ERRORS}/groups", params={"limit": 1, "cursor": first["next_cursor"]})).json()
    assert [page["groups"][0]["fingerprint"] for page in (first, second)] == ["v1:a", "v1:b"]
    group = f"{ERRORS}/groups/v1:a"
    resolved = (await client.post(f"{group}/resolve", json={"resolution_notes": "n"})).json()
    assert (resolved["group_status"], resolved["changed"], resolved["more"]) == ("resolved", True, False)
    assert (await client.get(group)).json()["group"]["resolved_by"] == "admin-token"
    assert (await client.post(f"{group}/reopen")).json()["group_status"] == "unresolved"
    until = "2100-01-01T00:00:00Z"
    muted = (await client.post(f"{group}/mute", json={"until": until})).json()
    assert (muted["group_status"], muted["muted_until"]) == ("muted", until)
    assert (await client.post(f"{group}/unmute")).json()["group_status"] == "unresolved"
    assert (await client.get(f"{ERRORS}/groups", params={"status": "muted"})).json()["count"] == 0
    assert (await client.get(f"{ERRORS}/groups/v1:none")).status_code == 404
    actions = [entry["action"] for entry in (await client.get(f"{ERRORS}/audit")).json()["entries"]]
    assert actions == ["unmute", "mute", "reopen_group", "resolve_group"]


async def test_bulk_acts_need_what_bounds_them_and_refuse_a_misspelt_filter(
    client: httpx.AsyncClient, conn: Connection
) -> None:
    for n in range(3):
        plant(conn, created_at=NOON + timedelta(seconds=n))
    dry = (
        await client.post(f"{ERRORS}/resolve", json={"error_type": "checkpoint_flush_error", "dry_run": True})
    ).json()
    assert dry == {"status": "success", "count": 3, "more": False, "dry_run": True}
    done = (await client.post(f"{ERRORS}/resolve", json={"severity": ["error"], "limit": 2})).json()
    assert (done["count"], done["more"]) == (2, True)
    assert (await client.delete(ERRORS)).status_code == 422
    future = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    misspelt = await client.delete(ERRORS, params={"resolved_before": future, "severty": "error"})
    assert misspelt.status_code == 422
    assert (await client.post(f"{ERRORS}/resolve", json={"eror_type": "x"})).status_code == 422
    dry = (await client.delete(ERRORS, params={"resolved_before": future, "dry_run": True})).json()
    assert (dry["count"], dry["dry_run"]) == (2, True)
    done = (await client.delete(ERRORS, params={"resolved_before": future})).json()
    assert (done["count"], done["more"]) == (2, False)
    assert (await client.get(ERRORS, params={"state": "all"})).json()["count"] == 1
    lines = (await client.get(f"{ERRORS}/audit", params={"action": "bulk_delete"})).json()
    assert lines["count"] == 1


async def test_wrong_requests_are_problems_that_say_where_and_not_what(client: httpx.AsyncClient) -> None:
    cursor = await client.get(ERRORS, params={"cursor": "hunter2"})
    assert (cursor.status_code, cursor.json()["code"]) == (400, "invalid_cursor")
    wrong = await client.get(ERRORS, params={"limit": "hunter2", "severity": "hunter2"})
    assert wrong.status_code == 422
    assert {error["location"] for error in wrong.json()["errors"]} == {"query.limit", "query.severity.0"}
    assert (await client.get(f"{ERRORS}/hunter2")).status_code == 422
    body = await client.post(
        f"{ERRORS}/1/resolve", content=b'{"resolution_notes": hunter2', headers={"Content-Type": "application/json"}
    )
    assert body.status_code == 422
    for answer in (cursor, wrong, body):
        assert answer.headers["content-type"] == "application/problem+json"
        assert set(answer.json()) >= {"type", "title", "status", "detail", "code"}
        assert "hunter2" not in answer.text


async def test_a_fault_is_a_problem_without_details(
    client: httpx.AsyncClient, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    error_id = plant(conn, thread_id="a-secret-thread")
    conn.execute("ALTER TABLE system_error_audit ADD CHECK (actor = details->>'nobody')")
    conn.execute("ALTER TABLE system_error_audit ALTER details TYPE jsonb, ADD CHECK (action = 'none')")
    answer = await client.delete(f"{ERRORS}/{error_id}")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_server_error")
    assert "system_error_audit" not in answer.text
    assert "failed: psycopg.errors.CheckViolation" in caplog.text
    # Postgres quotes the row in the details of its error.
    assert "a-secret-thread" not in caplog.text


async def test_the_application_that_mounts_the_routes_keeps_its_own_ways(
    api_uri: str, call: Any, conn: Connection
) -> None:
    def authorize(x_user: Annotated[str, Header()] = "") -> Principal:
        if not x_user:
            raise HTTPException(401, {"who": "are you"})
        return Principal(x_user, frozenset({"read", "resolve"}))

    app = FastAPI()
    async with AsyncConnectionPool(api_uri, open=False, kwargs={"prepare_threshold": None}) as pool:
        store = Store(pool=pool)
        app.include_router(create_admin_router(authorize=authorize, store=store, prefix="/errors"), prefix="/ops")

        @app.get("/own")
        def own(n: int) -> int:
            return n

        error_id = plant(conn)
        async with call(app) as client:
            assert (await client.get("/own")).json()["detail"][0]["loc"] == ["query", "n"]
            assert (await client.get("/nowhere")).json() == {"detail": "Not Found"}
            refused = await client.get("/ops/errors")
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            headers = {"X-User": "carla"}
            assert (await client.get("/ops/errors", headers=headers)).json()["count"] == 1
            done = await client.post(f"/ops/errors/{error_id}/resolve", headers=headers)
            assert done.json()["resolved_by"] == "carla"
            ticket = await client.post("/ops/errors/events/ticket", headers=headers)
            assert ticket.json()["url"].startswith("/ops/errors/events/by-ticket?ticket=")
        # The pool is the application's.
        assert not pool.closed


async def test_postgres_away_is_a_503_and_back_is_no_failed_request(
    own_servers: Servers, call: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(store_module, "_CONNECT_SECONDS", 1.0)
    app = create_app(
        postgres_uri=own_servers.postgres_uri, redis_url=own_servers.redis_url, admin_token="admin", prefix=prefix
    )
    async with call(app, Authorization="Bearer admin") as client:
        unready = await client.get("/readyz")
        assert (unready.status_code, "migrate" in unready.json()["checks"]["postgres"]) == (503, True)
        missing = await client.get(ERRORS)
        assert (missing.status_code, missing.json()["code"]) == (503, "not_set_up")
        _migrate(own_servers.postgres_uri)
        assert (await client.get(ERRORS)).status_code == 200
        assert (await client.get("/readyz")).json()["redis"] == "ok"
        # A server that is there and does not answer is away as well.
        own_servers.postgres.pause()
        stopped = await client.get(ERRORS)
        assert stopped.status_code == 503
        own_servers.postgres.resume()
        await await_until(lambda: _is_ok(client))
        own_servers.postgres.kill()
        for path in (ERRORS, "/readyz"):
            away = await client.get(path)
            assert away.status_code == 503
            assert int(away.headers["retry-after"]) > 0
            assert away.headers["content-type"] == "application/problem+json"
        assert (await client.get("/healthz")).status_code == 200
        own_servers.postgres.start()
        await await_until(lambda: _is_ok(client))
        # With connections in the pool that do not know of it; a slow machine may take its time for a new one.
        monkeypatch.setattr(store_module, "_ANSWER_SECONDS", 30.0)
        monkeypatch.setattr(store_module, "_CONNECT_SECONDS", 30.0)
        own_servers.postgres.restart()
        assert (await client.get(ERRORS)).status_code == 200
        own_servers.valkey.kill()
        assert (await client.get("/readyz")).json()["checks"] == {"postgres": "ok", "redis": "Redis cannot be reached."}


async def _is_ok(client: httpx.AsyncClient) -> bool:
    return (await client.get(ERRORS)).status_code == 200


def _migrate(uri: str) -> None:
    import psycopg

    from checkpointer.store import schema

    with psycopg.connect(uri, autocommit=True) as connection:
        schema.setup(connection)


async def test_metrics_are_those_of_the_registry_and_only_where_they_are_asked_for(api_uri: str, call: Any) -> None:
    from prometheus_client import CollectorRegistry, Counter

    registry = CollectorRegistry()
    Counter("own_things", "Own things.", registry=registry).inc(3)
    app = FastAPI()
    store = Store(api_uri)
    reader = Principal("prometheus", frozenset({"read"}))
    app.include_router(create_health_router(store=store, authorize_metrics=lambda: reader, registry=registry))
    async with call(app) as client:
        answer = await client.get("/metrics")
        assert "own_things_total 3.0" in answer.text
        assert "python_info" not in answer.text
        assert answer.headers["content-type"].startswith("text/plain")
    bare = FastAPI()
    bare.include_router(create_health_router(store=store))
    async with call(bare) as client:
        assert (await client.get("/metrics")).status_code == 404
        assert (await client.get("/readyz")).json()["redis"] == "not configured"


def test_a_store_needs_one_way_to_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTGRES_URI", raising=False)
    with pytest.raises(ConfigurationError, match="POSTGRES_URI"):
        Store()
    with pytest.raises(ConfigurationError) as failed:
        Store("postgres:/me:hunter2@host")
    assert "hunter2" not in str(failed.value)
    with pytest.raises(ConfigurationError, match="not both"):
        Store("postgresql://x/y", pool=AsyncConnectionPool("postgresql://x/y", open=False))


async def test_a_store_can_be_closed_twice_and_used_again(api_uri: str) -> None:
    store = Store(api_uri)
    await store.aclose()
    for _ in range(2):
        assert await store.run(reading.newest_id()) == 0
        await store.aclose()
        await store.aclose()
