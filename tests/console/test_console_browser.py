"""The console in a browser: headless Chromium on real servers, in light, dark and on a phone, by mouse and by keyboard.

After each test nothing may have been said on the browser's console, a violation of the content security policy
included.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import scene
from axe_playwright_python.sync_playwright import Axe
from planting import plant
from playwright.sync_api import expect, sync_playwright
from poisoning import put_step
from savers import put_chain
from visits import ADMIN

from observability.api import Streams
from observability.errors import acting, reading
from observability.errors.statements import run
from observability.tokens import revoke

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg
    from fastapi import FastAPI
    from playwright.sync_api import Browser, BrowserContext, Page
    from savers import Recording

    Connection = psycopg.Connection[Any]

_SCRIPT = "document.title = 'owned'"
HOSTILE = f'<script>{_SCRIPT}</script><img src=x onerror="{_SCRIPT}">"\'{{{{7*7}}}}\u202e\x1b[31m'
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
# Tells of every violation, those too that the browser would keep to itself.
_WATCH = "document.addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective));"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; nothing is downloaded."""
    program = shutil.which("chromium")
    assert program is not None, "install the Debian package `chromium`"
    with sync_playwright() as playwright:
        # Containers have no sandbox for it, and little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        found = playwright.chromium.launch(executable_path=program, args=options)
        yield found
        found.close()


class Tab:
    """A browser window of its own, and what it had to say.

    Attributes:
        page: The page.
        base: Where the console is.
        said: What stood on the browser's console.
        expected: The statuses that it may complain about.
    """

    def __init__(self, context: BrowserContext, base: str) -> None:
        context.add_init_script(_WATCH)
        self.page: Page = context.new_page()
        self.base = base
        self.said: list[str] = []
        self.expected: set[int] = set()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))

    def go(self, path: str) -> None:
        self.page.goto(f"{self.base}{path}")

    def sign_in(self, token: str = ADMIN, path: str = "/") -> None:
        self.go(f"{path}#token={quote(token, safe='')}")
        expect(self.page.get_by_role("button", name="Sign out")).to_be_visible()

    def check_silence(self) -> None:
        """Assert that the browser has complained about nothing else than was expected."""
        pattern = re.compile(r"status of (\d+)")
        unexpected = [
            line for line in self.said if not ((found := pattern.search(line)) and int(found[1]) in self.expected)
        ]
        assert unexpected == []

    def check_access(self) -> None:
        """Assert that axe finds nothing, in light and in dark, and that nothing is wider than a phone's window."""
        page = self.page
        found = [Axe().run(page).response]
        assert len(found[0]["passes"]) > 10  # it did look
        page.emulate_media(color_scheme="dark")
        # What else it looks for does not depend on colours.
        found.append(Axe().run(page, options={"runOnly": ["color-contrast"]}).response)
        page.emulate_media(color_scheme="light")
        problems = [
            (one["id"], one["help"], one["nodes"][0]["html"][:200]) for each in found for one in each["violations"]
        ]
        assert problems == [], page.url
        page.set_viewport_size(PHONE)
        wide = page.evaluate("document.documentElement.scrollWidth")
        page.set_viewport_size(DESK)
        assert wide <= PHONE["width"], page.url


@pytest.fixture
def base(serve: Callable[..., str], make_app: Callable[..., FastAPI]) -> str:
    streams = Streams()
    return f"{serve(make_app(streams=streams), streams)}/console"


@pytest.fixture
def tab(browser: Browser, base: str) -> Iterator[Tab]:
    with contextlib.closing(browser.new_context(viewport=DESK, color_scheme="light")) as context:
        found = Tab(context, base)
        yield found
        found.check_silence()


@pytest.fixture
def admin(tab: Tab) -> Tab:
    """Somebody with every scope, on the overview."""
    tab.sign_in()
    return tab


def row_of(conn: Connection, error: int) -> dict[str, Any]:
    row = run(conn, reading.one(error))
    assert row is not None
    return row


