"""What can be asked of the error store: pages of errors, groups, the audit and a thread's log, and counts.

Lists go from the newest to the oldest, a page at a time, by the place where the last page ended: the thousandth page
costs what the first does, and rows that arrive meanwhile move nothing. Counts are sums of `occurrences`, since a row
can stand for a burst. Not here: what changes anything (`acting.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from checkpointer.errors import ConfigurationError
from checkpointer.events import SEVERITIES, Severity
from observability.errors.statements import Act, Cursor, Page, Row, Statement, page_of, where
from observability.scrub import safe_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "AUDIT_LIST",
    "ERROR_COLUMNS",
    "Filters",
    "GroupStatus",
    "Series",
    "State",
    "Stats",
    "Trends",
    "audit",
    "find",
    "group",
    "groups",
    "log",
    "log_between",
    "newest_id",
    "one",
    "open_groups",
    "since",
    "stats",
    "trends",
]

State = Literal["unresolved", "resolved", "all"]
GroupStatus = Literal["unresolved", "resolved", "regressed", "muted"]
Bucket = Literal["hour", "day"]
By = Literal["total", "error_type", "severity"]

LARGEST_LIMIT = 500
"""The most rows that a page holds."""

_LONGEST_RANGE: dict[Bucket, timedelta] = {"hour": timedelta(days=31), "day": timedelta(days=400)}
_SERIES = 20

ERROR_COLUMNS = (
    "id, event_id, error_type, severity, thread_id, error_message, stack_trace, error_context, created_at, "
    "recorded_at, last_seen_at, occurrences, fingerprint, delivery, outcome, component, operation, error_code, "
    "run_id, checkpoint_ns, checkpoint_id, trace_id, release, environment, resolved_at, resolved_by, resolution_notes"
)
"""The columns of an error. `stack_trace` and `error_context` can hold what not every reader may see."""

# The mute of a group ends by its time, whether or not anything has happened since.
_STATUS = "CASE WHEN status = 'muted' AND muted_until <= now() THEN 'unresolved' ELSE status END"
GROUP_COLUMNS = (
    "fingerprint, error_type, severity, component, operation, error_code, title, "
    f"{_STATUS} AS status, first_seen_at, last_seen_at, occurrences, regressions, resolved_at, resolved_by, "
    "resolution_notes, muted_at, muted_by, muted_until"
)

ERRORS_LIST, GROUPS_LIST, AUDIT_LIST, LOG_LIST = "errors", "groups", "audit", "log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which errors are meant; what is not set does not restrict.

    Attributes:
        state: By default only those that nobody has resolved.
        severities: Any of these.
        error_type: Exactly this one.
        thread_id: Exactly this one.
        component: Exactly this one.
        fingerprint: Those of one group.
        since: Happened then or later; with a time zone.
        until: Happened earlier; with a time zone.
        text: Is part of the message, in whatever case; no character of it has a special meaning.
    """

    state: State = "unresolved"
    severities: tuple[Severity, ...] = ()
    error_type: str | None = None
    thread_id: str | None = None
    component: str | None = None
    fingerprint: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    text: str | None = None

    def conditions(self) -> tuple[list[str], dict[str, Any]]:
        """Return the conditions on `system_errors`, and their parameters."""
        found: list[str] = []
        params: dict[str, Any] = {}
        if self.state != "all":
            found.append(f"resolved_at IS {'' if self.state == 'unresolved' else 'NOT '}NULL")
        if self.severities:
            found.append("severity = ANY(%(severities)s)")
            params["severities"] = list(self.severities)
        # As the store has them: an id that Postgres cannot hold was stored in a form that it can.
        for name, limit in (("error_type", 200), ("thread_id", 1_000), ("component", 1_000), ("fingerprint", 1_000)):
            value = getattr(self, name)
            if value is not None:
                found.append(f"{name} = %({name})s")
                params[name] = safe_name(value, limit)
        if self.since is not None:
            found.append("created_at >= %(since)s")
            params["since"] = self.since
        if self.until is not None:
            found.append("created_at < %(until)s")
            params["until"] = self.until
        if self.text:
            found.append(r"error_message ILIKE %(text)s ESCAPE '\'")
            params["text"] = _pattern(self.text)
        return found, params


