"""What an alert says: a CloudEvent whose `data` has a title and a text for people, and the same as fields.

A message is made once and then only repeated, so it is text from the start, with its id in it. Not here: when one is
due (`rules.py`). What comes from errors is hostile text: secrets are blanked, and each thing stays in its line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from checkpointer.events import uuid7
from observability.scrub import one_line, safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from observability.alerts.rules import Firing

_TYPE = "langgraph.checkpoint.alert"
# A message is read on a telephone, and some services cut it after a few thousand characters.
_SHOWN = 20
_NAME_LENGTH = 200
_QUOTE_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Message:
    """Something to tell.

    Attributes:
        id: The idempotency key: the same whenever and by whomever this message is sent.
        rule: Who says it: `critical`, `digest` or `away`.
        body: A CloudEvent in JSON, all ASCII; exactly what is sent and signed.
    """

    id: UUID
    rule: str
    body: str

    @property
    def severity(self) -> str:
        """`info` or `critical`."""
        return str(self._data["severity"])

    @property
    def title(self) -> str:
        """One line for people."""
        return str(self._data["title"])

    @property
    def text(self) -> str:
        """A few lines for people."""
        return str(self._data["text"])

    @property
    def _data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.body)["data"]
        return data


def critical(firing: Sequence[Firing], *, source: str, now: datetime, read_from: str) -> Message:
    """Say that critical errors have arrived.

    Args:
        firing: The types that are to be told of, the most frequent first.
        source: Who speaks, a URI reference.
        now: The time of the message.
        read_from: `table`, or `memory` if Postgres could not be read and this process tells of its own errors.
    """
    first = firing[0]
    if len(firing) == 1:
        title = f"Critical: {_name(first.error_type)}, {_times(first.occurrences)}"
    else:
        title = f"Critical: {len(firing)} types of error, {_times(sum(one.occurrences for one in firing))}"
    lines = [_line(one) for one in firing[:_SHOWN]]
    if len(firing) > _SHOWN:
        lines.append(f"and {len(firing) - _SHOWN} types more.")
    if read_from == "memory":
        lines.append("Postgres cannot be read at the moment: this is what one process has seen by itself.")
    alerts = [
        {
            "error_type": _name(one.error_type),
            "why": one.why,
            "occurrences": one.occurrences,
            "threads": one.threads,
            "first_seen": _time(one.first_seen),
            "last_seen": _time(one.last_seen),
            "last_message": _quote(one.last_message),
        }
        for one in firing[:_SHOWN]
    ]
    facts = {"read_from": read_from, "types": len(firing), "alerts": alerts}
    return _message("critical", "critical", "critical", source, now, title, lines, facts)


def cleared(since: Mapping[str, datetime], *, source: str, now: datetime) -> Message:
    """Say that no more critical errors of some types arrive.

    Args:
        since: The types, and when the first alert of each was.
        source: Who speaks.
        now: The time of the message.
    """
    names = sorted(since)
    title = f"Over: {_name(names[0])}" if len(names) == 1 else f"Over: {len(names)} types of critical error"
    lines = [f"- {_name(name)}: no new ones for a while; it began at {_time(since[name])}." for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"and {len(names) - _SHOWN} types more.")
    alerts = [{"error_type": _name(name), "since": _time(since[name])} for name in names[:_SHOWN]]
    return _message("cleared", "critical", "info", source, now, title, lines, {"types": len(names), "alerts": alerts})


def digest(rows: Iterable[Mapping[str, Any]], *, today: date, source: str, now: datetime) -> Message:
    """Say what happened on the last days, yesterday first of all.

    Args:
        rows: Those of the query `daily_digest`.
        today: The day (UTC) on which it is sent.
        source: Who speaks.
        now: The time of the message.
    """
    days: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        error = {key: row[key] for key in ("severity", "occurrences", "threads", "unresolved", "lost")}
        days.setdefault(str(row["day"]), []).append({"error_type": _name(row["error_type"]), **error})
    sums = {
        day: {key: sum(error[key] for error in errors) for key in ("occurrences", "unresolved", "lost")}
        for day, errors in days.items()
    }
    yesterday = str(today - timedelta(days=1))
    title = f"Errors of {yesterday}: {_sum(sums.get(yesterday))}"
    lines = [
        f"- {error['severity']} {error['error_type']}: {_sum(error)}" for error in days.get(yesterday, [])[:_SHOWN]
    ]
    if len(days.get(yesterday, [])) > _SHOWN:
        lines.append(f"and {len(days[yesterday]) - _SHOWN} types more.")
    # Also of the days before, which are told again: what an outage held back has come to them meanwhile.
    lines += [f"{day}: {_sum(total)}" for day, total in sums.items() if day != yesterday]
    facts = {
        "day": yesterday,
        "days": [
            {"day": day, **sums[day], "types": len(errors), "errors": errors[:_SHOWN]} for day, errors in days.items()
        ],
    }
    return _message("digest", "digest", "info", source, now, title, lines, facts)


def away(reason: str, *, since: datetime, source: str, now: datetime) -> Message:
    """Say that errors cannot be read, so that nobody takes silence for health."""
    title = "Alerts are blind: Postgres cannot be read"
    lines = [
        f"Since {_time(since)} a process cannot read system_errors ({_name(reason)}).",
        "Until that is over it tells only of its own critical errors, and of no others.",
    ]
    facts = {"since": _time(since), "reason": _name(reason)}
    return _message("away", "away", "critical", source, now, title, lines, facts)


def back(*, since: datetime, source: str, now: datetime) -> Message:
    """Say that errors can be read again."""
    seconds = round((now - since).total_seconds(), 1)
    lines = [f"Since {_time(since)} system_errors could not be read; what happened meanwhile arrives now."]
    facts = {"since": _time(since), "seconds": seconds}
    return _message("back", "away", "info", source, now, "Alerts can read Postgres again", lines, facts)


def _message(
    kind: str,
    rule: str,
    severity: str,
    source: str,
    now: datetime,
    title: str,
    lines: Sequence[str],
    facts: Mapping[str, Any],
) -> Message:
    identity = uuid7()
    body = {
        "specversion": "1.0",
        "id": str(identity),
        "source": source,
        "type": f"{_TYPE}.{kind}",
        "time": _time(now),
        "datacontenttype": "application/json",
        "data": {"severity": severity, "title": title, "text": "\n".join(lines), **facts},
    }
    return Message(identity, rule, json.dumps(body, allow_nan=False))


def _line(one: Firing) -> str:
    threads = f" in {one.threads} threads" if one.threads else ""
    why = {"new": "new", "grown": "ten times as many as told before", "still": "still going on"}[one.why]
    return (
        f"- {_name(one.error_type)}: {_times(one.occurrences)}{threads} ({why}), "
        f"from {_time(one.first_seen) or '?'} to {_time(one.last_seen) or '?'}: {_quote(one.last_message)}"
    )


def _sum(total: Mapping[str, Any] | None) -> str:
    if not total or not total["occurrences"]:
        return "none"
    lost = f", {total['lost']} lost" if total["lost"] else ""
    return f"{total['occurrences']} ({total['unresolved']} unresolved{lost})"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _name(text: str) -> str:
    return one_line(safe_text(text, _NAME_LENGTH))


def _quote(text: str) -> str:
    return one_line(safe_text(text, _QUOTE_LENGTH))


def _time(when: datetime | None) -> str | None:
    # A row that was written by hand can be without its time.
    return None if when is None else when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