def test_no_page_has_a_barrier_or_needs_scrolling_sideways(
    tab: Tab, make: Callable[..., Recording], conn: Connection
) -> None:
    letter = scene.plant(make(), conn)
    run(conn, acting.resolve(5, actor="ann", notes="Restarted it."))
    plant(conn, thread_id=HOSTILE * 3, error_message=HOSTILE * 9, error_type="x" * 150, fingerprint="v1:hostile")
    tab.go("/sign-in")
    tab.check_access()
    tab.sign_in()
    seen = set()
    for path in (
        "/",
        "/errors",
        "/errors?state=all&text=nothing+like+this",
        "/errors/1",
        "/errors/5",
        "/errors/resolve?severity=warning",
        "/groups?status=unresolved&status=resolved",
        "/groups/v1%3Acheckpoint_lost",
        "/threads",
        "/threads?q=nobody",
        f"/thread?thread={scene.FLUSHED}",
        f"/thread?thread={scene.WAITING}",
        f"/thread?thread={scene.POISONED}",
        f"/thread?thread={quote(HOSTILE * 3)}",
        "/dead-letters",
        f"/dead-letters/{letter}",
        f"/dead-letters/{letter}/drop",
        "/audit",
    ):
        tab.go(path)
        tab.check_access()
        seen.add(tab.page.title())
    assert len(seen) >= 12
    tab.go(f"/thread?thread={scene.FLUSHED}")
    tab.page.get_by_role("button", name="Compare two checkpoints").click()
    expect(tab.page.get_by_role("heading", name="messages changed")).to_be_visible()
    tab.check_access()
    tab.expected.add(404)
    tab.go("/thread?thread=nobody")
    tab.check_access()


def test_one_signs_in_and_out_by_hand(tab: Tab, conn: Connection) -> None:
    page = tab.page
    tab.go("/errors?text=a")
    page.get_by_label("Token").fill("wrong")
    tab.expected.add(401)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not valid")
    page.get_by_label("Token").fill(ADMIN)
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{tab.base}/errors?text=a")
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{tab.base}/sign-in")
    page.go_back()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    actions = [row["action"] for row in run(conn, reading.audit()).rows]
    assert actions[:3] == ["sign-out", "sign-in", "refuse"]


def test_a_link_signs_in_and_its_token_goes_nowhere_else(tab: Tab, token: Callable[..., str]) -> None:
    given = token("read")
    requests: list[tuple[str, str]] = []
    tab.page.on("request", lambda request: requests.append((request.url, request.headers.get("referer", ""))))
    tab.sign_in(given, "/errors?severity=critical")
    assert tab.page.url == f"{tab.base}/errors?severity=critical"
    assert len(requests) > 4
    assert not [each for each in requests if given in "".join(each)]
    tab.page.go_back()
    assert given not in tab.page.url
    # Who has signed in already stays who they are.
    tab.go("/#token=nonsense%")
    expect(tab.page.get_by_role("heading", name="Overview")).to_be_visible()
    assert tab.page.url == f"{tab.base}/"


def test_a_link_on_another_site_signs_nobody_in_unasked(tab: Tab) -> None:
    page = tab.page
    link = f"<!doctype html><title>x</title><a href='{tab.base}/#token={ADMIN}'>go</a>"
    page.route("http://other.test/**", lambda route: route.fulfill(body=link, content_type="text/html"))
    page.goto("http://other.test/")
    page.get_by_role("link", name="go").click()
    expect(page.get_by_label("Token")).to_have_value(ADMIN)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    assert page.url.endswith("/sign-in")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()


def test_a_new_error_arrives_by_itself(admin: Tab, conn: Connection) -> None:
    page = admin.page
    plant(conn, error_message="An old one.")
    admin.go("/errors")
    expect(page.locator("#live")).to_have_attribute("data-connected", "yes")
    plant(conn, error_message="A new one.")
    expect(page.get_by_role("status")).to_contain_text("1 new error")
    expect(page.get_by_role("link", name="A new one.")).to_be_visible()
    # Nothing moves under the hands of somebody who is in the list.
    page.get_by_role("link", name="An old one.").focus()
    plant(conn, error_message="A third one.")
    expect(page.get_by_role("status")).to_contain_text("2 new errors")
    expect(page.get_by_role("link", name="An old one.")).to_be_focused()
    assert page.get_by_role("link", name="A third one.").count() == 0
    page.get_by_role("link", name="Show").click()
    expect(page.get_by_role("link", name="A third one.")).to_be_visible()


