"""The metrics of a saver and of a worker: the name and the meaning of each. Nothing else names one.

Not here: what they say at the moment (`instruments.py` and `readings.py` count and read) and how it is shown
(`exposition.py`, `observability/`). `docs/metrics.md` has the same list for operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "checkpointer_"
"""What every name begins with where it is shown."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Attributes:
        name: Its name, without `PREFIX` before it and the `_total` behind that of a counter; ends with the unit if that
            is seconds, bytes or ratio.
        kind: What it is.
        text: What it says, in a sentence.
        labels: The labels of its samples, beside `prefix`. Never a thread, a run or anything else without bound.
        joined: How samples of several savers with one prefix become one.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    joined: Literal["sum", "max", "min"] = "sum"

    @property
    def unit(self) -> str:
        """Its unit as UCUM has it: `s`, `By` or `1`; empty for what is counted."""
        return _UNITS.get(self.name.rpartition("_")[2], "")

    @property
    def bare_name(self) -> str:
        """Its name without the unit, for formats that say the unit apart."""
        return self.name.rpartition("_")[0] if self.unit else self.name


_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1"}

EVENTS = Metric("events", "counter", "Events, by name and severity.", ("name", "severity"))
OPERATION_DURATION = Metric(
    "operation_duration_seconds",
    "histogram",
    "How long puts and reads took, failed ones too; its count is how many there were.",
    ("operation",),
)
OPERATION_FAILURES = Metric("operation_failures", "counter", "Puts and reads that raised an error.", ("operation",))
PUTS_AROUND = Metric("puts_around", "counter", "Puts that were stored in Postgres because Redis could not take them.")

FLUSHED_CHECKPOINTS = Metric("flushed_checkpoints", "counter", "Checkpoints that this process brought to Postgres.")
FLUSHED_BLOBS = Metric("flushed_blobs", "counter", "Channel versions that this process brought to Postgres.")
FLUSHED_WRITES = Metric("flushed_writes", "counter", "Pending writes that this process brought to Postgres.")
FLUSH_FAILURES = Metric("flush_failures", "counter", "Flushes of this process that ended in an error.")
DEAD_LETTERS = Metric("dead_letters", "counter", "Records that Postgres refused when this process flushed them.")
FLUSH_BATCH = Metric(
    "flush_batch_seconds", "histogram", "Batches that this process brought to Postgres, and how long they took."
)
FLUSH_LAG = Metric(
    "flush_lag_seconds",
    "histogram",
    "For how long the oldest record of each thread that this process flushed had waited, until it was in Postgres.",
)
LAST_FLUSH = Metric("last_flush_timestamp_seconds", "gauge", "When this process's last batch was done.", joined="max")

HOOK_DELIVERED = Metric("hook_delivered", "counter", "Events that a hook has handled.", ("hook",))
HOOK_FAILURES = Metric("hook_failures", "counter", "Events at which a hook failed.", ("hook",))
HOOK_DROPPED = Metric(
    "hook_dropped",
    "counter",
    "Events that a hook was not given: its queue was full, it was closed, or it rested after failures.",
    ("hook", "reason"),
)
HOOK_QUEUED = Metric("hook_queued", "gauge", "Events that wait for a hook.", ("hook",))

BACKLOG_RECORDS = Metric("backlog_records", "gauge", "Records in the buffer that are not in Postgres.", joined="max")
BACKLOG_BYTES = Metric("backlog_bytes", "gauge", "Size of those records.", joined="max")
BACKLOG_THREADS = Metric("backlog_threads", "gauge", "Threads with such records.", joined="max")
BACKLOG_AGE = Metric("backlog_oldest_age_seconds", "gauge", "Age of the oldest such record.", joined="max")
PRESSURE = Metric(
    "buffer_pressure_ratio", "gauge", "How full the buffer is, as a share of its high-water mark.", joined="max"
)
DEAD_LETTERS_OPEN = Metric(
    "dead_letters_open", "gauge", "Dead letters that are neither replayed nor dropped.", joined="max"
)
TIER_UP = Metric("tier_up", "gauge", "Whether the server answered at the last look.", ("tier",), joined="min")
SPOOLED_ROWS = Metric(
    "spooled_rows", "gauge", "Error reports and log lines that wait in this host's spool file.", joined="max"
)

METRICS: tuple[Metric, ...] = (
    EVENTS,
    OPERATION_DURATION,
    OPERATION_FAILURES,
    PUTS_AROUND,
    FLUSHED_CHECKPOINTS,
    FLUSHED_BLOBS,
    FLUSHED_WRITES,
    FLUSH_FAILURES,
    DEAD_LETTERS,
    FLUSH_BATCH,
    FLUSH_LAG,
    LAST_FLUSH,
    HOOK_DELIVERED,
    HOOK_FAILURES,
    HOOK_DROPPED,
    HOOK_QUEUED,
    BACKLOG_RECORDS,
    BACKLOG_BYTES,
    BACKLOG_THREADS,
    BACKLOG_AGE,
    PRESSURE,
    DEAD_LETTERS_OPEN,
    TIER_UP,
    SPOOLED_ROWS,
)
"""All of them, in the order in which they are shown."""
