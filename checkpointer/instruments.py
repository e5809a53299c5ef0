"""What a saver or a worker can be measured by: the readings of its metrics, and operations as they begin and end.

Not here: which metrics there are (`metrics.py`), the numbers that other parts keep anyway (`readings.py`), and the
formats in which they are shown (`exposition.py`, `observability/`). No operation is measured until somebody installs
something: until then a put only looks at a flag.

Words: a *reading* is what a metric says now, with a *sample* for each combination of its labels; a *recorder* is told
of each operation at its beginning and its end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from checkpointer.events import SEVERITIES
from checkpointer.metrics import EVENTS, OPERATION_DURATION, OPERATION_FAILURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from checkpointer.events import CheckpointEvent
    from checkpointer.metrics import Metric

T = TypeVar("T")

logger = logging.getLogger("checkpointer.instruments")

Operation = Literal["put", "put_writes", "get_tuple", "list", "flush", "flush_in_background"]
"""What a recorder is told of. The last one runs in a thread of its own, on nobody's behalf."""

# Of what the flusher does, its own numbers tell: whoever waits for a flush waits for others' batches too.
_OF_THE_FLUSHER = ("flush", "flush_in_background")

# Shown as 0 from the start: of a sample that appears with its first event, Prometheus sees no rise.
CRITICAL_EVENTS = (
    "flush.failed",
    "put.failed",
    "put.refused",
    "dead_letter.added",
    "checkpoint.lost",
    "buffer.abandoned",
)
"""The names of the critical events of the saver's own."""

# The application can emit events of its own, under any names; this bounds how many samples they make.
_EVENT_KINDS = 200
_OTHER = "other"


class Distribution(NamedTuple):
    """What a histogram says.

    Attributes:
        bounds: The upper bounds of its buckets, ascending; one more bucket holds what is above.
        counts: How many values each bucket holds, not cumulated.
        total: The sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Reading(NamedTuple):
    """What a metric says now: a number, or a distribution, for each combination of label values."""

    metric: Metric
    samples: Mapping[tuple[str, ...], float | Distribution]


class Histogram:
    """Counts values by size. Not thread-safe: it belongs to a thread or stands behind a lock.

    Args:
        bounds: The upper bounds of the buckets, ascending.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def join(self, other: Histogram | Distribution) -> None:
        """Add what another one with the same buckets has counted."""
        self.counts = list(map(sum, zip(self.counts, other.counts, strict=True)))
        self.total += other.total

    def read(self) -> Distribution:
        """Return what it says now."""
        return Distribution(self.bounds, tuple(self.counts), self.total)


OPERATION_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds; from a put on one machine to the longest time-out."""

BATCH_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds."""

