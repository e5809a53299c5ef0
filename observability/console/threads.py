"""The pages of threads: which there are, what happened in one of them, and what changed between two checkpoints.

State is shown with the scope `read_sensitive` only. Not here: what is asked (`checkpointer/inspection.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from observability.console.diffs import differences
from observability.console.pages import Pages
from observability.errors import by_thread, reading

if TYPE_CHECKING:
    from checkpointer.inspection import Inspector

_THREADS = 50
_CHECKPOINTS = 50
_BETWEEN = 50
_LATEST = datetime.max.replace(tzinfo=UTC)

Id = Annotated[str, Query(min_length=1, max_length=2_700)]
Text = Annotated[str, Query(max_length=2_700)]


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened in a thread.

    Attributes:
        kind: `checkpoint`, `error` or `line`.
        at: When; None if that cannot be told.
        what: An `Entry` of `checkpointer/timelines.py`, or a row.
    """

    kind: str
    at: datetime | None
    what: Any


def add_pages(router: APIRouter, pages: Pages, inspector: "Inspector") -> None:
    """Add the pages to the console."""
    store = pages.store

    @router.get("/threads")
    async def list_threads(request: Request, q: Text = "", after: Text = "") -> Response:
        visitor = await pages.visitor(request)
        text = q.strip()
        page = await pages.ask(lambda: inspector.threads(text=text or None, after=after or None, limit=_THREADS))
        errors = await store.run(by_thread.unresolved([thread.thread_id for thread in page.threads]))
        given = {"q": text, "after": after}
        return pages.render(request, "threads", visitor=visitor, page=page, errors=errors, given=given)

    @router.get("/thread")
    async def show_thread(request: Request, thread: Id, ns: Text = "", before: Text = "") -> Response:
        visitor = await pages.visitor(request)
        facts = await pages.ask(lambda: inspector.thread(thread))
        timeline = await pages.ask(lambda: inspector.timeline(thread, ns, before=before or None, limit=_CHECKPOINTS))
        namespaces = await pages.ask(lambda: inspector.namespaces(thread))
        times = [entry.at for entry in timeline.entries if entry.at is not None]
        # A page reaches from its oldest checkpoint to the one that the page before ended with.
        since = min(times, default=None) if timeline.next_before else None
        until = max(times, default=None) if before else None
        found = await store.run(
            reading.find(reading.Filters(state="all", thread_id=thread, since=since, until=until), limit=_BETWEEN)
        )
        lines = await store.run(reading.log_between(thread, since, until, limit=_BETWEEN))
        nothing = facts.where == "none" and not (timeline.entries or found.rows or lines or facts.opened_at)
        if nothing and facts.dead_letter is None:
            raise HTTPException(404, "There is no thread with this id.")
        return pages.render(
            request,
            "thread",
            visitor=visitor,
            thread=facts,
            errors=(await store.run(by_thread.unresolved([thread]))).get(thread),
            namespaces=sorted({*namespaces, ns}),
            moments=_in_order(timeline.entries, found.rows, lines),
            timeline=timeline,
            given={"thread": thread, "ns": ns, "before": before},
            more=bool(found.next_cursor) or len(lines) == _BETWEEN,
        )

    @router.get("/thread/compare")
    async def compare(request: Request, thread: Id, first: Id, second: Id, ns: Text = "") -> Response:
        visitor = await pages.visitor(request)
        content = visitor.may("read_sensitive")
        # Ids go up with time.
        first, second = min(first, second), max(first, second)
        changes = await pages.ask(lambda: inspector.compare(thread, ns, first, second, content=content))
        if changes is None:
            raise HTTPException(404, "One of these checkpoints is nowhere.")
        given = {"thread": thread, "ns": ns, "first": first, "second": second}
        shown = [(change, differences(change.before, change.after) if content else []) for change in changes]
        return pages.render(request, "compare", visitor=visitor, changes=shown, content=content, given=given)


def _in_order(entries: list[Any], errors: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[Moment]:
    """Return all of it, the latest first; checkpoints keep their order, whatever their clocks say."""
    others = [Moment("error", row["created_at"], row) for row in errors]
    others += [Moment("line", row["created_at"], row) for row in lines]
    # What has no time comes first.
    others.sort(key=lambda moment: moment.at or _LATEST, reverse=True)
    found: list[Moment] = []
    for entry in entries:
        while others and (others[0].at is None or entry.at is None or others[0].at >= entry.at):
            found.append(others.pop(0))
        found.append(Moment("checkpoint", entry.at, entry))
    return [*found, *others]
