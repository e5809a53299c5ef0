"""What can be done in the error store, as acts: resolve, reopen, mute, delete; each with its line in the audit.

An act runs in one transaction, its audit line with it, and does nothing the second time: then it says that nothing
has changed, and the audit keeps the first. Whatever changes whether a group has unresolved errors locks the group
first, groups in the order of their fingerprints: of two who resolve the last two errors of a group at once, one sees
that it was the last. Not here: who may do it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from checkpointer.errors import ConfigurationError
from observability.errors.reading import ERROR_COLUMNS, Filters, group, one
from observability.errors.statements import Act, Row, Statement, where
from observability.scrub import safe_json, safe_name, safe_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

__all__ = [
    "BULK_LIMIT",
    "Bulk",
    "Changed",
    "bulk_delete",
    "bulk_resolve",
    "by_way_of",
    "delete",
    "mute",
    "note",
    "reopen",
    "reopen_group",
    "resolve",
    "resolve_group",
    "unmute",
]

BULK_LIMIT = 1_000
"""The most rows that one bulk act changes."""

_GROUP_ROWS = 10_000

_NOTE = (
    "INSERT INTO system_error_audit (action, actor, error_id, fingerprint, details) "
    "VALUES (%(action)s, %(actor)s, %(error_id)s, %(fingerprint)s, %(details)s::jsonb) RETURNING id"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Changed:
    """What became of one error or group.

    Attributes:
        row: As it is now.
        changed: False if it was so before.
        more: Errors of the group are left, since one act changes at most 10,000: do it again.
    """

    row: Row
    changed: bool
    more: bool = False


@dataclass(frozen=True, slots=True)
class Bulk:
    """What became of many errors.

    Attributes:
        count: How many were changed, or with `dry_run` would be.
        more: Others match as well: do it again.
        dry_run: Nothing was changed.
    """

    count: int
    more: bool
    dry_run: bool


def note(
    action: str,
    actor: str,
    *,
    error_id: int | None = None,
    fingerprint: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> Statement[None]:
    """A line of the audit: for what has no act of its own here, such as a refusal.

    Args:
        action: `refuse`, `sign-in`, ...
        actor: The name of the principal, or `anonymous`.
        error_id: The error that it is about.
        fingerprint: The group that it is about.
        details: JSON-like; secrets are blanked.
    """
    params = {
        "action": safe_name(action, 200),
        "actor": _actor(actor),
        "error_id": error_id,
        "fingerprint": fingerprint,
        "details": json.dumps(safe_json(details or {}), allow_nan=False),
    }
    return Statement(_NOTE, params, lambda rows: None)


def by_way_of(how: Mapping[str, Any], act: Act[T]) -> Act[T]:
    """Carry out an act whose audit lines also say how it was done.

    Args:
        how: JSON-like, such as `{"way": "http", "client": "192.0.2.1"}`; secrets are blanked.
        act: What is done.
    """
    said = safe_json(how)
    reply = None
    while True:
        try:
            statement = act.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result
        if statement.sql == _NOTE:
            details = json.loads(statement.params["details"]) | {"how": said}
            statement = replace(statement, params=statement.params | {"details": json.dumps(details)})
        reply = yield statement


def resolve(error_id: int, *, actor: str, notes: str | None = None) -> Act[Changed | None]:
    """Resolve one error; the group too, if that was the last. None if there is no such error."""
    found: Row | None = yield one(error_id)
    if found is None:
        return None
    ids = yield from _resolve_rows([error_id], [found["fingerprint"]], actor, notes)
    if ids:
        yield note("resolve", actor, error_id=error_id, fingerprint=found["fingerprint"], details=_notes(notes))
    row = yield one(error_id)
    return None if row is None else Changed(row, bool(ids))


def reopen(error_id: int, *, actor: str) -> Act[Changed | None]:
    """Take back that an error is resolved; its group is unresolved again. None if there is no such error."""
    found: Row | None = yield one(error_id)
    if found is None:
        return None
    yield _lock([found["fingerprint"]])
    ids = yield Statement(
        "UPDATE system_errors SET resolved_at = NULL, resolved_by = NULL, resolution_notes = NULL "
        "WHERE id = %(id)s AND resolved_at IS NOT NULL RETURNING id",
        {"id": error_id},
    )
    if ids:
        yield _unresolved_again(found["fingerprint"])
        yield note("reopen", actor, error_id=error_id, fingerprint=found["fingerprint"])
    row = yield one(error_id)
    return None if row is None else Changed(row, bool(ids))


def resolve_group(fingerprint: str, *, actor: str, notes: str | None = None) -> Act[Changed | None]:
    """Resolve a group and its errors, at most 10,000 of them at a time. None if there is no such group.

    A mute ends by it.
    """
    fingerprint = safe_name(fingerprint)
    locked = yield _lock([fingerprint])
    if not locked:
        return None
    # Both in one statement: no error can come in between, and all have the same time.
    done = yield Statement(
        """
        WITH chosen AS (
            SELECT id FROM system_errors WHERE fingerprint = %(fingerprint)s AND resolved_at IS NULL
            ORDER BY id LIMIT %(limit)s + 1
        ), rows AS (
            UPDATE system_errors SET resolved_at = statement_timestamp(), resolved_by = %(actor)s,
                resolution_notes = %(notes)s
            WHERE id IN (SELECT id FROM chosen ORDER BY id LIMIT %(limit)s) AND resolved_at IS NULL RETURNING id
        ), closed AS (
            UPDATE system_error_groups SET status = 'resolved', resolved_at = statement_timestamp(),
                resolved_by = %(actor)s, resolution_notes = %(notes)s,
                muted_at = NULL, muted_by = NULL, muted_until = NULL
            WHERE fingerprint = %(fingerprint)s AND (SELECT count(*) FROM chosen) <= %(limit)s
                AND (status <> 'resolved' OR EXISTS (SELECT FROM rows)) RETURNING fingerprint
        )
        SELECT (SELECT count(*) FROM rows) AS errors, (SELECT count(*) FROM closed) AS closed,
               (SELECT count(*) FROM chosen) > %(limit)s AS more
        """,
        {"fingerprint": fingerprint, "actor": _actor(actor), "notes": _text(notes), "limit": _GROUP_ROWS},
        lambda rows: rows[0],
    )
    changed = bool(done["errors"] or done["closed"])
    if changed:
        details = {"errors": done["errors"]} | _notes(notes)
        yield note("resolve_group", actor, fingerprint=fingerprint, details=details)
    row = yield group(fingerprint)
    return Changed(row, changed, done["more"])


def reopen_group(fingerprint: str, *, actor: str) -> Act[Changed | None]:
    """Take back that a group is resolved, with those of its errors that were resolved last.

    None if there is no such group; one that is not resolved stays as it is.
    """
    fingerprint = safe_name(fingerprint)
    locked = yield _lock([fingerprint])
    if not locked:
        return None
    changed = locked[0]["status"] == "resolved"
    if changed:
        errors = yield Statement(
            "UPDATE system_errors SET resolved_at = NULL, resolved_by = NULL, resolution_notes = NULL "
            "WHERE fingerprint = %(fingerprint)s AND resolved_at = "
            "(SELECT max(resolved_at) FROM system_errors WHERE fingerprint = %(fingerprint)s) RETURNING id",
            {"fingerprint": fingerprint},
        )
        yield _unresolved_again(fingerprint)
        yield note("reopen_group", actor, fingerprint=fingerprint, details={"errors": len(errors)})
    row = yield group(fingerprint)
    return Changed(row, changed)


def mute(fingerprint: str, *, actor: str, until: datetime | None = None) -> Act[Changed | None]:
    """Mute a group: alerts pass over it, its errors are stored and counted as ever. None if there is no such group.

    Args:
        fingerprint: The group.
        actor: Who does it.
        until: When it ends by itself; None for never.
    """
    fingerprint = safe_name(fingerprint)
    changed = yield Statement(
        """
        UPDATE system_error_groups SET status = 'muted', muted_at = now(), muted_by = %(actor)s, muted_until = %(until)s
        WHERE fingerprint = %(fingerprint)s AND (status <> 'muted' OR muted_until IS DISTINCT FROM %(until)s)
        RETURNING fingerprint
        """,
        {"fingerprint": fingerprint, "actor": _actor(actor), "until": until},
    )
    if changed:
        yield note("mute", actor, fingerprint=fingerprint, details={"until": until and until.isoformat()})
    row = yield group(fingerprint)
    return None if row is None else Changed(row, bool(changed))


def unmute(fingerprint: str, *, actor: str) -> Act[Changed | None]:
    """End the mute of a group: it is unresolved if an error of it is, else what it was. None if there is none."""
    fingerprint = safe_name(fingerprint)
    yield _lock([fingerprint])
    changed = yield Statement(
        """
        UPDATE system_error_groups g SET muted_at = NULL, muted_by = NULL, muted_until = NULL,
            status = CASE WHEN resolved_at IS NOT NULL AND NOT EXISTS (
                SELECT FROM system_errors e WHERE e.fingerprint = g.fingerprint AND e.resolved_at IS NULL
            ) THEN 'resolved' ELSE 'unresolved' END
        WHERE fingerprint = %(fingerprint)s AND status = 'muted' RETURNING fingerprint
        """,
        {"fingerprint": fingerprint},
    )
    if changed:
        yield note("unmute", actor, fingerprint=fingerprint)
    row = yield group(fingerprint)
    return None if row is None else Changed(row, bool(changed))


def bulk_resolve(
    filters: Filters, *, actor: str, notes: str | None = None, limit: int = BULK_LIMIT, dry_run: bool = False
) -> Act[Bulk]:
    """Resolve the unresolved errors that match, the oldest first.

    Args:
        filters: Which; their `state` is not looked at.
        actor: Who does it.
        notes: Why.
        limit: How many at most, from 1 to 1,000.
        dry_run: Only count.

    Raises:
        ConfigurationError: The limit is out of range.
    """
    conditions, params = _of_state(filters, "unresolved")
    rows = yield Statement(
        f"SELECT id, fingerprint FROM system_errors {where(conditions)} ORDER BY created_at, id LIMIT %(limit)s",
        params | {"limit": _checked(limit) + 1},
    )
    chosen, more = rows[:limit], len(rows) > limit
    if dry_run:
        return Bulk(len(chosen), more, dry_run=True)
    ids = yield from _resolve_rows([row["id"] for row in chosen], [row["fingerprint"] for row in chosen], actor, notes)
    if ids:
        yield _bulk_note("bulk_resolve", actor, filters, ids, _notes(notes))
    return Bulk(len(ids), more, dry_run=False)


def delete(error_id: int, *, actor: str) -> Act[Row | None]:
    """Delete one error and return it as it was. None if there is no such error.

    Counts over time and of its group stay; if it was the last unresolved one of its group, the group is resolved.
    """
    found: Row | None = yield one(error_id)
    if found is None:
        return None
    yield _lock([found["fingerprint"]])
    deleted: list[Row] = yield Statement(
        f"DELETE FROM system_errors WHERE id = %(id)s RETURNING {ERROR_COLUMNS}", {"id": error_id}
    )
    if not deleted:
        return None
    row = deleted[0]
    if row["resolved_at"] is None and row["fingerprint"] is not None:
        yield _close_groups([row["fingerprint"]], actor, None)
    facts = ("error_type", "severity", "thread_id", "created_at", "resolved_at", "occurrences")
    details = {key: row[key] for key in facts}
    yield note("delete", actor, error_id=error_id, fingerprint=row["fingerprint"], details=details)
    return row


def bulk_delete(
    resolved_before: datetime,
    *,
    actor: str,
    filters: Filters | None = None,
    limit: int = BULK_LIMIT,
    dry_run: bool = False,
) -> Act[Bulk]:
    """Delete errors that were resolved long ago.

    Args:
        resolved_before: Only those resolved earlier; with a time zone.
        actor: Who does it.
        filters: Only those that match; their `state` is not looked at.
        limit: How many at most, from 1 to 1,000.
        dry_run: Only count.

    Raises:
        ConfigurationError: The limit is out of range.
    """
    conditions, params = _of_state(filters or Filters(), "resolved")
    conditions.append("resolved_at < %(resolved_before)s")
    params |= {"resolved_before": resolved_before, "limit": _checked(limit) + 1}
    # Those that somebody else is deleting at this moment are passed over.
    rows = yield Statement(
        f"SELECT id FROM system_errors {where(conditions)} ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED", params
    )
    ids, more = [row["id"] for row in rows[:limit]], len(rows) > limit
    if dry_run:
        return Bulk(len(ids), more, dry_run=True)
    if ids:
        yield Statement("DELETE FROM system_errors WHERE id = ANY(%(ids)s) RETURNING id", {"ids": ids})
        details = {"resolved_before": resolved_before.isoformat()}
        yield _bulk_note("bulk_delete", actor, filters or Filters(), ids, details)
    return Bulk(len(ids), more, dry_run=False)


def _resolve_rows(
    ids: Sequence[int], fingerprints: Sequence[str | None], actor: str, notes: str | None
) -> Act[list[int]]:
    """Resolve those that are unresolved and close the groups that have none left; return the ids."""
    yield _lock(fingerprints)
    rows: list[Row] = yield Statement(
        # In the order of the ids, so that two who do this for errors without a group cannot wait for each other.
        """
        WITH chosen AS (
            SELECT id FROM system_errors WHERE id = ANY(%(ids)s) AND resolved_at IS NULL ORDER BY id FOR UPDATE
        )
        UPDATE system_errors SET resolved_at = statement_timestamp(), resolved_by = %(actor)s,
            resolution_notes = %(notes)s
        WHERE id IN (SELECT id FROM chosen) RETURNING id, fingerprint
        """,
        {"ids": list(ids), "actor": _actor(actor), "notes": _text(notes)},
    )
    if touched := sorted({row["fingerprint"] for row in rows if row["fingerprint"] is not None}):
        yield _close_groups(touched, actor, notes)
    return sorted(row["id"] for row in rows)


def _lock(fingerprints: Sequence[str | None]) -> Statement[list[Row]]:
    return Statement(
        "SELECT fingerprint, status FROM system_error_groups "
        "WHERE fingerprint = ANY(%(fingerprints)s) ORDER BY fingerprint FOR UPDATE",
        {"fingerprints": sorted({name for name in fingerprints if name is not None})},
    )


def _close_groups(fingerprints: Sequence[str], actor: str, notes: str | None) -> Statement[list[Row]]:
    """Those of locked groups that have nothing unresolved left are resolved; a muted one stays muted."""
    return Statement(
        """
        UPDATE system_error_groups g SET status = 'resolved', resolved_at = statement_timestamp(),
            resolved_by = %(actor)s, resolution_notes = %(notes)s
        WHERE g.fingerprint = ANY(%(fingerprints)s) AND g.status IN ('unresolved', 'regressed')
            AND NOT EXISTS (
                SELECT FROM system_errors e WHERE e.fingerprint = g.fingerprint AND e.resolved_at IS NULL
            )
        RETURNING g.fingerprint
        """,
        {"fingerprints": list(fingerprints), "actor": _actor(actor), "notes": _text(notes)},
    )


def _unresolved_again(fingerprint: str | None) -> Statement[list[Row]]:
    return Statement(
        "UPDATE system_error_groups SET status = 'unresolved', resolved_at = NULL, resolved_by = NULL, "
        "resolution_notes = NULL WHERE fingerprint = %(fingerprint)s AND status = 'resolved' RETURNING fingerprint",
        {"fingerprint": fingerprint},
    )


def _bulk_note(
    action: str, actor: str, filters: Filters, ids: Sequence[int], more: Mapping[str, Any]
) -> Statement[None]:
    given = {key: value for key, value in asdict(filters).items() if value and key != "state"}
    line = note(action, actor, details={"count": len(ids), "filters": given, **more})
    # All ids, which the bounds of what is logged elsewhere would cut: it is the only place that names them.
    line.params["details"] = json.dumps(json.loads(line.params["details"]) | {"ids": list(ids)})
    return line


def _of_state(filters: Filters, state: str) -> tuple[list[str], dict[str, Any]]:
    given = {name: getattr(filters, name) for name in Filters.__dataclass_fields__}
    return Filters(**given | {"state": state}).conditions()


def _notes(notes: str | None) -> dict[str, Any]:
    return {} if notes is None else {"notes": notes}


def _text(text: str | None) -> str | None:
    return None if text is None else safe_text(text)


def _actor(actor: str) -> str:
    return safe_name(actor, 200)


def _checked(limit: int) -> int:
    if not 1 <= limit <= BULK_LIMIT:
        raise ConfigurationError(
            f"limit={limit}: one bulk act changes 1 to {BULK_LIMIT:,} errors; do it again for more."
        )
    return limit