def _pattern(text: str) -> str:
    for special in ("\\", "%", "_"):
        text = text.replace(special, "\\" + special)
    clean = text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    return f"%{clean}%"


def find(filters: Filters | None = None, *, limit: int = 100, cursor: str | None = None) -> Statement[Page]:
    """Errors, the newest first.

    Args:
        filters: Which; by default the unresolved ones.
        limit: How many at most, from 1 to 500.
        cursor: The `next_cursor` of the page before.

    Raises:
        InvalidCursorError: It is not a cursor of this list.
        ConfigurationError: The limit is out of range.
    """
    conditions, params = (filters or Filters()).conditions()
    if cursor is not None:
        after = Cursor.decode(ERRORS_LIST, cursor, int)
        params |= {"after_at": after.at, "after_key": after.key}
        # Rows without a time, which only others than this package write, come first.
        conditions.append(
            "(created_at, id) < (%(after_at)s, %(after_key)s)"
            if after.at is not None
            else "(created_at IS NOT NULL OR id < %(after_key)s)"
        )
    params["limit"] = _checked(limit) + 1
    sql = (
        f"SELECT {ERROR_COLUMNS} FROM system_errors {where(conditions)} "
        "ORDER BY created_at DESC, id DESC LIMIT %(limit)s"
    )
    return Statement(sql, params, page_of(ERRORS_LIST, limit, "created_at", "id"))


def one(error_id: int) -> Statement[Row | None]:
    """One error; None if there is none with this id."""
    return Statement(f"SELECT {ERROR_COLUMNS} FROM system_errors WHERE id = %(id)s", {"id": error_id}, _first)


def newest_id() -> Statement[int]:
    """The highest id of an error so far; 0 if there is none."""
    return Statement("SELECT coalesce(max(id), 0) AS id FROM system_errors", {}, lambda rows: int(rows[0]["id"]))


def since(error_id: int, *, limit: int) -> Statement[list[Row]]:
    """Errors with a higher id, the lowest first.

    Ids are given out before rows are to be seen: a lower one than the last can still appear.
    """
    sql = f"SELECT {ERROR_COLUMNS} FROM system_errors WHERE id > %(id)s ORDER BY id LIMIT %(limit)s"
    return Statement(sql, {"id": error_id, "limit": limit})


