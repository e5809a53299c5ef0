"""Keeps a burst from becoming a table full of the same row: what is over becomes one row with a count.

The first rows of a *burst* (errors of one fingerprint, severity, outcome and thread with no silence in between) are
stored as they come. Further ones are *folded*: held for a second at most, and then stored as one row whose
`occurrences` says how many there were, from `created_at` to `last_seen_at`. It has the facts of the latest, and none of
the ids in which they differ. One thread's burst does not hide that another thread has the same error, until the *quota*
is used up: from then on rows are held for longer, threads are folded too, and `error_context.folded_threads` says how
many. If there are very many kinds as well, what is over becomes a kind of its own for each error type. The first
critical of each thread has its row even then.

Counts are exact: no error is dropped, and one that is folded is counted in the hour in which it happened. What is held
is lost if the process is killed in those seconds; what was stored as it came, never. Not here: threads, locks and I/O
(`observability/errors/__init__.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from observability.errors.fingerprint import fingerprint

__all__ = ["Folding", "Quota", "QUOTAS"]

Row = dict[str, Any]

_BURST_ROWS = 10
_BURST_SILENCE = 10.0
_HOLD_SECONDS = 1.0
# Once the quota is used up: of so many kinds a row each in so long a time, and one for all others of an error type.
_OVER_HOLD_SECONDS = 10.0
_OVER_KINDS = 100
# More are not told apart any longer: the oldest is forgotten, and gets a row of its own when it comes again.
_KNOWN_BURSTS = 10_000
_KNOWN_THREADS = 10_000

_IDS = ("thread_id", "run_id", "checkpoint_ns", "checkpoint_id", "trace_id", "recovery_key")
_UNLIKE = ("stack_trace", "error_code", "component", "operation", "outcome", *_IDS)


@dataclass(frozen=True, slots=True)
class Quota:
    """How many rows a process may store.

    Attributes:
        rows: At most so many.
        seconds: In so long a time.
    """

    rows: int
    seconds: float


QUOTAS = (Quota(1_000, 300.0), Quota(5_000, 3_600.0))
"""Of each process."""


@dataclass(slots=True)
class _Window:
    quota: Quota
    begun: float = float("-inf")
    used: int = 0

    def has_room(self, now: float) -> bool:
        if now - self.begun >= self.quota.seconds:
            self.begun, self.used = now, 0
        return self.used < self.quota.rows


@dataclass(slots=True)
class _Burst:
    seen: float
    rows: int = 0


@dataclass(slots=True)
class _Held:
    """A row that is being folded, and until when it is held."""

    row: Row
    until: float
    threads: set[str | None] = field(default_factory=set)


class Folding:
    """Decides for each error whether it becomes a row of its own; for one thread at a time.

    Times are seconds of any one clock that does not go back.

    Args:
        quotas: How many rows may be stored in which time.
    """

    def __init__(self, quotas: tuple[Quota, ...] = QUOTAS) -> None:
        self._windows = [_Window(quota) for quota in quotas]
        self._bursts: OrderedDict[tuple[Any, ...], _Burst] = OrderedDict()
        self._critical_threads: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._held: dict[tuple[Any, ...], _Held] = {}

    def offer(self, row: Row, now: float) -> Row | None:
        """Take an error; return the row to store now, or None if it is folded."""
        kind = (row["fingerprint"], row["severity"], row["outcome"])
        burst = self._burst((*kind, row["thread_id"]), now)
        has_room = self._has_room(now)
        is_first = row["severity"] == "critical" and self._is_first((row["fingerprint"], row["thread_id"]))
        if (burst.rows < _BURST_ROWS and has_room) or is_first:
            burst.rows += 1
            self._count_row()
            return row
        # By the hour in which it happened, so that the hourly counts are exact.
        hour = row["created_at"][:13]
        if has_room:
            self._fold((*kind, hour, row["thread_id"]), row, now + _HOLD_SECONDS)
        else:
            self._fold_over((*kind, hour), row, now + _OVER_HOLD_SECONDS)
        return None

    def due(self, now: float) -> list[Row]:
        """Return the folded rows that have been held long enough; from now on they are the caller's."""
        due = [key for key, held in self._held.items() if held.until <= now]
        for _ in due:
            self._count_row()
        return [_finished(self._held.pop(key)) for key in due]

    def rest(self) -> list[Row]:
        """Return all folded rows, however short ago they came."""
        return self.due(float("inf"))

    def next_due(self) -> float | None:
        """Return when the next folded row is due; None if none is held."""
        return min((held.until for held in self._held.values()), default=None)

    def _has_room(self, now: float) -> bool:
        # Each is asked, since that is when a new one begins.
        return False not in [window.has_room(now) for window in self._windows]

    def _count_row(self) -> None:
        for window in self._windows:
            window.used += 1

    def _burst(self, key: tuple[Any, ...], now: float) -> _Burst:
        burst = self._bursts.get(key)
        if burst is None or now - burst.seen > _BURST_SILENCE:
            burst = self._bursts[key] = _Burst(now)
        burst.seen = now
        self._bursts.move_to_end(key)
        if len(self._bursts) > _KNOWN_BURSTS:
            self._bursts.popitem(last=False)
        return burst

    def _is_first(self, key: tuple[Any, ...]) -> bool:
        is_first = key not in self._critical_threads
        self._critical_threads[key] = None
        self._critical_threads.move_to_end(key)
        if len(self._critical_threads) > _KNOWN_THREADS:
            self._critical_threads.popitem(last=False)
        return is_first

    def _fold(self, key: tuple[Any, ...], row: Row, until: float) -> None:
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held(row, until)
        else:
            held.row = _merged(held.row, row)
        held.threads.add(row["thread_id"])

    def _fold_over(self, key: tuple[Any, ...], row: Row, until: float) -> None:
        if key not in self._held and len(self._held) >= _OVER_KINDS:
            row = _of_no_kind(row)
            key = (row["fingerprint"], row["severity"], row["created_at"][:13])
        self._fold(key, row, until)


def _of_no_kind(row: Row) -> Row:
    """Return a row that can be folded with any other of its error type and severity."""
    message = "Errors of very many kinds at once; this row counts those that have none of their own."
    return {
        **row,
        **dict.fromkeys(_UNLIKE),
        "thread_id": row["thread_id"],
        "fingerprint": fingerprint(error_type=row["error_type"], message=message),
        "error_message": message,
        "error_context": {},
    }


def _merged(held: Row, row: Row) -> Row:
    """Return two rows as one, with the identity of the first and the facts of the later one."""
    later = max(held, row, key=_seen)
    ids = {name: row[name] if row[name] == held[name] else None for name in _IDS}
    return {
        **later,
        **ids,
        "event_id": held["event_id"],
        "created_at": min(held["created_at"], row["created_at"]),
        "last_seen_at": max(_seen(held), _seen(row)),
        "occurrences": held["occurrences"] + row["occurrences"],
    }


def _seen(row: Row) -> str:
    seen: str = row["last_seen_at"] or row["created_at"]
    return seen


def _finished(held: _Held) -> Row:
    if len(held.threads) == 1:
        return held.row
    context = held.row["error_context"]
    return {**held.row, "error_context": {**context, "folded_threads": len(held.threads)}}
