"""The pages of errors and of their groups, what is done with them, and new errors live.

Not here: what is asked and done (`observability/errors/`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from checkpointer.errors import ConfigurationError
from checkpointer.events import SEVERITIES
from observability.api.feed import ErrorFeed
from observability.api.models import ErrorQuery, GroupQuery
from observability.api.streams import Streams
from observability.console.filters import checked, given_in
from observability.console.pages import Form, Pages, how, part
from observability.console.traces import fold
from observability.errors import acting, reading

if TYPE_CHECKING:
    from observability.errors.statements import Act

ErrorId = Annotated[int, Path(ge=1, le=2**63 - 1)]
Fingerprint = Annotated[str, Path(min_length=1, max_length=1_000)]

_ROWS = 50
_LONGEST_NOTES = 4_000
_MUTES = {"1": "an hour", "24": "a day", "168": "a week", "": "ever"}


def add_pages(router: APIRouter, pages: Pages, feed: ErrorFeed, streams: Streams) -> None:
    """Add the pages to the console."""
    store = pages.store

    @router.get("/errors")
    async def list_errors(request: Request) -> Response:
        visitor = await pages.visitor(request)
        given = given_in(request.query_params)
        asked = _errors_asked(given)
        page = await store.run(reading.find(asked.filters(asked.state), limit=_ROWS, cursor=asked.cursor))
        return pages.render(
            request, "errors", visitor=visitor, page=page, given=given, asked=asked, severities=_worst_first()
        )

    @router.get("/errors/resolve")
    async def ask_resolve_many(request: Request) -> Response:
        visitor = await pages.visitor(request, "resolve")
        given = _narrowing(given_in(request.query_params))
        act = acting.bulk_resolve(_errors_asked(given).filters(), actor=visitor.principal.name, dry_run=True)
        return pages.render(request, "resolve_many", visitor=visitor, outcome=await store.run(act), given=given)

    @router.post("/errors/resolve")
    async def resolve_many(request: Request) -> Response:
        visitor, fields = await pages.form(request)
        given = _narrowing(given_in(request.query_params))
        act = acting.bulk_resolve(_errors_asked(given).filters(), actor=visitor.principal.name, notes=_notes(fields))
        outcome = await store.run(acting.by_way_of(how(visitor, request), act))
        return pages.render(request, "resolved_many", visitor=visitor, outcome=outcome, given=given)

    async def ready(request: Request) -> None:
        await pages.visitor(request)
        streams.check_room()
        await store.run(reading.newest_id())

    @router.get("/errors/live", response_class=EventSourceResponse, dependencies=[Depends(ready)])
    async def live(request: Request) -> AsyncIterator[ServerSentEvent]:
        async with feed.watch(None) as watcher:
            yield ServerSentEvent(comment="connected")
            async for row in streams.follow(watcher):
                if row is None:
                    yield ServerSentEvent(event="reset", data={})
                    continue
                facts = {"id": row["id"], "severity": row["severity"], "error_type": row["error_type"]}
                yield ServerSentEvent(event="system_error", data=facts)

    @router.get("/errors/{error_id}")
    async def show_error(request: Request, error_id: ErrorId) -> Response:
        visitor = await pages.visitor(request)
        row = await store.run(reading.one(error_id))
        if row is None:
            raise HTTPException(404, "There is no error with this number; it may have been deleted.")
        sensitive = visitor.may("read_sensitive")
        audit = await store.run(reading.audit(error_id=error_id, limit=20))
        return pages.render(
            request,
            "error",
            visitor=visitor,
            error={key: value for key, value in row.items() if key not in ("stack_trace", "error_context")},
            pieces=fold(row["stack_trace"] or "") if sensitive else [],
            context=row["error_context"] if sensitive else None,
            audit=audit.rows,
        )

    @router.post("/errors/{error_id}/{action}")
    async def change_error(request: Request, error_id: ErrorId, action: str) -> Response:
        visitor, fields = await pages.form(request)
        name = visitor.principal.name
        acts: dict[str, Act[acting.Changed | None]] = {
            "resolve": acting.resolve(error_id, actor=name, notes=_notes(fields)),
            "reopen": acting.reopen(error_id, actor=name),
        }
        if action not in acts:
            raise HTTPException(404, "There is no such action.")
        if await store.run(acting.by_way_of(how(visitor, request), acts[action])) is None:
            raise HTTPException(404, "There is no error with this number; it may have been deleted.")
        return pages.go(request, f"/errors/{error_id}")

    @router.get("/groups")
    async def list_groups(request: Request) -> Response:
        visitor = await pages.visitor(request)
        given = given_in(request.query_params)
        if "status" not in request.query_params:
            given["status"] = ["unresolved", "regressed"]
        asked = checked(GroupQuery, given)
        page = await store.run(
            reading.groups(
                statuses=asked.status,
                severities=asked.severity,
                error_type=asked.error_type,
                component=asked.component,
                text=asked.text,
                limit=_ROWS,
                cursor=asked.cursor,
            )
        )
        return pages.render(
            request, "groups", visitor=visitor, page=page, given=given, asked=asked, severities=_worst_first()
        )

    # A fingerprint can hold slashes.
    @router.get("/groups/{fingerprint:path}")
    async def show_group(request: Request, fingerprint: Fingerprint) -> Response:
        visitor = await pages.visitor(request)
        row = await store.run(reading.group(fingerprint))
        if row is None:
            raise HTTPException(404, "There is no group with this fingerprint.")
        page = await store.run(reading.find(reading.Filters(state="all", fingerprint=fingerprint), limit=20))
        return pages.render(request, "group", visitor=visitor, group=row, page=page, mutes=_MUTES)

    @router.post("/groups/{fingerprint:path}/{action}")
    async def change_group(request: Request, fingerprint: Fingerprint, action: str) -> Response:
        visitor, fields = await pages.form(request)
        name = visitor.principal.name
        acts: dict[str, Act[acting.Changed | None]] = {
            "resolve": acting.resolve_group(fingerprint, actor=name, notes=_notes(fields)),
            "reopen": acting.reopen_group(fingerprint, actor=name),
            "mute": acting.mute(fingerprint, actor=name, until=_until(fields)),
            "unmute": acting.unmute(fingerprint, actor=name),
        }
        if action not in acts:
            raise HTTPException(404, "There is no such action.")
        changed = await store.run(acting.by_way_of(how(visitor, request), acts[action]))
        if changed is None:
            raise HTTPException(404, "There is no group with this fingerprint.")
        # By the row's own name: what was given may hold what no URL does.
        return pages.go(request, f"/groups/{part(changed.row['fingerprint'])}")


def _worst_first() -> list[str]:
    return list(reversed(SEVERITIES))


def _narrowing(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("state", "cursor")}


def _errors_asked(given: dict[str, Any]) -> ErrorQuery:
    asked: ErrorQuery = checked(ErrorQuery, given)
    return asked


def _notes(fields: Form) -> str | None:
    notes = fields.get("notes", "").strip()
    if len(notes) > _LONGEST_NOTES:
        raise ConfigurationError(f"The notes are longer than {_LONGEST_NOTES:,} characters.")
    return notes or None


def _until(fields: Form) -> datetime | None:
    hours = fields.get("hours", "")
    if hours not in _MUTES:
        raise ConfigurationError("A group is muted for an hour, a day, a week, or for ever.")
    return datetime.now(UTC) + timedelta(hours=int(hours)) if hours else None
