"""How errors get into Postgres: rows, groups, hourly counts and the note of a regression, in one statement.

Only rows that were not there yet are counted, so a batch that is delivered twice changes nothing the second time. Every
process locks in one order: new rows by the time and id of their events, then hours, then groups, each by key; and only
who has locked a group locks rows that were there before. A later part of the statement reads what an earlier one
returns, and so begins when that is complete.

A group *regresses* if it was resolved and something of it happened later than that: occurrence times decide, and what
an outage held back never regresses anything. A muted group is unresolved again by the first occurrence after
`muted_until`. A row that arrives after the sign that its trouble is over is resolved by a statement of its own
(`recoveries.py`). Not here: when rows are inserted and what becomes of those that cannot be
(`observability/outbox.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row

from checkpointer.events import SEVERITIES, CheckpointEvent
from observability.errors.fingerprint import fingerprint_of
from observability.errors.recoveries import resolve_arrived
from observability.outbox import Table, Values, rows_from_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psycopg

__all__ = ["SYSTEM_ERRORS", "SystemErrorTable"]

_WORDS = ", ".join(f"'{severity}'" for severity in SEVERITIES)


def _rank(severity: str) -> str:
    """Return SQL for the rank of a severity, from 1; a word that is none ranks as the lowest."""
    return f"coalesce(array_position(ARRAY[{_WORDS}], {severity}), 1)"


def _statement(columns: dict[str, str]) -> str:
    names = ", ".join(columns)
    values = ", ".join(_DEFAULTS.get(name, name) for name in columns)
    return f"""
