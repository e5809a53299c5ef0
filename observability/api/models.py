"""The shapes of requests and responses.

Not here: problems (`problems.py`).
"""

# No `from __future__ import annotations`: FastAPI and pydantic read them.

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from checkpointer.events import Severity
from observability.errors.acting import BULK_LIMIT, Bulk, Changed
from observability.errors.reading import Filters, GroupStatus, State, Stats, Trends
from observability.errors.statements import Page, Row

Moment = Annotated[datetime, AfterValidator(lambda moment: moment.astimezone(UTC))]
Success = Literal["success"]
Text = Annotated[str, Field(max_length=1_000)]
NotesText = Annotated[str, Field(max_length=4_000, examples=["Restarted the database, all flushed."])]

SENSITIVE = ("stack_trace", "error_context")


class ErrorSummary(BaseModel):
    """An error, without what only some may see."""

    id: int
    event_id: UUID | None = None
    error_type: str
    severity: str
    thread_id: str | None = None
    error_message: str
    created_at: Moment | None = Field(None, description="When it happened.")
    recorded_at: Moment | None = Field(None, description="When it arrived; after an outage later than it happened.")
    last_seen_at: Moment | None = Field(None, description="When the last of a burst happened.")
    occurrences: int = Field(description="More than 1 for a burst that was folded into one row.")
    fingerprint: str | None = Field(None, description="Of its group.")
    delivery: str | None = None
    outcome: str | None = None
    component: str | None = None
    operation: str | None = None
    error_code: str | None = Field(None, description="SQLSTATE.")
    run_id: str | None = None
    checkpoint_ns: str | None = None
    checkpoint_id: str | None = None
    trace_id: str | None = None
    release: str | None = None
    environment: str | None = None
    resolved_at: Moment | None = None
    resolved_by: str | None = None
    resolution_notes: str | None = None


class ErrorDetail(ErrorSummary):
    """An error with all that is known of it."""

    stack_trace: str | None = Field(None, description="Hostile text: show it as text, never as HTML.")
    error_context: Any = None
    withheld: list[str] = Field(description="The fields that the scope `read_sensitive` would show.")

    @classmethod
    def of(cls, row: Row, sensitive: bool) -> Self:
        """Make it out of a row; without `sensitive` as if the row had neither stack trace nor context."""
        shown = row if sensitive else {key: value for key, value in row.items() if key not in SENSITIVE}
        return cls(**shown, withheld=[] if sensitive else list(SENSITIVE))


class ErrorList(BaseModel):
    """A page of errors."""

    status: Success = "success"
    count: int = Field(description="How many are on this page.")
    errors: list[ErrorSummary]
    next_cursor: str | None = Field(description="Leads to the next page; null on the last.")

    @classmethod
    def of(cls, page: Page) -> Self:
        """Make it out of a page."""
        errors = [ErrorSummary(**{key: row[key] for key in ErrorSummary.model_fields}) for row in page.rows]
        return cls(count=len(errors), errors=errors, next_cursor=page.next_cursor)


class OneError(BaseModel):
    """One error."""

    status: Success = "success"
    error: ErrorDetail


class Resolution(BaseModel):
    """What became of one error."""

    status: Success = "success"
    id: int
    changed: bool = Field(description="False if it was so before.")
    resolved_at: Moment | None
    resolved_by: str | None
    resolution_notes: str | None

    @classmethod
    def of(cls, outcome: Changed) -> Self:
        """Make it out of an outcome."""
        row = outcome.row
        facts = {key: row[key] for key in ("id", "resolved_at", "resolved_by", "resolution_notes")}
        return cls(changed=outcome.changed, **facts)


class Group(BaseModel):
    """Errors of one kind."""

    fingerprint: str
    error_type: str
    severity: str = Field(description="The worst so far.")
    component: str | None = None
    operation: str | None = None
    error_code: str | None = None
    title: str
    status: str = Field(description="`unresolved`, `resolved`, `regressed` or `muted`.")
    first_seen_at: Moment
    last_seen_at: Moment
    occurrences: int
    regressions: int = Field(description="How often it came back after it was resolved.")
    resolved_at: Moment | None = None
    resolved_by: str | None = None
    resolution_notes: str | None = None
    muted_at: Moment | None = None
    muted_by: str | None = None
    muted_until: Moment | None = None


