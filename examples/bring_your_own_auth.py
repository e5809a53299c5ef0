"""The routes for administrators inside your own FastAPI application, behind the login that it already has.

Run it: python examples/bring_your_own_auth.py          (asks its own routes, and ends)
        python examples/bring_your_own_auth.py --serve  (stays, for you to ask them)

Always on private servers, since it deletes an error.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import uvicorn
from fastapi import Body, Cookie, Depends, FastAPI, HTTPException, Response

from checkpointer import BufferedPostgresSaver, embedded
from observability import emit_log, log_system_error_sync
from observability.api import Principal, Store, Streams, create_admin_router, create_thread_router

if TYPE_CHECKING:
    from collections.abc import Iterator

# -- What your application has already: users, and a session that a cookie names -----------------------------------


@dataclass(frozen=True)
class User:
    """Somebody who has signed in."""

    name: str
    role: str


PASSWORDS = {"vera": "v-secret", "oleg": "o-secret", "ada": "a-secret", "carl": "c-secret"}
USERS = {"vera": User("vera", "viewer"), "oleg": User("oleg", "on-call"), "ada": User("ada", "admin")}
USERS["carl"] = User("carl", "customer")
THREADS = {"order-1": "carl"}
sessions: dict[str, User] = {}


def current_user(session: Annotated[str, Cookie()] = "") -> User:
    """Return who is asking."""
    if session not in sessions:
        raise HTTPException(401, "Sign in first.", headers={"WWW-Authenticate": "Session"})
    return sessions[session]


def login(response: Response, name: Annotated[str, Body()], password: Annotated[str, Body()]) -> None:
    """Begin a session."""
    if name not in USERS or not hmac.compare_digest(PASSWORDS[name].encode(), password.encode()):
        raise HTTPException(401, "That is not right.", headers={"WWW-Authenticate": "Session"})
    session = secrets.token_urlsafe(32)
    sessions[session] = USERS[name]
    # The routes refuse acts that another site makes a browser do; SameSite keeps the cookie out of them as well.
    # Behind TLS, as it should be, add secure=True.
    response.set_cookie("session", session, httponly=True, samesite="strict")


# -- What you add: which role may do what, and whose thread is whose --------------------------------------------------

SCOPES = {
    "viewer": {"read"},
    "on-call": {"read", "read_sensitive", "resolve"},
    "admin": {"read", "read_sensitive", "resolve", "delete"},
}


def administrator(user: Annotated[User, Depends(current_user)]) -> Principal:
    """Say who is asking and what they may do; the name is what `resolved_by` and the audit will say."""
    # A role that is not listed has no scope, so every route answers 403.
    return Principal(user.name, frozenset(SCOPES.get(user.role, ())))


def owner(thread_id: str, user: Annotated[User, Depends(current_user)]) -> None:
    """Let people see their own threads only."""
    if THREADS.get(thread_id) != user.name:
        # Not 403: that a thread exists is nobody else's business.
        raise HTTPException(404, "There is no such conversation.")


def create_app(postgres_uri: str, streams: Streams) -> FastAPI:
    """Make your application."""
    app = FastAPI()
    app.post("/login", status_code=204)(login)
    store = Store(postgres_uri)  # or Store(pool=...), with the pool that you have
    app.include_router(create_admin_router(authorize=administrator, store=store, streams=streams))
    app.include_router(create_thread_router(authorize_thread=owner, store=store, streams=streams))
    return app


# -- The rest tries it -----------------------------------------------------------------------------------------------


class Client:
    """A browser, as far as cookies go."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name, self._cookie = url, name, ""

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, print what comes of it, and return the answer."""
        headers = {"Content-Type": "application/json", "Cookie": self._cookie}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                self._cookie = reply.headers.get("Set-Cookie", self._cookie).partition(";")[0]
                status, text = reply.status, reply.read()
        except urllib.error.HTTPError as exc:
            with exc:
                status, text = exc.code, exc.read()
        answer: dict[str, Any] = json.loads(text) if text else {}
        print(f"   {self._name:<6} {method:<6} {path:<34} {status} {answer.get('detail', '')}".rstrip())
        return answer

    def sign_in(self) -> None:
        """Begin a session."""
        self.ask("POST", "/login", {"name": self._name, "password": PASSWORDS[self._name]})


def try_it(url: str) -> None:
    """Ask as a stranger, and as people of each role."""
    errors = "/admin/system-errors"
    Client(url, "nobody").ask("GET", errors)
    people = {name: Client(url, name) for name in USERS}
    for client in people.values():
        client.sign_in()

    people["carl"].ask("GET", errors)
    for line in people["carl"].ask("GET", "/threads/order-1/logs")["lines"]:
        print(f"          {line['level']}: {line['message']}")
    people["vera"].ask("GET", "/threads/order-1/logs")

    number = people["vera"].ask("GET", errors)["errors"][0]["id"]
    people["vera"].ask("POST", f"{errors}/{number}/resolve")
    resolved = people["oleg"].ask("POST", f"{errors}/{number}/resolve", {"resolution_notes": "Asked for another card."})
    print(f"          resolved by {resolved['resolved_by']}: {resolved['resolution_notes']}")
    people["oleg"].ask("DELETE", f"{errors}/{number}")
    people["ada"].ask("DELETE", f"{errors}/{number}")

    print("\nThe audit:")
    for entry in reversed(people["ada"].ask("GET", f"{errors}/audit")["entries"]):
        print(f"   {entry['action']:<8} {entry['actor'] or '(nobody)'}")


@contextlib.contextmanager
def served(app: FastAPI, streams: Streams) -> Iterator[str]:
    """Serve the application in a thread, on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        streams.end()
        server.should_exit = True
        thread.join()


def main() -> None:
    """Run the example."""
    with (
        embedded.servers() as at,
        BufferedPostgresSaver.from_conn_string(at.postgres_uri, redis_url=at.redis_url) as saver,
    ):
        saver.setup()
        # Something to look at; what the saver itself reports arrives in the same places.
        emit_log("The payment did not go through; we have asked again.", thread_id="order-1", level="warning")
        log_system_error_sync(
            error_type="payment_refused",
            severity="error",
            error_message="The bank refused the card.",
            thread_id="order-1",
        )
        saver.close()  # waits until the reports are stored, so that they are there to be looked at

        streams = Streams()  # a server waits for open streams; this ends them
        with served(create_app(at.postgres_uri, streams), streams) as url:
            print(f"The application is at {url}")
            if "--serve" in sys.argv[1:]:
                print(f'   curl -c jar {url}/login --json \'{{"name": "oleg", "password": "o-secret"}}\'')
                print(f"   curl -b jar {url}/admin/system-errors      (Ctrl-C ends)")
                with contextlib.suppress(KeyboardInterrupt):
                    threading.Event().wait()
            else:
                try_it(url)


if __name__ == "__main__":
    main()
