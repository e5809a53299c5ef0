"""The pages of dead letters: which there are, what one holds, and to try it again or to give it up.

What a letter holds is state: it is shown with the scope `read_sensitive` only. Not here: what replaying and dropping
does (`checkpointer/flush/dead_letters.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from checkpointer.errors import ConfigurationError
from observability.console.pages import Pages, how
from observability.errors.acting import note

if TYPE_CHECKING:
    from checkpointer.inspection import Inspector

_ROWS = 50
_SHOWN = 20_000

LetterId = Annotated[int, Path(ge=1, le=2**63 - 1)]
Number = Annotated[int | None, Query(ge=1, le=2**63 - 1)]
Flag = Annotated[str, Query(max_length=10)]


def add_pages(router: APIRouter, pages: Pages, inspector: "Inspector") -> None:
    """Add the pages to the console."""

    @router.get("/dead-letters")
    async def list_letters(request: Request, all: Flag = "", before: Number = None) -> Response:  # noqa: A002 - in the URL
        visitor = await pages.visitor(request)
        found = await pages.ask(lambda: inspector.dead_letters(resolved=all == "yes", before=before, limit=_ROWS + 1))
        last = found[_ROWS - 1].id if len(found) > _ROWS else None
        given = {"all": all, "before": before}
        return pages.render(request, "dead_letters", visitor=visitor, letters=found[:_ROWS], last=last, given=given)

    @router.get("/dead-letters/{letter_id}")
    async def show_letter(request: Request, letter_id: LetterId, tried: Flag = "") -> Response:
        visitor = await pages.visitor(request)
        content = visitor.may("read_sensitive")
        letter = await pages.ask(lambda: inspector.dead_letter(letter_id, content=content))
        return pages.render(
            request, "dead_letter", visitor=visitor, letter=letter, tried=tried == "yes", longest=_SHOWN
        )

    @router.post("/dead-letters/{letter_id}/replay")
    async def replay(request: Request, letter_id: LetterId) -> Response:
        visitor, _ = await pages.form(request, "resolve")
        name = visitor.principal.name
        letter = await pages.ask(lambda: inspector.replay(letter_id, by=name))
        details = {"dead_letter": letter_id, "thread_id": letter.thread_id, "resolution": letter.resolution}
        await pages.store.run(note("dead_letter_replay", name, details=details | {"how": how(visitor, request)}))
        return pages.go(request, f"/dead-letters/{letter_id}?tried=yes")

    @router.get("/dead-letters/{letter_id}/drop")
    async def ask_drop(request: Request, letter_id: LetterId) -> Response:
        visitor = await pages.visitor(request, "delete")
        letter = await pages.ask(lambda: inspector.dead_letter(letter_id, content=False))
        return pages.render(request, "drop", visitor=visitor, letter=letter)

    @router.post("/dead-letters/{letter_id}/drop")
    async def drop(request: Request, letter_id: LetterId) -> Response:
        visitor, fields = await pages.form(request, "delete")
        if fields.get("sure") != "yes":
            raise ConfigurationError("Say that the record may be given up: nothing brings it back afterwards.")
        name = visitor.principal.name
        letter = await pages.ask(lambda: inspector.drop(letter_id, by=name))
        details = {"dead_letter": letter_id, "thread_id": letter.thread_id, "resolution": letter.resolution}
        await pages.store.run(note("dead_letter_drop", name, details=details | {"how": how(visitor, request)}))
        return pages.go(request, f"/dead-letters/{letter_id}")
