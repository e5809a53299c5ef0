"""The chat example: over HTTP, and as people meet it, in a browser while its servers die."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from example_processes import Process, arguments, commands
from langgraph.checkpoint.postgres import PostgresSaver
from playwright.sync_api import Browser, Page, expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Addresses

HOSTILE = "<img src=x onerror=\"document.title='taken'\"> </script><b>&amp;</b> \u202e ${1} \\ 'x' \U0001f600"
LISTENING = r"Uvicorn running on (http://\S+)"
# Until the saver's pools have given up, and the flusher has met the outage, on a loaded machine.
PATIENCE = 60_000


@pytest.fixture
def with_servers(servers: Addresses, postgres_uri: str) -> dict[str, str]:
    return {"POSTGRES_URI": postgres_uri, "REDIS_URL": servers.redis_url}


def chat(folder: Path, number: int, *more: str, **environment: str) -> Process:
    """Run a command of the README, on a free port."""
    return Process(arguments(commands("fastapi_chat")[number], *more, "--port", "0"), folder, **environment)


def client_of(process: Process) -> httpx.Client:
    return httpx.Client(base_url=process.wait_for(LISTENING), timeout=60)


def begin(client: httpx.Client) -> str:
    assert client.get("/").status_code == 200
    return f"/conversations/{client.post('/conversations').json()['thread_id']}"


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def test_an_answer_comes_in_pieces_and_is_history_afterwards(tmp_path: Path, with_servers: dict[str, str]) -> None:
    with chat(tmp_path, 1, "--seconds-per-word", "0.001", **with_servers) as process, client_of(process) as client:
        conversation = begin(client)
        assert client.get(conversation).json() == {"messages": [], "unfinished": False}
        pieces = lines_of(client.post(f"{conversation}/messages", json={"text": HOSTILE}))
        assert pieces[-1] == {"end": True}
        texts = [piece["text"] for piece in pieces[:-1]]
        assert len(texts) > 10
        history = client.get(conversation).json()
        assert history["messages"][0] == {"from": "you", "text": HOSTILE}
        assert history["messages"][1] == {"from": "agent", "text": "".join(texts)}
        assert not history["unfinished"]
        # Values that Postgres cannot hold do not end a conversation either.
        assert lines_of(client.post(f"{conversation}/messages", json={"text": "a\0b"}))[-1] == {"end": True}
        assert client.post(f"{conversation}/messages", json={"text": ""}).status_code == 422
        policy = client.get("/").headers["Content-Security-Policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert process.end() == 0


def test_a_conversation_is_nobody_elses(tmp_path: Path, with_servers: dict[str, str]) -> None:
    with chat(tmp_path, 1, "--seconds-per-word", "0.001", **with_servers) as process, client_of(process) as client:
        conversation = begin(client)
        client.post(f"{conversation}/messages", json={"text": "A secret."})
        thread = conversation.replace("/conversations", "/threads")
        paths = [
            ("GET", conversation),
            ("POST", f"{conversation}/messages"),
            ("POST", f"{conversation}/continue"),
            ("GET", f"{thread}/logs"),
            ("GET", f"{thread}/events"),
        ]
        with client_of(process) as nobody, client_of(process) as somebody:
            begin(somebody)
            for other in (nobody, somebody):
                for method, path in paths:
                    answer = other.request(method, path, json={"text": "Hm."} if method == "POST" else None)
                    assert answer.status_code == 404, (method, path)
                    assert "secret" not in answer.text
        assert client.get(f"{thread}/logs").status_code == 200
        cookie = client.cookies["user"]
        # The cookie is as good as a password: it is not in the name of the thread, which stands in logs.
        assert cookie not in conversation
        assert "HttpOnly" in client.get("/").headers["Set-Cookie"]


def test_a_killed_server_is_followed_by_one_that_finishes_the_answer(
    tmp_path: Path, with_servers: dict[str, str]
) -> None:
    with chat(tmp_path, 1, "--seconds-per-word", "3", **with_servers) as process, client_of(process) as client:
        conversation = begin(client)
        with client.stream("POST", f"{conversation}/messages", json={"text": "Do not forget."}) as response:
            pieces = response.iter_lines()
            assert "text" in json.loads(next(pieces))
            process.end(signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)
        cookies = dict(client.cookies)
    with chat(tmp_path, 1, "--seconds-per-word", "0.001", **with_servers) as process, client_of(process) as client:
        client.cookies.update(cookies)
        assert client.get(conversation).json() == {
            "messages": [{"from": "you", "text": "Do not forget."}],
            "unfinished": True,
        }
        assert lines_of(client.post(f"{conversation}/continue", json={}))[-1] == {"end": True}
        history = client.get(conversation).json()
        assert [message["from"] for message in history["messages"]] == ["you", "agent"]
        assert not history["unfinished"]
        assert process.end() == 0
    with PostgresSaver.from_conn_string(with_servers["POSTGRES_URI"]) as stock:
        found = stock.get_tuple({"configurable": {"thread_id": conversation.rpartition("/")[2]}})
    assert found is not None
    texts = [message.text for message in found.checkpoint["channel_values"]["messages"]]
    assert texts == [message["text"] for message in history["messages"]]


# -- In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "chromium is missing: apt-get install chromium"
    # Chromium refuses to run its sandbox as root.
    arguments_ = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=arguments_)
        yield started
        started.close()


def open_page(browser: Browser, url: str, trouble: list[str], **settings: Any) -> Page:
    """Open a page; what its console is told goes to `trouble`, violations of its policy too."""
    page = browser.new_page(**settings)
    page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"page error: {error}"))
    page.goto(url)
    return page


def say(page: Page, text: str) -> None:
    """Write a message and send it, by keyboard."""
    page.get_by_label("Message").press_sequentially(text)
    page.keyboard.press("Enter")


def answer(page: Page, number: int) -> Any:
    """Return the answer of this number, once it is whole."""
    expect(page.locator(".agent")).to_have_count(number, timeout=PATIENCE)
    found = page.locator(".agent").last
    expect(found).not_to_have_attribute("aria-busy", "true", timeout=PATIENCE)
    return found


def test_the_page_tells_of_an_outage_and_of_its_end_and_a_reload_goes_on(tmp_path: Path, browser: Browser) -> None:
    trouble: list[str] = []
    spool = {"CHECKPOINTER_SPOOL_DIR": str(tmp_path / "spool")}
    with chat(tmp_path, 0, "--seconds-per-word", "0.02", **spool) as process:
        page = open_page(browser, process.wait_for(LISTENING), trouble)
        banner = page.get_by_role("status")

        # The chat works, and what was said is text.
        say(page, HOSTILE)
        expect(answer(page, 1)).to_contain_text(f"You said: {HOSTILE}")
        expect(page.locator(".you")).to_have_text(HOSTILE)
        assert page.locator("#messages *").count() == 2
        assert page.title() == "Chat"
        expect(page.get_by_label("Message")).to_be_focused()

        # A reload resumes it.
        page.reload()
        expect(page.locator(".you")).to_have_text(HOSTILE)
        say(page, "second")
        expect(answer(page, 2)).to_contain_text(f"Before that you said: {HOSTILE}")
        expect(banner).to_be_empty()

        # Postgres dies: answers go on, and the banner says what became of them, after a reload too.
        process.type("postgres")
        process.wait_for("postgres is killed")
        say(page, "third")
        expect(answer(page, 3)).to_contain_text("Before that you said: second")
        degraded = "This conversation could not be saved to permanent storage yet. It is buffered."
        expect(banner).to_have_text(degraded, timeout=PATIENCE)
        page.reload()
        expect(page.locator(".you")).to_have_text([HOSTILE, "second", "third"], timeout=PATIENCE)
        expect(banner).to_have_text(degraded, timeout=PATIENCE)

        # It is back: the banner says so, and goes.
        process.type("postgres")
        expect(banner).to_have_text("This conversation is saved again.", timeout=PATIENCE)
        expect(banner).to_be_empty(timeout=PATIENCE)
        page.reload()
        expect(page.locator(".you")).to_have_count(3, timeout=PATIENCE)
        say(page, "fourth")
        answer(page, 4)
        expect(banner).to_be_empty()

        # Redis dies: a note, and everything goes on.
        process.type("redis")
        process.wait_for("redis is killed")
        say(page, "fifth")
        expect(banner).to_have_text("Saving this conversation is slower than usual, but nothing is lost.")
        expect(answer(page, 5)).to_contain_text("Before that you said: fourth")
        assert trouble == []

        # Both are dead: nothing that was written is lost, and the page waits for them by itself.
        process.type("postgres")
        process.wait_for("postgres is killed", 2)
        say(page, "sixth")
        expect(page.locator(".problem")).to_contain_text("cannot be reached at the moment", timeout=PATIENCE)
        expect(page.get_by_label("Message")).to_have_value("sixth")
        page.reload()
        waiting = "This conversation cannot be loaded at the moment. Trying again."
        expect(banner).to_have_text(waiting, timeout=PATIENCE)
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        process.type("postgres")
        process.type("redis")
        expect(page.locator(".you")).to_have_text([HOSTILE, "second", "third", "fourth", "fifth"], timeout=PATIENCE)
        expect(banner).not_to_have_text(waiting)
        say(page, "sixth")
        expect(answer(page, 6)).to_contain_text("Before that you said: fifth")
        # A browser notes each refusal by itself.
        assert [line for line in trouble if "503 (Service Unavailable)" not in line] == []
        page.close()
        assert process.end() == 0


def test_an_answer_that_a_reload_has_cut_off_is_begun_again(
    tmp_path: Path, with_servers: dict[str, str], browser: Browser
) -> None:
    trouble: list[str] = []
    # More words than can be said while this test runs.
    question = " ".join(["word"] * 700)
    with chat(tmp_path, 1, "--seconds-per-word", "0.2", **with_servers) as process:
        page = open_page(browser, process.wait_for(LISTENING), trouble)
        page.get_by_label("Message").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator(".agent")).to_contain_text("You said: word", timeout=PATIENCE)
        page.reload()
        expect(page.locator(".you")).to_have_text([question])
        expect(page.locator(".agent")).to_contain_text("You said: word", timeout=PATIENCE)
        expect(page.locator(".agent")).to_have_attribute("aria-busy", "true")
        address = page.url

        # Another conversation, another browser: both begin with nothing.
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".message")).to_have_count(0)
        expect(page).not_to_have_url(address)
        expect(page).to_have_url(re.compile(r"#\w+-\w+$"))
        page.goto(address)
        expect(page.locator(".you")).to_have_text([question])
        assert trouble == []
        with browser.new_context() as context:
            stranger = context.new_page()
            stranger.goto(address)
            expect(stranger.locator(".message")).to_have_count(0)
            expect(stranger).not_to_have_url(address)
        page.close()


def test_the_page_fits_a_phone_and_has_no_barrier(
    tmp_path: Path, with_servers: dict[str, str], browser: Browser
) -> None:
    trouble: list[str] = []
    with chat(tmp_path, 1, "--seconds-per-word", "0.001", **with_servers) as process:
        page = open_page(browser, process.wait_for(LISTENING), trouble, viewport={"width": 320, "height": 568})
        say(page, "w" * 300)
        answer(page, 1)
        for element in (*page.locator(".message").all(), *page.get_by_role("button").all()):
            box = element.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 320
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = Axe().run(page).response
            assert len(found["passes"]) > 10  # it did look
            assert [(one["id"], one["help"]) for one in found["violations"]] == []
        assert trouble == []
        page.close()