def test_an_error_is_found_and_resolved_by_keyboard_alone(admin: Tab, conn: Connection) -> None:
    page = admin.page
    error = plant(conn, error_message="To be resolved.", stack_trace="Traceback ...")

    def tab_to(role: Any, name: str) -> None:
        wanted = page.get_by_role(role, name=name)
        for _ in range(60):
            page.keyboard.press("Tab")
            if wanted.evaluate("element => element === document.activeElement"):
                # To be seen without a mouse.
                assert wanted.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
                return
        raise AssertionError(f"no way to {name!r}")

    admin.go("/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    tab_to("link", "Errors")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Errors", level=1)).to_be_visible()
    tab_to("link", "To be resolved.")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Unresolved")).to_be_visible()
    tab_to("textbox", "Notes (optional)")
    page.keyboard.type("Restarted the database.")
    tab_to("button", "Resolve")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Resolved", exact=True)).to_be_visible()
    row = row_of(conn, error)
    assert (row["resolved_by"], row["resolution_notes"]) == ("admin-token", "Restarted the database.")


def test_many_are_resolved_and_groups_muted_by_clicks(admin: Tab, conn: Connection) -> None:
    page = admin.page
    matching = [plant(conn, thread_id="t", fingerprint="v1:b") for _ in range(3)]
    other = plant(conn, thread_id="u", fingerprint="v1:c", error_message="Something else.")
    admin.go("/errors")
    page.get_by_label("Thread").fill("t")
    page.get_by_role("button", name="Filter").click()
    page.get_by_role("link", name="Resolve all that match …").click()
    expect(page.get_by_role("heading", name="Resolve 3 errors?")).to_be_visible()
    page.get_by_role("button", name="Resolve").click()
    expect(page.get_by_role("heading", name="3 errors resolved")).to_be_visible()
    assert all(row_of(conn, error)["resolved_at"] for error in matching)
    assert row_of(conn, other)["resolved_at"] is None
    admin.go("/groups")
    page.get_by_role("link", name="Something else.").click()
    page.get_by_label("Mute for").select_option("a week")
    page.get_by_role("button", name="Mute").click()
    expect(page.get_by_role("heading", name="Muted")).to_be_visible()
    page.get_by_role("button", name="End the mute").click()
    page.get_by_role("button", name="Resolve with all its errors").click()
    expect(page.get_by_role("heading", name="Resolved", exact=True)).to_be_visible()
    page.get_by_role("button", name="Reopen").click()
    expect(page.get_by_role("heading", name="Unresolved", exact=True)).to_be_visible()
    admin.go("/audit")
    page.get_by_label("Did").fill("mute")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("cell", name="mute", exact=True)).to_be_visible()


def test_the_overview_changes_by_itself_and_leaves_the_focus_alone(
    admin: Tab, make: Callable[..., Recording], conn: Connection
) -> None:
    page = admin.page
    saver = make()
    admin.go("/")
    expect(page.get_by_role("heading", name="Everything is saved")).to_be_visible()
    link = page.get_by_role("link", name="Dead letters").last
    link.focus()
    put_chain(saver, "t", range(3))
    expect(page.get_by_text("6 records wait to be flushed")).to_be_visible(timeout=30_000)
    plant(conn, severity="critical", fingerprint="v1:worst")
    expect(page.get_by_role("heading", name="1 critical error is open")).to_be_visible(timeout=30_000)
    expect(page.locator("#news")).to_have_text("Everything is saved, and 1 critical error is open")
    expect(link).to_be_focused()


