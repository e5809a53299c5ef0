"""What Postgres keeps of alerts: which process looks, what was decided, and what is still to be sent.

A rule is looked after by whoever locks its row (`FOR UPDATE SKIP LOCKED`) when a look is due. What it decides is
written in the same transaction as what it remembers: so nothing is decided twice, and no decision is lost with its
process. A message is sent under a *lease*, outside any transaction; if the process dies, another takes the message over
when the lease has run out, with the same id. Not here: what is decided (`rules.py`) and the sending (`job.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from observability import queries
from observability.alerts import messages, rules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    import psycopg

    from observability.alerts.messages import Message

_ISOLATION = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
_RULES = "INSERT INTO system_alerts (rule) VALUES ('critical'), ('digest') ON CONFLICT DO NOTHING"
_NOW = "SELECT COALESCE(%s::timestamptz, now()) AS now"
# A look in the future is one by a clock that was wrong.
_TAKE = """
SELECT state FROM system_alerts
WHERE rule = %(rule)s AND (
    last_run IS NULL OR last_run <= %(now)s - %(interval)s OR last_run > %(now)s + interval '1 minute'
)
FOR UPDATE SKIP LOCKED
"""
_READ = "SELECT state FROM system_alerts WHERE rule = %(rule)s"
_LOCK = "SELECT state FROM system_alerts WHERE rule = %(rule)s FOR UPDATE"
_REMEMBER = "UPDATE system_alerts SET state = %(state)s, last_run = %(now)s WHERE rule = %(rule)s"
_KEEP = "UPDATE system_alerts SET state = %(state)s WHERE rule = %(rule)s"
_ADD = "INSERT INTO system_alert_messages (id, rule, body) VALUES (%s, %s, %s)"
_FORGET = "DELETE FROM system_alert_messages WHERE done_at < now() - interval '30 days'"
_CLAIM = """
UPDATE system_alert_messages
SET lease_until = now() + %(lease)s, attempts = attempts + 1
WHERE id = (
    SELECT id FROM system_alert_messages
    WHERE done_at IS NULL AND not_before <= now() AND (lease_until IS NULL OR lease_until <= now())
    ORDER BY created_at, id
    FOR UPDATE SKIP LOCKED
    LIMIT 1
)
RETURNING id, rule, body, attempts, delivered, refused, now() - created_at AS age
"""
# If another process has taken it over meanwhile, only what was delivered is news.
_SETTLE = """
UPDATE system_alert_messages
SET
    delivered = ARRAY(SELECT DISTINCT unnest(delivered || %(delivered)s::text[]) ORDER BY 1),
    refused = ARRAY(SELECT DISTINCT unnest(refused || %(refused)s::text[]) ORDER BY 1),
    failure = %(failure)s,
    not_before = now() + %(pause)s,
    lease_until = NULL,
    done_at = CASE WHEN %(done)s THEN now() END
