"""The pages of threads and dead letters: what there is, to whom state may be shown, and what their buttons do."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import scene
from planting import NOON, plant
from poisoning import WORD, allow, config, forbid, put_step, put_steps, saved
from savers import put, put_chain
from visits import forms_of, text_of

from observability.console.diffs import differences
from observability.errors import reading
from observability.errors.statements import run

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from fastapi import FastAPI
    from savers import Recording
    from visits import Visit

    Connection = psycopg.Connection[Any]

HOSTILE = "<script>alert(1)</script>\"'/../%2f?#&{{7*7}}\u202e\x1b[31m ü"


def thread_url(thread: str) -> str:
    return f"/console/thread?thread={quote(thread, safe='')}"


async def test_threads_are_listed_searched_and_led_to(admin: Visit, make: Callable[..., Recording]) -> None:
    assert "There are no threads yet" in (await admin.get("/console/threads")).text
    saver = make()
    for number in range(60):
        put(saver, f"thread-{number:02}", 0)
    saver.flush()
    put(saver, HOSTILE, 0)
    seen: list[str] = []
    url: str | None = "/console/threads"
    while url:
        answer = await admin.get(url)
        seen += re.findall(r"<bdi>(thread-\d\d)</bdi>", answer.text)
        assert len(re.findall("<tr>", answer.text)) <= 51
        found = re.search(r'rel="next" href="([^"]+)"', answer.text)
        url = found and found[1].replace("&amp;", "&")
    assert seen == [f"thread-{number:02}" for number in range(60)]
    html = (await admin.get(f"/console/threads?q={quote('SCRIPT>')}")).text
    assert "<script>alert" not in html
    found = re.search(r'href="(/console/thread\?[^"]+)"', html)
    assert found is not None
    answer = await admin.get(found[1].replace("&amp;", "&"))
    assert answer.status_code == 200
    assert "<script>alert" not in answer.text
    assert "\u202e" not in text_of(answer.text)
    assert "Redis, waits to be flushed" in text_of(answer.text)
    assert "No thread matches" in (await admin.get("/console/threads?q=nothing")).text


async def test_a_timeline_has_errors_and_the_log_between_checkpoints(
    admin: Visit, make: Callable[..., Recording], conn: Connection
) -> None:
    saver = make()
    first = put_step(saver, "t", 0)
    error = plant(conn, thread_id="t", error_message="Between.", created_at=datetime.now(UTC))
    line = "INSERT INTO thread_logs (thread_id, level, message, created_at) VALUES ('t', 'info', 'said', %s)"
    conn.execute(line, (datetime.now(UTC),))
    put_step(saver, "t", 1, first)
    plant(conn, thread_id="other", error_message="Elsewhere.")
    text = text_of((await admin.get(thread_url("t"))).text)
    assert "Elsewhere" not in text
    assert f"/errors/{error}" in (await admin.get(thread_url("t"))).text
    order = [text.index(words) for words in ("step 1", "said", "Between.", "step 0")]
    assert order == sorted(order), text


async def test_older_pages_of_a_timeline_have_what_happened_then(
    admin: Visit, make: Callable[..., Recording], conn: Connection
) -> None:
    saver = make()
    last = put_chain(saver, "t", range(120))
    saver.flush()
    assert last
    plant(conn, thread_id="t", error_message="Long before.", created_at=NOON.replace(year=2020))
    seen: list[int] = []
    before_all: list[bool] = []
    url: str | None = thread_url("t")
    while url:
        html = (await admin.get(url)).text
        seen += [int(step) for step in re.findall(r"<strong>step (-?\d+)</strong>", html)]
        before_all.append("Long before." in html)
        found = re.search(r'rel="next" href="([^"]+)"', html)
        url = found and found[1].replace("&amp;", "&")
    assert seen == list(range(119, -1, -1))
    assert before_all == [False, False, True]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("thread?thread=nobody", 404),
        ("thread?thread=a%00b", 422),
        ("thread", 422),
        ("thread/compare?thread=t&first=a&second=b", 404),
        ("threads?after=%00", 422),
        ("dead-letters/7", 404),
        ("dead-letters/0", 422),
        ("audit?cursor=rubbish", 400),
    ],
)
async def test_what_is_not_there_is_said(admin: Visit, make: Callable[..., Recording], path: str, status: int) -> None:
    make()
    answer = await admin.get(f"/console/{path}")
    assert answer.status_code == status
    assert 'role="alert"' in answer.text


async def test_what_changed_is_shown_to_those_who_may_see_state(
    app: FastAPI, visit: Any, token: Callable[..., str], make: Callable[..., Recording]
) -> None:
    saver = make()
    scene.talk(saver, "t", "needle?")
    html = ""
    for scopes in (["read", "read_sensitive"], ["read", "resolve", "delete"]):
        async with visit(app, token(*scopes)) as somebody:
            page = (await somebody.get(thread_url("t"))).text
            assert "needle" not in page
            (form,) = [form for form in forms_of(page) if form["action"].endswith("/compare")]
            assert form["fields"]["thread"] == "t"
            ids = re.findall(r'name="first" value="([^"]+)"', page)
            # From the first to the last one, in whatever order they are given.
            answer = await somebody.get(f"/console/thread/compare?thread=t&first={ids[0]}&second={ids[-1]}")
            assert answer.status_code == 200
            html = answer.text
            assert "messages" in html
            assert ("needle?" in html) == ("read_sensitive" in scopes)
            assert ("added: " in html) == ("read_sensitive" in scopes)
    assert "read_sensitive" in html


def test_a_difference_is_no_longer_than_a_page_can_show() -> None:
    before, after = ("\n".join(f"{word} {n}" for n in range(5_000)) for word in ("a", "b"))
    lines = differences(before, after)
    assert len(lines) == 401
    assert lines[-1].kind == "note"
    assert differences(None, "x")[0].kind == "new"
    assert differences("x", "x") == []
    assert len(differences("", "y" * 10_000)[-1].text) < 600
    kinds = [line.kind for line in differences("a\nb\nc", "a\nB\nc")]
    assert kinds == ["kept", "gone", "new", "kept"]


async def test_a_dead_letter_is_looked_at_replayed_and_audited(
    admin: Visit, make: Callable[..., Recording], conn: Connection
) -> None:
    saver = make()
    assert "No record waits" in (await admin.get("/console/dead-letters")).text
    forbid(conn)
    put_steps(saver, "t", 3, {1: "blob"})
    await asyncio.to_thread(saver.flush)
    assert len(saved(conn, "t")) == 1
    listed = (await admin.get("/console/dead-letters")).text
    page = re.search(r'href="(/console/dead-letters/\d+)"', listed)
    assert page is not None
    answer = await admin.get(page[1])
    assert WORD in answer.text
    assert page[1] in (await admin.get(thread_url("t"))).text
    answer = await admin.send(page[1], f"{page[1]}/replay")
    assert "It was refused again" in text_of(answer.text)
    allow(conn)
    answer = await admin.send(page[1], f"{page[1]}/replay")
    assert "Replayed" in text_of(answer.text)
    assert "It was refused again" not in answer.text
    assert len(saved(conn, "t")) == 3
    assert saver.get_tuple(config("t")).metadata["step"] == 2
    again = await admin.client.post(f"{page[1]}/replay", data=forms_of(answer.text)[0]["fields"])
    assert again.status_code == 200
    rows = run(conn, reading.audit(action="dead_letter_replay")).rows
    assert [(row["actor"], row["details"]["resolution"]) for row in rows[::-1]] == [
        ("admin-token", None),
        ("admin-token", "replayed"),
        ("admin-token", "replayed"),
    ]
    assert rows[0]["details"]["how"]["way"] == "console"
    assert f'href="{page[1]}"' in (await admin.get("/console/audit?action=dead_letter_replay")).text
    assert page[1] in (await admin.get("/console/dead-letters?all=yes")).text
    assert page[1] not in (await admin.get("/console/dead-letters")).text


async def test_a_record_is_given_up_only_by_who_says_so(
    admin: Visit, make: Callable[..., Recording], conn: Connection
) -> None:
    saver = make()
    forbid(conn)
    put_steps(saver, "t", 3, {1: "write"})
    await asyncio.to_thread(saver.flush)
    (letter,) = saver.dead_letters.list()
    ask = f"/console/dead-letters/{letter.id}/drop"
    assert f'href="{ask}"' in (await admin.get(f"/console/dead-letters/{letter.id}")).text
    answer = await admin.send(ask, ask)
    assert answer.status_code == 422
    assert saver.dead_letters.show(letter.id).resolution is None
    answer = await admin.send(ask, ask, sure="yes")
    assert "Dropped" in text_of(answer.text)
    assert saver.dead_letters.show(letter.id).resolved_by == "admin-token"
    assert len(saved(conn, "t")) == 3
    assert [row["actor"] for row in run(conn, reading.audit(action="dead_letter_drop")).rows] == ["admin-token"]


async def test_without_the_scopes_a_letter_is_neither_read_nor_resolved(
    app: FastAPI, visit: Any, token: Callable[..., str], make: Callable[..., Recording], conn: Connection
) -> None:
    saver = make()
    forbid(conn)
    put_steps(saver, "t", 2, {1: "write"})
    await asyncio.to_thread(saver.flush)
    (letter,) = saver.dead_letters.list()
    allow(conn)
    page = f"/console/dead-letters/{letter.id}"
    for scopes, denied in (
        (["read", "resolve"], [("GET", "drop"), ("POST", "drop")]),
        (["read", "delete"], [("POST", "replay")]),
        (["read"], [("GET", "drop"), ("POST", "drop"), ("POST", "replay")]),
    ):
        async with visit(app, token(*scopes, name="-".join(scopes))) as somebody:
            html = (await somebody.get(page)).text
            assert WORD not in html
            assert "read_sensitive" in html
            form_token = forms_of(html)[0]["fields"]["form_token"]
            for method, action in denied:
                assert f"{page}/{action}" not in html
                fields = {"form_token": form_token, "sure": "yes"}
                answer = await somebody.client.request(method, f"{page}/{action}", data=fields)
                assert answer.status_code == 403, (scopes, method, action)
    async with visit(app, token("read", "resolve", "delete")) as somebody:
        for action in ("replay", "drop"):
            answer = await somebody.client.post(f"{page}/{action}", data={"form_token": "x", "sure": "yes"})
            assert answer.status_code == 403
    assert saver.dead_letters.show(letter.id).resolution is None


async def test_the_audit_is_filtered_and_paged(admin: Visit, conn: Connection) -> None:
    error = plant(conn)
    for _ in range(30):
        await admin.send(f"/console/errors/{error}", f"/console/errors/{error}/resolve")
        await admin.send(f"/console/errors/{error}", f"/console/errors/{error}/reopen")
    html = (await admin.get("/console/audit")).text
    assert html.count("<tr>") == 51
    found = re.search(r'rel="next" href="([^"]+)"', html)
    assert found is not None
    older = (await admin.get(found[1].replace("&amp;", "&"))).text
    assert "sign-in" in older
    only = (await admin.get("/console/audit?action=reopen&actor=admin-token")).text
    assert only.count("<tr>") == 31
    assert "Nothing matches" in (await admin.get("/console/audit?actor=nobody")).text
