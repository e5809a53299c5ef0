"""The pages of errors show what there is, to whom it may be shown, as text; and do what their buttons say."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from planting import NOON, plant
from visits import forms_of, text_of

from observability.console.traces import fold
from observability.errors import reading
from observability.errors.statements import run

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from fastapi import FastAPI
    from visits import Visit

    Connection = psycopg.Connection[Any]

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}\u202e\x1b[31m"
TRACE = """Traceback (most recent call last):
  File "/srv/shop/agent.py", line 12, in answer
    graph.invoke(state)
  File "/usr/lib/python3.11/site-packages/langgraph/pregel.py", line 1, in invoke
    needle_of_library()
  File "<frozen runpy>", line 1, in _run
psycopg.errors.UndefinedTable: relation "x" does not exist"""


def ids(html: str) -> list[int]:
    return [int(found) for found in re.findall(r'href="/console/errors/(\d+)"', html)]


def row_of(conn: Connection, error: int) -> dict[str, Any]:
    row = run(conn, reading.one(error))
    assert row is not None
    return row


async def test_filters_stand_in_the_url(admin: Visit, conn: Connection) -> None:
    plain = plant(conn, thread_id="t1")
    critical = plant(conn, severity="critical", error_message="100% of it")
    plant(conn, resolved_at=NOON, created_at=NOON + timedelta(days=1))
    cases = {
        "": [critical, plain],
        "?severity=critical": [critical],
        "?severity=&thread_id=t1&text=&since=&until=": [plain],
        "?text=100%25": [critical],
        "?since=2026-03-14T12:01&state=unresolved": [],
        "?until=2026-03-14T12:01": [critical, plain],
    }
    for query, wanted in cases.items():
        answer = await admin.get(f"/console/errors{query}")
        assert answer.status_code == 200
        assert ids(answer.text) == wanted, query
    assert "No error matches" in (await admin.get("/console/errors?text=nothing")).text
    assert len(ids((await admin.get("/console/errors?state=all")).text)) == 3


@pytest.mark.parametrize("query", ["severity=awful", "state=x", "since=yesterday", f"text={'a' * 2000}"])
async def test_filters_that_cannot_be_used_are_said(admin: Visit, query: str) -> None:
    answer = await admin.get(f"/console/errors?{query}")
    assert answer.status_code == 422
    assert query.split("=")[0] in text_of(answer.text)


async def test_pages_lead_to_each_other_and_keep_the_filters(admin: Visit, conn: Connection) -> None:
    planted = [plant(conn, created_at=NOON + timedelta(seconds=number), thread_id="a b&c") for number in range(120)]
    seen: list[int] = []
    url: str | None = "/console/errors?thread_id=a+b%26c"
    while url:
        answer = await admin.get(url)
        seen += ids(answer.text)
        found = re.search(r'rel="next" href="([^"]+)"', answer.text)
        url = found and found[1].replace("&amp;", "&")
    assert seen == planted[::-1]
    assert (await admin.get("/console/errors?cursor=nonsense")).status_code == 400


async def test_an_error_shows_its_trace_folded_and_its_context(admin: Visit, conn: Connection) -> None:
    error = plant(conn, stack_trace=TRACE, error_context='{"checkpoint_count": 7}', thread_id="t")
    html = (await admin.get(f"/console/errors/{error}")).text
    folded = re.search(r"<details><summary>2 frames of libraries</summary>(.*?)</details>", html, re.DOTALL)
    assert folded is not None
    assert "needle_of_library" in folded[1]
    assert "graph.invoke(state)" in html.replace(folded[0], "")
    assert "UndefinedTable" in html.replace(folded[0], "")
    assert "checkpoint_count" in html


@pytest.mark.parametrize("trace", [TRACE, "", "no trace", "\n".join([TRACE, "", "During ...:", "", TRACE])])
def test_folding_loses_no_line(trace: str) -> None:
    assert "\n".join(piece.text for piece in fold(trace)) == trace


async def test_what_is_sensitive_needs_its_scope(
    app: FastAPI, visit: Any, token: Callable[..., str], conn: Connection
) -> None:
    error = plant(conn, stack_trace="needle", error_context='{"a": "needle"}')
    async with visit(app, token("read", "resolve", "delete")) as somebody:
        answer = await somebody.get(f"/console/errors/{error}")
        assert "needle" not in answer.text
        assert "read_sensitive" in answer.text
        for path in ("errors?state=all", "groups", "groups/v1:a"):
            assert "needle" not in (await somebody.get(f"/console/{path}")).text
    async with visit(app, token("read", "read_sensitive")) as somebody:
        assert (await somebody.get(f"/console/errors/{error}")).text.count("needle") == 2


async def test_resolving_and_reopening_say_who_and_why(admin: Visit, conn: Connection) -> None:
    error = plant(conn)
    page = f"/console/errors/{error}"
    answer = await admin.send(page, f"{page}/resolve", notes="Restarted it.")
    assert "Restarted it." in answer.text
    row = row_of(conn, error)
    assert (row["resolved_by"], row["resolution_notes"]) == ("admin-token", "Restarted it.")
    await admin.send(page, f"{page}/reopen")
    assert row_of(conn, error)["resolved_at"] is None
    audit = run(conn, reading.audit(error_id=error)).rows
    assert [line["action"] for line in audit] == ["reopen", "resolve"]
    assert audit[0]["details"]["how"] == {"way": "console", "client": "10.0.0.1", "with": "admin-token"}


async def test_a_group_is_resolved_muted_and_opened_again(admin: Visit, conn: Connection) -> None:
    error = plant(conn, fingerprint="v1:a/b ?#%")
    listed = (await admin.get("/console/groups")).text
    page = re.search(r'href="(/console/groups/v1[^"]+)"', listed)
    assert page is not None

    async def state(action: str, **fields: str) -> str:
        answer = await admin.send(page[1], f"{page[1]}/{action}", **fields)
        assert answer.status_code == 200, answer.text
        row = run(conn, reading.group("v1:a/b ?#%"))
        assert row is not None
        return str(row["status"])

    assert await state("mute", hours="24") == "muted"
    assert await state("unmute") == "unresolved"
    assert await state("resolve", notes="done") == "resolved"
    assert row_of(conn, error)["resolution_notes"] == "done"
    assert await state("reopen") == "unresolved"
    answer = await admin.send(page[1], f"{page[1]}/mute", hours="5000")
    assert answer.status_code == 422


async def test_many_are_resolved_after_a_look_at_how_many(admin: Visit, conn: Connection) -> None:
    matching = [plant(conn, thread_id="t") for _ in range(3)]
    other = plant(conn, thread_id="u")
    ask = "/console/errors/resolve?thread_id=t"
    answer = await admin.get("/console/errors?thread_id=t")
    assert f'href="{ask}"' in answer.text
    assert "Resolve 3 errors?" in text_of((await admin.get(ask)).text)
    assert row_of(conn, matching[0])["resolved_at"] is None
    answer = await admin.send(ask, ask, notes="All at once.")
    assert "3 errors resolved" in text_of(answer.text)
    assert {row_of(conn, error)["resolution_notes"] for error in matching} == {"All at once."}
    assert row_of(conn, other)["resolved_at"] is None


async def test_without_the_scope_there_are_no_buttons_and_forms_are_refused(
    app: FastAPI, visit: Any, token: Callable[..., str], conn: Connection
) -> None:
    error = plant(conn)
    async with visit(app, token("read", "read_sensitive", "delete")) as somebody:
        for page in (f"/console/errors/{error}", "/console/groups/v1:a", "/console/errors"):
            html = (await somebody.get(page)).text
            actions = [form["action"] for form in forms_of(html)]
            assert not [action for action in actions if action.startswith(f"{page}/")], page
            assert "/errors/resolve" not in html
        form_token = forms_of(html)[0]["fields"]["form_token"]
        for path in (f"errors/{error}/resolve", "errors/resolve", "groups/v1:a/resolve", "groups/v1:a/mute"):
            answer = await somebody.client.post(f"/console/{path}", data={"form_token": form_token})
            assert answer.status_code == 403
        assert (await somebody.get("/console/errors/resolve")).status_code == 403
    assert row_of(conn, error)["resolved_at"] is None
    refused = run(conn, reading.audit(action="refuse")).rows
    assert {line["actor"] for line in refused} == {"ann"}


async def test_hostile_text_is_text_on_every_page(admin: Visit, conn: Connection) -> None:
    error = plant(
        conn,
        **dict.fromkeys(
            ["error_type", "error_message", "thread_id", "stack_trace", "component", "operation", "error_code"], HOSTILE
        ),
        **dict.fromkeys(["run_id", "checkpoint_ns", "checkpoint_id", "release", "environment", "delivery"], HOSTILE),
        fingerprint=HOSTILE,
        severity="critical",
        resolved_by=HOSTILE,
        resolution_notes=HOSTILE,
        resolved_at=NOON,
    )
    listed = (await admin.get("/console/groups")).text
    group = re.search(r'href="(/console/groups/[^"]+)"', listed)
    assert group is not None
    filters = {"text": HOSTILE, "error_type": HOSTILE, "thread_id": HOSTILE, "component": HOSTILE, "state": "all"}
    for path, params in (
        ("/console/errors", {"state": "all"}),
        ("/console/errors", filters),
        ("/console/errors/resolve", filters),
        (f"/console/errors/{error}", {}),
        ("/console/groups", {"text": HOSTILE, "error_type": HOSTILE}),
        (group[1], {}),
    ):
        answer = await admin.get(path, params=params)
        assert answer.status_code == 200, (path, answer.text)
        assert "alert(1)" in answer.text
        assert "<script>alert" not in answer.text
        assert "<img src=x" not in answer.text
        assert ">49" not in answer.text
        assert "\x1b" not in text_of(answer.text)
        assert "\u202e" not in text_of(answer.text)


async def test_what_is_not_there_is_said(admin: Visit) -> None:
    for path in ("errors/99", "groups/none", "nothing"):
        assert (await admin.get(f"/console/{path}")).status_code == 404
    assert (await admin.get("/console/errors/0")).status_code == 422
    assert "Nothing is unresolved" in (await admin.get("/console/errors")).text


async def test_every_answer_has_the_strict_policy_and_no_page_has_script_or_style_inside(
    admin: Visit, conn: Connection
) -> None:
    error = plant(conn, stack_trace=TRACE)
    for path in ("errors", f"errors/{error}", "groups", "groups/v1:a", "errors/resolve", "errors/99", "sign-in"):
        answer = await admin.get(f"/console/{path}")
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", answer.text)
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", answer.text, re.DOTALL)
        assert scripts == ["", ""]
    for name in re.findall(r'/console/static/[^"]+', answer.text):
        found = await admin.get(name)
        assert found.status_code == 200
        assert found.headers["content-security-policy"]
    assert (await admin.get("/console/static/../pages.py")).status_code == 404