def groups(
    *,
    statuses: Sequence[GroupStatus] = (),
    severities: Sequence[Severity] = (),
    error_type: str | None = None,
    component: str | None = None,
    text: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Statement[Page]:
    """Groups of errors, those first that happened last.

    Args:
        statuses: Any of these; by default all. A mute that has run out counts as unresolved.
        severities: Any of these, by the worst of the group.
        error_type: Exactly this one.
        component: Exactly this one.
        text: Is part of the title, in whatever case.
        limit: How many at most, from 1 to 500.
        cursor: The `next_cursor` of the page before.

    Raises:
        InvalidCursorError: It is not a cursor of this list.
        ConfigurationError: The limit is out of range.
    """
    conditions: list[str] = []
    params: dict[str, Any] = {"limit": _checked(limit) + 1}
    if statuses:
        conditions.append(f"({_STATUS}) = ANY(%(statuses)s)")
        params["statuses"] = list(statuses)
    if severities:
        conditions.append("severity = ANY(%(severities)s)")
        params["severities"] = list(severities)
    if error_type is not None:
        conditions.append("error_type = %(error_type)s")
        params["error_type"] = safe_name(error_type, 200)
    if component is not None:
        conditions.append("component = %(component)s")
        params["component"] = safe_name(component)
    if text:
        conditions.append(r"title ILIKE %(text)s ESCAPE '\'")
        params["text"] = _pattern(text)
    if cursor is not None:
        after = Cursor.decode(GROUPS_LIST, cursor, str)
        conditions.append("(last_seen_at, fingerprint) < (%(after_at)s, %(after_key)s)")
        params |= {"after_at": after.at, "after_key": after.key}
    sql = (
        f"SELECT {GROUP_COLUMNS} FROM system_error_groups {where(conditions)} "
        "ORDER BY last_seen_at DESC, fingerprint DESC LIMIT %(limit)s"
    )
    return Statement(sql, params, page_of(GROUPS_LIST, limit, "last_seen_at", "fingerprint"))


def group(fingerprint: str) -> Statement[Row | None]:
    """One group; None if there is none with this fingerprint."""
    sql = f"SELECT {GROUP_COLUMNS} FROM system_error_groups WHERE fingerprint = %(fingerprint)s"
    return Statement(sql, {"fingerprint": safe_name(fingerprint)}, _first)


def audit(
    *,
    action: str | None = None,
    actor: str | None = None,
    error_id: int | None = None,
    fingerprint: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Statement[Page]:
    """Who did what and who was refused, the latest first.

    Raises:
        InvalidCursorError: It is not a cursor of this list.
        ConfigurationError: The limit is out of range.
    """
    conditions: list[str] = []
    params: dict[str, Any] = {"limit": _checked(limit) + 1}
    texts = {"action": action, "actor": actor, "fingerprint": fingerprint}
    given = {name: safe_name(text) for name, text in texts.items() if text is not None}
    for name, value in (given if error_id is None else given | {"error_id": error_id}).items():
        conditions.append(f"{name} = %({name})s")
        params[name] = value
    if cursor is not None:
        after = Cursor.decode(AUDIT_LIST, cursor, int)
        conditions.append("(at, id) < (%(after_at)s, %(after_key)s)")
        params |= {"after_at": after.at, "after_key": after.key}
    sql = (
        f"SELECT id, at, action, actor, error_id, fingerprint, details FROM system_error_audit {where(conditions)} "
        "ORDER BY at DESC, id DESC LIMIT %(limit)s"
    )
    return Statement(sql, params, page_of(AUDIT_LIST, limit, "at", "id"))


def log(thread_id: str, *, limit: int = 100, cursor: str | None = None) -> Statement[Page]:
    """The lines of a thread's log that arrived last, by when they happened; the next page holds earlier ones.

    Raises:
        InvalidCursorError: It is not a cursor of this list.
        ConfigurationError: The limit is out of range.
    """
    conditions = ["thread_id = %(thread_id)s"]
    params: dict[str, Any] = {"thread_id": safe_name(thread_id), "limit": _checked(limit) + 1}
    if cursor is not None:
        conditions.append("id < %(after_key)s")
        params["after_key"] = Cursor.decode(LOG_LIST, cursor, int).key
    sql = (
        f"SELECT id, thread_id, level, message, event_id, context, created_at FROM thread_logs {where(conditions)} "
        "ORDER BY id DESC LIMIT %(limit)s"
    )
    newest_first = page_of(LOG_LIST, limit, None, "id")

    def read(rows: list[Row]) -> Page:
        page = newest_first(rows)
        # Lines that waited for Postgres have a later id than their time says.
        ordered = sorted(page.rows, key=lambda row: (row["created_at"] is not None, row["created_at"], row["id"]))
        return Page(ordered, page.next_cursor)

    return Statement(sql, params, read)


def log_between(thread_id: str, since: datetime | None, until: datetime | None, *, limit: int) -> Statement[list[Row]]:
    """The last lines of a thread's log from a span of time, the newest first; None leaves an end of it open."""
    params = {"thread_id": safe_name(thread_id), "since": since, "until": until, "limit": _checked(limit)}
    sql = """
        SELECT id, level, message, created_at FROM thread_logs
        WHERE thread_id = %(thread_id)s AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s::timestamptz)
            AND (%(until)s::timestamptz IS NULL OR created_at < %(until)s::timestamptz)
        ORDER BY id DESC LIMIT %(limit)s
    """
    return Statement(sql, params)


@dataclass(frozen=True, slots=True)
class Stats:
    """How it stands.

    Attributes:
        unresolved: Occurrences that nobody has resolved.
        unresolved_rows: Rows that these are in.
        last_24h: Occurrences of the last 24 hours, resolved or not.
        threads: Threads with something unresolved.
        oldest_unresolved_at: When the oldest of them happened; None if there is none.
        by_severity: For each severity, the worst first: `severity`, `unresolved`, `last_24h`.
        by_type: For each type with something unresolved or new, the most frequent first, at most 100:
            `error_type`, `unresolved`, `last_24h`, `worst_severity`.
        groups: How many groups have each status.
    """

    unresolved: int
    unresolved_rows: int
    last_24h: int
    threads: int
    oldest_unresolved_at: datetime | None
    by_severity: list[Row]
    by_type: list[Row]
    groups: dict[str, int]


_NAMES = ", ".join(f"'{name}'" for name in SEVERITIES)
_RANK = f"array_position(ARRAY[{_NAMES}], severity)"

_STATS = f"""
SELECT grouping(severity) = 0 AS of_severity, grouping(error_type) = 0 AS of_type, severity, error_type,
       coalesce(sum(occurrences) FILTER (WHERE resolved_at IS NULL), 0)::bigint AS unresolved,
       count(*) FILTER (WHERE resolved_at IS NULL) AS unresolved_rows,
       coalesce(sum(occurrences) FILTER (WHERE created_at > now() - interval '24 hours'), 0)::bigint AS last_24h,
       count(DISTINCT thread_id) FILTER (WHERE resolved_at IS NULL) AS threads,
       min(created_at) FILTER (WHERE resolved_at IS NULL) AS oldest_unresolved_at,
       max({_RANK}) AS worst
FROM system_errors
WHERE resolved_at IS NULL OR created_at > now() - interval '24 hours'
GROUP BY GROUPING SETS ((), (severity), (error_type))
ORDER BY unresolved DESC, last_24h DESC, error_type, severity
"""
_GROUP_COUNTS = f"SELECT {_STATUS} AS status, count(*) AS groups FROM system_error_groups GROUP BY 1"
_OPEN_GROUPS = f"""
SELECT severity, count(*) AS groups FROM system_error_groups
WHERE ({_STATUS}) IN ('unresolved', 'regressed') GROUP BY severity
"""


def stats() -> Act[Stats]:
    """How many errors there are, of which kinds, and how many groups."""
    counted = yield Statement(_STATS)
    statuses = yield Statement(_GROUP_COUNTS)
    total = next(row for row in counted if not row["of_severity"] and not row["of_type"])
    severities = {row["severity"]: row for row in counted if row["of_severity"]}
    known = [*reversed(SEVERITIES), *(name for name in severities if name not in SEVERITIES)]
    return Stats(
        unresolved=total["unresolved"],
        unresolved_rows=total["unresolved_rows"],
        last_24h=total["last_24h"],
        threads=total["threads"],
        oldest_unresolved_at=total["oldest_unresolved_at"],
        by_severity=[
            {"severity": name} | {key: severities.get(name, {}).get(key, 0) for key in ("unresolved", "last_24h")}
            for name in known
        ],
        by_type=[
            {key: row[key] for key in ("error_type", "unresolved", "last_24h")}
            | {"worst_severity": SEVERITIES[row["worst"] - 1] if row["worst"] else "error"}
            for row in counted
            if row["of_type"]
        ][:100],
        groups=dict.fromkeys(("unresolved", "regressed", "muted", "resolved"), 0)
        | {row["status"]: row["groups"] for row in statuses},
    )


def open_groups() -> Statement[dict[str, int]]:
    """How many groups are unresolved or have come back, by their worst severity."""
    return Statement(_OPEN_GROUPS, {}, lambda rows: {row["severity"]: row["groups"] for row in rows})


@dataclass(frozen=True, slots=True)
class Series:
    """Counts of one kind over time.

    Attributes:
        key: The type or severity; None for the total, or for all kinds beyond the twenty most frequent.
        counts: One for each bucket of the range.
        total: Their sum.
    """

    key: str | None
    counts: list[int]
    total: int


@dataclass(frozen=True, slots=True)
class Trends:
    """Counts over time, by when errors happened.

    Attributes:
        bucket: How long each count is for.
        starts: When each bucket begins, UTC, the oldest first.
        series: The most frequent first.
    """

    bucket: Bucket
    starts: list[datetime]
    series: list[Series]


def trends(
    *,
    since: datetime,
    until: datetime,
    bucket: Bucket = "hour",
    by: By = "total",
    error_type: str | None = None,
    severity: Severity | None = None,
    fingerprint: str | None = None,
) -> Statement[Trends]:
    """How many errors happened in each hour or day (UTC), from counts that outlive the rows.

    Args:
        since: Its bucket is the first.
        until: The last bucket is the one before or around it.
        bucket: `hour` (at most 31 days) or `day` (at most 400 days).
        by: One series for all, or one for each type or severity.
        error_type: Only of this one.
        severity: Only of this one.
        fingerprint: Only of this group.

    Raises:
        ConfigurationError: The range is empty, too long, or without a time zone.
    """
    if since.tzinfo is None or until.tzinfo is None:
        raise ConfigurationError("The range of trends needs times with a time zone.")
    if since >= until:
        raise ConfigurationError("The range of trends is empty: its start has to be before its end.")
    if until - since > _LONGEST_RANGE[bucket]:
        raise ConfigurationError(
            f"The range of trends by {bucket} is at most {_LONGEST_RANGE[bucket].days} days: choose a shorter one."
        )
    step = timedelta(hours=1) if bucket == "hour" else timedelta(days=1)
    try:
        first = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        first = first if bucket == "hour" else first.replace(hour=0)
        starts = [first]
        while starts[-1] + step < until:
            starts.append(starts[-1] + step)
        end = starts[-1] + step
    except OverflowError:
        raise ConfigurationError("The range of trends is outside of the calendar.") from None
    conditions = ["hour >= %(first)s", "hour < %(end)s"]
    params: dict[str, Any] = {"first": first, "end": end}
    given = {"error_type": error_type, "severity": severity, "fingerprint": fingerprint}
    for name, value in given.items():
        if value is not None:
            conditions.append(f"{name} = %({name})s")
            params[name] = safe_name(value, 200 if name == "error_type" else 1_000)
    key = "NULL::text" if by == "total" else by
    sql = (
        f"SELECT date_trunc('{bucket}', hour, 'UTC') AS start, {key} AS key, sum(occurrences)::bigint AS occurrences "
        f"FROM system_error_hourly {where(conditions)} GROUP BY 1, 2"
    )
    return Statement(sql, params, _reader_of_trends(bucket, starts, by))


def _reader_of_trends(bucket: Bucket, starts: list[datetime], by: By) -> Callable[[list[Row]], Trends]:
    position = {start: number for number, start in enumerate(starts)}

    def read(rows: list[Row]) -> Trends:
        counts: dict[str | None, list[int]] = {None: [0] * len(starts)} if by == "total" else {}
        for row in rows:
            series = counts.setdefault(row["key"], [0] * len(starts))
            series[position[row["start"].astimezone(UTC)]] += row["occurrences"]
        ranked = sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0] or ""))
        shown = [Series(key, values, sum(values)) for key, values in ranked[:_SERIES]]
        if rest := [values for _, values in ranked[_SERIES:]]:
            merged = [sum(column) for column in zip(*rest, strict=True)]
            shown.append(Series(None, merged, sum(merged)))
        return Trends(bucket, starts, shown)

    return read


def _first(rows: list[Row]) -> Row | None:
    return rows[0] if rows else None


def _checked(limit: int) -> int:
    if not 1 <= limit <= LARGEST_LIMIT:
        raise ConfigurationError(f"limit={limit}: a page holds 1 to {LARGEST_LIMIT} rows.")
    return limit
