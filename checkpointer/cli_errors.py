"""The commands `checkpointer errors ...`: see, follow, resolve and delete errors without access to the database.

A *target* is an error, by its number, or a group of errors of one kind, by its fingerprint. Not here: what is asked
and what an act does (`observability/errors/`), which the HTTP interface runs too.
"""

# No `from __future__ import annotations`: see `cli.py`.

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import psycopg

from checkpointer import cli_output
from checkpointer.cli_connections import Common, connect, who
from checkpointer.cli_follow import follow
from checkpointer.errors import ConfigurationError
from checkpointer.events import SEVERITIES, Severity
from observability.errors import acting, reading
from observability.errors.acting import Changed
from observability.errors.reading import Filters
from observability.errors.statements import Act, Page, run
from observability.following import errors_source

if TYPE_CHECKING:
    import typer

T = TypeVar("T")

_AGO = re.compile(r"(\d{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN = 10
_LARGEST_NUMBER = 2**63 - 1


class State(StrEnum):
    """Which errors, by whether somebody has resolved them."""

    unresolved = "unresolved"
    resolved = "resolved"
    all = "all"


class Level(StrEnum):
    """A severity."""

    info = "info"
    warning = "warning"
    error = "error"
    critical = "critical"


class Status(StrEnum):
    """The status of a group."""

    unresolved = "unresolved"
    resolved = "resolved"
    regressed = "regressed"
    muted = "muted"


class Bucket(StrEnum):
    """For how long each count of a trend is."""

    hour = "hour"
    day = "day"


class By(StrEnum):
    """What a trend has a series for."""

    total = "total"
    error_type = "error_type"
    severity = "severity"


def add_commands(app: "typer.Typer", common: Common) -> None:
    """Add the commands to the command line."""
    import typer

    group = typer.Typer(no_args_is_help=True, help="Errors: see, follow, resolve and delete them.")
    app.add_typer(group, name="errors")

    def moment(text: str) -> datetime:
        try:
            return _moment(text)
        except (ValueError, OverflowError) as exc:
            raise typer.BadParameter("use a time such as 2026-03-14T12:00, or an age such as 30m, 24h or 7d") from exc

    def later(text: str) -> datetime:
        ago = _AGO.fullmatch(text)
        now = datetime.now(UTC)
        try:
            found = now + _span(ago) if ago else _moment(text)
        except (ValueError, OverflowError) as exc:
            raise typer.BadParameter("use a time such as 2026-03-14T12:00, or 30m, 24h or 7d from now") from exc
        if found <= now:
            raise typer.BadParameter("that is over already")
        return found

    def a_page(action: Callable[[], T]) -> T:
        try:
            return action()
        except ConfigurationError as exc:
            raise typer.BadParameter(str(exc)) from exc

    state_option = typer.Option("--state", help="Which.")
    severity_option = typer.Option("--severity", help="Only this severity; may be repeated.", show_default="all")
    type_option = typer.Option("--type", help="Only this type.", show_default=False)
    thread_option = typer.Option("--thread", help="Only of this thread.", show_default=False)
    component_option = typer.Option("--component", help="Only of this component.", show_default=False)
    group_option = typer.Option("--group", help="Only of the group with this fingerprint.", show_default=False)
    text_option = typer.Option("--text", help="Only with this in the message.", show_default=False)
    since_option = typer.Option("--since", parser=moment, metavar="TIME|AGE", help="Happened then or later.")
    until_option = typer.Option("--until", parser=moment, metavar="TIME|AGE", help="Happened earlier.")
    limit_option = typer.Option(min=1, max=reading.LARGEST_LIMIT, help="At most so many.")
    lines_option = typer.Option(
        "--lines", "-n", min=0, max=reading.LARGEST_LIMIT, help="With how many of the last ones to begin."
    )
    lines_json_option = typer.Option("--json", help="Print a JSON object on each line.")
    status_option = typer.Option("--status", help="Only with this status; may be repeated.", show_default="all")
    target_argument = typer.Argument(help="The number of an error, or a fingerprint.", show_default=False)
    targets_argument = typer.Argument(help="Numbers of errors, or fingerprints.", show_default=False)
    notes_option = typer.Option("--notes", help="What was done about it.", show_default=False)
    until_muted_option = typer.Option(
        "--until", parser=later, metavar="TIME|SPAN", help="When the mute ends by itself.", show_default="never"
    )
    bucket_option = typer.Option(help="How long each count is for.")
    by_option = typer.Option("--by", help="A series for each.")
    start_option = typer.Option(
        "--since", parser=moment, metavar="TIME|AGE", help="Where it begins.", show_default="24 buckets ago"
    )
    end_option = typer.Option("--until", parser=moment, metavar="TIME|AGE", help="Where it ends.", show_default="now")
    before_option = typer.Option(
        "--resolved-before", parser=moment, metavar="TIME|AGE", help="All that were resolved earlier."
    )
    ids_argument = typer.Argument(help="Numbers of errors.", show_default=False)
    yes_option = typer.Option("--yes", help="Do it; without this they are only counted.")

    @group.command("list")
    def list_errors(
        state: Annotated[State, state_option] = State.unresolved,
        severity: Annotated[list[Level] | None, severity_option] = None,
        error_type: Annotated[str | None, type_option] = None,
        thread_id: Annotated[str | None, thread_option] = None,
        component: Annotated[str | None, component_option] = None,
        fingerprint: Annotated[str | None, group_option] = None,
        since: Annotated[datetime | None, since_option] = None,
        until: Annotated[datetime | None, until_option] = None,
        text: Annotated[str | None, text_option] = None,
        limit: Annotated[int, limit_option] = 100,
        cursor: Annotated[str | None, common.cursor] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """List errors, the newest first; by default those that nobody has resolved."""
        filters = Filters(
            state=state.value,
            severities=_severities(severity),
            error_type=error_type,
            thread_id=thread_id,
            component=component,
            fingerprint=fingerprint,
            since=since,
            until=until,
            text=text,
        )
        with connect(postgres_uri, in_schema) as conn:
            page = run(conn, reading.find(filters, limit=limit, cursor=cursor))
        line = _error_line if state is State.unresolved else _line_with_resolution
        _print_page("errors", page, line, as_json=as_json)

    @group.command("groups")
    def list_groups(
        status: Annotated[list[Status] | None, status_option] = None,
        severity: Annotated[list[Level] | None, severity_option] = None,
        error_type: Annotated[str | None, type_option] = None,
        component: Annotated[str | None, component_option] = None,
        text: Annotated[str | None, text_option] = None,
        limit: Annotated[int, limit_option] = 100,
        cursor: Annotated[str | None, common.cursor] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """List groups of errors of one kind, those first that happened last."""
        asked = reading.groups(
            statuses=[one.value for one in status or ()],
            severities=_severities(severity),
            error_type=error_type,
            component=component,
            text=text,
            limit=limit,
            cursor=cursor,
        )
        with connect(postgres_uri, in_schema) as conn:
            page = run(conn, asked)
        _print_page("groups", page, _group_line, as_json=as_json)

    @group.command()
    def show(
        target: Annotated[str, target_argument],
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Show an error with its context and stack, or a group with its latest errors; and who did what with it."""
        number = _number(target)
        with connect(postgres_uri, in_schema) as conn:
            row = run(conn, reading.group(target) if number is None else reading.one(number))
            if row is None:
                raise _unknown(target)
            asked = reading.audit(fingerprint=target) if number is None else reading.audit(error_id=number)
            audit = run(conn, asked).rows
            latest = []
            if number is None:
                latest = run(conn, reading.find(Filters(state="all", fingerprint=target), limit=_SHOWN)).rows
        if as_json:
            cli_output.print_json(row | ({"latest_errors": latest} if number is None else {}) | {"audit": audit})
            return
        stack, context = row.pop("stack_trace", None), row.pop("error_context", None)
        cli_output.print_fields(row)
        for title, given in (("Context", context), ("Stack", stack)):
            if given:
                cli_output.print_line()
                cli_output.print_line(title)
                _print_indented(given)
        _print_section("Latest errors", [_line_with_resolution(error) for error in latest])
        _print_section("What was done", [_audit_line(line) for line in audit])

    @group.command()
    def resolve(
        targets: Annotated[list[str], targets_argument],
        notes: Annotated[str | None, notes_option] = None,
        by: Annotated[str | None, common.by] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Resolve errors, or groups with all their errors; exit with 1 if one does not exist."""
        actor = by or who()
        with connect(postgres_uri, in_schema) as conn:
            done = _act(
                conn,
                targets,
                lambda number: acting.resolve(number, actor=actor, notes=notes),
                lambda fingerprint: acting.resolve_group(fingerprint, actor=actor, notes=notes),
                quiet=as_json,
            )
        _print_done(done, "resolved", as_json=as_json)

    @group.command()
    def reopen(
        targets: Annotated[list[str], targets_argument],
        by: Annotated[str | None, common.by] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Take back that errors or groups are resolved; exit with 1 if one does not exist."""
        actor = by or who()
        with connect(postgres_uri, in_schema) as conn:
            done = _act(
                conn,
                targets,
                lambda number: acting.reopen(number, actor=actor),
                lambda fingerprint: acting.reopen_group(fingerprint, actor=actor),
                quiet=as_json,
            )
        _print_done(done, "reopened", as_json=as_json)

    @group.command()
    def mute(
        targets: Annotated[list[str], targets_argument],
        until: Annotated[datetime | None, until_muted_option] = None,
        by: Annotated[str | None, common.by] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Mute groups, given by fingerprint or by one of their errors: alerts pass over them; all is stored as ever."""
        actor = by or who()
        with connect(postgres_uri, in_schema) as conn:
            mute_group = _of_group(lambda fingerprint: acting.mute(fingerprint, actor=actor, until=until))
            done = _act(conn, targets, mute_group, mute_group, quiet=as_json)
        _print_done(done, "muted", as_json=as_json)

    @group.command()
    def unmute(
        targets: Annotated[list[str], targets_argument],
        by: Annotated[str | None, common.by] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """End the mute of groups, given by fingerprint or by one of their errors."""
        actor = by or who()
        with connect(postgres_uri, in_schema) as conn:
            unmute_group = _of_group(lambda fingerprint: acting.unmute(fingerprint, actor=actor))
            done = _act(conn, targets, unmute_group, unmute_group, quiet=as_json)
        _print_done(done, "unmuted", as_json=as_json)

    @group.command()
    def delete(
        ids: Annotated[list[int] | None, ids_argument] = None,
        resolved_before: Annotated[datetime | None, before_option] = None,
        yes: Annotated[bool, yes_option] = False,
        by: Annotated[str | None, common.by] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Delete errors by number, or all that were resolved before a time; counts over time stay."""
        if bool(ids) is (resolved_before is not None):
            raise typer.BadParameter("give either numbers of errors or --resolved-before", param_hint="IDS")
        actor = by or who()
        with connect(postgres_uri, in_schema) as conn:
            if resolved_before is None:
                _delete_some(conn, ids or [], actor, yes=yes, as_json=as_json)
            else:
                _delete_old(conn, resolved_before, actor, yes=yes, as_json=as_json)

    @group.command()
    def stats(
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Show how many errors are unresolved and new, by severity and type."""
        with connect(postgres_uri, in_schema) as conn:
            found = asdict(run(conn, reading.stats()))
        if as_json:
            cli_output.print_json(found)
            return
        tables = {name: found.pop(name) for name in ("by_severity", "by_type")}
        found["groups"] = ", ".join(f"{count} {status}" for status, count in found["groups"].items())
        cli_output.print_fields(found)
        _print_section("By severity", tables["by_severity"])
        _print_section("By type", tables["by_type"])

    @group.command()
    def trends(
        bucket: Annotated[Bucket, bucket_option] = Bucket.hour,
        series: Annotated[By, by_option] = By.total,
        since: Annotated[datetime | None, start_option] = None,
        until: Annotated[datetime | None, end_option] = None,
        error_type: Annotated[str | None, type_option] = None,
        severity: Annotated[Level | None, typer.Option("--severity", help="Only this severity.")] = None,
        fingerprint: Annotated[str | None, group_option] = None,
        as_json: Annotated[bool, common.json] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Show how many errors happened in each hour or day (UTC), from counts that outlive the errors."""
        end = until or datetime.now(UTC)
        start = since or end - 24 * timedelta(hours=1 if bucket is Bucket.hour else 24)
        asked = a_page(
            lambda: reading.trends(
                since=start,
                until=end,
                bucket=bucket.value,
                by=series.value,
                error_type=error_type,
                severity=None if severity is None else severity.value,
                fingerprint=fingerprint,
            )
        )
        with connect(postgres_uri, in_schema) as conn:
            found = run(conn, asked)
        if as_json:
            cli_output.print_json(asdict(found))
            return
        cli_output.print_line(f"By {bucket.value}, from {found.starts[0]:%Y-%m-%d %H:%M} UTC")
        highest = max((max(one.counts) for one in found.series), default=0)
        cli_output.print_table(
            [
                {"series": one.key or "total", "occurrences": one.total, "trend": _spark(one.counts, highest)}
                for one in found.series
            ]
        )

    @group.command()
    def tail(
        lines: Annotated[int, lines_option] = 10,
        severity: Annotated[list[Level] | None, severity_option] = None,
        error_type: Annotated[str | None, type_option] = None,
        thread_id: Annotated[str | None, thread_option] = None,
        component: Annotated[str | None, component_option] = None,
        text: Annotated[str | None, text_option] = None,
        as_json: Annotated[bool, lines_json_option] = False,
        postgres_uri: Annotated[str | None, common.postgres] = None,
        redis_url: Annotated[str | None, common.redis] = None,
        in_schema: Annotated[str | None, common.schema] = None,
    ) -> None:
        """Follow errors as they arrive, resolved or not, until Ctrl-C."""
        filters = Filters(
            state="all",
            severities=_severities(severity),
            error_type=error_type,
            thread_id=thread_id,
            component=component,
            text=text,
        )
        follow(
            errors_source(filters),
            lines,
            postgres_uri=postgres_uri,
            schema=in_schema,
            clean=lambda row: row,
            show=cli_output.print_json_line if as_json else _print_arrived,
        )


def _span(ago: re.Match[str]) -> timedelta:
    return timedelta(**{_UNITS[ago[2]]: int(ago[1])})


def _moment(text: str) -> datetime:
    """Read a time, which is UTC if it does not say otherwise, or an age."""
    if ago := _AGO.fullmatch(text):
        return datetime.now(UTC) - _span(ago)
    found = datetime.fromisoformat(text)
    return found.astimezone(UTC) if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _severities(levels: Sequence[Level] | None) -> tuple[Severity, ...]:
    chosen = {level.value for level in levels or ()}
    return tuple(name for name in SEVERITIES if name in chosen)


def _number(target: str) -> int | None:
    """Return the number of an error, or None if the target is a fingerprint."""
    return int(target) if target.isascii() and target.isdecimal() and len(target) < len(str(_LARGEST_NUMBER)) else None


def _unknown(target: str) -> ConfigurationError:
    what = "group with the fingerprint" if _number(target) is None else "error with the number"
    return ConfigurationError(f"There is no {what} {target}: see `checkpointer errors list` and `errors groups`.")


# -- acts ------------------------------------------------------------------------------------------------------------


def _of_group(act: Callable[[str], Act[Changed | None]]) -> Callable[[int | str], Act[Changed | None]]:
    """Return the act on the group that an error belongs to, or that has a fingerprint."""

    def on(target: int | str) -> Act[Changed | None]:
        if isinstance(target, str):
            return (yield from act(target))
        row = yield reading.one(target)
        if row is None or row["fingerprint"] is None:
            return None
        return (yield from act(row["fingerprint"]))

    return on


def _act(
    conn: psycopg.Connection[Any],
    targets: Sequence[str],
    on_error: Callable[[int], Act[Changed | None]],
    on_group: Callable[[str], Act[Changed | None]],
    *,
    quiet: bool,
) -> list[tuple[str, Changed | None]]:
    """Do something with each target, each in a transaction of its own."""
    done: list[tuple[str, Changed | None]] = []
    with cli_output.progress("Changing errors", len(targets), quiet=quiet) as advance:
        for target in targets:
            number = _number(target)
            while True:
                changed = run(conn, on_group(target) if number is None else on_error(number))
                # One act changes at most so many errors of a group.
                if changed is None or not changed.more:
                    break
            done.append((target, changed))
            advance(len(done))
    return done


def _print_done(done: Sequence[tuple[str, Changed | None]], word: str, *, as_json: bool) -> None:
    import typer

    if as_json:
        cli_output.print_json(
            [
                {
                    "target": target,
                    "found": changed is not None,
                    "changed": changed is not None and changed.changed,
                    "row": None if changed is None else changed.row,
                }
                for target, changed in done
            ]
        )
    else:
        for target, changed in done:
            if changed is None:
                cli_output.note(str(_unknown(target)))
            else:
                cli_output.print_line(f"{target}: {word if changed.changed else 'nothing to change'}")
    if any(changed is None for _, changed in done):
        raise typer.Exit(1)


def _delete_some(conn: psycopg.Connection[Any], ids: Sequence[int], actor: str, *, yes: bool, as_json: bool) -> None:
    import typer

    missing = []
    for number in ids:
        found = run(conn, acting.delete(number, actor=actor)) if yes else run(conn, reading.one(number))
        if found is None:
            missing.append(number)
    _print_deleted(len(ids) - len(missing), yes=yes, more=False, as_json=as_json)
    for number in missing:
        cli_output.note(str(_unknown(str(number))))
    if missing:
        raise typer.Exit(1)


def _delete_old(
    conn: psycopg.Connection[Any], resolved_before: datetime, actor: str, *, yes: bool, as_json: bool
) -> None:
    if not yes:
        would = run(conn, acting.bulk_delete(resolved_before, actor=actor, dry_run=True))
        _print_deleted(would.count, yes=False, more=would.more, as_json=as_json)
        return
    count = 0
    with cli_output.progress("Deleting errors", None, quiet=as_json) as advance:
        while True:
            done = run(conn, acting.bulk_delete(resolved_before, actor=actor))
            count += done.count
            advance(count)
            # Without the second condition it would wait for ever for what somebody else keeps locked.
            if not done.more or not done.count:
                break
    _print_deleted(count, yes=True, more=done.more, as_json=as_json)


def _print_deleted(count: int, *, yes: bool, more: bool, as_json: bool) -> None:
    if as_json:
        cli_output.print_json({"count": count, "more": more, "deleted": yes})
    elif yes:
        cli_output.print_line(f"{count} errors were deleted.")
    else:
        cli_output.print_line(f"{'More than ' if more else ''}{count} errors would be deleted: do it with --yes.")


# -- printing --------------------------------------------------------------------------------------------------------


def _print_page(name: str, page: Page, line: Callable[[dict[str, Any]], dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        cli_output.print_json({"count": len(page.rows), name: page.rows, "next_cursor": page.next_cursor})
        return
    cli_output.print_table([line(row) for row in page.rows])
    if page.next_cursor is not None:
        cli_output.note(f"There are more: --cursor {shlex.quote(page.next_cursor)}")


def _print_section(title: str, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        cli_output.print_line()
        cli_output.print_line(title)
        cli_output.print_table(rows)


def _print_indented(given: Any) -> None:
    # Behind a bar, so that no line of it can pass for one of this command's.
    if isinstance(given, str):
        for line in given.rstrip("\n").split("\n"):
            cli_output.print_line(f"  | {line}")
    else:
        for name, value in given.items() if isinstance(given, dict) else enumerate(given):
            if value is not None:
                cli_output.print_line(f"  | {name}: {cli_output.plain(value)}")


def _error_line(row: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "created_at", "severity", "error_type", "thread_id")
    times = f" (x{row['occurrences']})" if row["occurrences"] > 1 else ""
    return {name: row[name] for name in names} | {"error_message": f"{row['error_message']}{times}"}


def _line_with_resolution(row: dict[str, Any]) -> dict[str, Any]:
    return _error_line(row) | {name: row[name] for name in ("resolved_at", "resolved_by")}


def _group_line(row: dict[str, Any]) -> dict[str, Any]:
    names = ("fingerprint", "status", "severity", "error_type", "title", "occurrences", "regressions", "last_seen_at")
    return {name: row[name] for name in names}


def _audit_line(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("at", "action", "actor", "details")}


def _print_arrived(row: dict[str, Any]) -> None:
    thread = f"  thread {row['thread_id']}" if row["thread_id"] else ""
    times = f"  x{row['occurrences']}" if row["occurrences"] > 1 else ""
    at = cli_output.plain(row["created_at"])
    said = f"{row['severity']:<8}  #{row['id']} {row['error_type']}{thread}{times}: {row['error_message']}"
    cli_output.print_line(f"{at}  {said}")
    sys.stdout.flush()


def _spark(counts: Sequence[int], highest: int) -> str:
    steps = len(_BARS) - 1
    # What happened at all is to be seen.
    return "".join(_BARS[-(-count * steps // highest) if highest else 0] for count in counts)
