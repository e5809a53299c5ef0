"""What a flush says about itself, and what all flushes of a session add up to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from checkpointer.instruments import BATCH_BOUNDS, LAG_BOUNDS, Histogram

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checkpointer.events import ErrorInfo
    from checkpointer.store.writes import Batch


@dataclass(slots=True)
class FlushReport:
    """The outcome of a flush; true only if everything asked for is in Postgres.

    Attributes:
        threads: How many threads had something to flush.
        checkpoints: Checkpoints that are now in Postgres.
        blobs: Channel versions that are now in Postgres.
        writes: Pending writes that are now in Postgres.
        waiting: Records asked for that are still in the buffer and will be retried.
        waiting_threads: The threads of those records, at most 100.
        error: Why the flush failed; None if it succeeded, or just could not finish.
    """

    threads: int = 0
    checkpoints: int = 0
    blobs: int = 0
    writes: int = 0
    waiting: int = 0
    waiting_threads: list[str] = field(default_factory=list)
    error: ErrorInfo | None = None

    def __bool__(self) -> bool:
        """Whether everything asked for is in Postgres."""
        return self.waiting == 0 and self.error is None and not self.waiting_threads


@dataclass(slots=True)
class FlushTotals:
    """What one session has flushed since it was made; changed by its thread, read by any.

    Attributes:
        checkpoints: Checkpoints written to Postgres.
        blobs: Channel versions written.
        writes: Pending writes written.
        batches: How long each committed transaction that brought something took, in seconds from waiting for the lock
            to the acknowledgement in Redis.
        lags: For how many seconds the oldest record of each thread had waited when all of it was in Postgres.
        failures: Flushes that ended in an error.
        dead_letters: Records that Postgres refused for what they are.
        flushed_at: When the last batch was done, as a Unix timestamp; 0 before the first.
        progress_at: When anything was last done, if only that nothing was found, on the monotonic clock.
    """

    checkpoints: int = 0
    blobs: int = 0
    writes: int = 0
    batches: Histogram = field(default_factory=lambda: Histogram(BATCH_BOUNDS))
    lags: Histogram = field(default_factory=lambda: Histogram(LAG_BOUNDS))
    failures: int = 0
    dead_letters: int = 0
    flushed_at: float = 0.0
    progress_at: float = 0.0

    @classmethod
    def of_all(cls, each: Sequence[FlushTotals]) -> FlushTotals:
        """Return what several sessions have flushed together."""
        found = cls(
            checkpoints=sum(one.checkpoints for one in each),
            blobs=sum(one.blobs for one in each),
            writes=sum(one.writes for one in each),
            failures=sum(one.failures for one in each),
            dead_letters=sum(one.dead_letters for one in each),
            flushed_at=max((one.flushed_at for one in each), default=0.0),
            progress_at=max((one.progress_at for one in each), default=0.0),
        )
        for one in each:
            found.batches.join(one.batches)
            found.lags.join(one.lags)
        return found

    def add(self, written: Sequence[Batch], seconds: float, lags: Sequence[float]) -> bool:
        """Add what one transaction has brought to Postgres, once it is acknowledged; returns whether it was anything.

        Args:
            written: The records.
            seconds: How long that took.
            lags: For how many seconds the oldest record of each thread that is now flushed had waited.
        """
        self.progress_at = time.monotonic()
        for lag in lags:
            self.lags.add(lag)
        if not any(any(batch.counts) for batch in written):
            return False
        for batch in written:
            checkpoints, blobs, writes = batch.counts
            self.checkpoints += checkpoints
            self.blobs += blobs
            self.writes += writes
        self.batches.add(seconds)
        self.flushed_at = time.time()
        return True