WHERE id = %(id)s AND done_at IS NULL AND (attempts = %(attempts)s OR %(done)s)
"""
_SENT = "UPDATE system_alerts SET last_sent = now() WHERE rule = %s"


@dataclass(frozen=True, slots=True)
class Claimed:
    """A message that this process is to send.

    Attributes:
        message: The message.
        attempts: How many times it was claimed, this time included.
        age: How long ago it was made.
        delivered: The channels that have it.
        refused: The channels that will never take it.
    """

    message: Message
    attempts: int
    age: timedelta
    delivered: frozenset[str]
    refused: frozenset[str]


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of an attempt.

    Attributes:
        id: The message.
        attempts: As in `Claimed`: which attempt it was.
        delivered: The channels that took it now.
        refused: The channels that will never take it.
        failure: Why it is not everywhere, or None.
        pause: How long to wait before the next attempt.
        done: Whether there is to be none.
    """

    id: UUID
    rule: str
    attempts: int
    delivered: Sequence[str]
    refused: Sequence[str]
    failure: str | None
    pause: timedelta
    done: bool


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make the rows that are locked, where they are missing."""
    connection.execute(_RULES)


def absorb(connection: psycopg.Connection[Any], counts: Mapping[str, int], *, clock: datetime | None) -> None:
    """Remember what this process has told by itself; see `rules.absorb`."""
    with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(_ISOLATION)
        now = _now(cursor, clock)
        cursor.execute(_LOCK, {"rule": "critical"})
        for row in cursor.fetchall():
            state = rules.absorb(row["state"], counts, now=now)
            cursor.execute(_KEEP, {"rule": "critical", "state": Jsonb(state)})


def look_for_criticals(
    connection: psycopg.Connection[Any],
    *,
    clock: datetime | None,
    interval: timedelta,
    cooldown: timedelta,
    source: str,
) -> bool:
    """Decide what is to be told of critical errors, if a look is due and no other process is at it.

    Returns:
        Whether this process has looked.
    """
    with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(_ISOLATION)
        now = _now(cursor, clock)
        cursor.execute(_TAKE, {"rule": "critical", "now": now, "interval": interval})
        taken = cursor.fetchone()
        if taken is None:
            return False
        verdict = rules.judge(taken["state"], queries.run(connection, "critical_alert_5m"), now=now, cooldown=cooldown)
        if verdict.firing:
            _add(cursor, messages.critical(verdict.firing, source=source, now=now, read_from="table"))
        if verdict.cleared:
            _add(cursor, messages.cleared(verdict.cleared, source=source, now=now))
        cursor.execute(_REMEMBER, {"rule": "critical", "now": now, "state": Jsonb(verdict.state)})
        cursor.execute(_FORGET)
    return True


def write_digest(connection: psycopg.Connection[Any], *, clock: datetime | None, hour: int, source: str) -> None:
    """Write today's digest, if it is due and no other process is at it."""
    with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(_ISOLATION)
        now = _now(cursor, clock)
        # Locked only if it looks due, and then looked at again: another process may have written it meanwhile.
        for look in (_READ, f"{_LOCK} SKIP LOCKED"):
            row = cursor.execute(look, {"rule": "digest"}).fetchone()
            if row is None or not rules.digest_is_due(row["state"], now=now, hour=hour):
                return
        today = rules.day_of(now)
        rows = queries.run(connection, "daily_digest")
        _add(cursor, messages.digest(rows, today=today, source=source, now=now))
        cursor.execute(_REMEMBER, {"rule": "digest", "now": now, "state": Jsonb({"day": str(today)})})


def claim(connection: psycopg.Connection[Any], lease: timedelta) -> Claimed | None:
    """Take the oldest message that can be sent now; nobody else gets it while the lease lasts."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(_CLAIM, {"lease": lease}).fetchone()
    if row is None:
        return None
    return Claimed(
        message=messages.Message(row["id"], row["rule"], row["body"]),
        attempts=row["attempts"],
        age=row["age"],
        delivered=frozenset(row["delivered"]),
        refused=frozenset(row["refused"]),
    )


def settle(connection: psycopg.Connection[Any], outcome: Settlement) -> None:
    """Write down what became of an attempt."""
    with connection.transaction():
        connection.execute(
            _SETTLE,
            {
                "id": outcome.id,
                "attempts": outcome.attempts,
                "delivered": list(outcome.delivered),
                "refused": list(outcome.refused),
                "failure": outcome.failure,
                "pause": outcome.pause,
                "done": outcome.done,
            },
        )
        if outcome.delivered:
            connection.execute(_SENT, [outcome.rule])


def _now(cursor: psycopg.Cursor[Any], clock: datetime | None) -> datetime:
    cursor.execute(_NOW, [clock])
    (row,) = cursor.fetchall()
    found: datetime = row["now"]
    return found


def _add(cursor: psycopg.Cursor[Any], message: Message) -> None:
    cursor.execute(_ADD, [message.id, message.rule, message.body])