LAG_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Seconds; from a run that ends at once to an outage of an hour."""


class Recorder:
    """Is told of operations as they happen; this one does nothing with it.

    Called in the thread that does the operation, so it has to be quick; what it raises is logged.
    """

    def begin(self, operation: Operation, thread_id: str | None) -> Any:
        """Note that an operation begins; what this returns is given to `end`."""

    def end(self, token: Any, operation: Operation, seconds: float, error: BaseException | None) -> None:
        """Note that an operation has ended, after so many seconds, and how."""

    def batch(self, seconds: float, lags: Sequence[float]) -> None:
        """Note that the flusher has committed a batch, in so many seconds, and for how long its threads had waited."""

    def event(self, event: CheckpointEvent) -> CheckpointEvent:
        """Note an event, where it happens, and return it, or one that says more: that is what the hooks are given."""
        return event


class Instruments:
    """The instruments of one saver and its clones, or of one worker.

    Args:
        prefix: The value of the label `prefix`: what the Redis keys begin with.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        # The only thing that a put looks at.
        self.is_on = False
        # Replaced, never changed, so that they can be walked without a lock. None: no recorder, only the times.
        self._installed: tuple[_Installed, ...] = ()
        self._sources: tuple[Callable[[], Iterable[Reading]], ...] = ()
        self._at_close: list[Callable[[], None]] = []
        self._closed = False
        self.renew()

    def renew(self) -> None:
        """Count from nothing, as a forked child has to: the parent tells what the parent did."""
        # Re-entrant, since a finaliser or a signal handler may emit an event while this thread is inside.
        self._lock = threading.RLock()
        self._durations: dict[str, Histogram] = {}
        self._failures: dict[str, int] = {}
        self._events: dict[tuple[str, ...], int] = {(name, "critical"): 0 for name in CRITICAL_EVENTS}

    # -- for those who show ---------------------------------------------------------------------------------------

    def install(self, recorder: Recorder | None = None) -> Callable[[], None]:
        """Time puts and reads from now on.

        Args:
            recorder: Is told of each of them too.

        Returns:
            A callable that takes it back; it may be called again.
        """
        mine = _Installed(recorder)
        with self._lock:
            self._installed = (*self._installed, mine)
            self.is_on = True

        def remove() -> None:
            with self._lock:
                self._installed = tuple(one for one in self._installed if one is not mine)
                self.is_on = bool(self._installed)

        return remove

    def at_close(self, function: Callable[[], None]) -> None:
        """Have a function called before the saver is closed; at once, if it is closed already."""
        with self._lock:
            if not self._closed:
                self._at_close.append(function)
                return
        function()

    def read(self) -> list[Reading]:
        """Return what every metric says now. Waits for no server: what they have to be asked, was asked before."""
        with self._lock:
            events: dict[tuple[str, ...], float | Distribution] = {**self._events}
            durations: dict[tuple[str, ...], float | Distribution] = {
                (name,): one.read() for name, one in self._durations.items()
            }
            failures: dict[tuple[str, ...], float | Distribution] = {
                (name,): self._failures.get(name, 0) for name in self._durations
            }
        found = [
            Reading(EVENTS, events),
            Reading(OPERATION_DURATION, durations),
            Reading(OPERATION_FAILURES, failures),
        ]
        for source in self._sources:
            found += _tell(lambda source=source: list(source())) or ()
        return found

    # -- for those who know numbers -------------------------------------------------------------------------------

    def add_source(self, source: Callable[[], Iterable[Reading]]) -> Callable[[], None]:
        """Have more readings made from now on, by a function that neither waits for a server nor is slow.

        Returns:
            A callable that takes it back; it may be called again.
        """
        with self._lock:
            self._sources = (*self._sources, source)

        def remove() -> None:
            with self._lock:
                self._sources = tuple(one for one in self._sources if one is not source)

        return remove

    # -- for the saver --------------------------------------------------------------------------------------------

    def notice(self, event: CheckpointEvent) -> CheckpointEvent:
        """Count an event, and return it as the recorders leave it; never waits and never raises."""
        kind: tuple[str, str] = event.name, event.severity
        with self._lock:
            if kind not in self._events and len(self._events) >= _EVENT_KINDS:
                kind = _OTHER, event.severity if event.severity in SEVERITIES else _OTHER
            self._events[kind] = self._events.get(kind, 0) + 1
        for recorder in self.recorders:
            event = _tell(recorder.event, event) or event
        return event

    def ended(self, operation: str, seconds: float, *, failed: bool) -> None:
        """Count an operation that has ended."""
        with self._lock:
            durations = self._durations.get(operation)
            if durations is None:
                durations = self._durations[operation] = Histogram(OPERATION_BOUNDS)
            durations.add(seconds)
            if failed:
                self._failures[operation] = self._failures.get(operation, 0) + 1

    def batch(self, seconds: float, lags: Sequence[float]) -> None:
        """Tell the recorders of a batch."""
        for recorder in self.recorders:
            _tell(recorder.batch, seconds, lags)

    @property
    def recorders(self) -> list[Recorder]:
        """Who is told of operations."""
        return [one.recorder for one in self._installed if one.recorder is not None]

    def close(self) -> None:
        """Call what was to be called at closing; only once."""
        with self._lock:
            self._closed = True
            functions, self._at_close = self._at_close, []
        for function in functions:
            _tell(function)


@dataclass(frozen=True, slots=True, eq=False)
class _Installed:
    recorder: Recorder | None


def joined(all_readings: Iterable[Iterable[Reading]]) -> list[Reading]:
    """Make one reading of those of several savers that share a prefix."""
    found: dict[Metric, dict[tuple[str, ...], list[float | Distribution]]] = {}
    for readings in all_readings:
        for metric, samples in readings:
            into = found.setdefault(metric, {})
            for labels, value in samples.items():
                into.setdefault(labels, []).append(value)
    return [
        Reading(metric, {labels: _join(metric, values) for labels, values in samples.items()})
        for metric, samples in found.items()
    ]


def _join(metric: Metric, values: Sequence[float | Distribution]) -> float | Distribution:
    numbers = [value for value in values if not isinstance(value, Distribution)]
    if numbers:
        return max(numbers) if metric.joined == "max" else min(numbers) if metric.joined == "min" else sum(numbers)
    whole: Histogram | None = None
    for value in values:
        assert isinstance(value, Distribution)
        whole = whole or Histogram(value.bounds)
        whole.join(value)
    assert whole is not None
    return whole.read()


class Measured:
    """Measures an operation, under `with`.

    Args:
        instruments: Counts it.
        operation: What it is.
        config: Says which thread it is about.
    """

    __slots__ = ("_begun", "_instruments", "_operation", "_thread_id", "_told")

    def __init__(self, instruments: Instruments, operation: Operation, config: Mapping[str, Any] | None = None) -> None:
        self._instruments = instruments
        self._operation = operation
        # As it was given: whether it is a proper one, the operation finds out.
        self._thread_id = ((config or {}).get("configurable") or {}).get("thread_id")
        self._told: list[tuple[Recorder, Any]] = []

    def __enter__(self) -> None:
        recorders = self._instruments.recorders
        self._told = [(recorder, _tell(recorder.begin, self._operation, self._thread_id)) for recorder in recorders]
        self._begun = time.perf_counter()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._begun
        if self._instruments.is_on and self._operation not in _OF_THE_FLUSHER:
            # A cancelled one has not failed.
            self._instruments.ended(self._operation, seconds, failed=isinstance(exc, Exception))
        for recorder, token in reversed(self._told):
            _tell(recorder.end, token, self._operation, seconds, exc)


def _tell(function: Callable[..., T], *args: Any) -> T | None:
    """Call what somebody has installed; a fault in it is no fault of what it measures."""
    try:
        return function(*args)
    except Exception:
        # A logging handler may be what fails.
        with contextlib.suppress(Exception):
            logger.exception("an instrument failed")
        return None
