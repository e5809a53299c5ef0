"""A chat in the browser: answers come word by word, and a banner says when saving is in trouble and when that is over.

Run it: python examples/fastapi_chat/app.py   (README.md has what to try)
"""

# No `from __future__ import annotations`: FastAPI reads them.

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, Cookie, Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from langchain_core.messages import AIMessageChunk, HumanMessage
from model import build_agent

from checkpointer import BufferedPostgresSaver, embedded
from checkpointer.errors import CheckpointerError
from observability.api import Store, Streams, create_thread_router

STATIC = Path(__file__).parent / "static"

# Nothing but what this server sends runs in the page: text that a user or a model writes cannot become a program.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
POLICY += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def owner_of(user: str) -> str:
    """Return what the names of a user's threads begin with: they stand in logs, where the cookie itself must not."""
    return hashlib.sha256(user.encode()).hexdigest()[:16]


def own_thread(thread_id: str, user: Annotated[str, Cookie()] = "") -> str:
    """Let people into their own conversations only; an application with a login asks that instead."""
    if not user or not thread_id.startswith(f"{owner_of(user)}-"):
        raise HTTPException(404, "There is no such conversation.")
    return thread_id


def create_app(postgres_uri: str, redis_url: str, *, seconds_per_word: float = 0.06) -> FastAPI:
    """Make the application.

    Args:
        postgres_uri: Where Postgres is.
        redis_url: Where Redis is.
        seconds_per_word: How slow the model is.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url) as saver:
            await saver.asetup()
            app.state.agent = build_agent(saver, seconds_per_word)
            yield

    app = FastAPI(lifespan=lifespan)
    # `/threads/{thread_id}/events` and `/logs`: what the page's banner is made of.
    app.state.streams = Streams()
    app.include_router(
        create_thread_router(authorize_thread=own_thread, store=Store(postgres_uri), streams=app.state.streams)
    )
    app.mount("/static", StaticFiles(directory=STATIC))
    OwnThread = Annotated[str, Depends(own_thread)]  # noqa: N806 - a type

    @app.get("/")
    def page(user: Annotated[str, Cookie()] = "") -> FileResponse:
        response = FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": POLICY})
        # Behind TLS, as it should be, add secure=True.
        cookie = user or secrets.token_urlsafe(32)
        response.set_cookie("user", cookie, max_age=30 * 86_400, httponly=True, samesite="strict")
        return response

    @app.post("/conversations")
    def begin(user: Annotated[str, Cookie()]) -> dict[str, str]:
        return {"thread_id": f"{owner_of(user)}-{secrets.token_hex(8)}"}

    @app.get("/conversations/{thread_id}")
    async def history(thread_id: OwnThread) -> dict[str, Any]:
        try:
            state = await app.state.agent.aget_state(config_of(thread_id))
        except CheckpointerError:
            raise HTTPException(503, "This conversation cannot be loaded at the moment.") from None
        messages = [
            {"from": "you" if isinstance(message, HumanMessage) else "agent", "text": message.text}
            for message in state.values.get("messages", ())
        ]
        # A question without an answer: the browser was closed, or this process was ended, before the answer was there.
        return {"messages": messages, "unfinished": bool(state.next)}

    @app.post("/conversations/{thread_id}/messages")
    async def ask(
        thread_id: OwnThread, text: Annotated[str, Body(embed=True, min_length=1, max_length=4_000)]
    ) -> StreamingResponse:
        return StreamingResponse(answer(thread_id, {"messages": [HumanMessage(text)]}), headers=NDJSON)

    @app.post("/conversations/{thread_id}/continue")
    async def go_on(thread_id: OwnThread) -> StreamingResponse:
        # No input: the run goes on from its last checkpoint.
        return StreamingResponse(answer(thread_id, None), headers=NDJSON)

    async def answer(thread_id: str, given: dict[str, Any] | None) -> AsyncIterator[str]:
        try:
            async for part, _ in app.state.agent.astream(given, config_of(thread_id), stream_mode="messages"):
                if isinstance(part, AIMessageChunk):
                    yield json.dumps({"text": part.text}) + "\n"
        except CheckpointerError:
            # Both servers are away, or the one that this thread needs. The log says which; the user need not know.
            yield json.dumps({"error": "This conversation cannot be reached at the moment. Please try again."}) + "\n"
        else:
            yield json.dumps({"end": True}) + "\n"

    return app


NDJSON = {"Content-Type": "application/x-ndjson", "X-Accel-Buffering": "no"}


def config_of(thread_id: str) -> Any:
    """Return the config of a thread."""
    return {"configurable": {"thread_id": thread_id}}


class Server(uvicorn.Server):
    """Ends open event streams first: it would wait for them for ever."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take a signal to end."""
        self.config.app.state.streams.end()
        super().handle_exit(sig, frame)


def obey(servers: embedded.Servers) -> None:
    """Kill and start the private servers as lines on standard input say, to see what the page makes of it."""
    print("Type postgres or redis and Enter to kill that server, and once more to start it again.", flush=True)
    by_name = {"postgres": servers.postgres, "redis": servers.valkey}
    while typed := os.read(0, 1_000):  # not sys.stdin, which a thread must not hold when the program ends
        for name in typed.decode(errors="replace").split():
            server = by_name.get(name)
            if server is None:
                print("postgres or redis?", flush=True)
            elif server.is_alive():
                server.kill()
                print(f"*** {name} is killed", flush=True)
            else:
                server.start()
                print(f"*** {name} is started again", flush=True)


def main() -> None:
    """Serve, on the servers that POSTGRES_URI and REDIS_URL name, or on private ones."""
    parser = argparse.ArgumentParser(description="A chat in the browser.")
    parser.add_argument("--port", type=int, default=8_000)
    parser.add_argument("--seconds-per-word", type=float, default=0.06, help="how slow the model is")
    given = parser.parse_args()
    postgres_uri, redis_url = os.environ.get("POSTGRES_URI"), os.environ.get("REDIS_URL")
    with contextlib.ExitStack() as stack:
        if not (postgres_uri and redis_url):
            servers = stack.enter_context(embedded.servers())
            postgres_uri, redis_url = servers.postgres_uri, servers.redis_url
            threading.Thread(target=obey, args=[servers], daemon=True).start()
        app = create_app(postgres_uri, redis_url, seconds_per_word=given.seconds_per_word)
        # The server ends by raising the signal once more, which is no failure.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        # An answer that takes longer than this when the server ends is begun again by whoever reloads the page.
        Server(uvicorn.Config(app, port=given.port, timeout_graceful_shutdown=5)).run()


if __name__ == "__main__":
    main()
