"""The routes for the people behind a thread: its log, and its events as they happen.

Not here: who may see which thread (`authorize_thread`), and what a user may see of an event (`projections.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from checkpointer.errors import StoreUnavailableError
from observability import aread_thread_log, subscribe_run_events
from observability.api.admin import CHALLENGE, make_ticket
from observability.api.models import LogLine, LogPage, Ticket
from observability.api.problems import Refusals, responses, route_class
from observability.api.store import Store
from observability.api.streams import Streams
from observability.api.tickets import Tickets
from observability.errors import reading
from observability.scrub import safe_name
from observability.target import Observability

ThreadId = Annotated[str, Path(min_length=1, max_length=1_000, description="The id of a LangGraph thread.")]
LastEventId = Annotated[str | None, Header(description="The id of the last event seen, as browsers send it.")]

_LONGEST_EVENT_ID = 200


def create_thread_router(
    *,
    authorize_thread: Callable[..., Any],
    store: Store | None = None,
    observability: Callable[[], Observability] | None = None,
    streams: Streams | None = None,
    tickets: Tickets | None = None,
    prefix: str = "/threads",
) -> APIRouter:
    """Make the routes for the people behind a thread.

    Args:
        authorize_thread: A FastAPI dependency with a parameter `thread_id` that raises an HTTPException (401, 403 or
            404) unless the request may see this thread; what it returns is not looked at. There is no default, so
            that nobody publishes conversations by mistake.
        store: Has the logs; by default one on POSTGRES_URI. It is closed when the application ends.
        observability: Returns the target whose events are streamed; by default the active one.
        streams: The application's open streams, to be ended before it shuts down.
        tickets: For streams in a browser; give one with a key if several processes serve the same clients.
        prefix: Where the routes are.
    """
    store = store or Store()
    streams = streams or Streams()
    tickets = tickets or Tickets()

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with store.lifespan(app), streams.lifespan(app):
            yield

    router = APIRouter(
        prefix=prefix,
        tags=["threads"],
        route_class=route_class(Refusals(store)),
        responses=responses(404),
        lifespan=lifespan,
    )
    allowed = [Depends(authorize_thread)]

    def target() -> Observability | None:
        return observability() if observability is not None else None

    # An id can hold slashes, so the rest of the path has to tell the routes apart.

    @router.get("/{thread_id:path}/logs", operation_id="thread_log", dependencies=allowed)
    async def thread_log(
        thread_id: ThreadId,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
        cursor: Annotated[str | None, Query(max_length=4_000)] = None,
    ) -> LogPage:
        """Read the last lines of the thread's log, the oldest of them first."""
        try:
            page = await store.run(reading.log(thread_id, limit=limit, cursor=cursor))
        except StoreUnavailableError:
            if cursor is not None:
                raise
            kept = await aread_thread_log(thread_id, limit, observability=target())
            lines = [LogLine(**line) for line in kept]
            return LogPage(count=len(lines), lines=lines, next_cursor=None, complete=False)
        lines = [_line(row) for row in page.rows]
        return LogPage(count=len(lines), lines=lines, next_cursor=page.next_cursor, complete=True)

    async def stream(thread_id: str, last_event_id: str | None) -> AsyncIterator[ServerSentEvent]:
        # What is no id that this could have sent is answered as one that has left the ring.
        last = last_event_id and last_event_id[:_LONGEST_EVENT_ID]
        async with subscribe_run_events(thread_id, last_event_id=last, observability=target()) as subscription:
            yield ServerSentEvent(comment="connected")
            async for view in streams.follow(subscription):
                kind = "reset" if view.get("type") == "reset" else None
                yield ServerSentEvent(id=_event_id(view), event=kind, data=view)

    def room() -> None:
        streams.check_room()

    streamed: dict[int | str, dict[str, Any]] = {
        200: {"description": "What `observability.subscribe_run_events` yields; after a gap an event `reset`."}
    }

    @router.get(
        "/{thread_id:path}/events",
        operation_id="watch_thread",
        response_class=EventSourceResponse,
        responses=streamed,
        dependencies=[*allowed, Depends(room)],
    )
    async def events(thread_id: ThreadId, last_event_id: LastEventId = None) -> AsyncIterator[ServerSentEvent]:
        """Watch the thread as server-sent events."""
        async for event in stream(thread_id, last_event_id):
            yield event

    @router.post("/{thread_id:path}/events/ticket", operation_id="watch_thread_ticket", dependencies=allowed)
    async def event_ticket(thread_id: ThreadId, request: Request) -> Ticket:
        """Get a URL for an EventSource, which cannot send a header; it is good for 60 seconds."""
        return make_ticket(tickets, request, _purpose(thread_id))

    async def by_ticket(thread_id: ThreadId, ticket: Annotated[str, Query(max_length=4_000)]) -> None:
        if not tickets.is_good(ticket, _purpose(thread_id)):
            raise HTTPException(401, "The ticket is not valid or has expired: get a new one.", headers=CHALLENGE)

    @router.get(
        "/{thread_id:path}/events/by-ticket",
        operation_id="watch_thread_by_ticket",
        response_class=EventSourceResponse,
        responses=streamed,
        openapi_extra={"x-credentials": "ticket"},
        dependencies=[Depends(by_ticket), Depends(room)],
    )
    async def events_by_ticket(
        thread_id: ThreadId,
        last_event_id: LastEventId = None,
        after: Annotated[str | None, Query(max_length=1_000, description="As the header Last-Event-ID.")] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Watch the thread with a ticket."""
        async for event in stream(thread_id, last_event_id or after):
            yield event

    return router


def _purpose(thread_id: str) -> str:
    return f"thread:{safe_name(thread_id)}"


def _line(row: dict[str, Any]) -> LogLine:
    facts = {name: row[name] for name in LogLine.model_fields if name != "event_id"}
    return LogLine(**facts, event_id=row["event_id"] and str(row["event_id"]))


def _event_id(view: dict[str, Any]) -> str | None:
    """Return the id of an event, unless the application gave it one that would end the line it stands in."""
    event_id = view.get("event_id")
    fits = isinstance(event_id, str) and len(event_id) <= _LONGEST_EVENT_ID and event_id.isprintable()
    return event_id if fits else None
