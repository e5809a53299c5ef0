"""The routes for administrators: errors, groups, counts, the audit, and new errors live.

Not here: who is asking (`authorize`, such as `authentication.py`), and what is asked of the store
(`observability/errors/`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Body, Depends, Header, HTTPException, Path, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from observability.api import tickets as ticketing
from observability.api.feed import ErrorFeed
from observability.api.limits import client_key
from observability.api.models import (
    AuditEntry,
    AuditList,
    AuditQuery,
    BulkDelete,
    BulkOutcome,
    BulkResolve,
    Deleted,
    ErrorDetail,
    ErrorList,
    ErrorQuery,
    ErrorSummary,
    Group,
    GroupList,
    GroupOutcome,
    GroupQuery,
    Mute,
    Notes,
    OneError,
    OneGroup,
    Resolution,
    StatsAnswer,
    Ticket,
    TrendQuery,
    TrendsAnswer,
)
from observability.api.principals import Principal
from observability.api.problems import Refusals, remember_principal, responses, route_class
from observability.api.store import Store
from observability.api.streams import Streams
from observability.api.tickets import Tickets
from observability.errors import acting, reading
from observability.errors.statements import Act
from observability.tokens import Scope

T = TypeVar("T")

_TICKET_PURPOSE = "system-errors"

ErrorId = Annotated[int, Path(ge=1, le=2**63 - 1, description="The id of an error.")]
Fingerprint = Annotated[str, Path(min_length=1, max_length=1_000, description="The fingerprint of a group.")]
LastEventId = Annotated[str | None, Header(description="The id of the last event seen, as browsers send it.")]


def create_admin_router(
    *,
    authorize: Callable[..., Any],
    store: Store | None = None,
    streams: Streams | None = None,
    tickets: Tickets | None = None,
    prefix: str = "/admin/system-errors",
) -> APIRouter:
    """Make the routes for administrators.

    Args:
        authorize: A FastAPI dependency that returns a `Principal`, or raises an HTTPException: 401 without valid
            credentials. There is no default, so that nobody publishes errors by mistake; `BearerTokens` is one.
        store: Has the errors; by default one on POSTGRES_URI. It is closed when the application ends.
        streams: The application's open streams, to be ended before it shuts down.
        tickets: For streams in a browser; give one with a key if several processes serve the same clients.
        prefix: Where the routes are.
    """
    store = store or Store()
    streams = streams or Streams()
    tickets = tickets or Tickets()
    feed = ErrorFeed(store)

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with store.lifespan(app), streams.lifespan(app):
            try:
                yield
            finally:
                await feed.aclose()

    router = APIRouter(
        prefix=prefix,
        tags=["system errors"],
        route_class=route_class(Refusals(store)),
        responses=responses(),
        lifespan=lifespan,
    )

    def allowed(scope: Scope) -> Any:
        """Return the parameter that makes a route need a scope."""

        async def check(request: Request, principal: Annotated[Principal, Depends(authorize)]) -> Principal:
            remember_principal(request, principal.name)
            if scope not in principal.scopes:
                raise HTTPException(403, f"This needs the scope {scope!r}.")
            return principal

        return Depends(check)

    Reader = Annotated[Principal, allowed("read")]  # noqa: N806 - a type
    Resolver = Annotated[Principal, allowed("resolve")]  # noqa: N806 - a type
    Deleter = Annotated[Principal, allowed("delete")]  # noqa: N806 - a type

    def needs(scope: Scope) -> dict[str, Any]:
        return {"x-required-scope": scope}

    async def done(who: Principal, request: Request, act: Act[T]) -> T:
        """Carry out an act; the audit also says how it got here."""
        return await store.run(acting.by_way_of(_how(who, request), act))

    async def found(who: Principal, request: Request, act: Act[T | None]) -> T:
        """As `done`; refuse if what the act is about does not exist."""
        result = await done(who, request, act)
        if result is None:
            raise HTTPException(404, "There is no error or group with this id.")
        return result

    # Literal paths first: `/{error_id}` would take them.

    @router.get("", operation_id="list_errors", openapi_extra=needs("read"))
    async def list_errors(_: Reader, query: Annotated[ErrorQuery, Query()]) -> ErrorList:
        """List errors, the newest first; by default those that nobody has resolved."""
        statement = reading.find(query.filters(query.state), limit=query.limit, cursor=query.cursor)
        return ErrorList.of(await store.run(statement))

    @router.delete("", operation_id="delete_old_errors", openapi_extra=needs("delete"))
    async def delete_old(request: Request, who: Deleter, query: Annotated[BulkDelete, Query()]) -> BulkOutcome:
        """Delete errors that were resolved before a time, at most 1,000 at once."""
        act = acting.bulk_delete(
            query.resolved_before,
            actor=who.name,
            filters=query.filters("resolved"),
            limit=query.limit,
            dry_run=query.dry_run,
        )
        return BulkOutcome.of(await done(who, request, act))

    @router.post("/resolve", operation_id="resolve_errors", openapi_extra=needs("resolve"))
    async def resolve_many(request: Request, who: Resolver, body: BulkResolve) -> BulkOutcome:
        """Resolve the unresolved errors that match, the oldest first, at most 1,000 at once."""
        act = acting.bulk_resolve(
            body.filters(), actor=who.name, notes=body.resolution_notes, limit=body.limit, dry_run=body.dry_run
        )
        return BulkOutcome.of(await done(who, request, act))

    @router.get("/stats", operation_id="error_stats", openapi_extra=needs("read"))
    async def stats(_: Reader) -> StatsAnswer:
        """Count what is unresolved, by severity and type, and what the last 24 hours brought."""
        return StatsAnswer.of(await store.run(reading.stats()))

    @router.get("/trends", operation_id="error_trends", openapi_extra=needs("read"))
    async def trends(_: Reader, query: Annotated[TrendQuery, Query()]) -> TrendsAnswer:
        """Count what happened in each hour or day; the counts stay when the errors are deleted."""
        until = query.until or datetime.now(UTC)
        try:
            since = query.since or until - timedelta(days=1 if query.bucket == "hour" else 30)
        except OverflowError:
            raise HTTPException(422, "The range is outside of the calendar.") from None
        statement = reading.trends(
            since=since,
            until=until,
            bucket=query.bucket,
            by=query.by,
            error_type=query.error_type,
            severity=query.severity,
            fingerprint=query.fingerprint,
        )
        return TrendsAnswer.of(await store.run(statement))

    @router.get("/audit", operation_id="list_audit", openapi_extra=needs("read"))
    async def audit(_: Reader, query: Annotated[AuditQuery, Query()]) -> AuditList:
        """List who did what and who was refused what, the latest first."""
        page = await store.run(
            reading.audit(
                action=query.action,
                actor=query.actor,
                error_id=query.error_id,
                fingerprint=query.fingerprint,
                limit=query.limit,
                cursor=query.cursor,
            )
        )
        entries = [AuditEntry(**row) for row in page.rows]
        return AuditList(count=len(entries), entries=entries, next_cursor=page.next_cursor)

    async def stream(last_event_id: str | None) -> AsyncIterator[ServerSentEvent]:
        last = _as_id(last_event_id)
        async with feed.watch(last) as watcher:
            yield ServerSentEvent(comment="connected")
            if last_event_id is not None and last is None:
                yield ServerSentEvent(event="reset", data={"type": "reset"})
            async for row in streams.follow(watcher):
                if row is None:
                    yield ServerSentEvent(event="reset", data={"type": "reset"})
                    continue
                summary = ErrorSummary(**{key: row[key] for key in ErrorSummary.model_fields})
                yield ServerSentEvent(id=str(row["id"]), event="system_error", data=summary)

    async def ready() -> None:
        """Refuse while that can still be said with a status."""
        streams.check_room()
        await store.run(reading.newest_id())

    Ready = Annotated[None, Depends(ready)]  # noqa: N806 - a type

    streamed: dict[int | str, dict[str, Any]] = {
        200: {"description": "Events `system_error`, each with an error as the list has it, and `reset`."}
    }

    @router.get(
        "/events",
        operation_id="watch_errors",
        response_class=EventSourceResponse,
        responses=streamed,
        openapi_extra=needs("read"),
    )
    async def events(_: Reader, ready: Ready, last_event_id: LastEventId = None) -> AsyncIterator[ServerSentEvent]:
        """Watch new errors as server-sent events."""
        async for event in stream(last_event_id):
            yield event

    @router.post("/events/ticket", operation_id="watch_errors_ticket", openapi_extra=needs("read"))
    async def event_ticket(_: Reader, request: Request) -> Ticket:
        """Get a URL for an EventSource, which cannot send a header; it is good for 60 seconds."""
        return make_ticket(tickets, request, _TICKET_PURPOSE)

    async def by_ticket(ticket: Annotated[str, Query(max_length=4_000)]) -> None:
        if not tickets.is_good(ticket, _TICKET_PURPOSE):
            raise HTTPException(401, "The ticket is not valid or has expired: get a new one.", headers=CHALLENGE)

    @router.get(
        "/events/by-ticket",
        operation_id="watch_errors_by_ticket",
        response_class=EventSourceResponse,
        responses=streamed,
        openapi_extra={"x-credentials": "ticket"},
        dependencies=[Depends(by_ticket), Depends(ready)],
    )
    async def events_by_ticket(
        last_event_id: LastEventId = None,
        after: Annotated[str | None, Query(max_length=100, description="As the header Last-Event-ID.")] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Watch new errors with a ticket."""
        async for event in stream(last_event_id or after):
            yield event

    @router.get("/groups", operation_id="list_groups", openapi_extra=needs("read"))
    async def list_groups(_: Reader, query: Annotated[GroupQuery, Query()]) -> GroupList:
        """List groups of errors, those first that happened last."""
        page = await store.run(
            reading.groups(
                statuses=query.status,
                severities=query.severity,
                error_type=query.error_type,
                component=query.component,
                text=query.text,
                limit=query.limit,
                cursor=query.cursor,
            )
        )
        groups = [Group(**row) for row in page.rows]
        return GroupList(count=len(groups), groups=groups, next_cursor=page.next_cursor)

    missing = responses(404)

    @router.get("/groups/{fingerprint}", operation_id="get_group", responses=missing, openapi_extra=needs("read"))
    async def get_group(_: Reader, fingerprint: Fingerprint) -> OneGroup:
        """Get one group."""
        row = await store.run(reading.group(fingerprint))
        if row is None:
            raise HTTPException(404, "There is no group with this fingerprint.")
        return OneGroup(group=Group(**row))

    @router.post(
        "/groups/{fingerprint}/resolve",
        operation_id="resolve_group",
        responses=missing,
        openapi_extra=needs("resolve"),
    )
    async def resolve_group(
        request: Request, who: Resolver, fingerprint: Fingerprint, body: Annotated[Notes | None, Body()] = None
    ) -> GroupOutcome:
        """Resolve a group and its errors; it regresses if one happens later."""
        notes = body.resolution_notes if body else None
        return GroupOutcome.of(
            await found(who, request, acting.resolve_group(fingerprint, actor=who.name, notes=notes))
        )

    @router.post(
        "/groups/{fingerprint}/reopen", operation_id="reopen_group", responses=missing, openapi_extra=needs("resolve")
    )
    async def reopen_group(request: Request, who: Resolver, fingerprint: Fingerprint) -> GroupOutcome:
        """Take back that a group is resolved, with the errors that were resolved together with it."""
        return GroupOutcome.of(await found(who, request, acting.reopen_group(fingerprint, actor=who.name)))

    @router.post(
        "/groups/{fingerprint}/mute", operation_id="mute_group", responses=missing, openapi_extra=needs("resolve")
    )
    async def mute_group(
        request: Request, who: Resolver, fingerprint: Fingerprint, body: Annotated[Mute | None, Body()] = None
    ) -> GroupOutcome:
        """Mute a group, for ever or until a time."""
        until = body.until if body else None
        return GroupOutcome.of(await found(who, request, acting.mute(fingerprint, actor=who.name, until=until)))

    @router.post(
        "/groups/{fingerprint}/unmute", operation_id="unmute_group", responses=missing, openapi_extra=needs("resolve")
    )
    async def unmute_group(request: Request, who: Resolver, fingerprint: Fingerprint) -> GroupOutcome:
        """End the mute of a group."""
        return GroupOutcome.of(await found(who, request, acting.unmute(fingerprint, actor=who.name)))

    @router.get("/{error_id}", operation_id="get_error", responses=missing, openapi_extra=needs("read"))
    async def get_error(who: Reader, error_id: ErrorId) -> OneError:
        """Get one error; with the scope `read_sensitive` its stack trace and context too."""
        row = await store.run(reading.one(error_id))
        if row is None:
            raise HTTPException(404, "There is no error with this id.")
        return OneError(error=ErrorDetail.of(row, "read_sensitive" in who.scopes))

    @router.post("/{error_id}/resolve", operation_id="resolve_error", responses=missing, openapi_extra=needs("resolve"))
    async def resolve_error(
        request: Request, who: Resolver, error_id: ErrorId, body: Annotated[Notes | None, Body()] = None
    ) -> Resolution:
        """Resolve one error. Again changes nothing: who was first stays."""
        notes = body.resolution_notes if body else None
        return Resolution.of(await found(who, request, acting.resolve(error_id, actor=who.name, notes=notes)))

    @router.post("/{error_id}/reopen", operation_id="reopen_error", responses=missing, openapi_extra=needs("resolve"))
    async def reopen_error(request: Request, who: Resolver, error_id: ErrorId) -> Resolution:
        """Take back that one error is resolved."""
        return Resolution.of(await found(who, request, acting.reopen(error_id, actor=who.name)))

    @router.delete("/{error_id}", operation_id="delete_error", responses=missing, openapi_extra=needs("delete"))
    async def delete_error(request: Request, who: Deleter, error_id: ErrorId) -> Deleted:
        """Delete one error; what was counted stays counted."""
        await found(who, request, acting.delete(error_id, actor=who.name))
        return Deleted()

    return router


CHALLENGE = {"WWW-Authenticate": 'Ticket realm="checkpointer"'}


def make_ticket(tickets: Tickets, request: Request, purpose: str) -> Ticket:
    """Return a ticket and the path that takes it: the one beside the request's own."""
    ticket = tickets.issue(purpose)
    path = request.url.path.removesuffix("/ticket")
    return Ticket(ticket=ticket, url=f"{quote(path)}/by-ticket?ticket={ticket}", expires_in=ticketing.SECONDS)


def _how(who: Principal, request: Request) -> dict[str, str]:
    how = {"way": "http", "client": client_key(request.client.host if request.client else None)}
    return how | ({"with": who.credential} if who.credential else {})


def _as_id(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 19 else None
