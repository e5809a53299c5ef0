"""What a flush says about itself, and what all flushes of a session add up to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
        batches: Committed transactions that brought something.
        seconds: How long those took in all, from waiting for the lock to the acknowledgement in Redis.
        failures: Flushes that ended in an error.
        flushed_at: When the last batch was done, as a Unix timestamp; 0 before the first.
        progress_at: When anything was last done, if only that nothing was found, on the monotonic clock.
    """

    checkpoints: int = 0
    blobs: int = 0
    writes: int = 0
    batches: int = 0
    seconds: float = 0.0
    failures: int = 0
    flushed_at: float = 0.0
    progress_at: float = 0.0

    def add(self, written: Sequence[Batch], seconds: float) -> None:
        """Add what one transaction has brought to Postgres, once it is acknowledged."""
        self.progress_at = time.monotonic()
        if not any(any(batch.counts) for batch in written):
            return
        for batch in written:
            checkpoints, blobs, writes = batch.counts
            self.checkpoints += checkpoints
            self.blobs += blobs
            self.writes += writes
        self.batches += 1
        self.seconds += seconds
        self.flushed_at = time.time()
