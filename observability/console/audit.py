"""The page of the audit: who did what, and who was refused.

Not here: what is written down (`errors/acting.py`, `api/problems.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

from fastapi import APIRouter, Request
from starlette.responses import Response

from observability.api.models import AuditQuery
from observability.console.filters import checked, given_in
from observability.console.pages import Pages
from observability.errors import reading

_ROWS = 50


def add_pages(router: APIRouter, pages: Pages) -> None:
    """Add the page to the console."""

    @router.get("/audit")
    async def audit(request: Request) -> Response:
        visitor = await pages.visitor(request)
        given = given_in(request.query_params)
        asked = checked(AuditQuery, given)
        page = await pages.store.run(
            reading.audit(
                action=asked.action,
                actor=asked.actor,
                error_id=asked.error_id,
                fingerprint=asked.fingerprint,
                limit=_ROWS,
                cursor=asked.cursor,
            )
        )
        return pages.render(request, "audit", visitor=visitor, page=page, given=given)