def test_a_session_that_has_ended_leads_to_the_sign_in_by_itself(
    tab: Tab, token: Callable[..., str], conn: Connection
) -> None:
    given = token("read")
    tab.sign_in(given)
    tab.expected.add(401)
    run(conn, revoke(given.split("_")[1], actor="test"))
    expect(tab.page.get_by_role("heading", name="Sign in")).to_be_visible(timeout=30_000)


def test_a_thread_is_searched_followed_and_compared(
    admin: Tab, make: Callable[..., Recording], conn: Connection
) -> None:
    page = admin.page
    scene.plant(make(), conn)
    page.get_by_role("link", name="Threads").click()
    page.get_by_label("Id has").fill("1041")
    page.keyboard.press("Enter")
    page.get_by_role("link", name=scene.FLUSHED).click()
    expect(page.get_by_role("cell", name="Saving works again.")).to_be_visible()
    page.get_by_label("From step 1", exact=True).check()
    page.get_by_label("To step 4", exact=True).check()
    page.get_by_role("button", name="Compare two checkpoints").click()
    expect(page.get_by_role("region", name="Changes of messages")).to_contain_text("And when will it be here?")
    page.get_by_role("link", name=f"Thread {scene.FLUSHED}").click()
    expect(page.get_by_role("heading", name="Timeline")).to_be_visible()


def test_dead_letters_are_replayed_and_dropped_by_clicks(
    admin: Tab, make: Callable[..., Recording], conn: Connection
) -> None:
    page = admin.page
    saver = make()
    scene.plant_letter(saver, conn)
    admin.go("/")
    page.get_by_role("navigation").get_by_role("link", name="Dead letters").click()
    page.get_by_role("link", name="blob #").click()
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_role("heading", name="Replayed")).to_be_visible()
    second = scene.plant_letter(saver, conn, thread="order-2")
    admin.go(f"/dead-letters/{second}")
    page.get_by_role("link", name="Drop …").click()
    page.get_by_role("button", name="Drop").click()
    expect(page.get_by_role("heading", name="Give this record up?")).to_be_visible()
    assert saver.dead_letters.show(second).resolution is None
    page.get_by_label("I want to give it up").check()
    page.get_by_role("button", name="Drop").click()
    expect(page.get_by_role("heading", name="Dropped")).to_be_visible()
    assert saver.dead_letters.show(second).resolution == "dropped"


def test_hostile_text_stays_text_in_a_browser(admin: Tab, make: Callable[..., Recording], conn: Connection) -> None:
    thread = HOSTILE.replace("\x1b", "")
    fields = ["error_type", "error_message", "thread_id", "stack_trace", "component", "operation", "fingerprint"]
    plant(conn, **dict.fromkeys(fields, HOSTILE), severity="critical")
    put_step(make(), thread, 0)
    conn.execute("INSERT INTO thread_logs (thread_id, level, message) VALUES (%s, %s, %s)", (thread, "info", HOSTILE))
    for path in ("/errors", "/errors/1", "/groups", f"/groups/{quote(HOSTILE, safe='')}", "/threads", "/audit"):
        admin.go(path)
        assert "owned" not in admin.page.title()
    admin.go(f"/thread?thread={quote(thread, safe='')}")
    expect(admin.page.get_by_text("step 0")).to_be_visible()
    assert not admin.page.title().startswith("owned")
    assert admin.page.locator("main img, main script").count() == 0


def test_pages_work_without_scripts(
    browser: Browser, base: str, make: Callable[..., Recording], conn: Connection
) -> None:
    make()
    error = plant(conn, error_message="To be resolved.")
    context = browser.new_context(java_script_enabled=False)
    with contextlib.closing(context):
        page = context.new_page()
        page.goto(f"{base}/errors")
        page.get_by_label("Token").fill(ADMIN)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="To be resolved.").click()
        page.get_by_role("button", name="Resolve").click()
        expect(page.get_by_role("heading", name="Resolved", exact=True)).to_be_visible()
        page.get_by_role("link", name="Overview").click()
        expect(page.get_by_role("heading", name="Everything is saved")).to_be_visible()
    assert row_of(conn, error)["resolved_at"] is not None
