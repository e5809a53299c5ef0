"""Who is asking, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from observability.tokens import SCOPES

if TYPE_CHECKING:
    from collections.abc import Set

__all__ = ["SCOPES", "Principal"]


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody whose credentials were found valid.

    Attributes:
        name: Stands in `resolved_by` and in the audit.
        scopes: Any of `read`, `read_sensitive` (stack traces and context), `resolve`, `delete`.
        credential: What it was shown by, for the audit, such as the public id of a token. May be empty.
    """

    name: str
    scopes: Set[str] = field(default_factory=frozenset)
    credential: str = ""
