"""The job that sends alerts: one thread that looks, and sends what any process has decided.

Every process may run it; they share the work through Postgres (`ledger.py`). While Postgres is away the thread cannot
see what others report, so it says that (*away*), and tells of the criticals that its own process emits straight from
memory. Afterwards it writes down what it has told, before the same errors arrive in the table.

A *delivery* that failed is repeated with growing pauses until the message is too old. What fails is itself an event,
`alert.failed`; that is an `error` and never a critical, so no alert is ever about an alert.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import psycopg

from checkpointer.errors import ConfigurationError
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import HookContext, renew_in_child
from observability.alerts import ledger, messages
from observability.alerts.channels import AlertDeliveryError
from observability.alerts.ledger import Claimed, Settlement
from observability.alerts.rules import GROWTH, Firing
from observability.links import AwayError, PostgresLink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from observability.alerts.channels import Channel
    from observability.alerts.messages import Message

logger = logging.getLogger("checkpointer.observability")

_GIVE_UP = timedelta(hours=6)
_FIRST_PAUSE = 2.0
_LONGEST_PAUSE = 300.0
# The digest reads a week of errors.
_DIGEST_SECONDS = 20.0
# How long events are gathered before they are told of, so that a burst is one message.
_GATHER = 0.5
_AWAY_INTERVAL = 1.0
# After an outage other processes write down what they have told, before anyone looks at what arrives.
_SETTLE = 5.0
# Types of errors are named by applications: what is kept of them in memory is bounded.
_TYPES = 100
_BATCH = 50


@dataclass(slots=True)
class _Seen:
    """What this process has seen of one type of critical error during an outage."""

    count: int
    threads: set[str]
    first: datetime
    last: datetime
    message: str
    is_told: bool = False


@dataclass(slots=True)
class _Direct:
    """A message that is sent from memory."""

    message: Message
    made: float
    types: Sequence[str] = ()
    attempts: int = 0
    not_before: float = 0.0
    delivered: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Outage:
    """From when on nothing could be read, and whether that is because Postgres is away."""

    since: float
    since_time: datetime
    is_postgres: bool
    reason: str = "it does not answer"
    told: float | None = None


class Alerts:
    """Sends alerts until it is closed. As a hook it also takes events: `saver.hooks.add(Alerts(...))`.

    The critical rule looks every `interval` seconds, in one process of all that run this. A message goes to every
    channel, at least once. A forked child starts a thread of its own with the first event that it gets.

    Args:
        postgres: Connection string of the database with `system_errors`, or a function that opens an autocommit
            connection.
        channels: Where messages go; the same in all processes.
        digest_hour: From which hour (UTC) on the digest of a day is sent; None for no digest.
        cooldown: Seconds for which the same type of error is not told again, unless it grows tenfold.
        interval: Seconds between two looks.
        lease: Seconds after which a message is taken over from a process that began to send it and is not heard of;
            more than all channels together may take.
        away_after: After so many seconds without Postgres it is said that alerts are blind.
        source: The `source` of the messages, a URI reference.
        emit: Takes the events `alert.failed`: `saver.hooks.emit`.
        clock: Gives the time to the rules; without it they use that of Postgres, which is one for all processes.

    Raises:
        ConfigurationError: There is no channel, two have the same name, or a number is out of range.
    """

    def __init__(
        self,
        postgres: str | Callable[[], psycopg.Connection[Any]],
        channels: Sequence[Channel],
        *,
        digest_hour: int | None = 7,
        cooldown: float = 3_600.0,
        interval: float = 10.0,
        lease: float = 120.0,
        away_after: float = 60.0,
        source: str = "/checkpointer",
        emit: Callable[[CheckpointEvent], None] | None = None,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        names = [channel.name for channel in channels]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError("alerts need at least one channel, and each a name of its own")
        if digest_hour is not None and not 0 <= digest_hour <= 23:
            raise ConfigurationError(f"digest_hour={digest_hour} has to be an hour of the day (UTC), 0 to 23")
        if min(cooldown, interval, lease) <= 0 or away_after < 0:
            raise ConfigurationError(
                "cooldown, interval and lease have to be more than 0 seconds, away_after at least 0"
            )
        self._channels = tuple(channels)
        self._digest_hour = digest_hour
        self._cooldown = cooldown
        self._interval = interval
        self._lease = timedelta(seconds=lease)
        self._away_after = away_after
        self._source = source
        self._emit = emit
        self._clock = clock
        self._postgres = PostgresLink(_context(postgres))
        self._closed = False
        self._renew()
        renew_in_child(self._renew)
        self._start()

    def __call__(self, event: CheckpointEvent) -> None:
        """Note an event: a critical one is told of at once if Postgres is away. Does not wait."""
        is_outage = event.name == "backend.down" and event.context.get("backend") == "postgres"
        if event.severity != "critical" and not is_outage:
            return
        with self._lock:
            if event.severity == "critical":
                self._last_critical = time.monotonic()
                _note(self._noted, event)
            self._start()
        self._wake.set()

    def close(self, timeout: float = 4.0) -> None:
        """Look a last time if a critical event has just been seen, and end the thread; again, it does nothing.

        Args:
            timeout: Seconds to wait. What is not sent then is sent by another process, or by the next one.
        """
        with self._lock:
            self._closed = True
            thread = self._thread
        self._stop.set()
        self._wake.set()
        if thread is None:
            self._postgres.close()
        elif thread is not threading.current_thread():
            thread.join(timeout)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        if self._closed:
            self._stop.set()
        self._thread: threading.Thread | None = None
        self._noted: dict[str, _Seen] = {}
        self._outage: _Outage | None = None
        self._seen: dict[str, _Seen] = {}
        # When a type was last told of from memory, and its count: also of earlier outages, for a Postgres that flaps.
        self._asked: dict[str, tuple[float, int]] = {}
        self._direct: list[_Direct] = []
        self._unsettled: list[Settlement] = []
        self._is_prepared = False
        self._looks_from = 0.0
        self._last_critical = float("-inf")

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._closed:
                return
            thread = threading.Thread(target=self._run, name="checkpointer-alerts", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # No thread to be had (a limit, or the interpreter is ending): the next event tries again.
                return
            self._thread = thread

    def _run(self) -> None:
        try:
            # Tables that setup() is about to make are not missing yet.
            self._stop.wait(_GATHER)
            while not self._stop.is_set():
                pause = self._turn(is_last=False)
                if self._wake.wait(pause):
                    self._wake.clear()
                    self._stop.wait(_GATHER)
            if self._direct or self._unsettled or time.monotonic() - self._last_critical < self._interval + _GATHER:
                self._turn(is_last=True)
        finally:
            self._postgres.close()

    def _turn(self, *, is_last: bool) -> float:
        """Look and send; return how long to wait."""
        try:
            self._look(is_last=is_last)
            self._send_stored(is_last=is_last)
            self._send_direct()
        except AwayError:
            # Met while sending; the next look says it.
            return min(_AWAY_INTERVAL, self._interval)
        # The thread has to outlive whatever it meets.
        except Exception:
            logger.exception("sending alerts failed; it is tried again")
        if self._outage is not None or self._direct:
            return min(_AWAY_INTERVAL, self._interval)
        return self._interval

    # Looking.

    def _look(self, *, is_last: bool) -> None:
        with self._lock:
            noted, self._noted = self._noted, {}
        try:
            self._postgres.run(lambda connection: self._ask(connection, is_last=is_last))
            self._postgres.run(self._ask_digest, seconds=_DIGEST_SECONDS)
        except AwayError as exc:
            self._is_blind(noted, exc.__cause__, is_postgres=True)
        # What was remembered cannot be read, for example: as blind as without Postgres, and to be told as well.
        except Exception as exc:
            if self._outage is None:
                logger.exception("looking for alerts failed; it is tried again")
            self._is_blind(noted, exc, is_postgres=False)
        else:
            self._can_see()

    def _ask(self, connection: psycopg.Connection[Any], *, is_last: bool) -> None:
        clock = self._clock() if self._clock else None
        if not self._is_prepared:
            ledger.prepare(connection)
            self._is_prepared = True
        while self._unsettled:
            ledger.settle(connection, self._unsettled[0])
            del self._unsettled[0]
        told = {name: seen.count for name, seen in self._seen.items() if seen.is_told}
        if told:
            ledger.absorb(connection, told, clock=clock)
        was_away = self._outage is not None and self._outage.is_postgres
        if was_away or time.monotonic() < self._looks_from:
            # Whether it answers is to be known all the same: what is noted is forgotten if it does.
            connection.execute("SELECT")
            return
        ledger.look_for_criticals(
            connection,
            clock=clock,
            interval=timedelta(seconds=0 if is_last else self._interval),
            cooldown=timedelta(seconds=self._cooldown),
            source=self._source,
        )

    def _ask_digest(self, connection: psycopg.Connection[Any]) -> None:
        if self._digest_hour is not None:
            clock = self._clock() if self._clock else None
            ledger.write_digest(connection, clock=clock, hour=self._digest_hour, source=self._source)

    def _is_blind(self, noted: dict[str, _Seen], cause: BaseException | None, *, is_postgres: bool) -> None:
        now = time.monotonic()
        if self._outage is None:
            self._outage = _Outage(now, self._time(), is_postgres)
        if cause is not None:
            self._outage.reason = _reason(cause)
        for name, seen in noted.items():
            _merge(self._seen, name, seen)
        due = {name: why for name in noted if (why := self._why(name, now))}
        if due:
            self._tell_seen(due, now)
        is_long = now - self._outage.since >= self._away_after
        if is_long and (self._outage.told is None or now - self._outage.told >= self._cooldown):
            self._outage.told = now
            message = messages.away(
                self._outage.reason, since=self._outage.since_time, source=self._source, now=self._time()
            )
            self._direct.append(_Direct(message, now))

    def _why(self, name: str, now: float) -> Any:
        """Return why a type that has just been seen is to be told of, or None if it is held back."""
        if name not in self._seen:
            return None
        asked, count = self._asked.get(name, (float("-inf"), 0))
        if now - asked >= self._cooldown:
            return "still" if name in self._asked else "new"
        return "grown" if self._seen[name].count >= count * GROWTH else None

    def _tell_seen(self, due: dict[str, Any], now: float) -> None:
        firing = []
        for name, why in due.items():
            seen = self._seen[name]
            self._asked.pop(name, None)
            self._asked[name] = (now, seen.count)
            firing.append(Firing(name, seen.count, len(seen.threads), seen.first, seen.last, seen.message, why))
        while len(self._asked) > _TYPES:
            del self._asked[next(iter(self._asked))]
        firing.sort(key=lambda one: (-one.occurrences, one.error_type))
        message = messages.critical(firing, source=self._source, now=self._time(), read_from="memory")
        self._direct.append(_Direct(message, now, types=tuple(due)))

    def _can_see(self) -> None:
        if self._outage is None:
            return
        outage, self._outage = self._outage, None
        self._seen = {}
        if outage.is_postgres:
            self._looks_from = time.monotonic() + _SETTLE
        # What could not be told from memory is told from the table, in which it arrives now; or in the next outage.
        for one in self._direct:
            if not one.delivered:
                for name in one.types:
                    self._asked.pop(name, None)
        self._direct = [one for one in self._direct if not one.types]
        if outage.told is not None:
            message = messages.back(since=outage.since_time, source=self._source, now=self._time())
            self._direct.append(_Direct(message, time.monotonic()))

    # Sending.

    def _send_stored(self, *, is_last: bool) -> None:
        for _ in range(_BATCH):
            if self._outage is not None or (self._stop.is_set() and not is_last):
                return
            claimed = self._postgres.run(lambda connection: ledger.claim(connection, self._lease))
            if claimed is None:
                return
            outcome = self._attempt(claimed)
            self._unsettled.append(outcome)
            self._postgres.run(lambda connection, outcome=outcome: ledger.settle(connection, outcome))  # type: ignore[misc]
            self._unsettled.remove(outcome)

    def _send_direct(self) -> None:
        now = time.monotonic()
        for one in [one for one in self._direct if one.not_before <= now]:
            one.attempts += 1
            age = timedelta(seconds=now - one.made)
            outcome = self._attempt(
                Claimed(one.message, one.attempts, age, frozenset(one.delivered), frozenset(one.refused))
            )
            one.delivered |= set(outcome.delivered)
            one.refused |= set(outcome.refused)
            one.not_before = time.monotonic() + outcome.pause.total_seconds()
            if one.delivered:
                for name in one.types:
                    if name in self._seen:
                        self._seen[name].is_told = True
            if outcome.done:
                self._direct.remove(one)

    def _attempt(self, claimed: Claimed) -> Settlement:
        """Send a message to the channels that do not have it yet."""
        delivered, refused, failures, waits = [], [], [], [0.0]
        for channel in self._channels:
            if channel.name in claimed.delivered or channel.name in claimed.refused:
                continue
            try:
                channel.send(claimed.message)
            except AlertDeliveryError as exc:
                failure = exc
            # A channel of somebody else: its messages may quote anything.
            except Exception as exc:  # noqa: BLE001
                failure = AlertDeliveryError(type(exc).__name__)
            else:
                delivered.append(channel.name)
                continue
            failures.append(f"{channel.name}: {failure.reason}")
            waits.append(failure.retry_after or 0.0)
            gives_up = not failure.retryable or claimed.age >= _GIVE_UP
            if gives_up:
                refused.append(channel.name)
            if gives_up or claimed.attempts == 1:
                self._report(claimed, channel.name, failure.reason, gives_up=gives_up)
        settled = claimed.delivered | claimed.refused | set(delivered) | set(refused)
        return Settlement(
            id=claimed.message.id,
            rule=claimed.message.rule,
            attempts=claimed.attempts,
            delivered=delivered,
            refused=refused,
            failure="; ".join(failures) or None,
            pause=timedelta(seconds=max(_backoff(claimed.attempts), *waits)),
            done=settled >= {channel.name for channel in self._channels},
        )

    def _report(self, claimed: Claimed, channel: str, reason: str, *, gives_up: bool) -> None:
        rest = "it is given up" if gives_up else "it is tried again"
        logger.warning("an alert could not be sent by %s (%s); %s", channel, reason, rest)
        if self._emit is not None:
            self._emit(
                CheckpointEvent(
                    name="alert.failed",
                    error_type="alert_failed",
                    severity="error",
                    message=f"An alert could not be sent by {channel} ({reason}); {rest}.",
                    component="alerts",
                    operation="send",
                    attempt=claimed.attempts,
                    context={
                        "alert_id": str(claimed.message.id),
                        "rule": claimed.message.rule,
                        "channel": channel,
                        "given_up": gives_up,
                    },
                )
            )

    def _time(self) -> datetime:
        return self._clock() if self._clock else datetime.now(UTC)


def _context(postgres: str | Callable[[], psycopg.Connection[Any]]) -> HookContext:
    def connect() -> psycopg.Connection[Any]:
        if callable(postgres):
            return postgres()
        # Unprepared: a pooler may stand between, and nothing here is hot.
        return psycopg.connect(postgres, autocommit=True, connect_timeout=3, prepare_threshold=None)

    def no_redis() -> NoReturn:
        raise ConnectionError("alerts work without Redis")

    return HookContext(connect, no_redis, "checkpointer", "alerts")


def _note(kept: dict[str, _Seen], event: CheckpointEvent) -> None:
    one = _Seen(1, {event.thread_id} if event.thread_id else set(), event.occurred_at, event.occurred_at, event.message)
    _merge(kept, event.error_type or event.name, one)


def _merge(kept: dict[str, _Seen], name: str, one: _Seen) -> None:
    known = kept.get(name)
    if known is None:
        if len(kept) < _TYPES:
            kept[name] = one
        return
    known.count += one.count
    known.threads |= one.threads
    known.last = max(known.last, one.last)
    known.message = one.message


def _reason(cause: BaseException) -> str:
    """Return what is wrong with Postgres; of its messages none, since those can quote credentials."""
    if isinstance(cause, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn):
        return "tables are missing: run `checkpointer migrate`"
    state = getattr(cause, "sqlstate", None)
    return type(cause).__name__ + (f", SQLSTATE {state}" if state else "")


def _backoff(attempts: int) -> float:
    pause: float = min(_FIRST_PAUSE * 2 ** min(attempts - 1, 16), _LONGEST_PAUSE)
    # Jitter, so that the processes of an installation do not come back all at once.
    return pause * random.uniform(0.5, 1.0)
