"""What the store knows of each of some threads: how many errors of it nobody has resolved, and how bad they are.

Not here: the errors themselves (`reading.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointer.events import SEVERITIES
from observability.errors.statements import Row, Statement
from observability.scrub import safe_name

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["unresolved"]

_RANKED = ", ".join(f"'{name}'" for name in SEVERITIES)


def unresolved(thread_ids: Sequence[str]) -> Statement[dict[str, Row]]:
    """For each of these threads that has unresolved errors: `errors` (occurrences) and `worst_severity`."""
    # As the store has them: an id that Postgres cannot hold was stored in a form that it can.
    stored = {safe_name(thread): thread for thread in thread_ids}
    # Thread by thread: for all at once Postgres would also go through the index of all that is unresolved.
    sql = f"""
        SELECT t.thread_id, found.errors, found.worst_severity
        FROM unnest(%(threads)s::text[]) AS t (thread_id) CROSS JOIN LATERAL (
            SELECT sum(e.occurrences)::bigint AS errors,
                   (ARRAY[{_RANKED}])[max(array_position(ARRAY[{_RANKED}], e.severity))] AS worst_severity
            FROM system_errors AS e WHERE e.thread_id = t.thread_id AND e.resolved_at IS NULL
        ) AS found
        WHERE found.errors IS NOT NULL
    """

    def read(rows: list[Row]) -> dict[str, Row]:
        return {
            stored[row["thread_id"]]: {"errors": row["errors"], "worst_severity": row["worst_severity"]} for row in rows
        }

    return Statement(sql, {"threads": list(stored)}, read)