class GroupList(BaseModel):
    """A page of groups."""

    status: Success = "success"
    count: int
    groups: list[Group]
    next_cursor: str | None


class OneGroup(BaseModel):
    """One group."""

    status: Success = "success"
    group: Group


class GroupOutcome(BaseModel):
    """What became of one group."""

    status: Success = "success"
    fingerprint: str
    group_status: str
    changed: bool
    more: bool = Field(description="Errors of it are left, since one request changes at most 10,000: repeat it.")
    resolved_at: Moment | None
    muted_until: Moment | None

    @classmethod
    def of(cls, outcome: Changed) -> Self:
        """Make it out of an outcome."""
        facts = {key: outcome.row[key] for key in ("fingerprint", "resolved_at", "muted_until")}
        return cls(group_status=outcome.row["status"], changed=outcome.changed, more=outcome.more, **facts)


class BulkOutcome(BaseModel):
    """What became of many errors."""

    status: Success = "success"
    count: int = Field(description="How many were changed, or with `dry_run` would be.")
    more: bool = Field(description="Others match as well: repeat it.")
    dry_run: bool

    @classmethod
    def of(cls, outcome: Bulk) -> Self:
        """Make it out of an outcome."""
        return cls(count=outcome.count, more=outcome.more, dry_run=outcome.dry_run)


class SeverityCounts(BaseModel):
    """Occurrences of one severity."""

    severity: str
    unresolved: int
    last_24h: int


class TypeCounts(BaseModel):
    """Occurrences of one type."""

    error_type: str
    unresolved: int
    last_24h: int
    worst_severity: str


class StatsAnswer(BaseModel):
    """How it stands. Numbers are occurrences."""

    status: Success = "success"
    unresolved: int
    unresolved_rows: int
    last_24h: int
    threads: int = Field(description="Threads with something unresolved.")
    oldest_unresolved_at: Moment | None
    by_severity: list[SeverityCounts] = Field(description="The worst first.")
    by_type: list[TypeCounts] = Field(description="The most frequent first.")
    groups: dict[str, int] = Field(description="How many groups have each status.")

    @classmethod
    def of(cls, stats: Stats) -> Self:
        """Make it out of what was counted."""
        return cls(**{name: getattr(stats, name) for name in Stats.__dataclass_fields__})


class SeriesAnswer(BaseModel):
    """Counts of one kind over time."""

    key: str | None = Field(description="The type or severity; null for all, or for the rest beyond twenty.")
    counts: list[int]
    total: int


class TrendsAnswer(BaseModel):
    """Counts over time. `counts` of each series belong to `starts`."""

    status: Success = "success"
    bucket: Literal["hour", "day"]
    starts: list[Moment]
    series: list[SeriesAnswer]

    @classmethod
    def of(cls, trends: Trends) -> Self:
        """Make it out of what was counted."""
        series = [SeriesAnswer(key=one.key, counts=one.counts, total=one.total) for one in trends.series]
        return cls(bucket=trends.bucket, starts=trends.starts, series=series)


class AuditEntry(BaseModel):
    """Who did what, or was refused what."""

    id: int
    at: Moment
    action: str
    actor: str
    error_id: int | None
    fingerprint: str | None
    details: Any


class AuditList(BaseModel):
    """A page of the audit."""

    status: Success = "success"
    count: int
    entries: list[AuditEntry]
    next_cursor: str | None


class LogLine(BaseModel):
    """A line of a thread's log."""

    thread_id: str
    level: str
    message: str
    event_id: str | None = None
    context: Any = None
    created_at: Moment | None = None


