"""When something is to be told: decisions from what was read and from what was told before. No I/O.

A type of error is *firing* while critical errors of it arrived in the last five minutes. It is told of when it begins,
again when it has become ten times as much or the *cooldown* has passed, and once more when it has been *quiet* for a
while.
Not here: the query that says what arrived (`observability/queries/critical_alert_5m.sql`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

GROWTH = 10
"""So many times as much as was told is told again within the cooldown."""

_QUIET = timedelta(minutes=10)

State = dict[str, Any]
"""What a rule remembers, as JSON."""


@dataclass(frozen=True, slots=True)
class Firing:
    """A type of critical error that is to be told of."""

    error_type: str
    occurrences: int
    threads: int
    first_seen: datetime | None
    last_seen: datetime | None
    last_message: str
    why: Literal["new", "grown", "still"] = "new"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from one look.

    Attributes:
        state: What the rule is to remember.
        firing: What is to be told.
        cleared: The types that are over, and when each was told of first.
    """

    state: State
    firing: list[Firing]
    cleared: dict[str, datetime]


def judge(state: State, rows: Iterable[Mapping[str, Any]], *, now: datetime, cooldown: timedelta) -> Verdict:
    """Decide what is to be told.

    Args:
        state: What was remembered last time; an empty dict at first.
        rows: Those of the query `critical_alert_5m`.
        now: The time.
        cooldown: For so long the same trouble is not told again, unless it grows.
    """
    types: dict[str, State] = {name: dict(known) for name, known in state.get("types", {}).items()}
    firing: list[Firing] = []
    for row in rows:
        name, count = row["error_type"], int(row["occurrences"])
        known = types.get(name)
        if known is None:
            why: Literal["new", "grown", "still"] = "new"
        elif now - _read(known["told"]) >= cooldown:
            why = "still"
        elif count >= known["occurrences"] * GROWTH:
            why = "grown"
        else:
            known["fired"] = _write(now)
            continue
        since = _write(now) if known is None else known["since"]
        types[name] = {"since": since, "fired": _write(now), "told": _write(now), "occurrences": count}
        firing.append(
            Firing(name, count, int(row["threads"]), row["first_seen"], row["last_seen"], row["last_message"], why)
        )
    over = {name: _read(known["since"]) for name, known in types.items() if now - _read(known["fired"]) >= _QUIET}
    for name in over:
        del types[name]
    return Verdict({"types": types}, firing, over)


def absorb(state: State, counts: Mapping[str, int], *, now: datetime) -> State:
    """Remember what a process has told by itself while Postgres was away, so that its late arrival is no news.

    Args:
        state: What was remembered.
        counts: How many errors of each type the process has seen.
        now: The time.
    """
    types: dict[str, State] = {name: dict(known) for name, known in state.get("types", {}).items()}
    for name, count in counts.items():
        known = types.get(name, {"since": _write(now), "occurrences": 0})
        types[name] = {
            "since": known["since"],
            "fired": _write(now),
            "told": _write(now),
            "occurrences": known["occurrences"] + count,
        }
    return {"types": types}


def digest_is_due(state: State, *, now: datetime, hour: int) -> bool:
    """Return whether today's digest is still to be sent; it may be late, but not on the next day."""
    return now.astimezone(UTC).hour >= hour and state.get("day") != str(day_of(now))


def day_of(now: datetime) -> date:
    """Return the day in UTC."""
    return now.astimezone(UTC).date()


def _write(when: datetime) -> str:
    return when.astimezone(UTC).isoformat()


def _read(text: str) -> datetime:
    return datetime.fromisoformat(text)