WITH given AS (
    SELECT {values} FROM {rows_from_json(columns)}
), stored AS (
    INSERT INTO system_errors ({names}) SELECT {names} FROM given ORDER BY created_at, event_id
    ON CONFLICT (event_id) DO NOTHING
    RETURNING *, coalesce(last_seen_at, created_at) AS seen_at
), hours AS (
    INSERT INTO system_error_hourly AS known (hour, error_type, severity, fingerprint, occurrences)
    SELECT date_trunc('hour', created_at, 'UTC'), error_type, severity, fingerprint, sum(occurrences)
    FROM stored GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
    ON CONFLICT (hour, error_type, severity, fingerprint)
        DO UPDATE SET occurrences = known.occurrences + excluded.occurrences
    RETURNING 1
), latest AS (
    SELECT DISTINCT ON (fingerprint) * FROM stored ORDER BY fingerprint, seen_at DESC, id DESC
), totals AS (
    SELECT
        fingerprint,
        (ARRAY[{_WORDS}])[max({_rank("severity")})] AS severity,
        min(created_at) AS first_seen_at,
        sum(occurrences) AS occurrences
    FROM stored GROUP BY fingerprint
), groups AS (
    INSERT INTO system_error_groups AS known (
        fingerprint, error_type, severity, component, operation, error_code, title,
        first_seen_at, last_seen_at, occurrences, latest_event_id
    )
    SELECT
        fingerprint, latest.error_type, totals.severity, component, operation, error_code, error_message,
        first_seen_at, seen_at, totals.occurrences, event_id
    FROM totals JOIN latest USING (fingerprint)
    WHERE (SELECT count(*) FROM hours) >= 0
    ORDER BY fingerprint
    ON CONFLICT (fingerprint) DO UPDATE SET
        severity = CASE WHEN {_rank("excluded.severity")} > {_rank("known.severity")}
            THEN excluded.severity ELSE known.severity END,
        title = CASE WHEN excluded.last_seen_at >= known.last_seen_at THEN excluded.title ELSE known.title END,
        latest_event_id = CASE WHEN excluded.last_seen_at >= known.last_seen_at
            THEN excluded.latest_event_id ELSE known.latest_event_id END,
        first_seen_at = least(known.first_seen_at, excluded.first_seen_at),
        last_seen_at = greatest(known.last_seen_at, excluded.last_seen_at),
        occurrences = known.occurrences + excluded.occurrences,
        status = CASE
            WHEN {_REGRESSES} THEN 'regressed' WHEN {_IS_HEARD_AGAIN} THEN 'unresolved' ELSE known.status END,
        regressions = known.regressions + ({_REGRESSES})::int,
        regression_event_id = CASE WHEN {_REGRESSES}
            THEN excluded.latest_event_id ELSE known.regression_event_id END,
        muted_at = CASE WHEN {_IS_HEARD_AGAIN} THEN NULL ELSE known.muted_at END,
        muted_by = CASE WHEN {_IS_HEARD_AGAIN} THEN NULL ELSE known.muted_by END,
        muted_until = CASE WHEN {_IS_HEARD_AGAIN} THEN NULL ELSE known.muted_until END
    RETURNING *
), regressed AS (
    SELECT g.*, l.id, l.event_id, l.thread_id, l.severity AS severity_now
    FROM groups g JOIN latest l ON g.fingerprint = l.fingerprint AND g.regression_event_id = l.event_id
    WHERE g.status = 'regressed'
), audited AS (
    INSERT INTO system_error_audit (action, actor, error_id, fingerprint, details)
    SELECT 'regress', 'system', id, fingerprint, jsonb_build_object(
        'event_id', event_id, 'occurred_at', last_seen_at, 'regressions', regressions,
        'resolved_at', resolved_at, 'resolved_by', resolved_by)
    FROM regressed ORDER BY fingerprint
)
SELECT fingerprint, error_type, severity_now, title, id, thread_id, regressions, resolved_at, resolved_by
FROM regressed ORDER BY fingerprint
"""


# What a row may lack that was left by an earlier version, or by somebody else.
_DEFAULTS = {
    "created_at": "coalesce(created_at, now()) AS created_at",
    "occurrences": "greatest(coalesce(occurrences, 1), 1) AS occurrences",
}
_REGRESSES = "known.status = 'resolved' AND excluded.last_seen_at > coalesce(known.resolved_at, '-infinity')"
_IS_HEARD_AGAIN = "known.status = 'muted' AND coalesce(excluded.last_seen_at > known.muted_until, false)"


@dataclass(frozen=True, slots=True)
class SystemErrorTable(Table):
    """`system_errors`, with what follows from each row."""

    def insert(self, connection: psycopg.Connection[Any], rows: Sequence[Values]) -> list[CheckpointEvent]:
        """Insert rows and count those that are new; return an event for each group that regressed."""
        # Rows that were left by a version without fingerprints get theirs now: it depends on nothing but the row.
        complete = [row if row.get("fingerprint") else {**row, "fingerprint": fingerprint_of(row)} for row in rows]
        with connection.cursor(row_factory=dict_row) as cursor:
            regressed = cursor.execute(
                _statement(self.columns).encode(), [json.dumps(complete, allow_nan=False)]
            ).fetchall()
        if keys := {key for row in complete if isinstance(key := row.get("recovery_key"), str)}:
            resolve_arrived(connection, keys)
        return [_regression(group) for group in regressed]


def _regression(group: dict[str, Any]) -> CheckpointEvent:
    resolved_at = group["resolved_at"]
    return CheckpointEvent(
        name="error.regressed",
        severity="info",
        message=f"An error that was resolved has happened again: {group['title']}",
        thread_id=group["thread_id"],
        component="observability",
        context={
            "fingerprint": group["fingerprint"],
            "error_type": group["error_type"],
            "severity": group["severity_now"],
            "error_id": group["id"],
            "regressions": group["regressions"],
            "resolved_at": resolved_at and resolved_at.isoformat(),
            "resolved_by": group["resolved_by"],
        },
    )


def _stand_in(event_id: str, message: str) -> Values:
    return {
        "event_id": event_id,
        "error_type": "system_error_unreadable",
        "severity": "error",
        "error_message": message,
        "error_context": {},
        "occurrences": 1,
        "component": "observability",
    }


SYSTEM_ERRORS = SystemErrorTable(
    name="system_errors",
    stream="errors",
    columns={
        "event_id": "uuid",
        "error_type": "text",
        "severity": "text",
        "thread_id": "text",
        "error_message": "text",
        "stack_trace": "text",
        "error_context": "jsonb",
        "created_at": "timestamptz",
        "delivery": "text",
        "occurrences": "int",
        "error_code": "text",
        "run_id": "text",
        "checkpoint_ns": "text",
        "checkpoint_id": "text",
        "component": "text",
        "operation": "text",
        "outcome": "text",
        "fingerprint": "text",
        "last_seen_at": "timestamptz",
        "trace_id": "text",
        "release": "text",
        "environment": "text",
        "recovery_key": "text",
    },
    stand_in=_stand_in,
)
"""Where rows of errors go."""