class LogPage(BaseModel):
    """Lines of a thread's log, the oldest first."""

    status: Success = "success"
    count: int
    lines: list[LogLine]
    next_cursor: str | None = Field(description="Leads to earlier lines; null if there are none.")
    complete: bool = Field(description="False while Postgres is away: then only the last lines of ten minutes.")


class Ticket(BaseModel):
    """Lets one stream be opened without a header."""

    status: Success = "success"
    ticket: str
    url: str = Field(description="The path to open with an EventSource.")
    expires_in: int = Field(description="Seconds.")


class Notes(BaseModel):
    """Why something is resolved."""

    model_config = ConfigDict(extra="forbid")

    resolution_notes: NotesText | None = None


class Mute(BaseModel):
    """How long a group is muted."""

    model_config = ConfigDict(extra="forbid")

    until: AwareDatetime | None = Field(None, description="When it ends by itself; without it never.")


class _Narrowing(BaseModel):
    """Which errors a bulk act is for; what is not set does not restrict."""

    # A misspelt filter must not make the act reach further.
    model_config = ConfigDict(extra="forbid")

    severity: list[Severity] = Field([], max_length=4)
    error_type: Text | None = None
    thread_id: Text | None = None
    component: Text | None = None
    fingerprint: Text | None = None
    since: AwareDatetime | None = Field(None, description="Happened then or later.")
    until: AwareDatetime | None = Field(None, description="Happened earlier.")
    text: Text | None = Field(None, description="Is part of the message, in whatever case.")

    def filters(self, state: State = "unresolved") -> Filters:
        """Return them for the store."""
        return Filters(
            state=state,
            severities=tuple(self.severity),
            error_type=self.error_type,
            thread_id=self.thread_id,
            component=self.component,
            fingerprint=self.fingerprint,
            since=self.since,
            until=self.until,
            text=self.text,
        )


class BulkResolve(_Narrowing):
    """Which errors are resolved, and why."""

    resolution_notes: NotesText | None = None
    limit: int = Field(BULK_LIMIT, ge=1, le=BULK_LIMIT)
    dry_run: bool = Field(False, description="Only count.")


class BulkDelete(_Narrowing):
    """Which resolved errors are deleted."""

    resolved_before: AwareDatetime
    limit: int = Field(BULK_LIMIT, ge=1, le=BULK_LIMIT)
    dry_run: bool = Field(False, description="Only count.")


class ErrorQuery(_Narrowing):
    """Which errors are listed."""

    model_config = ConfigDict(extra="ignore")

    state: State = Field("unresolved", description="Those that nobody has resolved, those that somebody has, or all.")
    limit: int = Field(100, ge=1, le=500)
    cursor: str | None = Field(None, max_length=4_000, description="The `next_cursor` of the page before.")


class GroupQuery(BaseModel):
    """Which groups are listed."""

    status: list[GroupStatus] = Field([], max_length=4)
    severity: list[Severity] = Field([], max_length=4, description="The worst of the group.")
    error_type: Text | None = None
    component: Text | None = None
    text: Text | None = Field(None, description="Is part of the title, in whatever case.")
    limit: int = Field(100, ge=1, le=500)
    cursor: str | None = Field(None, max_length=4_000)


class AuditQuery(BaseModel):
    """Which lines of the audit are listed."""

    action: Text | None = None
    actor: Text | None = None
    error_id: int | None = Field(None, ge=1, le=2**63 - 1)
    fingerprint: Text | None = None
    limit: int = Field(100, ge=1, le=500)
    cursor: str | None = Field(None, max_length=4_000)


class TrendQuery(BaseModel):
    """What is counted over time."""

    bucket: Literal["hour", "day"] = "hour"
    by: Literal["total", "error_type", "severity"] = "total"
    since: AwareDatetime | None = Field(None, description="By default a day, or with `bucket=day` 30 days, before.")
    until: AwareDatetime | None = Field(None, description="By default now.")
    error_type: Text | None = None
    severity: Severity | None = None
    fingerprint: Text | None = None


class Deleted(BaseModel):
    """One error was deleted."""

    status: Success = "success"
    count: Literal[1] = 1
