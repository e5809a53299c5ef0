"""What a form with filters has sent, which stands in the URL: read and checked.

Not here: which filters there are (the pages, and `api/models.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from pydantic import ValidationError

if TYPE_CHECKING:
    from starlette.datastructures import QueryParams

__all__ = ["checked", "given_in"]

_LISTS = ("severity", "status")
_TIMES = ("since", "until")


def given_in(params: QueryParams) -> dict[str, Any]:
    """Return what a form with filters has sent, without the fields that were left empty."""
    given: dict[str, Any] = {name: value.strip() for name, value in params.items() if value.strip()}
    for name in _LISTS:
        if values := [value for value in params.getlist(name) if value]:
            given[name] = values
    for name in _TIMES:
        # Fields for times have no zone; the labels say UTC.
        if name in given:
            try:
                found = datetime.fromisoformat(given[name])
            except ValueError:
                raise HTTPException(422, f"{name}: give a time such as 2026-01-31T12:00.") from None
            given[name] = (found if found.tzinfo else found.replace(tzinfo=UTC)).isoformat()
    return given


def checked(model: Any, given: dict[str, Any]) -> Any:
    """Return what was given as a model.

    Raises:
        HTTPException: 422, with what is wrong first.
    """
    try:
        return model.model_validate(given)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(piece) for piece in first["loc"])
        raise HTTPException(422, f"{where}: {first['msg']}.") from None
